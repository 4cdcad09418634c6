"""A process that is slower than the servers: the client library drops messages without telling their readers."""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from typing import Any

import pytest
from nats.aio.client import Client
from tests.jetstream.appends import append, line, read
from tests.jetstream.servers import Servers

from eventfold import Event, EventLog
from eventfold.jetstream import JetStream
from eventfold.jetstream._committer import StreamCommitter


@pytest.fixture
def engine(server: Servers) -> JetStream:
    return JetStream(server.addresses, f"slow{uuid.uuid4().hex}", attempt_timeout=0.1)


@pytest.fixture
def dropping(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Makes the client library drop what does not fit into a queue of five messages; yields the log."""
    subscribe = Client.subscribe

    async def with_limit(self: Client, subject: str, **options: Any) -> Any:
        if not subject.endswith("*"):  # These queues hold the answers to requests.
            options["pending_msgs_limit"] = 5
        return await subscribe(self, subject, **options)

    monkeypatch.setattr(Client, "subscribe", with_limit)
    caplog.set_level(logging.INFO, "eventfold")
    return caplog


async def test_a_tail_gets_messages_that_the_client_library_dropped(
    engine: JetStream, dropping: pytest.LogCaptureFixture
) -> None:
    async def append_beside() -> None:
        async with EventLog.open(JetStream(engine._settings.servers, engine._settings.log)) as log:
            for n in range(60):
                await log.append(Event("counted", {"n": n}))

    async with EventLog.open(engine) as log:
        tail = log.tail(0)
        waiting = asyncio.ensure_future(anext(tail))
        await asyncio.sleep(0.2)
        other = threading.Thread(target=asyncio.run, args=(append_beside(),))
        other.start()
        other.join()  # This event loop stands still meanwhile, and then gets all messages at once.
        found = [(await waiting).event.data["n"]]
        async with asyncio.timeout(20):
            while len(found) < 60:
                found.append((await anext(tail)).event.data["n"])

    assert found == list(range(60))
    assert "SlowConsumerError" in dropping.text


async def test_nothing_is_dropped_without_a_limit(
    engine: JetStream, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was asked for limits what comes, not the library."""
    caplog.set_level(logging.INFO, "eventfold")
    subscribe = Client.subscribe

    async def with_default(self: Client, subject: str, **options: Any) -> Any:
        return await subscribe(self, subject, **{"pending_msgs_limit": 5, **options})

    monkeypatch.setattr(Client, "subscribe", with_default)
    committer = await engine.open_committer()
    for n in range(50):
        await append(committer, n)

    assert await read(committer.source) == b"".join(map(line, range(50)))
    assert "SlowConsumerError" not in caplog.text
    await committer.aclose()


async def test_a_read_gets_messages_that_the_client_library_dropped(
    committer: StreamCommitter, dropping: pytest.LogCaptureFixture
) -> None:
    for n in range(20):
        await append(committer, n)

    assert await read(committer.source) == b"".join(map(line, range(20)))
    assert "SlowConsumerError" in dropping.text
