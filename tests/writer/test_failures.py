"""Failures of the disk and unexpected errors: what callers get, and whether the writer continues."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import shutil
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from tests.support import FaultInjector, event, line, numbers
from tests.writer.calls import started

from eventfold import (
    EventReader,
    EventWriter,
    SyncMode,
    WriterFailedError,
    _group_commit,
    _queue,
    line_hash,
)
from eventfold._files import operations

# Failures of the disk


@pytest.mark.parametrize("written", [0, 1, 20, len(line(2)) + 5])
async def test_a_failed_write_leaves_the_log_as_it_was(data_dir: Path, faults: FaultInjector, written: int) -> None:
    """The part of the group that was written is truncated, its calls raise the error, and the writer continues."""
    failures = [OSError(errno.ENOSPC, "disk full")]

    def partial(write: Any, fd: int, data: bytes, position: int) -> None:
        if failures:
            os.pwrite(fd, data[:written], position)
            raise failures.pop()
        write(fd, data, position)

    async with EventWriter.open(data_dir) as writer:
        first = await writer.append(event(1))
        faults.replace("write", partial)
        results = await asyncio.gather(
            writer.append(event(2)), writer.append_many([event(3), event(4)]), return_exceptions=True
        )
        after = writer.log_path.read_bytes(), writer.head
        await writer.append(event(5))
        found = await numbers(writer.reader())

    assert [(type(result), result.errno) for result in results] == [(OSError, errno.ENOSPC)] * 2  # type: ignore[union-attr]
    assert after == (line(1), (first.end_offset, first.line_hash))
    assert found == [1, 5]


@pytest.mark.parametrize("rotated", [False, True])
async def test_a_crash_while_a_failed_first_write_is_undone_leaves_a_log_that_can_be_opened(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rotated: bool
) -> None:
    """As long as the file has the line, the base file lists it. Here, only the line's confirmation has failed."""
    sync_dir, truncate = operations.sync_dir, operations.truncate
    crashed = tmp_path / "crashed"
    fails = [True, False]

    def failing_sync_dir(path: Path) -> None:
        if fails and fails.pop():
            raise OSError(errno.EIO, "made to fail")
        sync_dir(path)

    def copying_truncate(fd: int, size: int) -> None:
        shutil.copytree(data_dir, crashed)
        truncate(fd, size)

    async with EventWriter.open(data_dir) as writer:
        if rotated:
            await writer.append(event(0))
            await writer.rotate()
        monkeypatch.setattr(operations, "sync_dir", failing_sync_dir)
        monkeypatch.setattr(operations, "truncate", copying_truncate)
        with pytest.raises(OSError, match="made to fail"):
            await writer.append(event(1))
        await writer.append(event(2))
        found = await numbers(writer.reader())
    in_crashed = await numbers(EventReader(crashed))
    async with EventWriter.open(crashed) as writer:
        await writer.append(event(3))
        after = await numbers(writer.reader())

    before = [0] if rotated else []
    assert found == [*before, 2]
    assert in_crashed == [*before, 1]
    assert after == [*before, 1, 3]


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


async def test_the_appends_after_a_failed_group_are_written(data_dir: Path, faults: FaultInjector) -> None:
    """Only the calls of the failed group raise; appends that were queued meanwhile follow the old head."""
    async with EventWriter.open(data_dir) as writer:
        faults.fail("write", number=errno.ENOSPC)
        gate = faults.freeze("write")
        tasks = await started(writer.append(event(1)))
        await gate.reached()
        tasks += await started(writer.append(event(2)), writer.append_if(event(3), len(line(2)), line_hash(line(2))))
        gate.open()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        found = await numbers(writer.reader())

    assert isinstance(results[0], OSError)
    assert found == [2, 3]


async def test_a_failed_sync_ends_the_writer(damaged_dir: Path, faults: FaultInjector) -> None:
    """Appends of the group and in the queue raise `WriterFailedError`, and nothing is written or synced after that."""
    writer = await EventWriter.open(damaged_dir)
    faults.fail("sync")
    gate = faults.freeze("sync")
    syncs, writes = faults.count("sync"), faults.count("write")
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


async def test_after_a_failed_sync_the_error_says_why(damaged_dir: Path, faults: FaultInjector) -> None:
    """Later calls raise an error whose message contains the system's own."""
    async with EventWriter.open(damaged_dir) as writer:
        faults.fail("sync")
        with pytest.raises(WriterFailedError, match=r"a sync failed.*made to fail"):
            await writer.append(event(1))
        with pytest.raises(WriterFailedError, match=r"a sync failed.*made to fail"):
            await writer.append_many([event(2), event(3)])


async def test_appends_that_wait_for_a_full_queue_fail_with_the_writer(
    damaged_dir: Path, faults: FaultInjector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_queue, "QUEUE_SIZE", 1)
    async with EventWriter.open(damaged_dir) as writer:
        faults.fail("sync")
        gate = faults.freeze("sync")
        tasks = await started(writer.append(event(0)))
        await gate.reached()
        tasks += await started(*(writer.append(event(n)) for n in range(1, 5)))
        gate.open()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)

    assert [type(result) for result in results] == [WriterFailedError] * 5


async def test_a_failed_writer_can_be_opened_again(data_dir: Path, faults: FaultInjector) -> None:
    """After reopening, the log is consistent, with or without the events that could not be synced."""
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(1))
        faults.fail("sync")
        with pytest.raises(WriterFailedError):
            await writer.append(event(2))
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(3))
        found = await numbers(writer.reader())

    assert found in ([1, 3], [1, 2, 3])


@pytest.mark.parametrize("undoing", ["truncate", "sync"])
async def test_a_failed_write_that_cannot_be_undone_ends_the_writer(
    damaged_dir: Path, faults: FaultInjector, undoing: str
) -> None:
    """If the state of the file is unknown, nothing more is written to it."""
    async with EventWriter.open(damaged_dir) as writer:
        faults.fail("write", number=errno.ENOSPC)
        faults.fail(undoing)
        writes = faults.count("write")
        with pytest.raises(WriterFailedError, match="can't be undone"):
            await writer.append(event(1))
        with pytest.raises(WriterFailedError):
            await writer.append(event(2))

    assert len(writes) == 1


async def test_after_a_failed_sync_in_a_rotation_nothing_is_synced_again(
    damaged_dir: Path, faults: FaultInjector
) -> None:
    """A second sync of the same file could succeed although the system has dropped the data."""
    writer = await EventWriter.open(damaged_dir, sync=SyncMode.OS)
    await writer.append(event(1))
    faults.fail("sync")
    syncs = faults.count("sync")
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
        with pytest.raises(WriterFailedError, match="changed by another program"):
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


# Unexpected errors


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


async def test_an_append_after_a_switch_whose_sync_failed_is_not_acknowledged(
    damaged_dir: Path, faults: FaultInjector
) -> None:
    """The thread that commits knows of the failure before the event loop does."""
    writer = await EventWriter.open(damaged_dir)
    await writer.append(event(1))
    await writer.rotate()
    await writer.append(event(2))
    gate = faults.freeze("rename")
    rotation = asyncio.create_task(writer.rotate())
    await gate.reached()
    [append] = await started(writer.append(event(3)))
    faults.fail("sync_dir")
    gate.open()
    await asyncio.wait([rotation, append])
    await writer.aclose()

    assert isinstance(rotation.exception(), WriterFailedError)
    assert isinstance(append.exception(), WriterFailedError)


async def test_thousands_of_appends_that_wait_for_room_are_admitted_at_a_constant_cost(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A waiting append is never searched for among the others, whether it is cancelled or not."""
    monkeypatch.setattr(_queue, "QUEUE_SIZE", 1)

    class Waiting(deque[Any]):
        def remove(self, value: Any) -> None:
            raise AssertionError("an append was searched for")

    async with EventWriter.open(data_dir) as writer:
        writer._queue._waiting = Waiting()
        tasks = await started(*(writer.append(event(n)) for n in range(2000)))
        for task in tasks[1::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        found = await numbers(writer.reader())

    assert found == list(range(0, 2000, 2))


async def test_other_tasks_run_while_a_large_group_of_appends_fails(damaged_dir: Path, faults: FaultInjector) -> None:
    """Other tasks run between the portions."""
    async with EventWriter.open(damaged_dir) as writer:
        faults.fail("sync")
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


async def test_the_error_of_a_failed_writer_does_not_grow(damaged_dir: Path, faults: FaultInjector) -> None:
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
        faults.fail("sync")
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
    writer._attach([Broken(), Broken()])  # type: ignore[list-item]
    for _ in range(2):
        with pytest.raises(OSError, match="made to fail"):
            await writer.aclose()
    async with EventWriter.open(data_dir) as again:
        await again.append(event(1))


async def test_a_rotation_saves_the_other_views_if_one_can_t_be_saved(data_dir: Path) -> None:
    """The error is raised once all of them have been tried."""
    saved = []

    class Kept:
        offset = 0

        def __init__(self, name: str) -> None:
            self.name = name

        async def save(self, reader: EventReader) -> None:
            saved.append(self.name)
            if self.name == "broken":
                raise OSError("made to fail")

    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(1))
        with pytest.raises(OSError, match="made to fail"):
            await writer.rotate([Kept("broken"), Kept("other")])  # type: ignore[list-item]

        assert saved == ["broken", "other"]
        assert await writer.reader().active_log_size() == 0
