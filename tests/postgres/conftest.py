"""Fixtures: a server that all tests share, a new database for each test, and servers that a test may harm."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator

import pytest

pytest.importorskip("asyncpg")

from tests.postgres.servers import Server, running_server

_numbers = itertools.count()


@pytest.fixture
def server(postgres_server: Server) -> Server:
    """The server that all tests share; no test may harm it."""
    return postgres_server


@pytest.fixture(scope="module")
def own_server() -> Iterator[Server]:
    """A server that the tests of a module may kill; each test leaves it running."""
    with running_server() as server:
        yield server


@pytest.fixture
async def database(server: Server) -> AsyncIterator[str]:
    """The address of an empty database."""
    name = f"test{next(_numbers)}"
    await server.execute(f"CREATE DATABASE {name}")
    yield server.address(name)
    await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
