"""A real S3 server on this machine, and a proxy before it that loses replies."""

from __future__ import annotations

import http.client
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote

from featstore.objects import ObjectPath, put

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}
"""What a client of either needs beside its address, ``AWS_ENDPOINT_URL``."""


@contextmanager
def served() -> Iterator[int]:
    """A server, at this port."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells of each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()[1]
    finally:
        server.stop()


def make_bucket(port: int, name: str) -> None:
    client = http.client.HTTPConnection("127.0.0.1", port)
    client.request("PUT", f"/{name}")
    assert client.getresponse().status == 200
    client.close()


def put_called(port: int, address: str, content: bytes) -> None:
    """Makes an object of a name that featstore would give to none."""
    client = http.client.HTTPConnection("127.0.0.1", port)
    client.request("PUT", "/" + quote(address.removeprefix("s3://")), content)
    assert client.getresponse().status == 200
    client.close()


@dataclass
class Proxy:
    """What a proxy has been asked, and what it does with answers.

    Attributes:
        port: of it.
        requests: method and path of each, in their order.
        losing: method -> how many answers to it are lost from now on: the server has done what it was asked.
        after: is called with method and path when the server has done what it was asked, before it is answered.
    """

    port: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)
    losing: dict[str, int] = field(default_factory=dict)
    after: Callable[[str, str], None] | None = None

    def count(self, method: str) -> int:
        return sum(each == method for each, _ in self.requests)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # who asked may be gone
            super().handle_error(request, client_address)


@contextmanager
def proxied(port: int) -> Iterator[Proxy]:
    """A proxy before the server at `port`."""
    proxy = Proxy()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            proxy.requests.append((self.command, self.path))
            upstream = http.client.HTTPConnection("127.0.0.1", port)
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            content = answer.read()
            upstream.close()
            if proxy.after is not None:
                proxy.after(self.command, self.path)
            if proxy.losing.get(self.command, 0):
                proxy.losing[self.command] -= 1
                self.close_connection = True
                return
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = forward  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = _Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.port = server.server_address[1]
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()


def upload(folder: Path, place: ObjectPath) -> None:
    """Makes an object of each file in a folder, named as the file below it."""
    for path in folder.rglob("*"):
        if path.is_file():
            put(place / path.relative_to(folder), path.read_bytes())
