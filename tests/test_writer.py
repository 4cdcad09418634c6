"""The writer: order, group commit, conditions, batches, cancellation, back-pressure, and failures of the disk."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import itertools
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from tests.support import Seam, event, line, numbers, records, settle, write_log

from eventfold import (
    AppendResult,
    ConditionalAppendError,
    Event,
    EventfoldError,
    EventReader,
    EventWriter,
    Head,
    InvalidEventError,
    LockMode,
    LogClosedError,
    LogLockedError,
    SyncMode,
    WriterFailedError,
    _group_commit,
    _queue,
    line_hash,
)
from eventfold._codec.encode import encode_line
from eventfold._files import committer, operations, shared


async def started(*calls: Any) -> list[asyncio.Task[Any]]:
    """Starts the calls as tasks and lets each run until it waits."""
    tasks = [asyncio.create_task(call) for call in calls]
    await settle()
    return tasks


def run(script: str, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a separate process, with the directory as its first argument."""
    return subprocess.run(
        [sys.executable, "-c", script, str(directory), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def run_and_collect(main: Coroutine[Any, Any, None]) -> None:
    """Runs a program's main coroutine in its own loop, and collects the garbage that it leaves."""
    asyncio.run(main)
    gc.collect()


# Appending


async def test_append_returns_the_offsets_and_the_hash_of_the_line(data_dir: Path) -> None:
    """Start, end and hash match the bytes in the file."""
    async with EventWriter.open(data_dir) as writer:
        first = await writer.append(event(1))
        second = await writer.append(event(2))
        data = writer.log_path.read_bytes()

    assert first == AppendResult(0, len(line(1)), line_hash(line(1)))
    assert second == AppendResult(len(line(1)), len(data), line_hash(line(2)))
    assert data == line(1) + line(2)


async def test_the_head_follows_the_appends(data_dir: Path) -> None:
    """The head of an empty log is `(0, "")`; later it is the end of the last line with its hash."""
    async with EventWriter.open(data_dir) as writer:
        empty = writer.head
        result = await writer.append(event(1))
        head = writer.head

    assert empty == Head(0, "") == (0, "")
    assert head == (result.end_offset, result.line_hash)


async def test_a_thousand_concurrent_appends_cost_a_handful_of_syncs(data_dir: Path, seam: Seam) -> None:
    """Appends that wait together are written and synced together."""
    async with EventWriter.open(data_dir) as writer:
        syncs, writes = seam.count("sync"), seam.count("write")
        await asyncio.gather(*(writer.append(event(n)) for n in range(1000)))
        cost = len(syncs), len(writes)
        found = await numbers(writer.reader())

    assert max(cost) < 10
    assert found == list(range(1000))


async def test_every_append_is_synced_before_it_returns(data_dir: Path, seam: Seam) -> None:
    """With `SyncMode.ALWAYS`, an append waits for the sync and for nothing else."""
    async with EventWriter.open(data_dir) as writer:
        gate = seam.freeze("sync")
        [task] = await started(writer.append(event(1)))
        await gate.reached()
        waits, written, head = not task.done(), writer.log_path.read_bytes(), writer.head
        gate.open()
        result = await task

    assert waits
    assert written == line(1)
    assert head == (0, "")
    assert result.end_offset == len(line(1))


async def test_appends_are_in_the_log_in_the_order_of_their_calls(data_dir: Path) -> None:
    """Tested with a mix of single appends, batches and conditional appends."""
    async with EventWriter.open(data_dir) as writer:
        calls: list[Any] = []
        for n in range(0, 300, 3):
            calls += [writer.append(event(n)), writer.append_many([event(n + 1), event(n + 2)])]
        results = await asyncio.gather(*calls)
        found = await numbers(writer.reader())
    places = [r for result in results for r in (result if isinstance(result, list) else [result])]

    assert found == list(range(300))
    assert [place.start_offset for place in places] == [0, *(place.end_offset for place in places[:-1])]


async def test_appends_that_come_during_a_commit_keep_their_order(data_dir: Path, seam: Seam) -> None:
    """These appends form the next group."""
    async with EventWriter.open(data_dir) as writer:
        gate = seam.freeze("sync")
        tasks = await started(writer.append(event(0)))
        await gate.reached()
        tasks += await started(*(writer.append(event(n)) for n in range(1, 50)))
        gate.open()
        await asyncio.gather(*tasks)
        found = await numbers(writer.reader())

    assert found == list(range(50))


async def test_changes_to_an_event_after_the_call_are_not_in_the_log(data_dir: Path, seam: Seam) -> None:
    """The line is made when `append` is called, not when it is written."""
    async with EventWriter.open(data_dir) as writer:
        gate = seam.freeze("sync")
        data = {"n": 2}
        tasks = await started(writer.append(event(1)), writer.append(Event("counted", data)))
        data["n"] = 99
        gate.open()
        await asyncio.gather(*tasks)
        found = await numbers(writer.reader())

    assert found == [1, 2]


# Conditional appends


async def test_append_if_appends_at_the_expected_head(data_dir: Path) -> None:
    """`append_if(event, *head)` with the current head appends the event."""
    async with EventWriter.open(data_dir) as writer:
        first = await writer.append_if(event(1), *writer.head)
        second = await writer.append_if(event(2), first.end_offset, first.line_hash)
        head = writer.head

    assert head == (second.end_offset, second.line_hash)


async def test_append_if_on_an_empty_log_accepts_the_reader_s_hash_too(data_dir: Path) -> None:
    """`read_line_hash_before(0)` returns None, which is as good as the empty hash."""
    async with EventWriter.open(data_dir) as writer:
        result = await writer.append_if(event(1), 0, await writer.reader().read_line_hash_before(0))  # type: ignore[arg-type]

    assert result.start_offset == 0


async def test_append_if_at_another_offset_writes_nothing_and_names_both(data_dir: Path) -> None:
    """The error contains the expected and the actual offset, but no actual hash."""
    async with EventWriter.open(data_dir) as writer:
        result = await writer.append(event(1))
        with pytest.raises(ConditionalAppendError) as caught:
            await writer.append_if(event(2), 0, "")
        found = await numbers(writer.reader())
    conflict = caught.value.conflict

    assert found == [1]
    assert (conflict.expected_offset, conflict.actual_offset) == (0, result.end_offset)
    assert (conflict.expected_hash, conflict.actual_hash) == ("", None)
    assert str(result.end_offset) in str(caught.value)


async def test_append_if_with_another_hash_writes_nothing_and_names_both(data_dir: Path) -> None:
    """The offset is the same, so the error contains the hash that the log has there."""
    async with EventWriter.open(data_dir) as writer:
        result = await writer.append(event(1))
        with pytest.raises(ConditionalAppendError) as caught:
            await writer.append_if(event(2), result.end_offset, "0" * 16)
        found = await numbers(writer.reader())
    conflict = caught.value.conflict

    assert found == [1]
    assert conflict.expected_offset == conflict.actual_offset == result.end_offset
    assert (conflict.expected_hash, conflict.actual_hash) == ("0" * 16, result.line_hash)
    assert result.line_hash in str(caught.value)


async def test_of_several_conditional_appends_in_one_group_the_first_wins(data_dir: Path, seam: Seam) -> None:
    """Each condition is checked against the head at the moment when its own turn comes."""
    async with EventWriter.open(data_dir) as writer:
        syncs = seam.count("sync")
        results = await asyncio.gather(*(writer.append_if(event(n), 0, "") for n in range(5)), return_exceptions=True)
        cost = len(syncs)
        found = await numbers(writer.reader())

    assert found == [0]
    assert cost == 1
    assert isinstance(results[0], AppendResult)
    assert all(isinstance(result, ConditionalAppendError) for result in results[1:])
    assert all(result.conflict.actual_offset == len(line(0)) for result in results[1:])  # type: ignore[union-attr]


async def test_a_conditional_append_may_expect_the_previous_append_of_its_group(data_dir: Path, seam: Seam) -> None:
    """In one group, each condition expects the append before it, which is not written yet."""
    sizes = [len(line(n)) for n in range(4)]
    async with EventWriter.open(data_dir) as writer:
        syncs = seam.count("sync")
        await asyncio.gather(
            writer.append(event(0)),
            writer.append_if(event(1), sizes[0], line_hash(line(0))),
            writer.append_many([event(2)]),
            writer.append_if(event(3), sum(sizes[:3]), line_hash(line(2))),
        )
        cost = len(syncs)
        found = await numbers(writer.reader())

    assert found == [0, 1, 2, 3]
    assert cost == 1


async def test_a_refused_conditional_append_affects_no_other(data_dir: Path) -> None:
    """The other appends of the group are written without a gap."""
    async with EventWriter.open(data_dir) as writer:
        results = await asyncio.gather(
            writer.append(event(1)),
            writer.append_if(event(2), 0, ""),
            writer.append(event(3)),
            return_exceptions=True,
        )
        found = await numbers(writer.reader())

    assert found == [1, 3]
    assert isinstance(results[1], ConditionalAppendError)
    assert results[2].start_offset == results[0].end_offset  # type: ignore[union-attr]


# Batches


async def test_the_lines_of_a_batch_contain_their_positions(data_dir: Path) -> None:
    """Lines of a batch of two or more have `"batch":[i,n]`; a single event has nothing."""
    async with EventWriter.open(data_dir) as writer:
        alone = await writer.append_many([event(1)])
        results = await writer.append_many(event(n) for n in (2, 3, 4))
        data = writer.log_path.read_bytes()

    assert data == line(1) + line(2, batch="1,3") + line(3, batch="2,3") + line(4, batch="3,3")
    assert len(alone) == 1
    assert [result.line_hash for result in results] == [line_hash(each) for each in data.splitlines()[1:]]


async def test_an_empty_batch_changes_nothing(data_dir: Path) -> None:
    """`append_many([])` returns an empty list."""
    async with EventWriter.open(data_dir) as writer:
        results = await writer.append_many([])
        head = writer.head

    assert results == []
    assert head == (0, "")


async def test_a_batch_cut_anywhere_is_read_completely_or_not_at_all(damaged_dir: Path) -> None:
    """Wherever a crash has cut the batch, a reader sees the log without it or with all of it."""
    before, batch = line(0), [line(n, batch=f"{n},3") for n in (1, 2, 3)]
    whole = before + b"".join(batch)
    seen = []
    for size in range(len(before), len(whole) + 1):
        write_log(damaged_dir, whole[:size])
        seen.append(await numbers(EventReader(damaged_dir)))

    assert seen == [[0]] * (len(whole) - len(before)) + [[0, 1, 2, 3]]


@pytest.mark.parametrize("lines_left", [0, 1, 2])
@pytest.mark.parametrize("bytes_more", [0, 1, 40])
async def test_a_cut_batch_is_removed_when_a_writer_opens(damaged_dir: Path, lines_left: int, bytes_more: int) -> None:
    """The log then continues after the event before the batch."""
    batch = [line(n, batch=f"{n},3") for n in (1, 2, 3)]
    write_log(damaged_dir, line(0), *batch[:lines_left], batch[lines_left][:bytes_more])
    async with EventWriter.open(damaged_dir) as writer:
        await writer.append(event(9))
        found = await numbers(writer.reader())

    assert found == [0, 9]


# Cancellation


async def test_an_append_cancelled_in_the_queue_is_not_in_the_log(data_dir: Path, seam: Seam) -> None:
    """An append or a batch that is cancelled before it is taken for a group leaves no trace."""
    async with EventWriter.open(data_dir) as writer:
        gate = seam.freeze("sync")
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


async def test_an_append_cancelled_while_it_is_written_is_in_the_log(data_dir: Path, seam: Seam) -> None:
    """Once the group is taken, all of it is written, and callers that still wait get their results."""
    async with EventWriter.open(data_dir) as writer:
        gate = seam.freeze("sync")
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


async def test_conditions_do_not_cover_cancelled_appends(data_dir: Path, seam: Seam) -> None:
    """Conditions are checked without the appends that were cancelled before their turn."""
    async with EventWriter.open(data_dir) as writer:
        gate = seam.freeze("sync")
        tasks = await started(writer.append(event(1)))
        await gate.reached()
        tasks += await started(writer.append(event(2)), writer.append_if(event(3), len(line(1)), line_hash(line(1))))
        tasks[1].cancel()
        gate.open()
        await asyncio.gather(*tasks, return_exceptions=True)
        found = await numbers(writer.reader())

    assert found == [1, 3]


async def test_an_opening_that_is_cancelled_opens_nothing(data_dir: Path, seam: Seam) -> None:
    """When the cancellation is raised, the lock is free again."""
    gate = seam.freeze("sync")
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
    data_dir: Path, seam: Seam, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue contains at most its size plus the append that filled it, and no append overtakes a waiting one."""
    monkeypatch.setattr(_queue, "QUEUE_SIZE", 5 * len(line(10)))
    async with EventWriter.open(data_dir) as writer:
        gate = seam.freeze("sync")
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
    data_dir: Path, seam: Seam, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No group is larger than the queue may be, however many appends wait."""
    monkeypatch.setattr(_queue, "QUEUE_SIZE", 5 * len(line(10)))
    async with EventWriter.open(data_dir) as writer:
        writes = seam.count("write")
        await asyncio.gather(*(writer.append(event(n)) for n in range(10, 99)))
        sizes = [len(data) for _, data, _ in writes]

    assert sum(sizes) == 89 * len(line(10))
    assert max(sizes) <= 5 * len(line(10))


async def test_an_append_that_is_cancelled_while_the_queue_is_full_delays_no_other(
    data_dir: Path, seam: Seam, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cancelled append is not in the log, and the next one takes its turn."""
    monkeypatch.setattr(_queue, "QUEUE_SIZE", 1)
    async with EventWriter.open(data_dir) as writer:
        gate = seam.freeze("sync")
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
    data_dir: Path, seam: Seam, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The invalid event takes up no space in the queue."""
    monkeypatch.setattr(_queue, "QUEUE_SIZE", 1)
    async with EventWriter.open(data_dir) as writer:
        gate = seam.freeze("sync")
        tasks = await started(writer.append(event(0)))
        await gate.reached()
        tasks += await started(writer.append(event(1)), writer.append(Event("")), writer.append(event(2)))
        gate.open()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        found = await numbers(writer.reader())

    assert found == [0, 1, 2]
    assert isinstance(results[2], InvalidEventError)


async def test_closing_ends_even_if_the_last_waiting_append_is_refused(
    data_dir: Path, seam: Seam, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The append waited for space behind others that wrote nothing; the close must not wait for it."""
    monkeypatch.setattr(_queue, "QUEUE_SIZE", 1)
    writer = await EventWriter.open(data_dir)
    gate = seam.freeze("sync")
    tasks = await started(writer.append(event(0)))
    await gate.reached()
    tasks += await started(writer.append_if(event(1), 77, ""), writer.append(Event("")))
    tasks += await started(writer.aclose())
    gate.open()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)

    assert isinstance(results[1], ConditionalAppendError)
    assert isinstance(results[2], InvalidEventError)
    assert results[3] is None


# Failures of the disk


@pytest.mark.parametrize("written", [0, 1, 20, len(line(2)) + 5])
async def test_a_failed_write_leaves_the_log_as_it_was(data_dir: Path, seam: Seam, written: int) -> None:
    """The part of the group that was written is truncated, its calls raise the error, and the writer continues."""
    failures = [OSError(errno.ENOSPC, "disk full")]

    def partial(write: Any, fd: int, data: bytes, position: int) -> None:
        if failures:
            os.pwrite(fd, data[:written], position)
            raise failures.pop()
        write(fd, data, position)

    async with EventWriter.open(data_dir) as writer:
        first = await writer.append(event(1))
        seam.replace("write", partial)
        results = await asyncio.gather(
            writer.append(event(2)), writer.append_many([event(3), event(4)]), return_exceptions=True
        )
        after = writer.log_path.read_bytes(), writer.head
        await writer.append(event(5))
        found = await numbers(writer.reader())

    assert [(type(result), result.errno) for result in results] == [(OSError, errno.ENOSPC)] * 2  # type: ignore[union-attr]
    assert after == (line(1), (first.end_offset, first.line_hash))
    assert found == [1, 5]


async def test_a_short_write_is_undone(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a system call writes only a part, that counts as a failed write."""
    pwrite, left = os.pwrite, [1]

    def short(fd: int, data: bytes, position: int) -> int:
        if left and left.pop():
            return pwrite(fd, data[: len(data) // 2], position)
        return pwrite(fd, data, position)

    async with EventWriter.open(data_dir) as writer:
        monkeypatch.setattr(os, "pwrite", short)
        with pytest.raises(OSError, match="short write"):
            await writer.append(event(1))
        await writer.append(event(2))
        data = writer.log_path.read_bytes()

    assert data == line(2)


async def test_the_appends_after_a_failed_group_are_written(data_dir: Path, seam: Seam) -> None:
    """Only the calls of the failed group raise; appends that were queued meanwhile follow the old head."""
    async with EventWriter.open(data_dir) as writer:
        seam.fail("write", number=errno.ENOSPC)
        gate = seam.freeze("write")
        tasks = await started(writer.append(event(1)))
        await gate.reached()
        tasks += await started(writer.append(event(2)), writer.append_if(event(3), len(line(2)), line_hash(line(2))))
        gate.open()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        found = await numbers(writer.reader())

    assert isinstance(results[0], OSError)
    assert found == [2, 3]


async def test_a_failed_sync_ends_the_writer(damaged_dir: Path, seam: Seam) -> None:
    """Appends of the group and in the queue raise `WriterFailedError`, and nothing is written or synced after that."""
    writer = await EventWriter.open(damaged_dir)
    seam.fail("sync")
    gate = seam.freeze("sync")
    syncs, writes = seam.count("sync"), seam.count("write")
    tasks = await started(writer.append(event(1)))
    await gate.reached()
    tasks += await started(writer.append(event(2)), writer.append_many([event(3), event(4)]))
    gate.open()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    with pytest.raises(WriterFailedError):
        await writer.append(event(5))
    await writer.aclose()

    assert [type(result) for result in results] == [WriterFailedError] * 3
    assert (len(syncs), len(writes)) == (1, 1)


async def test_after_a_failed_sync_the_error_says_why(damaged_dir: Path, seam: Seam) -> None:
    """Later calls raise an error whose message contains the system's own."""
    async with EventWriter.open(damaged_dir) as writer:
        seam.fail("sync")
        with pytest.raises(WriterFailedError, match=r"a sync failed.*made to fail"):
            await writer.append(event(1))
        with pytest.raises(WriterFailedError, match=r"a sync failed.*made to fail"):
            await writer.append_many([event(2), event(3)])


async def test_appends_that_wait_for_a_full_queue_fail_with_the_writer(
    damaged_dir: Path, seam: Seam, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_queue, "QUEUE_SIZE", 1)
    async with EventWriter.open(damaged_dir) as writer:
        seam.fail("sync")
        gate = seam.freeze("sync")
        tasks = await started(writer.append(event(0)))
        await gate.reached()
        tasks += await started(*(writer.append(event(n)) for n in range(1, 5)))
        gate.open()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)

    assert [type(result) for result in results] == [WriterFailedError] * 5


async def test_a_failed_writer_can_be_opened_again(data_dir: Path, seam: Seam) -> None:
    """After reopening, the log is consistent, with or without the events that could not be synced."""
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(1))
        seam.fail("sync")
        with pytest.raises(WriterFailedError):
            await writer.append(event(2))
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(3))
        found = await numbers(writer.reader())

    assert found in ([1, 3], [1, 2, 3])


@pytest.mark.parametrize("undoing", ["truncate", "sync"])
async def test_a_failed_write_that_cannot_be_undone_ends_the_writer(
    damaged_dir: Path, seam: Seam, undoing: str
) -> None:
    """If the state of the file is unknown, nothing more is written to it."""
    async with EventWriter.open(damaged_dir) as writer:
        seam.fail("write", number=errno.ENOSPC)
        seam.fail(undoing)
        writes = seam.count("write")
        with pytest.raises(WriterFailedError, match="can't be undone"):
            await writer.append(event(1))
        with pytest.raises(WriterFailedError):
            await writer.append(event(2))

    assert len(writes) == 1


async def test_after_a_failed_sync_in_a_rotation_nothing_is_synced_again(damaged_dir: Path, seam: Seam) -> None:
    """A second sync of the same file could succeed although the system has dropped the data."""
    writer = await EventWriter.open(damaged_dir, sync=SyncMode.OS)
    await writer.append(event(1))
    seam.fail("sync")
    syncs = seam.count("sync")
    with pytest.raises(WriterFailedError):
        await writer.rotate()
    await writer.aclose()

    assert len(syncs) == 1


async def test_a_file_that_somebody_else_changed_ends_the_writer(damaged_dir: Path) -> None:
    """Lines that another program wrote are not overwritten."""
    async with EventWriter.open(damaged_dir) as writer:
        await writer.append(event(1))
        with writer.log_path.open("ab") as file:
            file.write(line(2))
        with pytest.raises(WriterFailedError, match="changed by somebody else"):
            await writer.append(event(3))
        data = writer.log_path.read_bytes()

    assert data == line(1) + line(2)


async def test_a_log_that_was_deleted_ends_the_writer(damaged_dir: Path) -> None:
    """Appends to a file without a name would be lost."""
    async with EventWriter.open(damaged_dir) as writer:
        await writer.append(event(1))
        writer.log_path.unlink()
        with pytest.raises(WriterFailedError, match="deleted or replaced"):
            await writer.append(event(2))


# Sync modes


async def test_in_mode_os_appends_are_not_synced_before_the_close(data_dir: Path, seam: Seam) -> None:
    """The system writes them when it likes, and closing syncs them."""
    writer = await EventWriter.open(data_dir, sync=SyncMode.OS)
    await writer.append(event(0))  # The first line of a new active log is synced in every mode.
    syncs = seam.count("sync")
    for n in range(1, 5):
        await writer.append(event(n))
    before = len(syncs)
    await writer.aclose()

    assert before == 0
    assert len(syncs) == 1


async def test_in_mode_every_second_a_sync_follows_automatically(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, seam: Seam
) -> None:
    """The sync happens without another append."""
    monkeypatch.setattr(committer, "SYNC_INTERVAL", 0.05)
    synced = threading.Event()

    def noted(sync: Any, fd: int) -> None:
        sync(fd)
        synced.set()

    async with EventWriter.open(data_dir, sync=SyncMode.EVERY_SECOND) as writer:
        await writer.append(event(0))  # The first line of a new active log is synced in every mode.
        while writer._committer._unsynced:
            await asyncio.sleep(0.01)
        seam.replace("sync", noted)
        await asyncio.gather(*(writer.append(event(n)) for n in range(1, 5)))
        before = synced.is_set()
        followed = await asyncio.to_thread(synced.wait, 10)

    assert not before
    assert followed


async def test_in_mode_every_second_a_failed_sync_ends_the_writer(
    damaged_dir: Path, monkeypatch: pytest.MonkeyPatch, seam: Seam
) -> None:
    """The calls have returned by then; the next one raises."""
    monkeypatch.setattr(committer, "SYNC_INTERVAL", 0.0)
    async with EventWriter.open(damaged_dir, sync=SyncMode.EVERY_SECOND) as writer:
        await writer.append(event(0))  # The first line of a new active log is synced in every mode.
        while writer._committer._unsynced:
            await asyncio.sleep(0.01)
        seam.fail("sync")
        gate = seam.freeze("sync")
        await writer.append(event(1))
        await gate.reached()
        [task] = await started(writer.append(event(2)))
        gate.open()

        with pytest.raises(WriterFailedError, match="a sync failed"):
            await task


@pytest.mark.parametrize("lock", [LockMode.FLOCK, LockMode.SHARED])
async def test_closing_raises_if_acknowledged_events_could_not_be_synced(
    damaged_dir: Path, monkeypatch: pytest.MonkeyPatch, seam: Seam, lock: LockMode
) -> None:
    """The sync failed after the calls had returned, and no append came that could have raised it."""
    monkeypatch.setattr(committer, "SYNC_INTERVAL", 0.0)
    monkeypatch.setattr(shared, "SYNC_INTERVAL", 0.0)
    writer = await EventWriter.open(damaged_dir, sync=SyncMode.EVERY_SECOND, lock=lock)
    await writer.append(event(0))  # The first line of a new active log is synced in every mode.
    while writer._committer._unsynced:
        await asyncio.sleep(0.01)
    seam.fail("sync")
    await writer.append(event(1))
    while writer._committer._failure is None:
        await asyncio.sleep(0.01)

    with pytest.raises(WriterFailedError, match="a sync failed"):
        await writer.aclose()


# Closing


async def test_closing_finishes_what_was_appended(data_dir: Path) -> None:
    """Every `append` that was called before `aclose` gets a result, and its event is in the log."""
    writer = await EventWriter.open(data_dir)
    tasks = await started(*(writer.append(event(n)) for n in range(20)))
    await writer.aclose()
    results = await asyncio.gather(*tasks)
    found = await numbers(EventReader(data_dir))

    assert found == list(range(20))
    assert results[-1].end_offset == (data_dir / "app.jsonl").stat().st_size


async def test_closing_finishes_appends_that_wait_for_a_full_queue(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full queue loses no append."""
    monkeypatch.setattr(_queue, "QUEUE_SIZE", 1)
    writer = await EventWriter.open(data_dir)
    tasks = await started(*(writer.append(event(n)) for n in range(20)))
    await writer.aclose()
    await asyncio.gather(*tasks)
    found = await numbers(EventReader(data_dir))

    assert found == list(range(20))


async def test_a_closed_writer_refuses_appends(data_dir: Path) -> None:
    """From the moment when the close begins, every method that writes raises `LogClosedError`."""
    writer = await EventWriter.open(data_dir)
    [closing] = await started(writer.aclose())
    with pytest.raises(LogClosedError):
        await writer.append(event(1))
    await closing
    with pytest.raises(LogClosedError):
        await writer.append_many([])
    with pytest.raises(LogClosedError):
        await writer.append_if(event(1), 0, "")
    with pytest.raises(LogClosedError):
        await writer.rotate()

    assert (data_dir / "app.jsonl").read_bytes() == b""


async def test_closing_a_writer_twice_does_nothing(data_dir: Path) -> None:
    """The second call may come during or after the first one."""
    writer = await EventWriter.open(data_dir)
    await asyncio.gather(writer.aclose(), writer.aclose())
    await writer.aclose()
    again = await EventWriter.open(data_dir)
    await again.aclose()

    assert "closed" in repr(writer)


async def test_a_close_that_is_cancelled_continues(data_dir: Path, seam: Seam) -> None:
    """The appends are finished and the lock is released anyway."""
    writer = await EventWriter.open(data_dir)
    gate = seam.freeze("sync")
    [append] = await started(writer.append(event(1)))
    await gate.reached()
    [closing] = await started(writer.aclose())
    closing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await closing
    gate.open()
    await writer.aclose()

    assert (await append).start_offset == 0
    async with EventWriter.open(data_dir):
        pass


async def test_reopening_continues_at_the_head(data_dir: Path) -> None:
    """The new writer starts with the old one's head, and the offsets go on from there."""
    async with EventWriter.open(data_dir) as writer:
        await writer.append_many([event(1), event(2)])
        head = writer.head
    async with EventWriter.open(data_dir) as writer:
        reopened = writer.head
        result = await writer.append_if(event(3), *head)
        found = await numbers(writer.reader())

    assert reopened == head
    assert result.start_offset == head.offset
    assert found == [1, 2, 3]


def test_a_writer_that_is_not_closed_warns(tmp_path: Path) -> None:
    """A leaked writer causes a `ResourceWarning`, and releases the lock when it is collected."""

    async def leak() -> None:
        writer = await EventWriter.open(tmp_path)
        await writer.append(event(1))

    async def reopen() -> None:
        async with EventWriter.open(tmp_path):
            pass

    with pytest.warns(ResourceWarning, match="was not closed"):
        run_and_collect(leak())
    asyncio.run(reopen())


def test_a_loop_that_ends_leaves_no_append_waiting(tmp_path: Path, seam: Seam) -> None:
    """If the loop is shut down before the writer is closed, what was written stays, and nothing hangs."""

    async def abandon() -> None:
        writer = await EventWriter.open(tmp_path)
        await writer.append(event(1))
        await started(*(writer.append(event(n)) for n in range(2, 5)))

    with pytest.warns(ResourceWarning, match="was not closed"):
        run_and_collect(abandon())
    found = asyncio.run(numbers(EventReader(tmp_path)))

    assert found[0] == 1
    assert found == sorted(found)


# Locks and processes


async def test_a_second_writer_in_the_same_process_is_refused(data_dir: Path) -> None:
    """The error names the file, and the first writer continues."""
    async with EventWriter.open(data_dir) as writer:
        with pytest.raises(LogLockedError, match=r"app\.jsonl") as caught:
            await EventWriter.open(data_dir)
        await writer.append(event(1))

    assert Path(caught.value.path) == data_dir / "app.jsonl"


OPEN_AND_SAY = """
import asyncio, sys
from eventfold import EventWriter, LogLockedError

async def main():
    try:
        async with EventWriter.open(sys.argv[1]):
            print("opened")
    except LogLockedError:
        print("locked")

asyncio.run(main())
"""


async def test_a_second_writer_in_another_process_is_refused(data_dir: Path) -> None:
    """Once the first writer is closed, the second one can open the log."""
    async with EventWriter.open(data_dir):
        during = await asyncio.to_thread(run, OPEN_AND_SAY, data_dir)
    after = await asyncio.to_thread(run, OPEN_AND_SAY, data_dir)

    assert (during.stdout, after.stdout) == ("locked\n", "opened\n"), during.stderr + after.stderr


async def test_without_a_lock_a_second_writer_can_open_the_log_but_not_mix_lines(damaged_dir: Path) -> None:
    """`LockMode.NONE` locks nobody out, but the second one to write notices that the file has changed."""
    first = await EventWriter.open(damaged_dir, lock=LockMode.NONE)
    second = await EventWriter.open(damaged_dir, lock=LockMode.NONE)
    await first.append(event(1))
    with pytest.raises(WriterFailedError, match="changed by somebody else"):
        await second.append(event(2))
    await second.aclose()
    await first.aclose()

    assert (damaged_dir / "app.jsonl").read_bytes() == line(1)


async def test_a_file_that_was_replaced_before_it_was_locked_is_not_written(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a rotation replaces the file between opening and locking, the writer takes the new file."""
    write_log(data_dir, line(1))
    lock, replaced = operations.lock, []

    def replace_first(fd: int) -> bool:
        if not replaced:
            replaced.append(data_dir / "other")
            replaced[0].write_bytes(line(1) + line(2))
            os.replace(replaced[0], data_dir / "app.jsonl")
        return lock(fd)

    monkeypatch.setattr(operations, "lock", replace_first)
    async with EventWriter.open(data_dir) as writer:
        with pytest.raises(LogLockedError):
            await EventWriter.open(data_dir)
        await writer.append(event(3))
        found = await numbers(EventReader(data_dir))

    assert found == [1, 2, 3]


async def test_a_file_that_was_removed_before_it_was_locked_is_created_again(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that is locked must be the one that has the name."""
    lock, removed = operations.lock, []

    def remove_first(fd: int) -> bool:
        if not removed:
            removed.append(True)
            (data_dir / "app.jsonl").unlink()
        return lock(fd)

    monkeypatch.setattr(operations, "lock", remove_first)
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(1))

    assert (data_dir / "app.jsonl").read_bytes() == line(1)


FORK = """
import asyncio, os, sys
from eventfold import Event, EventfoldError, EventReader, EventWriter, LockMode

def refused(call):
    try:
        call.send(None)
    except EventfoldError as error:
        return "fork" in str(error)
    except StopIteration:
        pass
    return False

async def read():
    return [record.event.type async for record in EventReader(sys.argv[1]).read_full()]

async def main():
    writer = await EventWriter.open(sys.argv[1], lock=LockMode(sys.argv[2]))
    await writer.append(Event("parent"))
    pid = os.fork()
    if not pid:
        try:
            event = Event("child")
            calls = [writer.append(event), writer.append_many([event]), writer.append_if(event, 0, ""), writer.rotate()]
            status = 0 if all([refused(call) for call in calls]) else 1
            if asyncio.run(read()) != ["parent"]:
                status = 2
            try:
                writer.aclose().send(None)
                status = 3
            except StopIteration:
                pass
        except BaseException:
            import traceback
            traceback.print_exc()
            status = 4
        os._exit(status)
    _, status = os.waitpid(pid, 0)
    print("child", os.waitstatus_to_exitcode(status))
    try:
        await EventWriter.open(sys.argv[1])
    except EventfoldError as error:
        print(type(error).__name__)
    await writer.append(Event("parent again"))
    await writer.aclose()
    print(await read())

asyncio.run(main())
"""


@pytest.mark.parametrize("lock", [LockMode.FLOCK, LockMode.SHARED])
def test_a_writer_refuses_to_write_in_a_forked_child(data_dir: Path, lock: LockMode) -> None:
    """The child inherits the lock, and may read and close; the parent keeps the lock and continues."""
    done = run(FORK, data_dir, lock.value)

    assert done.stdout.splitlines() == ["child 0", "LogLockedError", "['parent', 'parent again']"], done.stderr


# What readers see meanwhile


async def test_readers_in_the_writers_process_see_durable_events_only(data_dir: Path, seam: Seam) -> None:
    """A line that is written but not synced yet is seen by no reader of this process."""
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(1))
        gate = seam.freeze("sync")
        [task] = await started(writer.append(event(2)))
        await gate.reached()
        readers = [writer.reader(), EventReader(data_dir)]
        heads = [await reader.head() for reader in readers]
        during = [await numbers(reader) for reader in readers]
        size = await readers[0].active_log_size()
        gate.open()
        await task
        after = [await numbers(reader) for reader in readers]

    assert heads == [Head(len(line(1)), line_hash(line(1)))] * 2
    assert during == [[1], [1]]
    assert size == len(line(1) + line(2))
    assert after == [[1, 2], [1, 2]]


async def test_readers_do_not_see_the_rest_of_a_failed_write(data_dir: Path, seam: Seam) -> None:
    """Until the failed write is undone, the file has bytes that were never acknowledged."""

    def partial(write: Any, fd: int, data: bytes, position: int) -> None:
        write(fd, data, position)
        raise OSError(errno.EIO, "made to fail")

    async with EventWriter.open(data_dir) as writer:
        seam.replace("write", partial)
        gate = seam.freeze("truncate")
        [task] = await started(writer.append(event(1)))
        await gate.reached()
        during = await numbers(EventReader(data_dir))
        gate.open()
        with pytest.raises(OSError, match="made to fail"):
            await task

    assert during == []


# Opening


async def test_open_can_be_awaited_or_used_as_a_context_manager(data_dir: Path) -> None:
    """Both ways return the same writer, and the context manager closes it."""
    awaited = await EventWriter.open(data_dir)
    await awaited.append(event(1))
    await awaited.aclose()
    async with EventWriter.open(data_dir) as entered:
        await entered.append(event(2))
    with pytest.raises(LogClosedError):
        await entered.append(event(3))

    assert await numbers(EventReader(data_dir)) == [1, 2]


async def test_the_directory_and_its_parents_are_created(tmp_path: Path) -> None:
    """Nothing has to exist before a writer is opened."""
    directory = tmp_path / "a" / "b" / "c"
    async with EventWriter.open(str(directory)) as writer:
        paths = writer.dir, writer.log_path, writer.archive_path, writer.views_dir

    assert paths == (directory, directory / "app.jsonl", directory / "archive.jsonl.zst", directory / "views")
    assert paths[1].exists()


@pytest.mark.parametrize(
    "options",
    [{"max_log_size": -1}, {"max_log_size": 1.5}, {"max_event_size": 0}, {"max_event_size": True}, {"lock": "x"}],
)
async def test_wrong_options_are_refused_before_anything_is_created(tmp_path: Path, options: dict[str, Any]) -> None:
    """Opening raises `ValueError` and creates no directory."""
    with pytest.raises(ValueError):
        await EventWriter.open(tmp_path / "data", **options)

    assert not (tmp_path / "data").exists()


async def test_a_writer_cannot_be_opened_where_a_file_is(tmp_path: Path) -> None:
    """The system's own error is raised."""
    (tmp_path / "data").touch()

    with pytest.raises(OSError):
        await EventWriter.open(tmp_path / "data")


async def test_each_call_gets_its_own_error_object(data_dir: Path, seam: Seam) -> None:
    """If many tasks raised one error object, it would gather all their tracebacks."""
    async with EventWriter.open(data_dir) as writer:
        seam.fail("write", number=errno.ENOSPC)
        results = await asyncio.gather(writer.append(event(1)), writer.append(event(2)), return_exceptions=True)

    assert results[0] is not results[1]
    assert all(isinstance(result, OSError) and not isinstance(result, EventfoldError) for result in results)


async def test_the_written_line_follows_the_format(data_dir: Path) -> None:
    """Other programs can compute the same bytes and hash from the format."""
    original = Event("done", {"ä": ["\u2028", 1.5, None]}, ts=7, id="i", actor="me", meta={"m": 1})
    async with EventWriter.open(data_dir) as writer:
        result = await writer.append(original)
        data = writer.log_path.read_bytes()
        [record] = await records(writer.reader())

    assert data == encode_line(original, 2**20)
    assert result.line_hash == record.line_hash == line_hash(data)


# Nothing leaves the writer stuck


@pytest.mark.parametrize("expected", [(-1, ""), (True, ""), ("0", ""), (None, ""), (0, 7), (0, b"")])
async def test_a_condition_of_the_wrong_type_is_refused_in_its_own_call(data_dir: Path, expected: Any) -> None:
    """Nothing is queued, and no other call raises."""
    async with EventWriter.open(data_dir) as writer:
        with pytest.raises(ValueError, match="expected_"):
            await writer.append_if(event(1), *expected)
        await writer.append(event(2))


async def test_an_unexpected_error_ends_the_writer_instead_of_leaving_it_stuck(
    damaged_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Waiting calls get `WriterFailedError`, and the close comes to an end."""

    class Offset(int):
        def __eq__(self, other: object) -> bool:
            raise RuntimeError("not equal to anything")

        __hash__ = int.__hash__

    async with asyncio.timeout(10):
        async with EventWriter.open(damaged_dir) as writer:
            results = await asyncio.gather(
                writer.append_if(event(1), Offset(0), ""), writer.append(event(2)), return_exceptions=True
            )
            with pytest.raises(WriterFailedError, match="not equal to anything"):
                await writer.append(event(3))

    assert [type(result) for result in results] == [WriterFailedError] * 2


async def test_an_append_after_a_switch_whose_sync_failed_is_not_acknowledged(damaged_dir: Path, seam: Seam) -> None:
    """The thread that commits knows of the failure before the event loop does."""
    writer = await EventWriter.open(damaged_dir)
    await writer.append(event(1))
    await writer.rotate()
    await writer.append(event(2))
    gate = seam.freeze("rename")
    rotation = asyncio.create_task(writer.rotate())
    await gate.reached()
    [append] = await started(writer.append(event(3)))
    seam.fail("sync_dir")
    gate.open()
    await asyncio.wait([rotation, append])
    await writer.aclose()

    assert isinstance(rotation.exception(), WriterFailedError)
    assert isinstance(append.exception(), WriterFailedError)


async def test_thousands_of_appends_wait_for_a_full_queue_at_a_constant_cost(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A waiting append is never searched for among the others, whether it is cancelled or not."""
    monkeypatch.setattr(_queue, "QUEUE_SIZE", 1)

    class Turns(deque[Any]):
        def remove(self, value: Any) -> None:
            raise AssertionError("a place is looked for")

    async with EventWriter.open(data_dir) as writer:
        writer._queue._turns = Turns()
        tasks = await started(*(writer.append(event(n)) for n in range(2000)))
        for task in tasks[1::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        found = await numbers(writer.reader())

    assert found == list(range(0, 2000, 2))


async def test_other_tasks_run_while_a_large_group_of_appends_fails(damaged_dir: Path, seam: Seam) -> None:
    """Other tasks run between the portions."""
    async with EventWriter.open(damaged_dir) as writer:
        seam.fail("sync")
        loop = asyncio.get_running_loop()
        failed_in_one_turn: list[int] = []
        tasks = await started(*(writer.append(event(n)) for n in range(3000)))

        def look() -> None:
            failed_in_one_turn.append(sum(task.done() for task in tasks))
            if failed_in_one_turn[-1] < len(tasks):
                loop.call_soon(look)

        look()
        results = await asyncio.gather(*tasks, return_exceptions=True)

    steps = [b - a for a, b in itertools.pairwise(failed_in_one_turn)]
    assert {type(result) for result in results} == {WriterFailedError}
    assert max(steps) <= 2 * _group_commit.RESOLVED_AT_ONCE


async def test_the_error_of_a_failed_writer_does_not_grow(damaged_dir: Path, seam: Seam) -> None:
    """However often it is raised, it keeps the same few tracebacks and causes."""

    def size(error: BaseException | None) -> tuple[int, int]:
        causes = frames = 0
        while error is not None:
            causes += 1
            trace = error.__traceback__
            while trace is not None:
                frames, trace = frames + 1, trace.tb_next
            error = error.__cause__
        return causes, frames

    async with EventWriter.open(damaged_dir) as writer:
        seam.fail("sync")
        with pytest.raises(WriterFailedError):
            await writer.append(event(1))
        sizes = set()
        for _ in range(50):
            with pytest.raises(WriterFailedError) as caught:
                await writer.append(event(2))
            sizes.add(size(caught.value))

    assert len(sizes) == 1


def test_a_max_event_size_above_the_limit_of_a_read_is_refused(tmp_path: Path) -> None:
    """A limit of more than 1 GiB is refused when the log is opened."""
    with pytest.raises(ValueError, match="max_event_size must be an integer of 1 to 1073741824"):
        EventWriter.open(tmp_path, max_event_size=2**31)


async def test_a_close_that_cannot_save_a_view_releases_the_lock(data_dir: Path) -> None:
    """The error is raised once everything is closed, and again by every further close, with the same size."""

    class Broken:
        name, offset = "broken", 0

        async def save(self, reader: EventReader) -> None:
            raise OSError("made to fail")

    writer = await EventWriter.open(data_dir)
    writer.attach([Broken(), Broken()])  # type: ignore[list-item]
    for _ in range(2):
        with pytest.raises(OSError, match="made to fail"):
            await writer.aclose()
    async with EventWriter.open(data_dir) as again:
        await again.append(event(1))
