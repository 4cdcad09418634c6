"""Consumers with one name: one process at a time reads, another takes over when it is gone, and no commit is undone."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from nats.aio.client import Client
from tests.jetstream.servers import Servers

from eventfold import Event, EventfoldError, EventLog, Record
from eventfold.jetstream import JetStream
from eventfold.jetstream._committer import StreamCommitter
from eventfold.jetstream._documents import KeyValueDocuments
from eventfold.jetstream._locks import Lock
from eventfold.jetstream._monitor import StreamMonitor

PROGRAM = Path(__file__).with_name("consuming_worker.py")


class Reader:
    """A process that reads and commits under the name `mailer`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def line(self) -> str:
        """Returns the next number that it has committed, or why it has ended."""
        assert self._process.stdout is not None
        return (await asyncio.wait_for(self._process.stdout.readline(), 30)).decode().strip()

    def signal(self, number: int) -> None:
        if self._process.returncode is None:
            os.kill(self._process.pid, number)

    async def end(self) -> None:
        """Makes it close the log and end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()

    async def kill(self) -> None:
        self.signal(signal.SIGKILL)
        await self._process.wait()


@pytest.fixture
async def start_reader(server: Servers) -> AsyncIterator[Callable[[str], asyncio.Future[Reader]]]:
    """Starts such a process on a log."""
    started = []

    async def start(log: str) -> Reader:
        process = await asyncio.create_subprocess_exec(
            sys.executable, PROGRAM, server.addresses[0], log, stdin=-1, stdout=-1
        )
        started.append(Reader(process))
        return started[-1]

    yield lambda log: asyncio.ensure_future(start(log))
    for reader in started:
        await reader.kill()


async def test_a_waiting_consumer_takes_over_when_the_other_process_is_killed(
    server: Servers, start_reader: Callable[[str], asyncio.Future[Reader]]
) -> None:
    async with EventLog.open(JetStream(server.addresses, "killed")) as log:
        await log.append(Event("counted", {"n": 0}))
        reader = await start_reader("killed")
        assert await reader.line() == "0"
        waiting = asyncio.ensure_future(anext(log.consumer("mailer")))
        await asyncio.sleep(1)
        await log.append(Event("counted", {"n": 1}))
        assert await reader.line() == "1"
        assert not waiting.done()

        await reader.kill()
        await log.append(Event("counted", {"n": 2}))

        assert (await asyncio.wait_for(waiting, 20)).event.data["n"] == 2


async def test_a_consumer_takes_over_at_once_when_the_other_process_has_closed_its_log(
    server: Servers, start_reader: Callable[[str], asyncio.Future[Reader]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventfold.jetstream._locks.ABSENT_FOR", 1000)
    async with EventLog.open(JetStream(server.addresses, "closed")) as log:
        await log.append(Event("counted", {"n": 0}))
        reader = await start_reader("closed")
        assert await reader.line() == "0"
        waiting = asyncio.ensure_future(anext(log.consumer("mailer")))
        await asyncio.sleep(0.5)

        await reader.end()
        await log.append(Event("counted", {"n": 1}))

        assert (await asyncio.wait_for(waiting, 20)).event.data["n"] == 1


async def test_a_process_that_was_suspended_too_long_cannot_commit_any_more(
    server: Servers, start_reader: Callable[[str], asyncio.Future[Reader]]
) -> None:
    """When it resumes, its commits are refused, since the other process may be far ahead."""
    engine = JetStream(server.addresses, "stopped", timeout=2, attempt_timeout=0.5)
    async with EventLog.open(engine) as log:
        await log.append(Event("counted", {"n": 0}))
        reader = await start_reader("stopped")
        assert await reader.line() == "0"
        reader.signal(signal.SIGSTOP)
        consumer = log.consumer("mailer")
        waiting = asyncio.ensure_future(anext(consumer))
        await log.append_many([Event("counted", {"n": n}) for n in (1, 2)])
        await consumer.commit(await asyncio.wait_for(waiting, 20))

        reader.signal(signal.SIGCONT)

        while (line := await reader.line()) == "1":
            pass  # It had this one in progress, and the other process has committed it as well.
        assert "another process" in line
        assert (await anext(consumer)).event.data["n"] == 2


async def test_of_many_processes_that_want_a_name_at_once_one_gets_it(server: Servers) -> None:
    committers = [await JetStream(server.addresses, "wanted", timeout=5 + n / 10).open_committer() for n in range(5)]

    locks = await asyncio.gather(*(committer.source.documents.lock("consumer", "c") for committer in committers))

    assert len([lock for lock in locks if lock is not None]) == 1
    for committer in committers:
        await committer.aclose()


@pytest.fixture
async def committers(server: Servers, engine: JetStream) -> AsyncIterator[list[StreamCommitter]]:
    """A log that is open twice, as in two processes."""
    other = JetStream(server.addresses, engine._settings.log, timeout=6)
    opened = [await engine.open_committer(), await other.open_committer()]
    yield opened
    for committer in opened:
        await committer.aclose()


async def taken_over(held: Lock, documents: KeyValueDocuments) -> Lock:
    """Another process's lock, which takes the name over when the holder no longer answers."""
    await held._responder.stop()
    while not isinstance(taken := await documents.lock("consumer", "c"), Lock):
        pass
    return taken


async def test_a_process_that_lost_its_name_can_store_nothing(
    committers: list[StreamCommitter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old holder was only cut off, and continues."""
    monkeypatch.setattr("eventfold.jetstream._locks.ABSENT_FOR", 0.2)
    first, second = (committer.source.documents for committer in committers)
    held = await first.lock("consumer", "c")
    assert isinstance(held, Lock)
    await first.store("consumer", "c", b"1")
    taken = await taken_over(held, second)
    await second.store("consumer", "c", b"2")

    with pytest.raises(EventfoldError, match="another process"):
        await first.store("consumer", "c", b"3")
    assert held.lost
    held.release()
    assert await first.load("consumer", "c") == b"2"
    assert await first.lock("consumer", "c") is None
    taken.release()


async def test_a_process_that_lost_its_name_notices_at_the_next_check_of_the_stream(
    committers: list[StreamCommitter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventfold.jetstream._locks.ABSENT_FOR", 0.2)
    first, second = (committer.source.documents for committer in committers)
    held = await first.lock("consumer", "c")
    assert isinstance(held, Lock)
    taken = await taken_over(held, second)

    committers[0].source.connection.monitor.check_soon()
    async with asyncio.timeout(5):
        while not held.lost:
            await asyncio.sleep(0.01)
    assert not taken.lost


async def test_a_name_that_was_released_is_free(committers: list[StreamCommitter]) -> None:
    """Tested repeatedly, and without any commit."""
    first, second = (committer.source.documents for committer in committers)
    for documents in (first, first, second, first):
        held = await asyncio.wait_for(documents.lock("consumer", "c"), 2)
        assert held is not None
        held.release()
        await documents.aclose()  # Waits until that is known.


async def test_a_lock_without_a_reference_is_released(committers: list[StreamCommitter]) -> None:
    first, second = (committer.source.documents for committer in committers)
    held = await first.lock("consumer", "c")
    assert held is not None
    assert await second.lock("consumer", "c") is None

    del held

    await first.aclose()
    assert await second.lock("consumer", "c") is not None


async def test_a_held_name_without_a_commit_has_no_document(committers: list[StreamCommitter]) -> None:
    first, second = (committer.source.documents for committer in committers)
    held = await first.lock("consumer", "c")

    assert (await second.load("consumer", "c"), await second.names("consumer")) == (None, [])
    await second.store("consumer", "c", b"1")
    assert (await first.load("consumer", "c"), await first.names("consumer")) == (b"1", ["c"])
    await second.delete("consumer", "c")
    assert (await first.load("consumer", "c"), await first.names("consumer")) == (None, [])
    assert held is not None
    assert await second.lock("consumer", "c") is None


async def test_a_name_stays_held_if_the_check_of_a_new_connection_fails(
    own_servers: Callable[[], Servers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check is repeated before others take the name over."""
    check = StreamMonitor.check
    failed = 0

    async def failing_once(self: StreamMonitor, client: Client, *, create: bool) -> None:
        nonlocal failed
        if self is connection.monitor and not create and not failed:
            failed += 1
            raise OSError(errno.ETIMEDOUT, "no answer")
        await check(self, client, create=create)

    servers = own_servers()
    committers = [await JetStream(servers.addresses, "log").open_committer() for _ in range(2)]
    first, second = (committer.source.documents for committer in committers)
    held = await first.lock("consumer", "c")
    assert isinstance(held, Lock)
    connection = committers[0].source.connection
    monkeypatch.setattr(StreamMonitor, "check", failing_once)
    client = await connection.client()
    client._transport.write(b"NONSENSE\r\n")
    while not client.is_closed:
        await asyncio.sleep(0.01)
    await first.store("consumer", "c", b"1")

    for _ in range(15):
        assert await second.lock("consumer", "c") is None
    assert held.is_held
    assert failed == 1
    for committer in committers:
        await committer.aclose()


async def test_closing_the_log_ends_a_consumer_that_waits_for_another_process(
    server: Servers, start_reader: Callable[[str], asyncio.Future[Reader]]
) -> None:
    log = await EventLog.open(JetStream(server.addresses, "waiting"))
    await log.append(Event("counted", {"n": 0}))
    reader = await start_reader("waiting")
    assert await reader.line() == "0"

    async def consume_all() -> list[Record]:
        return [record async for record in log.consumer("mailer")]

    consuming = asyncio.ensure_future(consume_all())
    await asyncio.sleep(0.2)
    await log.aclose()

    assert await asyncio.wait_for(consuming, 5) == []


async def test_a_name_stays_held_while_its_server_is_restarted_and_its_connection_replaced(
    own_servers: Callable[[], Servers],
) -> None:
    servers = own_servers()
    engines = [JetStream(servers.addresses, "log", attempt_timeout=n) for n in (0.3, 0.4)]
    committers = [await engine.open_committer() for engine in engines]
    first, second = (committer.source.documents for committer in committers)
    held = await first.lock("consumer", "c")
    assert isinstance(held, Lock)
    await asyncio.to_thread(servers.all[0].restart)
    await first.store("consumer", "c", b"1")
    client = await committers[0].source.connection.client()
    client._transport.write(b"NONSENSE\r\n")
    while not client.is_closed:
        await asyncio.sleep(0.01)
    await first.store("consumer", "c", b"2")

    for _ in range(15):  # longer than others wait for a process that is gone
        assert await second.lock("consumer", "c") is None
    assert held.is_held
    for committer in committers:
        await committer.aclose()
