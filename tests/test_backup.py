"""`EventLog.backup`: copies of a log that is in use; they open at once and can be brought up to date."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support import FaultInjector

from eventfold import (
    CorruptLogError,
    Event,
    EventfoldError,
    EventLog,
    EventReader,
    LogLockedError,
    View,
    verify,
)
from eventfold._files import operations


def count(state: int, event: Event) -> int:
    return state + 1


def counting() -> View[int]:
    """A view that counts the events."""
    return View("count", count, 0)


async def add(log: EventLog, events: int, text: str = "x") -> None:
    """Appends that many events, numbered from 0."""
    await log.append_many([Event("added", {"n": n, "text": text}) for n in range(events)])


async def lines(dir: Path) -> list[bytes]:
    """Returns the lines of a log, byte for byte."""
    return [record._line async for record in EventReader(dir).read_full()]


def contents(dir: Path) -> dict[str, bytes]:
    """Returns the content of every file in a directory, by name."""
    return {str(path.relative_to(dir)): path.read_bytes() for path in dir.rglob("*") if path.is_file()}


@pytest.mark.parametrize("rotations", [0, 1, 3])
@pytest.mark.parametrize("after", [0, 5])
async def test_a_copy_has_the_same_events_and_can_be_appended_to(tmp_path: Path, rotations: int, after: int) -> None:
    """Tested with and without an archive, and with an empty active log."""
    source, copy = tmp_path / "log", tmp_path / "copy"
    async with EventLog.open(source, views=[counting()]) as log:
        for _ in range(rotations):
            await add(log, 10)
            await log.rotate()
        await add(log, after) if after else None

        head = await log.backup(copy)

        assert head == log.head
        assert await lines(copy) == await lines(source)
        assert (await verify(copy)).ok
    async with EventLog.open(copy, views=[counting()]) as log:
        assert log.head == head
        await add(log, 1)
        await log.rotate()
        assert log.view("count") == rotations * 10 + after + 1
        assert len(await lines(copy)) == rotations * 10 + after + 1


async def test_an_empty_log_can_be_copied(tmp_path: Path) -> None:
    async with EventLog.open(tmp_path / "log") as log:
        assert (await log.backup(tmp_path / "copy")).offset == 0
    async with EventLog.open(tmp_path / "copy") as copy:
        await copy.append(Event("added"))


async def test_a_copy_has_the_snapshots_and_the_consumers_offsets(tmp_path: Path) -> None:
    """After a restore, nothing has to be folded or consumed again."""
    async with EventLog.open(tmp_path / "log", views=[view := counting()]) as log:
        await add(log, 10)
        await log.refresh_all()
        await view.save(log.reader())
        async for record in (consumer := log.consumer("mailer")):
            await consumer.commit(record)
            break

        await log.backup(tmp_path / "copy")

    async with EventLog.open(tmp_path / "copy", views=[counting()]) as copy:
        info = await copy.info()
        first = await anext(aiter(copy.consumer("mailer")))
    assert [(place.name, place.lag) for place in info.views] == [("count", 0)]
    assert first.start_offset == record.end_offset


async def test_a_snapshot_that_does_not_fit_the_log_is_not_copied(tmp_path: Path) -> None:
    """A snapshot that contradicts the copied log stays out of the copy."""
    async with EventLog.open(tmp_path / "log") as log:
        await add(log, 10)
        for name in ("views/count.snapshot.json", "consumers/mailer.json"):
            (tmp_path / "log" / name).parent.mkdir()
            (tmp_path / "log" / name).write_bytes(b"nonsense")

        await log.backup(tmp_path / "copy")

    assert (await verify(tmp_path / "copy")).ok


async def test_an_older_copy_is_brought_up_to_date(tmp_path: Path) -> None:
    """The log grows, is rotated, or both, between two backups; the copy's archive is not written again."""
    source, copy = tmp_path / "log", tmp_path / "copy"
    async with EventLog.open(source) as log:
        for step in range(8):
            archive = contents(copy).get("archive.jsonl.zst", b"") if copy.exists() else b""
            inode = (copy / "archive.jsonl.zst").stat().st_ino if archive else None
            if step % 4 != 3:
                await add(log, 3)
            if step % 2:
                await log.rotate()

            assert await log.backup(copy) == log.head

            assert await lines(copy) == await lines(source)
            assert (await verify(copy)).ok
            if archive:
                assert (copy / "archive.jsonl.zst").read_bytes().startswith(archive)
                assert (copy / "archive.jsonl.zst").stat().st_ino == inode


async def test_only_new_frames_of_the_archive_are_copied(tmp_path: Path) -> None:
    """The progress callback reports only the bytes of the new frames."""
    async with EventLog.open(tmp_path / "log") as log:
        await add(log, 1000, "y" * 100)
        await log.rotate()
        await log.backup(tmp_path / "copy")
        await add(log, 1)
        reported: list[tuple[int, int]] = []

        await log.backup(tmp_path / "copy", lambda done, total: reported.append((done, total)))

        assert reported[-1] == (await log.active_log_size(),) * 2


async def test_every_backup_during_appends_and_rotations_can_be_opened(tmp_path: Path) -> None:
    """Each backup is a prefix of the log and has every event that was acknowledged before it began."""
    source = tmp_path / "log"
    async with EventLog.open(source, max_log_size=20_000) as log:
        going = True

        async def write() -> None:
            while going:
                await add(log, 20, "z" * 50)

        writing = asyncio.create_task(write())
        try:
            for number in range(12):
                acknowledged = log.head.offset
                copy = tmp_path / f"copy{number % 3}"
                head = await log.backup(copy)
                assert head.offset >= acknowledged
                assert await EventReader(copy).head() == head
                assert (await verify(copy)).ok
        finally:
            going = False
            await writing
        whole = await lines(source)
    for number in range(3):
        copied = await lines(tmp_path / f"copy{number}")
        assert copied == whole[: len(copied)]
        async with EventLog.open(tmp_path / f"copy{number}") as log:
            await add(log, 1)


@pytest.mark.parametrize("name", ["write", "sync", "rename", "create_file", "replace_file", "sync_dir"])
@pytest.mark.parametrize("call", range(4))
async def test_a_backup_that_fails_leaves_a_copy_that_opens_and_can_be_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int
) -> None:
    """The backup fails at each of its disk operations in turn, and leaves no temporary file."""
    source, copy = tmp_path / "log", tmp_path / "copy"
    async with EventLog.open(source) as log:
        await add(log, 10)
        await log.backup(copy)
        before = await lines(copy)
        await log.rotate()
        await add(log, 10)
        await log.rotate()
        await add(log, 10)
        real, calls = getattr(operations, name), 0

        def fail(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call + 1:
                raise OSError(errno.EIO, "the disk failed")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(operations, name, fail)
            try:
                await log.backup(copy)
            except OSError:
                pass
            else:
                assert calls <= call  # the call was not reached

        copied = await lines(copy)
        assert copied[: len(before)] == before
        assert (await lines(source))[: len(copied)] == copied
        assert not [path for path in os.listdir(copy) if path.endswith(".tmp")]
        await log.backup(copy)
        assert await lines(copy) == await lines(source)


async def test_an_incomplete_frame_in_the_copy_is_copied_again(tmp_path: Path) -> None:
    """A killed backup leaves such a torn frame behind."""
    source, copy = tmp_path / "log", tmp_path / "copy"
    async with EventLog.open(source) as log:
        await add(log, 10)
        await log.rotate()
        await log.backup(copy)
        await add(log, 10)
        await log.rotate()
        whole = (source / "archive.jsonl.zst").read_bytes()
        (copy / "archive.jsonl.zst").write_bytes(whole[:-100])

        await log.backup(copy)

        assert (copy / "archive.jsonl.zst").read_bytes() == whole
        assert await lines(copy) == await lines(source)


async def test_a_copy_of_another_log_is_left_as_it_is(tmp_path: Path) -> None:
    """The backup refuses it although both archives have the same size."""
    for name in ("one", "other"):
        async with EventLog.open(tmp_path / name) as log:
            await log.append(Event("added", name[:3], ts=1))
            await log.rotate()
    async with EventLog.open(tmp_path / "one") as log:
        before = contents(tmp_path / "other")
        with pytest.raises(EventfoldError, match="not an older copy"):
            await log.backup(tmp_path / "other")
    assert contents(tmp_path / "other") == before


async def test_a_copy_that_was_appended_to_is_left_as_it_is(tmp_path: Path) -> None:
    """A backup would delete the events that were appended to the copy."""
    source, copy = tmp_path / "log", tmp_path / "copy"
    async with EventLog.open(source) as log:
        await add(log, 3)
        await log.rotate()
        await log.backup(copy)
        async with EventLog.open(copy) as other:
            await other.append(Event("added", "there"))
        before = contents(copy)
        await add(log, 3)

        with pytest.raises(EventfoldError, match="has events that are not in"):
            await log.backup(copy)

    assert contents(copy) == before


async def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    """A backup never mixes its files with somebody else's."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    async with EventLog.open(tmp_path / "log") as log:
        with pytest.raises(EventfoldError, match="something other"):
            await log.backup(tmp_path / "photos")
    assert os.listdir(tmp_path / "photos") == ["cat.jpg"]


@pytest.mark.parametrize("target", ["log", "log/copy", "."])
async def test_a_copy_into_the_log_itself_is_refused(tmp_path: Path, target: str) -> None:
    """The target may be neither inside the log's directory nor around it."""
    async with EventLog.open(tmp_path / "log") as log:
        with pytest.raises(EventfoldError, match="choose a separate directory"):
            await log.backup(tmp_path / target)


async def test_a_copy_that_is_open_for_writing_is_refused(tmp_path: Path) -> None:
    """A copy that somebody writes to has become a log of its own."""
    async with EventLog.open(tmp_path / "log") as log:
        await add(log, 1)
        await log.backup(tmp_path / "copy")
        async with EventLog.open(tmp_path / "copy"):
            with pytest.raises(LogLockedError):
                await log.backup(tmp_path / "copy")


async def test_only_one_backup_at_a_time_writes_to_a_directory(tmp_path: Path, faults: FaultInjector) -> None:
    """If a backup takes longer than the interval between backups, the next one must not truncate its files."""
    async with EventLog.open(tmp_path / "log") as log:
        await add(log, 3)
        await log.rotate()
        gate = faults.freeze("sync")
        first = asyncio.create_task(log.backup(tmp_path / "copy"))
        await gate.reached()
        with pytest.raises(EventfoldError, match="another backup"):
            await log.backup(tmp_path / "copy")
        gate.open()
        await first
        await log.backup(tmp_path / "copy")
        assert await lines(tmp_path / "copy") == await lines(tmp_path / "log")


async def test_a_log_that_is_created_where_a_copy_is_written_keeps_its_events(
    tmp_path: Path, faults: FaultInjector
) -> None:
    """Otherwise the copy, which does not exist yet, would replace that log."""
    begun: list[bool] = []

    async def begin() -> None:
        async with EventLog.open(tmp_path / "copy") as other:
            await other.append(Event("live"))

    def sync(original: Callable[[int], None], fd: int) -> None:
        if not begun:
            begun.append(True)
            with ThreadPoolExecutor(1) as thread:
                thread.submit(asyncio.run, begin()).result()
        original(fd)

    async with EventLog.open(tmp_path / "log") as log:
        await add(log, 3)
        faults.replace("sync", sync)
        with pytest.raises(EventfoldError, match="was created"):
            await log.backup(tmp_path / "copy")
    assert begun
    async with EventLog.open(tmp_path / "copy") as other:
        assert [record.event.type async for record in other.read_full()] == ["live"]


async def test_a_damaged_log_is_not_copied_over_a_good_copy(tmp_path: Path) -> None:
    """Where the log's archive ends is unknown, so the copy is left alone."""
    source, copy = tmp_path / "log", tmp_path / "copy"
    async with EventLog.open(source) as log:
        await add(log, 10)
        await log.rotate()
        await log.backup(copy)
    before = contents(copy)
    data = bytearray((source / "archive.jsonl.zst").read_bytes())
    data[-20] ^= 1
    (source / "archive.jsonl.zst").write_bytes(data)

    async with EventLog.open(copy, read_only=True):
        pass
    async with EventLog.open(tmp_path / "elsewhere") as log:
        with pytest.raises(EventfoldError):
            await log.backup(copy)
    with pytest.raises(CorruptLogError):
        from eventfold._backup import backup

        await backup(EventReader(source), copy)
    assert contents(copy) == before


async def test_a_cancelled_backup_leaves_a_copy_that_can_be_finished(tmp_path: Path) -> None:
    """The backup stops after the chunk that it is copying."""
    source, copy = tmp_path / "log", tmp_path / "copy"
    async with EventLog.open(source) as log:
        for _ in range(3):
            await add(log, 100)
            await log.rotate()

        def cancel(done: int, total: int) -> None:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(log.backup(copy, cancel))

        copied = await lines(copy)
        assert copied == (await lines(source))[: len(copied)]
        await log.backup(copy)
        assert await lines(copy) == await lines(source)
