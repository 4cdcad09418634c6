"""Servers that go away, come back with another configuration, or end the connection for good."""

from __future__ import annotations

import asyncio
import gc
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from nats.aio.client import Client
from tests.jetstream.appends import append, line, pending, read
from tests.jetstream.servers import Servers

from eventfold import Event, EventfoldError, EventLog, UnknownOutcomeError, View
from eventfold.jetstream import JetStream
from eventfold.jetstream._committer import StreamCommitter
from eventfold.jetstream._connection import Connection


async def _open(servers: Servers, **options: Any) -> StreamCommitter:
    options = {"timeout": 5, "attempt_timeout": 0.3} | options
    return await JetStream(servers.addresses, "log", **options).open_committer()


async def _restart(servers: Servers, **configuration: Any) -> None:
    servers.all[0].configure(**configuration)
    await asyncio.to_thread(servers.all[0].restart)


async def test_an_attempt_that_could_not_be_sent_before_an_outage_is_not_sent_after_it(
    own_servers: Callable[[], Servers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then, the servers may have forgotten an earlier attempt, and the events would be in the log twice."""
    monkeypatch.setattr("eventfold.jetstream._configuration.DUPLICATE_WINDOW", 200_000_000)
    servers, original, lost = own_servers(), Client.request, []
    committer = await _open(servers, timeout=1)

    async def lose_first(self: Client, subject: str, *arguments: Any, **options: Any) -> Any:
        answer = await original(self, subject, *arguments, **options)
        if subject.startswith("eventfold.") and not lost:
            lost.append(answer)
            servers.kill()
            raise TimeoutError
        return answer

    monkeypatch.setattr(Client, "request", lose_first)
    with pytest.raises(UnknownOutcomeError):
        await append(committer, 1)
    await asyncio.to_thread(servers.start)
    await append(committer, 2)

    assert await read(committer.source) == line(1) + line(2)
    await committer.aclose()


async def test_an_attempt_that_had_to_wait_for_a_new_connection_is_not_sent_late(
    own_servers: Callable[[], Servers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connecting has a time-out of its own, which may end after the servers have forgotten an earlier attempt."""
    monkeypatch.setattr("eventfold.jetstream._configuration.DUPLICATE_WINDOW", 200_000_000)
    committer = await _open(own_servers(), timeout=1)
    request, client, lost = Client.request, Connection.client, []

    async def lose_first(self: Client, subject: str, *arguments: Any, **options: Any) -> Any:
        answer = await request(self, subject, *arguments, **options)
        if subject.startswith("eventfold.") and not lost:
            lost.append(answer)
            raise TimeoutError
        return answer

    async def connect_slowly(self: Connection) -> Client:
        if len(lost) == 1:
            lost.append(None)
            await asyncio.sleep(1.5)
        return await client(self)

    monkeypatch.setattr(Client, "request", lose_first)
    monkeypatch.setattr(Connection, "client", connect_slowly)
    with pytest.raises(UnknownOutcomeError):
        await append(committer, 1)

    assert await read(committer.source) == line(1)
    await committer.aclose()


async def test_an_append_that_was_never_sent_was_not_written(own_servers: Callable[[], Servers]) -> None:
    """The outcome is certain, so the error is not `UnknownOutcomeError`."""
    servers = own_servers()
    committer = await _open(servers, timeout=0.5)
    await append(committer, 1)
    servers.kill()
    client = await committer.source.connection.client()
    while client.is_connected:
        await asyncio.sleep(0.01)

    with pytest.raises(OSError, match="no connection"):
        await append(committer, 2)

    await asyncio.to_thread(servers.start)
    await append(committer, 3)
    assert await read(committer.source) == line(1) + line(3)
    await committer.aclose()


async def test_a_connection_that_the_server_ends_for_good_is_replaced(own_servers: Callable[[], Servers]) -> None:
    """The client library never reconnects after certain errors of the server."""
    async with EventLog.open(JetStream(own_servers().addresses, "log", attempt_timeout=0.3)) as log:
        tail = log.tail(0)
        await log.append(Event("counted", {"n": 1}))
        assert (await anext(tail)).event.data["n"] == 1
        waiting = asyncio.ensure_future(anext(tail))
        client = await log.reader()._source.connection.client()  # type: ignore[attr-defined]
        client._transport.write(b"NONSENSE\r\n")
        while not client.is_closed:
            await asyncio.sleep(0.01)

        await log.append(Event("counted", {"n": 2}))
        assert (await asyncio.wait_for(waiting, 10)).event.data["n"] == 2


async def test_a_first_append_without_a_connection_is_not_called_too_large(own_servers: Callable[[], Servers]) -> None:
    """The maximum size is known from the connection that ended."""
    servers = own_servers()
    committer = await _open(servers, timeout=1)
    client = await committer.source.connection.client()
    client._transport.write(b"NONSENSE\r\n")
    while not client.is_closed:
        await asyncio.sleep(0.01)
    servers.kill()
    with pytest.raises(OSError, match="no server has answered"):
        await committer.source.head()

    with pytest.raises(OSError, match="no server has answered"):
        await append(committer, 1)
    await committer.aclose()


async def test_servers_with_a_smaller_max_payload_get_smaller_messages(
    own_servers: Callable[[], Servers],
) -> None:
    servers = own_servers()
    async with EventLog.open(JetStream(servers.addresses, "log", attempt_timeout=0.3)) as log:
        large = Event("large", {"text": "x" * 4_000_000})
        await log.append(large)
        await _restart(servers, max_payload="1MB")
        await log.append(Event("small", {}))

        with pytest.raises(OSError, match="bytes"):
            await log.append(large)
        await asyncio.gather(*(log.append(Event("part", {"text": "x" * 300_000})) for _ in range(10)))

        found = [record.event.type async for record in log.read_full()]
    assert found == ["large", "small", *["part"] * 10]


async def test_servers_without_jetstream_are_waited_for(own_servers: Callable[[], Servers]) -> None:
    servers = own_servers()
    committer = await _open(servers, timeout=1)
    await append(committer, 1)
    await _restart(servers, jetstream=False)

    with pytest.raises((UnknownOutcomeError, OSError)):
        await append(committer, 2)
    with pytest.raises(OSError, match="no answer"):
        await committer.source.head()

    await _restart(servers)
    await append(committer, 3)
    assert line(3) in await read(committer.source)
    await committer.aclose()


async def test_servers_that_refuse_connections_are_waited_for(own_servers: Callable[[], Servers]) -> None:
    servers = own_servers()
    committer = await _open(servers, timeout=1)
    await append(committer, 1)
    servers.all[0].configure("authorization { user: ann, password: secret }")
    await asyncio.to_thread(servers.all[0].restart)

    with pytest.raises(OSError, match="Authorization Violation"):
        await committer.source.head()

    await _restart(servers)
    await append(committer, 2)
    assert await read(committer.source) == line(1) + line(2)
    await committer.aclose()
    gc.collect()  # Development mode reports sockets that were left open.


async def test_servers_whose_messages_are_too_small_are_refused_when_they_are_back(
    own_servers: Callable[[], Servers],
) -> None:
    servers = own_servers()
    async with EventLog.open(JetStream(servers.addresses, "log", attempt_timeout=0.3)) as log:
        waiting = asyncio.ensure_future(anext(log.tail()))
        await asyncio.sleep(0.1)
        await _restart(servers, max_payload="32KB")

        with pytest.raises(EventfoldError, match="max_payload is 32768 bytes"):
            await asyncio.wait_for(waiting, 10)
        with pytest.raises(EventfoldError, match="max_payload is 32768 bytes"):
            await log.append(Event("small", {}))


async def test_closing_does_not_wait_for_servers_that_have_stopped(own_servers: Callable[[], Servers]) -> None:
    servers = own_servers()
    committer = await _open(servers)
    servers.all[0].signal(signal.SIGSTOP)
    waiting = asyncio.ensure_future(committer.source.head())
    sent = [asyncio.ensure_future(committer.commit([pending(n, size=2**22)])) for n in range(2)]
    await asyncio.sleep(0.2)

    await asyncio.wait_for(committer.aclose(), 5)

    await asyncio.gather(waiting, *sent, return_exceptions=True)


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_closing_a_log_waits_for_unavailable_servers_only_once(
    own_servers: Callable[[], Servers], how: str
) -> None:
    """Queued appends and the snapshots share one `timeout`."""
    servers = own_servers()
    views = [View(f"view{n}", lambda state, event: state + 1, 0) for n in range(5)]
    engine = JetStream(servers.addresses, "log", timeout=2, attempt_timeout=0.5)
    log = await EventLog.open(engine, views=views)
    await log.append(Event("counted", {"n": 1}))
    await log.refresh_all()
    servers.all[0].signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    large = Event("large", {"text": "x" * 3_000_000})  # Two of these don't fit into a message.
    appending = [asyncio.ensure_future(log.append(large)) for _ in range(6)]
    tailing = asyncio.ensure_future(anext(log.tail()))
    await asyncio.sleep(0.1)

    began = time.monotonic()
    await asyncio.wait_for(log.aclose(), 30)

    assert time.monotonic() - began < 6  # one time-out, one attempt that was under way, and closing the connection
    outcomes = await asyncio.gather(*appending, tailing, return_exceptions=True)
    assert all(isinstance(outcome, OSError | UnknownOutcomeError) for outcome in outcomes[:6])


async def test_closing_a_log_does_not_shorten_the_waits_of_another(
    own_servers: Callable[[], Servers],
) -> None:
    """The two logs use the same connection."""
    servers = own_servers()
    engine = JetStream(servers.addresses, "log", timeout=3, attempt_timeout=0.3)
    async with EventLog.open(engine) as log:
        async with EventLog.open(engine) as other:
            await other.append(Event("counted", {"n": 1}))
        await asyncio.sleep(3)
        servers.kill()
        appending = asyncio.ensure_future(log.append(Event("counted", {"n": 2})))
        await asyncio.sleep(1)
        await asyncio.to_thread(servers.start)

        await appending


async def test_a_connection_of_the_application_stays_open(server: Servers) -> None:
    client = Client()
    await client.connect(server.addresses)
    async with EventLog.open(JetStream(client, "own_connection")) as log:
        await log.append(Event("counted", {"n": 1}))
        assert (await anext(log.tail(0))).event.data["n"] == 1

    assert client.is_connected
    await client.close()
    with pytest.raises(EventfoldError, match="is closed: close it after the log"):
        await EventLog.open(JetStream(client, "own_connection"))


def test_an_append_survives_the_end_of_asyncio_run(server: Servers) -> None:
    """At its end, `asyncio.run` cancels all tasks, including those of the client library."""
    engine = JetStream(server.addresses, "end_of_run", attempt_timeout=0.3)

    async def append_at_the_end(log: EventLog) -> None:
        try:
            await asyncio.sleep(100)
        finally:
            await log.append(Event("counted", {"n": 2}))
            await log.aclose()

    async def main() -> None:
        log = await EventLog.open(engine)
        await log.append(Event("counted", {"n": 1}))
        task = asyncio.create_task(append_at_the_end(log))
        await asyncio.sleep(0)
        assert not task.done()

    async def numbers() -> list[int]:
        async with EventLog.open(engine) as log:
            return [record.event.data["n"] async for record in log.read_full()]

    asyncio.run(main())
    assert asyncio.run(numbers()) == [1, 2]
