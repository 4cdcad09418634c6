"""`build_index` and `drop_index`: an open log uses an index that was built before."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from tests.support import event

from eventfold import (
    CorruptLogError,
    EventfoldError,
    EventLog,
    EventReader,
    LockMode,
    LogLockedError,
    Query,
    build_index,
    drop_index,
)
from eventfold._index import file_index


async def make(directory: Path, events: int = 50) -> None:
    async with EventLog.open(directory) as log:
        await log.append_many([event(n, tags=(f"seven:{n % 7}",)) for n in range(events)])
        await log.rotate()


async def tagged(log: EventLog, tag: str) -> list[int]:
    return [record.event.data["n"] async for record in log.read_from(query=Query(tags={tag}))]


async def test_a_built_index_is_complete_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tested with an index that is written in several transactions."""
    monkeypatch.setattr(file_index, "WRITE_BATCH_SIZE", 7)
    await make(tmp_path)

    place = await build_index(tmp_path)

    assert place == await EventReader(tmp_path).head()
    async with EventLog.open(tmp_path, index=True) as log:
        assert await tagged(log, "seven:3") == list(range(3, 50, 7))


async def test_an_index_is_brought_up_to_date(tmp_path: Path) -> None:
    await make(tmp_path)
    first = await build_index(tmp_path)
    await make(tmp_path)

    assert (await build_index(tmp_path)).offset == 2 * first.offset


@pytest.mark.parametrize("lock", [LockMode.FLOCK, LockMode.SHARED])
async def test_an_index_is_built_while_a_writer_is_running(tmp_path: Path, lock: LockMode) -> None:
    """The writer may maintain the same index at that time."""
    await make(tmp_path)
    async with EventLog.open(tmp_path, lock=lock, index=True) as log:
        await log.append(event(50, tags=("seven:1",)))
        place = await build_index(tmp_path)
        await log.append(event(57, tags=("seven:1",)))

        assert place.offset < log.head.offset
        assert await tagged(log, "seven:1") == [*range(1, 58, 7)]


async def test_an_index_that_cannot_be_written_is_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await make(tmp_path)

    with pytest.raises(EventfoldError, match="could not be built"), caplog.at_level(logging.ERROR):
        await build_index(tmp_path, path=tmp_path / "none" / "index.sqlite")


async def test_a_damaged_log_is_not_indexed(tmp_path: Path) -> None:
    await make(tmp_path)
    path = tmp_path / "archive.jsonl.zst"
    path.write_bytes(path.read_bytes().replace(b"\x28\xb5\x2f\xfd", b"\0\0\0\0"))

    with pytest.raises(CorruptLogError):
        await build_index(tmp_path)


async def test_a_cancelled_build_leaves_an_index_that_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_index, "WRITE_BATCH_SIZE", 1)
    await make(tmp_path)
    task = asyncio.create_task(build_index(tmp_path))
    while not (tmp_path / "index.sqlite").exists():
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    await build_index(tmp_path)
    async with EventLog.open(tmp_path, index=True) as log:
        assert await tagged(log, "seven:3") == list(range(3, 50, 7))


async def test_progress_is_reported(tmp_path: Path) -> None:
    await make(tmp_path)
    reported: list[tuple[int, int]] = []

    place = await build_index(tmp_path, progress=lambda done, total: reported.append((done, total)))

    assert reported[-1] == (place.offset, place.offset)


async def test_dropping_an_index_removes_nothing_else(tmp_path: Path) -> None:
    await make(tmp_path)
    await build_index(tmp_path)

    assert await drop_index(tmp_path)
    assert not await drop_index(tmp_path)

    assert not list(tmp_path.glob("index*"))
    assert len([record async for record in EventReader(tmp_path).read_full()]) == 50


@pytest.mark.parametrize("lock", [LockMode.FLOCK, LockMode.SHARED])
async def test_an_index_that_a_writer_uses_is_not_dropped(tmp_path: Path, lock: LockMode) -> None:
    await make(tmp_path)
    async with EventLog.open(tmp_path, lock=lock, index=True):
        with pytest.raises(LogLockedError):
            await drop_index(tmp_path)

    assert (tmp_path / "index.sqlite").exists()
