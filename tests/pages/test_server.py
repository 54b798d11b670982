"""The server of pages: it answers to its own address, where a request reads, and what that names is never a path."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.extracting import run
from support.tiny import photos

from featstore import FeatureStore, ImageSet
from featstore.errors import FeatureStoreError
from featstore.pages.server import HOST, Viewing, application, guarded
from featstore.pages.store_pages import StorePages

testclient: Any = pytest.importorskip("starlette.testclient", reason="starlette isn't installed, or httpx, to test it")
for library in ("plotly", "uvicorn"):
    pytest.importorskip(library, reason=f"{library} isn't installed")

if TYPE_CHECKING:
    from starlette.testclient import TestClient

PORT, ROOT = 4321, "/secret"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return ImageSet.from_folder(photos(tmp_path_factory.mktemp("server") / "photos", 6)).split(0.3)


@pytest.fixture(scope="module")
def store(images: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    store = FeatureStore(tmp_path_factory.mktemp("store") / "feats")
    run(images, store)
    return store


@pytest.fixture(scope="module")
def client(store: FeatureStore, images: ImageSet) -> TestClient:
    app = guarded(application(StorePages(store, images, root=ROOT), ROOT), PORT)
    client: TestClient = testclient.TestClient(app, base_url=f"http://{HOST}:{PORT}")
    return client


def addresses(store: FeatureStore) -> list[str]:
    key = store.sets()[0].key
    return ["/", "/images/0", "/images/0?split=valid&label=0", f"/sets/{key}/0", "/thumbnails/0/3", f"/near/{key}/0/3"]


def test_every_page_answers_and_forbids_what_it_does_not_need(client: TestClient, store: FeatureStore) -> None:
    for address in [*addresses(store), "/assets/page.js", "/assets/page.css", "/assets/plotly.js"]:
        answer = client.get(ROOT + address)
        assert answer.status_code == 200, address
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; ")
        assert "unsafe-eval" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in answer.headers
    assert client.get(ROOT + "/thumbnails/0/3").headers["content-type"] == "image/jpeg"


def test_all_that_a_page_links_to_is_there(client: TestClient, store: FeatureStore) -> None:
    seen, left = set(), {f"{ROOT}/"}
    while left:
        address = left.pop()
        seen.add(address)
        answer = client.get(address)
        assert answer.status_code == 200, address
        if answer.headers["content-type"].startswith("text/html"):
            found = re.findall(r'(?:href|src)="(/[^"]*)"', answer.text)
            left |= {each.replace("&amp;", "&") for each in found} - seen
    assert len(seen) > 8


@pytest.mark.parametrize("host", ["evil.example", f"evil.example:{PORT}", HOST, f"{HOST}:1", "", f"localhost.:{PORT}"])
def test_another_name_that_leads_here_is_refused(client: TestClient, store: FeatureStore, host: str) -> None:
    for address in addresses(store):
        answer = client.get(ROOT + address, headers={"host": host})
        assert (answer.status_code, answer.text) == (421, "This server answers to its own address alone.\n")


def test_its_own_names_are_answered(client: TestClient) -> None:
    for host in (f"{HOST}:{PORT}", f"localhost:{PORT}"):
        assert client.get(f"{ROOT}/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"])
def test_what_does_more_than_read_is_refused(client: TestClient, store: FeatureStore, method: str) -> None:
    for address in addresses(store):
        answer = client.request(method, ROOT + address)
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


def test_head_has_no_body(client: TestClient) -> None:
    answer = client.head(f"{ROOT}/")
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("start", ["", "/", "/secre", "/secrets", "/SECRET"])
def test_without_the_secret_there_is_nothing(client: TestClient, store: FeatureStore, start: str) -> None:
    for address in addresses(store):
        assert client.get(start + address).status_code == 404


@pytest.mark.parametrize(
    "address",
    [
        "/images/1", "/images/-1", "/images/0?page=99", "/images/0?page=-1", "/images/0?label=x", "/images/0?split=x",
        "/sets/x/0", "/sets/..%2f..%2fetc/0", "/thumbnails/0/6", "/thumbnails/0/cat%2f000.jpg", "/thumbnails/0/-1",
        "/thumbnails/0/99999999999999999999", "/near/x/0/0", "/near/x/0/" + "9" * 5000, "/assets/page.py",
        "/assets/..%2fpage.py", "/assets/%2e%2e/page.py", "/assets//etc/passwd", "/..%2f..%2fetc/passwd",
    ],
)  # fmt: skip
def test_what_is_not_there_is_not_found(client: TestClient, address: str) -> None:
    answer = client.get(ROOT + address)
    assert answer.status_code == 404
    assert "etc" not in answer.text


def test_names_of_files_are_text_in_a_page(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 2)
    path = next(folder.rglob("*.jpg"))
    path.rename(path.with_name('"><img src=x onerror=alert(1)>.jpg'))
    images = ImageSet.from_folder(folder)
    store = FeatureStore(tmp_path / "feats")
    run(images, store)
    client = testclient.TestClient(application(StorePages(store, images, root=ROOT), ROOT))
    text = client.get(f"{ROOT}/images/0").text
    assert "<img" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;.jpg" in text


@pytest.fixture
def viewing(store: FeatureStore, images: ImageSet) -> Iterator[Viewing]:
    viewing = Viewing(store, images)
    thread = threading.Thread(target=viewing.run)
    thread.start()
    yield viewing
    viewing.end()
    thread.join(30)
    assert not thread.is_alive()


def test_a_server_answers_on_the_loopback_address_alone_and_ends(viewing: Viewing) -> None:
    connection = http.client.HTTPConnection(HOST, viewing.port, timeout=30)
    connection.request("GET", viewing.address.partition(str(viewing.port))[2])
    answer = connection.getresponse()
    assert (answer.status, b"Store " in answer.read()) == (200, True)
    assert answer.getheader("server") is None
    connection.close()
    assert viewing._socket.getsockname()[0] == "127.0.0.1"
    secret = viewing.address.split("/")[3]
    assert len(secret) >= 32


def test_each_server_has_a_secret_of_its_own_and_a_taken_port_is_said(store: FeatureStore) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"port {port} can't be had"):
            Viewing(store, port=port)
    one, other = Viewing(store), Viewing(store)
    assert one.address.split("/")[3] != other.address.split("/")[3]
    for each in (one, other):
        each._socket.close()


def test_where_starlette_is_missing_it_says_what_to_install(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(FeatureStoreError, match=r"pip install 'featstore\[view\]'"):
        Viewing(store)


def test_ctrl_c_ends_the_command_cleanly(store: FeatureStore) -> None:
    started = subprocess.Popen(
        [sys.executable, "-m", "featstore", "view", "--store", str(store.folder), "--no-browser"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert started.stdout is not None
        address = started.stdout.readline().strip()
        port = int(address.split("/")[2].partition(":")[2])
        connection = http.client.HTTPConnection(HOST, port, timeout=60)
        connection.request("GET", address.partition(str(port))[2])
        assert connection.getresponse().status == 200
        connection.close()
        started.send_signal(signal.SIGINT)
        _, said = started.communicate(timeout=60)
    finally:
        started.kill()
    assert (started.returncode, said.splitlines()) == (0, ["Ctrl-C ends it", "closed"])
