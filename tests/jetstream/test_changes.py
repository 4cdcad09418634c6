"""A stream that somebody deletes, replaces, empties or edits under a running program causes an error, never silence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from nats.js.errors import APIError
from tests.jetstream.servers import Servers

from eventfold import CorruptLogError, Event, EventfoldError, EventLog
from eventfold._waiters import Scope
from eventfold.jetstream import JetStream
from eventfold.jetstream._configuration import _REQUIRED, stream_configuration


@pytest.fixture
def name(engine: JetStream) -> str:
    return engine._settings.stream


@pytest.fixture
async def log(engine: JetStream, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EventLog]:
    """A log with three events, whose stream is checked often."""
    monkeypatch.setattr("eventfold.jetstream._monitor._CHECK_INTERVAL", 0.1)
    log = await EventLog.open(engine)
    for n in range(3):
        await log.append(Event("counted", {"n": n}))
    yield log
    await log.aclose()


async def _edit(client: Any, name: str, **changes: Any) -> None:
    before = (await client.stream_info(name)).config
    await client.update_stream(before.evolve(**changes))


async def _recreate(client: Any, name: str, messages: int) -> None:
    """Deletes the stream, and creates it again with other messages."""
    configuration = (await client.stream_info(name)).config
    await client.delete_stream(name)
    await client.add_stream(configuration)
    for _ in range(messages):
        await client.publish(f"eventfold.{name}", b'{"type":"other","data":{},"ts":1}\n')


async def _ends_with(error: str, waiting: Any) -> None:
    with pytest.raises(EventfoldError, match=error):
        await asyncio.wait_for(waiting, 30)


async def test_a_waiting_tail_raises_if_the_stream_is_deleted(log: EventLog, client: Any, name: str) -> None:
    waiting = asyncio.ensure_future(anext(log.tail()))
    await asyncio.sleep(0.2)
    await client.delete_stream(name)

    await _ends_with("the stream was deleted", waiting)


async def test_a_tail_that_starts_after_the_deletion_raises_too(log: EventLog, client: Any, name: str) -> None:
    """Tested while another tail is waiting, so that no new check begins."""
    waiters = await log.reader()._source.waiters()
    with waiters.watched(), waiters.waiter(Scope()) as later:
        waiting = asyncio.ensure_future(anext(log.tail()))
        await asyncio.sleep(0.2)
        await client.delete_stream(name)
        await _ends_with("the stream was deleted", waiting)

        await _ends_with("the stream was deleted", later.head_beyond(log.head.offset))


@pytest.mark.parametrize("messages", [0, 2, 20])
async def test_a_recreated_stream_is_not_accepted(log: EventLog, client: Any, name: str, messages: int) -> None:
    """The new stream may be shorter or longer than the old one."""
    waiting = asyncio.ensure_future(anext(log.tail()))
    await asyncio.sleep(0.2)
    await _recreate(client, name, messages)

    with pytest.raises(CorruptLogError, match="the stream was"):
        await asyncio.wait_for(waiting, 30)
    with pytest.raises(CorruptLogError, match="the stream was"):
        await asyncio.wait_for(log.append(Event("counted", {"n": 3})), 5)


async def test_an_append_to_a_stream_that_was_just_recreated_is_not_acknowledged(
    log: EventLog, client: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes even before the stream is checked again."""
    monkeypatch.setattr("eventfold.jetstream._monitor._CHECK_INTERVAL", 60)
    await asyncio.sleep(0.2)
    await _recreate(client, name, 0)

    with pytest.raises(CorruptLogError, match="was replaced"):
        await log.append(Event("counted", {"n": 3}))


@pytest.mark.parametrize("purge", [{}, {"keep": 1}, {"seq": 3}], ids=str)
async def test_a_stream_can_t_be_purged_under_a_running_program(
    log: EventLog, client: Any, name: str, purge: dict[str, int]
) -> None:
    """`deny_purge`, which is checked, can't be unset either; appends, tails and offsets continue as they were."""
    before = log.head
    waiting = asyncio.ensure_future(anext(log.tail()))
    await asyncio.sleep(0.2)
    with pytest.raises(APIError, match="purge not permitted"):
        await client.purge_stream(name, **purge)
    with pytest.raises(APIError, match="can not cancel deny purge"):
        await _edit(client, name, deny_purge=False)
    appended = await log.append(Event("counted", {"n": 3}))

    assert appended.start_offset == before.offset
    assert (await asyncio.wait_for(waiting, 30)).event.data["n"] == 3
    assert [record.event.data["n"] async for record in log.read_full()] == [0, 1, 2, 3]


@pytest.mark.parametrize("purge", [{}, {"keep": 1}, {"seq": 3}], ids=str)
async def test_a_stream_that_was_purged_all_the_same_is_not_used_any_more(
    engine: JetStream, client: Any, name: str, purge: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server might permit it in a later version: an append gets no offset a second time, and a read no gap."""
    monkeypatch.setattr("eventfold.jetstream._monitor._CHECK_INTERVAL", 0.1)
    monkeypatch.delitem(_REQUIRED, "deny_purge")
    monkeypatch.setattr(
        "eventfold.jetstream._monitor.stream_configuration",
        lambda *wanted: stream_configuration(*wanted) | {"deny_purge": False},
    )
    async with EventLog.open(engine) as log:
        for n in range(3):
            await log.append(Event("counted", {"n": n}))
        before = log.head
        waiting = asyncio.ensure_future(anext(log.tail()))
        await asyncio.sleep(0.2)
        await client.purge_stream(name, **purge)

        # It may come before the next check, or after it.
        [appended] = await asyncio.gather(log.append(Event("counted", {"n": 3})), return_exceptions=True)
        assert isinstance(appended, CorruptLogError) or appended.start_offset == before.offset
        with pytest.raises(CorruptLogError):
            await asyncio.wait_for(anext(log.read_full()), 30)
        with pytest.raises(CorruptLogError):
            await asyncio.wait_for(_all_of(waiting, log), 30)
        await _ends_with("messages were deleted", log.append(Event("counted", {"n": 4})))
    await _ends_with("messages were deleted", engine.open_committer())


async def _all_of(first: asyncio.Future[Any], log: EventLog) -> None:
    """Waits for an event, and for those after it."""
    await first
    async for _ in log.tail():
        pass


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_msgs": 2, "discard": "old"}, "max_msgs"),
        ({"max_age": 3600}, "max_age"),
        ({"max_msg_size": 1000}, "max_msg_size"),
        ({"sealed": True}, "sealed"),
        ({"subjects": ["elsewhere"]}, "subjects"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_stream_whose_settings_became_unsafe_is_no_longer_used(
    log: EventLog, client: Any, name: str, change: dict[str, Any], named: str
) -> None:
    waiting = asyncio.ensure_future(anext(log.tail()))
    await asyncio.sleep(0.2)
    await _edit(client, name, **change)

    await _ends_with(named, waiting)
    await _ends_with(named, log.append(Event("counted", {"n": 3})))
    await _ends_with(named, anext(log.read_full()))


async def test_a_stream_can_be_read_again_once_its_settings_are_right(log: EventLog, client: Any, name: str) -> None:
    await _edit(client, name, max_age=3600)
    await _ends_with("max_age", anext(log.tail()))
    await _edit(client, name, max_age=0)
    await asyncio.sleep(0.3)

    assert (await anext(log.tail(0))).event.data["n"] == 0


async def test_a_stream_that_lost_its_messages_on_disk_is_reported(own_servers: Callable[[], Servers]) -> None:
    """The server starts with an empty stream, and does not report it."""
    [server] = (servers := own_servers()).all
    async with EventLog.open(JetStream(servers.addresses, "log", timeout=1, attempt_timeout=0.3)) as log:
        for n in range(3):
            await log.append(Event("counted", {"n": n}))
        waiting = asyncio.ensure_future(anext(log.tail()))
        await asyncio.sleep(0.1)
        server.kill()
        for path in server.directory.rglob("streams/log/msgs/*"):
            path.unlink()
        await asyncio.to_thread(server.restart)

        with pytest.raises(CorruptLogError):
            await asyncio.wait_for(waiting, 60)
        with pytest.raises(CorruptLogError):
            await log.append(Event("counted", {"n": 3}))


async def test_a_bucket_that_may_lose_documents_is_refused(engine: JetStream, client: Any, name: str) -> None:
    await client.create_key_value(bucket=f"eventfold-{name}", ttl=60)

    with pytest.raises(EventfoldError, match=r"max_age.*set it to 0"):
        await EventLog.open(engine)


async def test_an_existing_bucket_is_used(engine: JetStream, client: Any, name: str) -> None:
    await client.create_key_value(bucket=f"eventfold-{name}")

    async with EventLog.open(engine) as log:
        await log.append(Event("counted", {"n": 1}))
