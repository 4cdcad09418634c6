"""Opening and closing a writer, its sync modes, and readers in its process."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from tests.support import FaultInjector, event, line, numbers, records
from tests.writer.calls import started

from eventfold import (
    Event,
    EventfoldError,
    EventReader,
    EventWriter,
    Head,
    LockMode,
    LogClosedError,
    SyncMode,
    WriterFailedError,
    _queue,
    line_hash,
)
from eventfold._codec.encode import encode_line
from eventfold._files import committer, shared_committer


def run_and_collect(main: Coroutine[Any, Any, None]) -> None:
    """Runs a program's main coroutine in its own loop, and collects the garbage that it leaves."""
    asyncio.run(main)
    gc.collect()


# Sync modes


async def test_in_mode_os_appends_are_not_synced_before_the_close(data_dir: Path, faults: FaultInjector) -> None:
    """The system writes them when it likes, and closing syncs them."""
    writer = await EventWriter.open(data_dir, sync=SyncMode.OS)
    await writer.append(event(0))  # The first line of a new active log is synced in every mode.
    syncs = faults.count("sync")
    for n in range(1, 5):
        await writer.append(event(n))
    before = len(syncs)
    await writer.aclose()

    assert before == 0
    assert len(syncs) == 1


async def test_in_mode_every_second_a_sync_follows_automatically(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, faults: FaultInjector
) -> None:
    """The sync happens without another append."""
    monkeypatch.setattr(committer, "SYNC_INTERVAL", 0.05)
    synced = threading.Event()

    def noted(sync: Any, fd: int) -> None:
        sync(fd)
        synced.set()

    async with EventWriter.open(data_dir, sync=SyncMode.EVERY_SECOND) as writer:
        await writer.append(event(0))  # The first line of a new active log is synced in every mode.
        while writer._committer.active.unsynced:
            await asyncio.sleep(0.01)
        faults.replace("sync", noted)
        await asyncio.gather(*(writer.append(event(n)) for n in range(1, 5)))
        before = synced.is_set()
        followed = await asyncio.to_thread(synced.wait, 10)

    assert not before
    assert followed


async def test_in_mode_every_second_a_failed_sync_ends_the_writer(
    damaged_dir: Path, monkeypatch: pytest.MonkeyPatch, faults: FaultInjector
) -> None:
    """The calls have returned by then; the next one raises."""
    monkeypatch.setattr(committer, "SYNC_INTERVAL", 0.0)
    async with EventWriter.open(damaged_dir, sync=SyncMode.EVERY_SECOND) as writer:
        await writer.append(event(0))  # The first line of a new active log is synced in every mode.
        while writer._committer.active.unsynced:
            await asyncio.sleep(0.01)
        faults.fail("sync")
        gate = faults.freeze("sync")
        await writer.append(event(1))
        await gate.reached()
        [task] = await started(writer.append(event(2)))
        gate.open()

        with pytest.raises(WriterFailedError, match="a sync failed"):
            await task


@pytest.mark.parametrize("lock", [LockMode.FLOCK, LockMode.SHARED])
async def test_closing_raises_if_acknowledged_events_could_not_be_synced(
    damaged_dir: Path, monkeypatch: pytest.MonkeyPatch, faults: FaultInjector, lock: LockMode
) -> None:
    """The sync failed after the calls had returned, and no append came that could have raised it."""
    monkeypatch.setattr(committer, "SYNC_INTERVAL", 0.0)
    monkeypatch.setattr(shared_committer, "SYNC_INTERVAL", 0.0)
    writer = await EventWriter.open(damaged_dir, sync=SyncMode.EVERY_SECOND, lock=lock)
    await writer.append(event(0))  # The first line of a new active log is synced in every mode.
    while writer._committer.active.unsynced:
        await asyncio.sleep(0.01)
    faults.fail("sync")
    await writer.append(event(1))
    while writer._committer._failure is None:
        await asyncio.sleep(0.01)

    with pytest.raises(WriterFailedError, match="a sync failed"):
        await writer.aclose()


async def with_failed_rotation(
    directory: Path, monkeypatch: pytest.MonkeyPatch, faults: FaultInjector, sync: SyncMode, lock: LockMode
) -> EventWriter:
    """Returns a writer whose automatic rotation has met a failed sync, its own or (`EVERY_SECOND`) an earlier one."""
    monkeypatch.setattr(committer, "SYNC_INTERVAL", 0.0)
    monkeypatch.setattr(shared_committer, "SYNC_INTERVAL", 0.0)
    writer = await EventWriter.open(directory, sync=sync, lock=lock, max_log_size=10**6)
    await writer.append(event(0))  # The first line of a new active log is synced in every mode.
    while sync is SyncMode.EVERY_SECOND and writer._committer.active.unsynced:
        await asyncio.sleep(0.01)
    faults.fail("sync")
    await writer.append(event(1))
    while sync is SyncMode.EVERY_SECOND and writer._committer._failure is None:
        await asyncio.sleep(0.01)
    writer._committer._max_log_size = 1
    writer._rotator.rotate_if_due([])
    await writer._rotator.drain()
    return writer


@pytest.mark.parametrize("lock", [LockMode.FLOCK, LockMode.SHARED])
@pytest.mark.parametrize("sync", [SyncMode.OS, SyncMode.EVERY_SECOND])
async def test_closing_raises_the_failed_sync_that_only_an_automatic_rotation_has_met(
    damaged_dir: Path, monkeypatch: pytest.MonkeyPatch, faults: FaultInjector, sync: SyncMode, lock: LockMode
) -> None:
    """Nobody waits for such a rotation, so the error would otherwise be in a log message alone."""
    writer = await with_failed_rotation(damaged_dir, monkeypatch, faults, sync, lock)

    with pytest.raises(WriterFailedError, match="a sync failed"):
        await writer.aclose()


@pytest.mark.parametrize("lock", [LockMode.FLOCK, LockMode.SHARED])
@pytest.mark.parametrize("sync", [SyncMode.OS, SyncMode.EVERY_SECOND])
async def test_closing_does_not_raise_again_what_an_append_has_raised_after_a_rotation(
    damaged_dir: Path, monkeypatch: pytest.MonkeyPatch, faults: FaultInjector, sync: SyncMode, lock: LockMode
) -> None:
    """The error has been given to the program once."""
    writer = await with_failed_rotation(damaged_dir, monkeypatch, faults, sync, lock)
    with pytest.raises(WriterFailedError, match="a sync failed"):
        await writer.append(event(2))
    await writer.aclose()


@pytest.mark.parametrize("lock", [LockMode.FLOCK, LockMode.SHARED])
@pytest.mark.parametrize("call", ["append", "rotate"])
async def test_closing_raises_the_failed_sync_that_only_a_cancelled_call_has_met(
    damaged_dir: Path, monkeypatch: pytest.MonkeyPatch, faults: FaultInjector, call: str, lock: LockMode
) -> None:
    """The cancelled call raises `CancelledError`, so nothing else would tell the program that events may be lost."""
    monkeypatch.setattr(committer, "SYNC_INTERVAL", 0.0 if call == "append" else 60.0)
    monkeypatch.setattr(shared_committer, "SYNC_INTERVAL", 0.0 if call == "append" else 60.0)
    writer = await EventWriter.open(damaged_dir, sync=SyncMode.EVERY_SECOND, lock=lock)
    await writer.append(event(0))  # The first line of a new active log is synced in every mode.
    while call == "append" and writer._committer.active.unsynced:
        await asyncio.sleep(0.01)
    faults.fail("sync")
    gate = faults.freeze("sync")
    await writer.append(event(1))
    if call == "append":
        await gate.reached()
    [task] = await started(writer.append(event(2)) if call == "append" else writer.rotate())
    await gate.reached()
    task.cancel()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task

    with pytest.raises(WriterFailedError, match="a sync failed"):
        await writer.aclose()


@pytest.mark.parametrize("lock", [LockMode.FLOCK, LockMode.SHARED])
async def test_closing_does_not_raise_again_what_a_rotation_has_raised(
    damaged_dir: Path, monkeypatch: pytest.MonkeyPatch, faults: FaultInjector, lock: LockMode
) -> None:
    writer = await EventWriter.open(damaged_dir, sync=SyncMode.OS, lock=lock)
    await writer.append(event(0))
    await writer.append(event(1))
    faults.fail("sync")
    with pytest.raises(WriterFailedError, match="a sync failed"):
        await writer.rotate()
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


async def test_a_close_that_is_cancelled_continues(data_dir: Path, faults: FaultInjector) -> None:
    """The appends are finished and the lock is released anyway."""
    writer = await EventWriter.open(data_dir)
    gate = faults.freeze("sync")
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


def test_a_loop_that_ends_leaves_no_append_waiting(tmp_path: Path, faults: FaultInjector) -> None:
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


# Readers in the writer's process


async def test_readers_in_the_writers_process_see_durable_events_only(data_dir: Path, faults: FaultInjector) -> None:
    """A line that is written but not synced yet is seen by no reader of this process."""
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(1))
        gate = faults.freeze("sync")
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


async def test_readers_do_not_see_the_rest_of_a_failed_write(data_dir: Path, faults: FaultInjector) -> None:
    """Until the failed write is undone, the file has bytes that were never acknowledged."""

    def partial(write: Any, fd: int, data: bytes, position: int) -> None:
        write(fd, data, position)
        raise OSError(errno.EIO, "made to fail")

    async with EventWriter.open(data_dir) as writer:
        faults.replace("write", partial)
        gate = faults.freeze("truncate")
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


async def test_each_call_gets_its_own_error_object(data_dir: Path, faults: FaultInjector) -> None:
    """If many tasks raised one error object, it would gather all their tracebacks."""
    async with EventWriter.open(data_dir) as writer:
        faults.fail("write", number=errno.ENOSPC)
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
