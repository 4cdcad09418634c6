"""Fixtures: a server that all tests share, a database of its own for each test, and servers that a test may harm."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator

import pytest

pytest.importorskip("asyncpg")

from tests.postgres.servers import Server, find_binaries

_numbers = itertools.count()


def _new_server() -> Server:
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("needs PostgreSQL's initdb and postgres: apt-get install postgresql")
    server = Server(binaries)
    try:
        server.create()
        server.start()
    except BaseException:
        server.remove()
        raise
    return server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One server, left running."""
    server = _new_server()
    yield server
    server.remove()


@pytest.fixture(scope="module")
def own_server() -> Iterator[Server]:
    """A server that the tests of a module may kill; each leaves it running."""
    server = _new_server()
    yield server
    server.remove()


@pytest.fixture
async def database(server: Server) -> AsyncIterator[str]:
    """The address of an empty database."""
    name = f"test{next(_numbers)}"
    await server.execute(f"CREATE DATABASE {name}")
    yield server.address(name)
    await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
