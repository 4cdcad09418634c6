"""Cancelled appends, and appends that wait because the queue is full."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.support import FaultInjector, event, line, numbers
from tests.writer.calls import started

from eventfold import (
    ConditionalAppendError,
    Event,
    EventWriter,
    InvalidEventError,
    _queue,
    line_hash,
)

# Cancellation


async def test_an_append_cancelled_in_the_queue_is_not_in_the_log(data_dir: Path, faults: FaultInjector) -> None:
    """An append or a batch that is cancelled before it is taken for a group leaves no trace."""
    async with EventWriter.open(data_dir) as writer:
        gate = faults.freeze("sync")
        tasks = await started(writer.append(event(1)))
        await gate.reached()
        tasks += await started(
            writer.append(event(2)), writer.append_many([event(3), event(4)]), writer.append(event(5))
        )
        tasks[1].cancel()
        tasks[2].cancel()
        gate.open()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        found = await numbers(writer.reader())

    assert found == [1, 5]
    assert [isinstance(result, asyncio.CancelledError) for result in results] == [False, True, True, False]
    assert results[3].start_offset == results[0].end_offset


async def test_an_append_cancelled_while_it_is_written_is_in_the_log(data_dir: Path, faults: FaultInjector) -> None:
    """Once the group is taken, all of it is written, and callers that still wait get their results."""
    async with EventWriter.open(data_dir) as writer:
        gate = faults.freeze("sync")
        tasks = await started(
            writer.append(event(1)), writer.append_many([event(2), event(3)]), writer.append(event(4))
        )
        await gate.reached()
        tasks[0].cancel()
        tasks[1].cancel()
        gate.open()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        found = await numbers(writer.reader())
        head = writer.head

    assert found == [1, 2, 3, 4]
    assert isinstance(results[0], asyncio.CancelledError)
    assert head == (results[2].end_offset, results[2].line_hash)


async def test_conditions_do_not_cover_cancelled_appends(data_dir: Path, faults: FaultInjector) -> None:
    """Conditions are checked without the appends that were cancelled before their turn."""
    async with EventWriter.open(data_dir) as writer:
        gate = faults.freeze("sync")
        tasks = await started(writer.append(event(1)))
        await gate.reached()
        tasks += await started(writer.append(event(2)), writer.append_if(event(3), len(line(1)), line_hash(line(1))))
        tasks[1].cancel()
        gate.open()
        await asyncio.gather(*tasks, return_exceptions=True)
        found = await numbers(writer.reader())

    assert found == [1, 3]


async def test_an_opening_that_is_cancelled_opens_nothing(data_dir: Path, faults: FaultInjector) -> None:
    """When the cancellation is raised, the lock is free again."""
    gate = faults.freeze("sync")
    opening = EventWriter.open(data_dir)
    [task] = await started(opening.__aenter__())
    await gate.reached()
    task.cancel()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(1))
        found = await numbers(writer.reader())

    assert found == [1]


# Back-pressure


async def test_a_full_queue_makes_appends_wait_in_order(
    data_dir: Path, faults: FaultInjector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue contains at most its size plus the append that filled it, and no append overtakes a waiting one."""
    monkeypatch.setattr(_queue, "QUEUE_SIZE", 5 * len(line(10)))
    async with EventWriter.open(data_dir) as writer:
        gate = faults.freeze("sync")
        tasks = await started(writer.append(event(10)))
        await gate.reached()
        tasks += await started(*(writer.append(event(n)) for n in range(11, 60)))
        queued = len(writer._queue)
        gate.open()
        await asyncio.gather(*tasks)
        found = await numbers(writer.reader())

    assert queued == 5
    assert found == list(range(10, 60))


async def test_the_queue_stays_bounded_while_it_is_processed(
    data_dir: Path, faults: FaultInjector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No group is larger than the queue may be, however many appends wait."""
    monkeypatch.setattr(_queue, "QUEUE_SIZE", 5 * len(line(10)))
    async with EventWriter.open(data_dir) as writer:
        writes = faults.count("write")
        await asyncio.gather(*(writer.append(event(n)) for n in range(10, 99)))
        sizes = [len(data) for _, data, _ in writes]

    assert sum(sizes) == 89 * len(line(10))
    assert max(sizes) <= 5 * len(line(10))


async def test_an_append_that_is_cancelled_while_the_queue_is_full_delays_no_other(
    data_dir: Path, faults: FaultInjector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cancelled append is not in the log, and the next one takes its turn."""
    monkeypatch.setattr(_queue, "QUEUE_SIZE", 1)
    async with EventWriter.open(data_dir) as writer:
        gate = faults.freeze("sync")
        tasks = await started(writer.append(event(0)))
        await gate.reached()
        tasks += await started(*(writer.append(event(n)) for n in range(1, 6)))
        tasks[2].cancel()
        tasks[3].cancel()
        gate.open()
        await asyncio.gather(*tasks, return_exceptions=True)
        found = await numbers(writer.reader())

    assert found == [0, 1, 4, 5]


async def test_an_invalid_event_that_waits_for_a_full_queue_is_refused_in_its_own_call(
    data_dir: Path, faults: FaultInjector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The invalid event takes up no space in the queue."""
    monkeypatch.setattr(_queue, "QUEUE_SIZE", 1)
    async with EventWriter.open(data_dir) as writer:
        gate = faults.freeze("sync")
        tasks = await started(writer.append(event(0)))
        await gate.reached()
        tasks += await started(writer.append(event(1)), writer.append(Event("")), writer.append(event(2)))
        gate.open()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        found = await numbers(writer.reader())

    assert found == [0, 1, 2]
    assert isinstance(results[2], InvalidEventError)


async def test_closing_ends_even_if_the_last_waiting_append_is_refused(
    data_dir: Path, faults: FaultInjector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The append waited for space behind others that wrote nothing; the close must not wait for it."""
    monkeypatch.setattr(_queue, "QUEUE_SIZE", 1)
    writer = await EventWriter.open(data_dir)
    gate = faults.freeze("sync")
    tasks = await started(writer.append(event(0)))
    await gate.reached()
    tasks += await started(writer.append_if(event(1), 77, ""), writer.append(Event("")))
    tasks += await started(writer.aclose())
    gate.open()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)

    assert isinstance(results[1], ConditionalAppendError)
    assert isinstance(results[2], InvalidEventError)
    assert results[3] is None
