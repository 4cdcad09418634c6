"""A cancellation has its effect although the client library swallows cancellations.

The library loses one that comes together with the answer (up to Python 3.11), and any that comes while it is flushing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import anyio
import pytest
from nats.aio.client import Client
from tests.jetstream.appends import append, read

from eventfold.jetstream import JetStream
from eventfold.jetstream._committer import StreamCommitter


def _losing(method: Any, begun: asyncio.Event) -> Any:
    """Replaces a method of the client library: it ignores a cancellation, and reports first that it was called."""

    async def call(self: Client, *args: Any, **kwargs: Any) -> Any:
        result = asyncio.ensure_future(method(self, *args, **kwargs))
        begun.set()
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            pass
        return await result

    return call


async def _read_all(committer: StreamCommitter) -> None:
    await read(committer.source)


async def _ask_for_the_head(committer: StreamCommitter) -> None:
    await committer.source.head()


async def _load_a_document(committer: StreamCommitter) -> None:
    await committer.source.documents.load("view", "v")


async def _connect(committer: StreamCommitter) -> None:
    settings = committer.source.connection.settings
    other = await JetStream(settings.servers, settings.log, timeout=6).open_committer()
    await other.aclose()


@pytest.fixture(
    params=[
        ("request", _ask_for_the_head),
        ("request", _load_a_document),
        ("subscribe", _read_all),
        ("publish", _read_all),
        ("connect", _connect),
        ("request", _connect),
    ],
    ids=lambda value: f"{value[0]}-{value[1].__name__.strip('_')}",
)
async def begun(
    request: pytest.FixtureRequest, committer: StreamCommitter, monkeypatch: pytest.MonkeyPatch
) -> tuple[asyncio.Event, Coroutine[Any, Any, None]]:
    """Starts a call of a log, and reports when it has called the client library."""
    name, do = request.param
    await append(committer, 1)
    called = asyncio.Event()
    monkeypatch.setattr(Client, name, _losing(getattr(Client, name), called))
    return called, do(committer)


async def test_a_task_that_is_cancelled_ends(begun: tuple[asyncio.Event, Coroutine[Any, Any, None]]) -> None:
    called, work = begun
    task = asyncio.create_task(work)
    await called.wait()
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_scope_that_is_cancelled_ends(begun: tuple[asyncio.Event, Coroutine[Any, Any, None]]) -> None:
    called, work = begun
    finished = False

    async def run() -> None:
        nonlocal finished
        with anyio.CancelScope() as scope:
            cancelling.append(scope)
            await work
            finished = True
        assert scope.cancelled_caught

    cancelling: list[anyio.CancelScope] = []
    task = asyncio.create_task(run())
    await called.wait()
    cancelling[0].cancel()
    await task

    assert not finished


async def test_a_deadline_holds(begun: tuple[asyncio.Event, Coroutine[Any, Any, None]]) -> None:
    _, work = begun

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await work


async def test_an_append_that_is_cancelled_while_it_is_sent_is_written(
    committer: StreamCommitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the client library does, the append is never cut in two."""
    called = asyncio.Event()
    monkeypatch.setattr(Client, "request", _losing(Client.request, called))
    task = asyncio.create_task(append(committer, 1))
    await called.wait()
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await committer.source.head()).offset == 1 << 24
