"""Tails: they start anywhere and miss or repeat nothing, across rotations and processes, and leave nothing behind."""

from __future__ import annotations

import asyncio
import sys
import threading
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path

import pytest
from tests.processes import add_lines, other_writer, resources, resources_at_rest, wait_for_resources
from tests.support import FaultInjector, counted_turns, event, line, recorded_reads, settle, write_log

from eventfold import CorruptLogError, EventLog, EventReader, EventWriter, Query, Record, SyncMode


async def take(tail: AsyncIterator[Record], count: int) -> list[Record]:
    """Returns the next records of a tail, which must come within some seconds."""
    async with asyncio.timeout(20):
        return [await anext(tail) for _ in range(count)]


def numbers_of(records: list[Record]) -> list[int]:
    return [record.event.data["n"] for record in records]


def chained(records: list[Record], offset: int = 0) -> bool:
    """Whether each record begins where the one before it ended."""
    for record in records:
        if record.start_offset != offset:
            return False
        offset = record.end_offset
    return True


async def test_a_tail_from_0_yields_existing_events_and_then_new_ones(data_dir: Path) -> None:
    """The old and the new events form one unbroken sequence."""
    async with EventLog.open(data_dir) as log, aclosing(log.tail(0)) as tail:
        await log.append_many([event(n) for n in range(3)])
        old = await take(tail, 3)
        await log.append_many([event(n) for n in range(3, 5)])
        new = await take(tail, 2)

    assert numbers_of(old + new) == [0, 1, 2, 3, 4]
    assert chained(old + new)


async def test_a_tail_from_an_offset_begins_with_the_event_that_starts_there(data_dir: Path) -> None:
    """The end of a record is where the next tail continues."""
    async with EventLog.open(data_dir) as log:
        results = await log.append_many([event(n) for n in range(4)])

        async with aclosing(log.tail(results[1].end_offset)) as tail:
            found = await take(tail, 2)

    assert numbers_of(found) == [2, 3]


async def test_a_tail_without_an_offset_yields_only_later_events(data_dir: Path) -> None:
    """Without an offset, a tail begins at the head at the moment of its first `anext`."""
    async with EventLog.open(data_dir) as log, aclosing(log.tail()) as tail:
        await log.append(event(0))
        first = asyncio.ensure_future(take(tail, 1))
        await settle()
        await log.append(event(1))

        assert numbers_of(await first) == [1]


@pytest.mark.parametrize("offset", [-1, 1, 10_000, True, "0"])
async def test_a_tail_from_an_invalid_offset_is_refused(data_dir: Path, offset: int) -> None:
    """Invalid offsets are negative, inside a line, beyond the head, or not integers; they raise ValueError."""
    async with EventLog.open(data_dir) as log:
        await log.append(event(0))

        with pytest.raises(ValueError, match="offset"):
            await take(log.tail(offset), 1)


async def test_a_tail_continues_through_many_rotations_of_its_own_process(data_dir: Path) -> None:
    """The tail misses and repeats nothing, whether it is ahead of a rotation or behind it."""
    async with EventLog.open(data_dir, sync=SyncMode.OS) as log, aclosing(log.tail(0)) as tail:
        found = asyncio.ensure_future(take(tail, 400))
        for n in range(400):
            await log.append(event(n))
            if n % 40 == 39:
                await log.rotate()
        records = await found

    assert numbers_of(records) == list(range(400))
    assert chained(records)


async def test_a_tail_continues_through_automatic_rotations(data_dir: Path) -> None:
    """With a small max_log_size, rotations happen while appends and tails go on."""
    async with EventLog.open(data_dir, sync=SyncMode.OS, max_log_size=2000) as log:
        tails = [asyncio.ensure_future(take(log.tail(0), 500)) for _ in range(3)]
        for n in range(500):
            await log.append(event(n))
        found = await asyncio.gather(*tails)

    assert log.archive_path.exists()
    assert [numbers_of(records) for records in found] == [list(range(500))] * 3


async def test_a_tail_continues_through_many_rotations_of_another_process(data_dir: Path) -> None:
    """Another process appends and rotates, and the tail here sees one unbroken sequence."""
    async with other_writer(data_dir) as writer, aclosing(EventReader(data_dir).tail(0)) as tail:
        found = asyncio.ensure_future(take(tail, 150))
        for _ in range(10):
            await writer.append(10)
            await writer.rotate()
            await writer.append(5)
        records = await found

    assert numbers_of(records) == list(range(150))
    assert chained(records)


async def test_a_tail_that_lagged_through_rotations_reads_them_from_the_archive(data_dir: Path) -> None:
    """A tail that was not read while the log rotated twice continues at its next event."""
    async with other_writer(data_dir) as writer, aclosing(EventReader(data_dir).tail(0)) as tail:
        await writer.append(1)
        first = await take(tail, 1)
        for _ in range(2):
            await writer.append(20)
            await writer.rotate()
        records = first + await take(tail, 40)

    assert numbers_of(records) == list(range(41))
    assert chained(records)


async def test_a_tail_never_yields_part_of_a_batch(data_dir: Path) -> None:
    """While only a part of a batch is on disk, a tail yields none of it."""
    write_log(data_dir, line(0))
    reader = EventReader(data_dir)
    async with aclosing(reader.tail(0)) as tail:
        await take(tail, 1)
        add_lines(data_dir, line(1, batch="1,2"))
        waiting = asyncio.ensure_future(take(tail, 2))
        result = await reader.wait_for_events(len(line(0)), timeout=0.6)
        add_lines(data_dir, line(2, batch="2,2"))

        assert not result.new_data
        assert numbers_of(await waiting) == [1, 2]


async def test_batches_from_another_process_arrive_whole_and_in_order(data_dir: Path) -> None:
    """The batches come in the order of the log, together with single events."""
    async with other_writer(data_dir) as writer, aclosing(EventReader(data_dir).tail(0)) as tail:
        found = asyncio.ensure_future(take(tail, 60))
        for _ in range(5):
            await writer.batch(10)
            await writer.append(2)

        assert numbers_of(await found) == list(range(60))


async def test_a_tail_waits_for_a_directory_that_does_not_exist_yet(data_dir: Path) -> None:
    """When a writer in another process creates the directory, the tail notices it and yields its events."""
    async with aclosing(EventReader(data_dir).tail(0)) as tail:
        first = asyncio.ensure_future(take(tail, 2))
        await settle()
        async with other_writer(data_dir) as writer:
            await writer.append(2)

            assert numbers_of(await first) == [0, 1]


async def test_a_tail_waits_for_a_log_that_does_not_exist_yet(data_dir: Path) -> None:
    """In a directory without `app.jsonl`, the tail notices the file as soon as it exists."""
    data_dir.mkdir()
    async with aclosing(EventReader(data_dir).tail(0)) as tail:
        first = asyncio.ensure_future(take(tail, 1))
        await settle()
        write_log(data_dir, line(0))

        assert numbers_of(await first) == [0]


async def test_a_tail_older_than_its_directory_is_woken_by_a_writer_of_its_process(data_dir: Path) -> None:
    """A reader that was made on its own, and a log that the same process opens later, share the directory."""
    async with aclosing(EventReader(data_dir).tail()) as tail:
        first = asyncio.ensure_future(take(tail, 1))
        await asyncio.sleep(0.2)  # The current head is looked up in a thread.
        async with EventLog.open(data_dir) as log:
            await log.append(event(7))

            assert numbers_of(await first) == [7]


async def test_a_readers_tail_outlives_the_writer_of_its_process(data_dir: Path) -> None:
    """After the log here is closed, another process goes on writing, and the tail goes on too."""
    async with aclosing(EventReader(data_dir).tail(0)) as tail:
        async with EventLog.open(data_dir) as log:
            await log.append(event(0))
            await take(tail, 1)
        async with other_writer(data_dir) as writer:
            await writer.append(1)
            [record] = await take(tail, 1)

    assert record.start_offset == len(line(0))


@pytest.mark.parametrize("read_only", [False, True])
async def test_a_tail_ends_when_its_log_is_closed(data_dir: Path, read_only: bool) -> None:
    """Waiting tails end without an error, and so does a tail that is advanced only after the close."""
    async with EventLog.open(data_dir) as log:
        await log.append(event(0))
    log = await EventLog.open(data_dir, read_only=read_only)
    tails = [log.tail(0) for _ in range(3)]
    for tail in tails:
        await take(tail, 1)
    waiting = [asyncio.ensure_future(anext(tail, None)) for tail in tails[:2]]
    await settle()
    await log.aclose()
    async with asyncio.timeout(5):
        found = [await ended for ended in (*waiting, anext(tails[2], None))]

    assert found == [None, None, None]


async def test_a_tail_yields_the_last_events_before_closing_its_log_ends_it(data_dir: Path) -> None:
    """A slow reader gets every acknowledged event before the tail ends."""
    log = await EventLog.open(data_dir)
    await log.append(event(0))
    tail = log.tail(0)
    first = await take(tail, 1)
    for n in range(1, 4):
        await log.append(event(n))
    await log.aclose()
    rest = [record async for record in tail]

    assert numbers_of(first + rest) == [0, 1, 2, 3]


async def test_closing_a_log_ends_tails_in_other_event_loops(data_dir: Path) -> None:
    """A reader of the log may be used in another thread's loop, which is woken too."""
    waiting = threading.Event()

    async def follow(tail: AsyncIterator[Record]) -> list[int]:
        asyncio.get_running_loop().call_later(0.1, waiting.set)
        async with asyncio.timeout(30):  # This wakes the loop on its own, but only long after the test has failed.
            return [record.event.data["n"] async for record in tail]

    log = await EventLog.open(data_dir)
    await log.append(event(0))
    elsewhere = asyncio.create_task(asyncio.to_thread(asyncio.run, follow(log.reader().tail(0))))
    await asyncio.to_thread(waiting.wait, 10)
    await log.aclose()

    assert await asyncio.wait_for(asyncio.shield(elsewhere), 5) == [0]


LAGGING = """
import asyncio, resource, sys
from eventfold import EventReader

async def main():
    tails = [EventReader(sys.argv[1]).tail(0) for _ in range(100)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for tail in tails:
        await anext(tail)
    await asyncio.sleep(0.5)
    for tail in tails:
        await anext(tail)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    for tail in tails:
        await tail.aclose()

asyncio.run(main())
"""


@pytest.mark.parametrize("archived", [False, True], ids=["active log", "archive"])
async def test_a_hundred_tails_that_lag_need_little_memory(data_dir: Path, *, archived: bool) -> None:
    """Clients that come back at the same time need less than a megabyte each; the test runs in its own process."""
    padding = "x" * 1000
    write_log(data_dir, *(line(n).replace(b'"counted"', f'"{padding}"'.encode()) for n in range(30_000)))
    if archived:
        async with EventWriter.open(data_dir) as writer:
            await writer.rotate()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LAGGING, str(data_dir), stdout=asyncio.subprocess.PIPE
    )
    grown, _ = await process.communicate()
    await asyncio.sleep(0)

    assert int(grown) * (1 if sys.platform == "darwin" else 1024) < 100_000_000


async def test_a_tail_of_a_closed_log_ends_at_once(data_dir: Path) -> None:
    """The tail neither yields anything nor waits."""
    async with EventLog.open(data_dir) as log:
        await log.append(event(0))
    async with asyncio.timeout(5):
        found = [record async for record in log.tail()]

    assert found == []


@pytest.mark.parametrize("lives_here", [True, False])
async def test_a_cancelled_tail_leaves_nothing_behind(data_dir: Path, lives_here: bool) -> None:
    """No task, descriptor or watcher thread outlives it, whether it was waiting or reading."""
    async with EventLog.open(data_dir) as log:
        await log.append_many([event(n) for n in range(1000)])
        if lives_here:
            await log.reader().head()
            before = await resources_at_rest()
            await cancel_tails(log.reader())
            left = await wait_for_resources(before)
    if not lives_here:
        before = await resources_at_rest()
        await cancel_tails(EventReader(data_dir))
        left = await wait_for_resources(before)

    assert left == before


async def cancel_tails(reader: EventReader) -> None:
    """Starts tails, of which some wait and some read, and cancels all of them."""

    async def follow(offset: int | None) -> None:
        async for _ in reader.tail(offset):
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(follow(offset)) for offset in [0, None] * 5]
    for _ in range(30):
        await asyncio.sleep(0.001)
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)


async def test_leaving_a_tail_early_leaves_nothing_behind(data_dir: Path) -> None:
    """A tail that is closed in the middle of the log closes its files and stops its watcher."""
    async with EventLog.open(data_dir) as log:
        await log.append_many([event(n) for n in range(1000)])
        await log.rotate()
        await log.append_many([event(n) for n in range(1000)])
    reader = EventReader(data_dir)
    before = await resources_at_rest()
    async with aclosing(reader.tail(0)) as tail:
        await take(tail, 5)
        meanwhile = resources()
    left = await wait_for_resources(before)

    assert meanwhile.watchers == 1
    assert left == before


async def test_a_slow_tail_delays_nobody_and_misses_nothing(data_dir: Path) -> None:
    """While one tail is not read, appends are acknowledged and another tail stays up to date."""
    async with (
        EventLog.open(data_dir, sync=SyncMode.OS) as log,
        aclosing(log.tail(0)) as slow,
        aclosing(log.tail(0)) as fast,
    ):
        await log.append(event(0))
        await take(slow, 1)
        for n in range(1, 300):
            await log.append(event(n))
        quick = await take(fast, 300)
        late = await take(slow, 299)

    assert numbers_of(quick) == list(range(300))
    assert numbers_of(late) == list(range(1, 300))


async def test_a_slow_tail_costs_no_memory(data_dir: Path) -> None:
    """Events that were not asked for stay on disk: a tail that is 16 MB behind needs less than one."""
    async with EventLog.open(data_dir, sync=SyncMode.OS) as log, aclosing(log.tail(0)) as slow:
        await log.append(event(0))
        await take(slow, 1)
        waiting = asyncio.ensure_future(take(log.tail(), 1))
        await settle()
        tracemalloc.start()
        try:
            for _ in range(160):
                await log.append(event(1, meta="x" * 100_000))
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        await waiting

    assert held < 1_000_000


async def test_a_tail_in_the_writers_process_yields_durable_events_only(data_dir: Path, faults: FaultInjector) -> None:
    """While an append is being synced, its line is in the file, but no tail yields it."""
    async with EventLog.open(data_dir) as log, aclosing(EventReader(data_dir).tail(0)) as tail:
        first = asyncio.ensure_future(take(tail, 1))
        await settle()
        gate = faults.freeze("sync")
        append = asyncio.ensure_future(log.append(event(0)))
        await gate.reached()
        await asyncio.sleep(0.05)

        assert data_dir.joinpath("app.jsonl").read_bytes() == line(0)
        assert not first.done()
        gate.open()
        await append
        assert numbers_of(await first) == [0]


async def test_reading_a_long_log_lets_other_tasks_run(data_dir: Path) -> None:
    """A tail that reads many events without a pause lets the event loop run every few milliseconds."""
    write_log(data_dir, *(line(n) for n in range(50_000)))
    async with aclosing(EventReader(data_dir).tail(0)) as tail:
        await take(tail, 1)
        async with counted_turns() as turns:
            await take(tail, 49_999)

    assert turns[0] > 10


async def test_damage_ends_a_tail_after_all_events_before_it(damaged_dir: Path) -> None:
    """After the good events, CorruptLogError says where the damage begins."""
    write_log(damaged_dir, line(0), line(1), b"damage\n", line(2))
    async with aclosing(EventReader(damaged_dir).tail(0)) as tail:
        found = await take(tail, 2)
        with pytest.raises(CorruptLogError) as caught:
            await take(tail, 1)

    assert numbers_of(found) == [0, 1]
    assert caught.value.offset == len(line(0) + line(1))


async def test_a_hundred_tails_each_yield_all_events(data_dir: Path) -> None:
    async with EventLog.open(data_dir) as log:
        tails = [asyncio.ensure_future(take(log.tail(0), 20)) for _ in range(100)]
        for n in range(20):
            await log.append(event(n))
        found = await asyncio.gather(*tails)

    assert [numbers_of(records) for records in found] == [list(range(20))] * 100


async def test_many_tails_that_wake_at_once_let_other_tasks_run(data_dir: Path) -> None:
    """Some of them run in each iteration of the loop, and each yields all events, even those appended meanwhile."""
    async with EventLog.open(data_dir, sync=SyncMode.OS) as log:
        delivered = 0
        in_turns = [0]

        async def follow() -> list[int]:
            nonlocal delivered
            found = []
            async with aclosing(log.tail(0)) as tail:
                async for record in tail:
                    delivered += 1
                    found.append(record.event.data["n"])
                    if len(found) == 20:
                        break
            return found

        async def look_on() -> None:
            while True:
                in_turns.append(delivered)
                await asyncio.sleep(0)

        tails = [asyncio.create_task(follow()) for _ in range(500)]
        await settle()
        onlooker = asyncio.create_task(look_on())
        await log.append(event(0))
        while delivered < 500:
            await asyncio.sleep(0)
        most = max(later - earlier for earlier, later in pairwise(in_turns))
        for n in range(1, 20):
            await log.append(event(n))
        async with asyncio.timeout(20):
            everything = await asyncio.gather(*tails)
        onlooker.cancel()

    assert most <= 50
    assert everything == [list(range(20))] * 500


async def test_a_tail_a_few_appends_behind_does_not_read_the_disk(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest lines are in memory, and only older ones are read."""
    reads = recorded_reads(monkeypatch)
    async with EventLog.open(data_dir, sync=SyncMode.OS) as log:
        await log.append(event(0))
        async with aclosing(log.tail()) as tail:
            waiting = asyncio.create_task(take(tail, 1))
            await settle()
            found = []
            for n in range(1, 31, 10):
                for late in range(10):
                    await log.append(event(n + late))
                found += await waiting
                found += await take(tail, 9)
                waiting = asyncio.create_task(take(tail, 1))
                await settle()
            reads_of_the_newest = len(reads)
            for n in range(31, 131):
                await log.append(event(n))
            found += await waiting
            found += await take(tail, 99)

    assert numbers_of(found) == list(range(1, 131))
    assert chained(found, found[0].start_offset)
    assert (reads_of_the_newest, len(reads)) == (0, 1)


async def test_a_tail_with_a_query_yields_matching_events(data_dir: Path) -> None:
    """Tested with existing and new events, and with batches; other events are skipped."""
    query = Query({"a"}, {"x"})
    async with EventLog.open(data_dir) as log:
        await log.append_many([event(0, "a", tags=("x",)), event(1, "a"), event(2, "b", tags=("x",))])
        async with aclosing(log.tail(0, query=query)) as tail:  # type: ignore[type-var]
            first = await take(tail, 1)
            waiting = asyncio.create_task(take(tail, 2))
            await settle()
            for n in range(3, 9):
                await log.append(event(n, "ab"[n % 2], tags=("x",) if n > 4 else ()))
            rest = await waiting

    assert numbers_of(first + rest) == [0, 6, 8]


async def test_a_tail_with_a_query_waits_if_nothing_matches(data_dir: Path) -> None:
    """The tail waits for a matching event."""
    async with EventLog.open(data_dir) as log:
        waiting = asyncio.create_task(take(log.tail(query=Query(tags={"x"})), 1))
        await settle()
        for n in range(20):
            await log.append(event(n))
        assert not waiting.done()
        await log.append(event(20, tags=("x",)))

        assert numbers_of(await waiting) == [20]
