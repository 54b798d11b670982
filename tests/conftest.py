"""What tests of every room start from. One thread, unless the caller says otherwise; no `cuda` test without a GPU."""

from __future__ import annotations

import gc
import os
import secrets
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# The networks are small, and where other work shares the cores torch's threads wait for one another. Measured on 2 busy
# cores: the tests of equivalence 51 s with one, over 250 s with two. Processes share the work better: all tests took
# 13.7 min in one, 7.8 in two. Before torch, which reads it once; processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What code this user trusts is remembered there: tests neither read nor write the real one.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="featstore-state-")

import torch
from support.processes import Processes

if TYPE_CHECKING:  # else each run of a single file would wait for all that the programs import
    from support.object_server import Proxy
    from support.programs import Run

    from featstore import FeatureStore


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Runs programs in a process of their own, of which all tests together wait once for what they import."""
    modules = ["featstore.cli.app", "training.cli.app", "training.learner", "torchvision", "sklearn.datasets"]
    with Processes(*modules, "torch._dynamo") as running:  # which torch imports itself for batch norm and to train
        yield running


@pytest.fixture(scope="session")
def new_processes() -> Iterator[Processes]:
    """Likewise for programs that show what is imported by them: nothing is before."""
    with Processes() as running:
        yield running


@pytest.fixture(scope="session")
def object_server() -> Iterator[int]:
    """The port of an S3 server on this machine."""
    pytest.importorskip("moto", reason="moto, the S3 server, isn't installed")
    from support.object_server import served

    with served() as port:
        yield port


@pytest.fixture
def proxy(object_server: int) -> Iterator[Proxy]:
    """Before that server."""
    from support.object_server import proxied

    with proxied(object_server) as proxy:
        yield proxy


@pytest.fixture
def bucket(object_server: int, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a new bucket in that server, which is asked through the proxy."""
    from support.object_server import ENVIRONMENT, make_bucket

    name = f"bucket-{secrets.token_hex(8)}"
    make_bucket(object_server, name)
    for variable, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}.items():
        monkeypatch.setenv(variable, value)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def compiler() -> None:
    """Of C++; a test that compiles a model is left out where there is none."""
    from featstore.models.compiled import check_compiler

    try:
        check_compiler(torch.device("cpu"))
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """One that nothing has been filed in."""
    from featstore import FeatureStore

    return FeatureStore(tmp_path / "features")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with photographs and a small backbone."""
    from support.programs import workplace

    return workplace(tmp_path, monkeypatch)


@pytest.fixture
def run(here: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs one of the programs in the directory `here`."""
    from support.programs import runner

    return runner(capsys)


@pytest.fixture
def heeds_signals() -> Iterator[None]:
    """Signals as a terminal gives them; a shell's background jobs ignore SIGINT, and those below `nohup` SIGHUP."""
    usual: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {each: signal.signal(each, handler) for each, handler in usual.items()}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """All that is imported stays, 800,000 objects: they aren't looked through for garbage meanwhile, nor in tests.

    Measured: the collection takes 8.7 s instead of 11.3, and tests 0.6 % of their time for garbage instead of 4.6.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000, 20, 20)
        gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else libraries that count what is left at the end find all of it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda") is not None:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))
