"""The engines that must pass: for each, a factory that returns a new log. New engines need a factory in `ENGINES`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from eventfold import LockMode
from eventfold._address import Address
from eventfold._files.engine import Files

_numbers = itertools.count()
# The argument of `EventLog.open`: a log that does not exist yet.
Factory: TypeAlias = Callable[[pytest.FixtureRequest], Address]


def files(request: pytest.FixtureRequest) -> Address:
    """A directory."""
    path: Path = request.getfixturevalue("tmp_path")
    return path / f"log{next(_numbers)}"


def files_shared(request: pytest.FixtureRequest) -> Address:
    """A directory that several writers share."""
    path: Path = request.getfixturevalue("tmp_path")
    return Files(path / f"log{next(_numbers)}", lock=LockMode.SHARED)


def postgres(request: pytest.FixtureRequest) -> Address:
    """A log in a database that all tests of the session share."""
    server = request.getfixturevalue("postgres_server")
    from eventfold.postgres import Postgres

    return Postgres(server.address(), f"conformance{next(_numbers)}")


def jetstream(request: pytest.FixtureRequest) -> Address:
    """A log on a server that all tests of the session share."""
    server = request.getfixturevalue("nats_server")
    from eventfold.jetstream import JetStream

    return JetStream(server.addresses, f"conformance{next(_numbers)}", timeout=10)


def jetstream_cluster(request: pytest.FixtureRequest) -> Address:
    """A log on three servers, with a replica on each."""
    servers = request.getfixturevalue("nats_cluster")
    from eventfold.jetstream import JetStream

    return JetStream(servers.addresses, f"conformance{next(_numbers)}", replicas=3)


ENGINES: dict[str, Factory] = {
    "files": files,
    "files_shared": files_shared,
    "postgres": postgres,
    "jetstream": jetstream,
}
# Engines on which several writers can append at once.
SHARED = {"files_shared", "jetstream", "postgres"}
# Engines whose index is a separate file.
KEEPS_NO_INDEX = {"jetstream", "jetstream_cluster"}
if os.environ.get("EVENTFOLD_NATS") == "all":
    ENGINES["jetstream_cluster"] = jetstream_cluster
    SHARED.add("jetstream_cluster")


@pytest.fixture(params=ENGINES)
def where(request: pytest.FixtureRequest) -> Address:
    """A log that does not exist yet, on each engine."""
    return ENGINES[request.param](request)


@pytest.fixture
def index(request: pytest.FixtureRequest, tmp_path: Path) -> bool | Path:
    """The `index` argument of `EventLog.open`: a file, unless the engine keeps the index itself."""
    names = {str(value) for value in request.node.callspec.params.values()}
    return tmp_path / "index.sqlite" if names & KEEPS_NO_INDEX else True


@pytest.fixture(params=sorted(SHARED))
def shared(request: pytest.FixtureRequest) -> Address:
    """A log that does not exist yet, on each engine to which several writers can append at once."""
    return ENGINES[request.param](request)
