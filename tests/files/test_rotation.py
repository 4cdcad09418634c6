"""Rotation: its steps, how a writer finishes an interrupted one, and that appends don't notice it."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import itertools
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests import support
from tests.crash.oracle import Opened, append, read_now, zstd
from tests.crash.recorder import read_files
from tests.support import FaultInjector, Gate, event, line, numbers, write_log

from eventfold import CorruptLogError, EventLog, EventReader, EventWriter, LogLockedError, WriterFailedError, _rotator
from eventfold._files import committer, operations
from eventfold._files.paths import Layout


def lines(start: int, end: int) -> bytes:
    """Returns the lines of these events."""
    return b"".join(map(line, range(start, end)))


SIZE = len(line(0))
# where the log of `leave_rotation` was rotated before, and where it ends
BASE, END = len(lines(0, 3)), len(lines(0, 14))


@pytest.fixture
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes frames of four lines each."""
    support.small_frames(monkeypatch, 4 * SIZE)


@pytest.fixture
def data_dir_now(tmp_path: Path) -> Path:
    """A data directory for tests without an event loop."""
    return tmp_path / "data"


class LeftError(Exception):
    """Simulates the death of a process in a rotation."""


def leave_rotation(directory: Path, frames: int, rest: bytes = b"") -> Layout:
    """A log of 3 archived and 11 active lines whose rotation wrote some frames and then `rest` before it died."""
    with Opened(directory) as opened:
        append(opened.active, lines(0, 3))
        opened.rotate()
        append(opened.active, lines(3, 14))
        calls = itertools.count()

        def die(fd: int, data: bytes, position: int) -> None:
            if next(calls) == frames:
                os.pwrite(fd, data[:40] if rest == b"torn" else rest, position)
                raise LeftError
            os.pwrite(fd, data, position)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(operations, "write", die)
            patch.setattr(operations, "truncate", lambda fd, size: None)
            with pytest.raises(LeftError):
                opened.rotate()
    return opened.layout


@pytest.mark.parametrize("rest", [b"", b"torn", bytes(100), b"\x28", bytes(3)])
def test_a_rotation_without_a_complete_record_is_undone(data_dir_now: Path, small_frames: None, rest: bytes) -> None:
    """The archive is cut to its previous size, the new file is deleted, and the log is the same as before."""
    layout = leave_rotation(data_dir_now, 0, rest)
    left = layout.next_file()
    before = read_now(data_dir_now)
    with Opened(data_dir_now) as opened:
        base = opened.active.base
    files = read_files(data_dir_now)

    assert left.base == base == BASE
    assert sorted(files) == ["app.jsonl", "app.jsonl.base", "archive.jsonl.zst"]
    assert len(files["archive.jsonl.zst"]) == left.archive_size
    assert read_now(data_dir_now) == before
    assert before[1] == lines(0, 14)


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("rest", [b"", b"torn", bytes(100)])
def test_a_rotation_with_a_complete_record_is_finished(
    data_dir_now: Path, small_frames: None, frames: int, rest: bytes
) -> None:
    """Complete frames stay, since readers may have used them; what follows them is cut, and the rest is archived."""
    layout = leave_rotation(data_dir_now, frames, rest)
    archive = layout.archive_path.read_bytes()
    before = read_now(data_dir_now)
    with Opened(data_dir_now) as opened:
        base = opened.active.base
    after = layout.archive_path.read_bytes()

    assert base == END
    assert sorted(read_files(data_dir_now)) == ["app.jsonl", "app.jsonl.base", "archive.jsonl.zst"]
    assert after.startswith(archive[: len(archive) - (40 if rest == b"torn" else len(rest))])
    assert zstd.decompress(after) == before[1] == lines(0, 14)
    assert read_now(data_dir_now) == before


def test_a_completed_rotation_keeps_lines_that_were_appended_during_it(data_dir_now: Path, small_frames: None) -> None:
    """Lines that were appended during the rotation move to the new active log, and a torn one is cut."""
    leave_rotation(data_dir_now, 2)
    with data_dir_now.joinpath("app.jsonl").open("ab") as file:
        file.write(line(14) + line(15) + b'{"type":"to')
    with Opened(data_dir_now) as opened:
        base, head = opened.active.base, opened.active.head

    assert base == END
    assert head.offset == len(lines(0, 16))
    assert (data_dir_now / "app.jsonl").read_bytes() == line(14) + line(15)
    assert (data_dir_now / f"app.jsonl.torn.{len(lines(0, 16))}").read_bytes() == b'{"type":"to'
    assert read_now(data_dir_now)[1] == lines(0, 16)


def shorten_log(layout: Layout) -> None:
    """Makes `app.jsonl` shorter than the part that is being archived."""
    os.truncate(layout.log_path, END - BASE - 1)


def change_log(layout: Layout) -> None:
    """Changes a line of `app.jsonl` that is already archived."""
    data = layout.log_path.read_bytes()
    layout.log_path.write_bytes(data.replace(b'"n":4}', b'"n":5}', 1))


def remove_archive(layout: Layout) -> None:
    """Removes the archive."""
    layout.archive_path.unlink()


def shorten_archive(layout: Layout) -> None:
    """Makes the archive shorter than it was when the rotation began."""
    os.truncate(layout.archive_path, layout.next_file().archive_size - 1)


def damage_new_frame(layout: Layout) -> None:
    """Changes a byte of the first of the two new frames."""
    data = bytearray(layout.archive_path.read_bytes())
    data[layout.next_file().archive_size + 20] ^= 1
    layout.archive_path.write_bytes(data)


def damage_new_record(layout: Layout) -> None:
    """Changes a byte of the record of the first new frame, which another frame follows."""
    data = bytearray(layout.archive_path.read_bytes())
    at = data.index(b"EVTFOLD\0", layout.next_file().archive_size)
    data[at + 20] ^= 1
    layout.archive_path.write_bytes(data)


def replace_log_by_lines_of_another(layout: Layout) -> None:
    """Replaces the lines in `app.jsonl` by others of the same length."""
    layout.log_path.write_bytes(b"".join(map(line, range(13, 2, -1))))


@pytest.mark.parametrize(
    "contradict",
    [
        shorten_log,
        change_log,
        remove_archive,
        shorten_archive,
        damage_new_frame,
        damage_new_record,
        replace_log_by_lines_of_another,
    ],
)
async def test_files_that_contradict_each_other_are_not_touched(
    damaged_dir: Path, small_frames: None, contradict: Any
) -> None:
    """Opening raises an error that says where, changes no byte, and releases the lock."""
    layout = await asyncio.to_thread(leave_rotation, damaged_dir, 2)
    await asyncio.to_thread(contradict, layout)
    before = read_files(damaged_dir)
    for _ in range(2):
        with pytest.raises(CorruptLogError) as caught:
            await EventLog.open(damaged_dir)

        assert caught.value.path in (layout.log_path, layout.archive_path)
        assert 0 <= caught.value.offset <= END
        assert read_files(damaged_dir) == before


async def test_lines_after_old_damage_in_the_archive_can_be_read_during_a_rotation(
    damaged_dir: Path, small_frames: None
) -> None:
    """Only the events in the damaged frame are missing: reading reports that, and reading from after it works."""
    layout = await asyncio.to_thread(leave_rotation, damaged_dir, 2)
    data = bytearray(layout.archive_path.read_bytes())
    data[20] ^= 1
    layout.archive_path.write_bytes(data)
    async with EventWriter.open(damaged_dir) as writer:
        with pytest.raises(CorruptLogError) as caught:
            await numbers(writer.reader())
        found = [record.event.data["n"] async for record in writer.reader().read_from(BASE)]

    assert (caught.value.path, caught.value.offset) == (layout.archive_path, 0)
    assert found == list(range(3, 14))


def test_the_first_archive_is_complete_when_it_appears(
    data_dir_now: Path, small_frames: None, monkeypatch: Any
) -> None:
    """There is no archive before the rename, and all of it after the rename: it is never empty."""
    seen = []
    original = operations.write

    def look(fd: int, data: bytes, position: int) -> None:
        original(fd, data, position)
        seen.append((data_dir_now / "archive.jsonl.zst").exists())

    with Opened(data_dir_now) as opened:
        append(opened.active, lines(0, 9))
        monkeypatch.setattr(operations, "write", look)
        opened.rotate()

    assert seen == [False] * 3 + [True]  # the last one is the base file
    assert zstd.decompress((data_dir_now / "archive.jsonl.zst").read_bytes()) == lines(0, 9)


def test_the_name_of_the_new_file_describes_the_log(data_dir_now: Path) -> None:
    """The name contains the base, the size and the archive's size at the beginning of the rotation."""
    layout = leave_rotation(data_dir_now, 0)
    name = layout.next_file().path.name

    assert name == f"app.jsonl.next.{BASE}.{END - BASE}.{layout.archive_path.stat().st_size}"
    assert layout.next_file().path.read_bytes() == b""


async def test_rotating_an_empty_log_does_nothing(data_dir: Path) -> None:
    """An archive always has lines, and a second rotation in a row adds nothing."""
    async with EventLog.open(data_dir) as log:
        await log.rotate()
        empty = read_files(data_dir)
        await log.append(event(1))
        await log.rotate()
        once = read_files(data_dir)
        await log.rotate()

        assert empty["app.jsonl"] == b""
        assert "archive.jsonl.zst" not in empty
        assert read_files(data_dir) == once


async def test_a_log_that_is_too_large_is_rotated_when_it_is_opened(data_dir: Path) -> None:
    """`max_log_size` also counts what was there before the opening."""
    write_log(data_dir, *map(line, range(20)))
    async with EventLog.open(data_dir, max_log_size=10 * SIZE):
        pass

    assert (data_dir / "app.jsonl").read_bytes() == b""
    assert await numbers(EventReader(data_dir)) == list(range(20))


async def test_a_log_that_grows_is_rotated_automatically(data_dir: Path) -> None:
    """The log is rotated each time it reaches `max_log_size`, and the offsets continue."""
    async with EventLog.open(data_dir, max_log_size=10 * SIZE) as log:
        results = [await log.append(event(n)) for n in range(100)]

    assert [result.start_offset for result in results] == [len(lines(0, n)) for n in range(100)]
    assert (data_dir / "app.jsonl").stat().st_size < 20 * SIZE
    assert await numbers(EventReader(data_dir)) == list(range(100))


async def test_appends_do_not_wait_for_the_archive(data_dir: Path, faults: FaultInjector) -> None:
    """While the archive can't be written, appends are acknowledged and can be read; the rotation then includes them."""
    async with EventLog.open(data_dir) as log:
        await log.append(event(0))
        active = log._writer._committer.active
        gate = Gate()
        faults.gates.append(gate)

        def frozen(original: Any, fd: int, data: bytes, position: int) -> None:
            if fd != active.fd:
                gate.pass_through()
            original(fd, data, position)

        faults.replace("write", frozen)
        rotation = asyncio.create_task(log.rotate())
        await gate.reached()
        for n in range(1, 20):
            await asyncio.wait_for(log.append(event(n)), 10)
        meanwhile = await numbers(log)
        from_elsewhere = await numbers(EventReader(data_dir))
        under_way = not rotation.done()
        gate.open()
        await rotation

        assert under_way
        assert meanwhile == from_elsewhere == list(range(20))
        assert await numbers(log) == list(range(20))
        assert await log.active_log_size() == len(lines(1, 20))


@pytest.mark.parametrize("operation", ["write", "sync", "rename"])
@pytest.mark.parametrize("number", [1, 2, 3])
async def test_a_failed_rotation_affects_no_append_and_is_continued_by_the_next(
    data_dir: Path, small_frames: None, monkeypatch: pytest.MonkeyPatch, operation: str, number: int
) -> None:
    """`rotate` raises the disk's error; appends work before and after the next rotation, which does the rest."""
    async with EventLog.open(data_dir) as log:
        for n in range(5):
            await log.append(event(n))
        await log.rotate()
        for n in range(5, 25):
            await log.append(event(n))
        active, calls = log._writer._committer.active, itertools.count(1)
        original = getattr(operations, operation)

        def failing(*args: Any) -> Any:
            due = operation == "rename" or args[0] != active.fd
            if due and next(calls) >= (1 if operation == "rename" else number):
                raise OSError(errno.ENOSPC, "made to fail")
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(operations, operation, failing)
            with pytest.raises(OSError, match="made to fail"):
                await log.rotate()
            await log.append(event(25))
            during = await numbers(log), await numbers(EventReader(data_dir))
        await log.append(event(26))
        await log.rotate()
        after = await numbers(log)

        assert during == (list(range(26)), list(range(26)))
        assert after == list(range(27))
        assert await log.active_log_size() == 0
        assert not list(data_dir.glob("app.jsonl.next.*"))


async def test_a_failed_automatic_rotation_logs_a_warning_and_is_tried_again(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While the archive's disk is full, appends are acknowledged; once there is space, the log is rotated."""
    monkeypatch.setattr(_rotator, "RETRY_INTERVAL", 0.0)
    async with EventLog.open(data_dir, max_log_size=5 * SIZE) as log:
        await log.append(event(0))
        original, active, failures = operations.write, log._writer._committer.active, []

        def full(fd: int, data: bytes, position: int) -> None:
            if fd != active.fd:
                failures.append(fd)
                raise OSError(errno.ENOSPC, "made to fail")
            original(fd, data, position)

        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "eventfold"):
            patch.setattr(operations, "write", full)
            for n in range(1, 20):
                await log.append(event(n))
            while log._writer._rotator.running:
                await asyncio.wait(list(log._writer._rotator.running))
        await log.append(event(20))

        assert failures
        assert {record.levelname for record in caplog.records} == {"WARNING"}
        assert "could not be rotated" in caplog.text
        assert await numbers(log) == list(range(21))
    assert (data_dir / "app.jsonl").stat().st_size < 5 * SIZE
    assert await numbers(EventReader(data_dir)) == list(range(21))


async def test_a_full_disk_when_opening_leaves_a_rotation_for_later(
    data_dir: Path, small_frames: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log opens and accepts appends, and the next rotation finishes the interrupted one."""
    await asyncio.to_thread(leave_rotation, data_dir, 1)

    def full(fd: int, data: bytes, position: int) -> None:
        raise OSError(errno.ENOSPC, "made to fail")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "eventfold"):
        patch.setattr(operations, "write", full)
        log = await EventLog.open(data_dir)
    try:
        await log.append(event(14))
        before = await numbers(log), await numbers(EventReader(data_dir))
        await log.rotate()
        after, size = await numbers(log), await log.active_log_size()
    finally:
        await log.aclose()

    assert "could not be completed" in caplog.text
    assert before == (list(range(15)), list(range(15)))
    assert (after, size) == (list(range(15)), 0)


async def test_an_opening_that_cannot_finish_a_rotation_releases_the_lock(
    data_dir: Path, small_frames: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory could not be synced after the switch, and the log can be opened again in the same process."""
    await asyncio.to_thread(leave_rotation, data_dir, 1)
    original, renamed = operations.sync_dir, []
    rename = operations.rename

    def failing(path: Path) -> None:
        if data_dir / "app.jsonl" in renamed:
            raise OSError(errno.EIO, "made to fail")
        original(path)

    def noted(source: Path, target: Path) -> None:
        renamed.append(target)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(operations, "sync_dir", failing)
        patch.setattr(operations, "rename", noted)
        with pytest.raises(WriterFailedError):
            await EventLog.open(data_dir)
    async with EventLog.open(data_dir) as log:
        found = await numbers(log)

    assert data_dir / "app.jsonl" in renamed
    assert found == list(range(14))


async def test_no_other_process_can_lock_the_log_during_or_after_a_rotation(data_dir: Path) -> None:
    """The new file is locked before it gets its name, and the old file stays locked for processes that have it open."""
    async with EventLog.open(data_dir) as log:
        await log.append(event(1))
        held_open = os.open(log.log_path, os.O_RDWR)
        try:
            await log.rotate()
            with pytest.raises(BlockingIOError):
                fcntl.flock(held_open, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with pytest.raises(LogLockedError):
                await EventLog.open(data_dir)
        finally:
            os.close(held_open)


async def test_the_old_file_is_closed_after_a_while(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old file stays locked while another process might be about to lock it, but not forever."""
    monkeypatch.setattr(committer, "KEEP_LOCKED", 0.0)
    async with EventLog.open(data_dir) as log:
        await log.append(event(1))
        held_open = os.open(log.log_path, os.O_RDWR)
        try:
            await log.rotate()
            while log._writer._committer._old_files:
                await asyncio.sleep(0)
            fcntl.flock(held_open, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(held_open)

        assert await numbers(log) == [1]


async def test_an_opening_checks_the_file_s_name_again_after_locking(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that opened the file before a rotation and locks it afterwards notices that its name is gone."""
    write_log(data_dir, line(0))
    original, moved = operations.lock, []

    def lock_late(fd: int) -> bool:
        if not moved:
            moved.append((data_dir / "app.jsonl").rename(data_dir / "was"))
            write_log(data_dir, line(0), line(1))
        return original(fd)

    monkeypatch.setattr(operations, "lock", lock_late)
    async with EventLog.open(data_dir) as log:
        found = await numbers(log)

    assert moved
    assert found == [0, 1]


async def test_offsets_and_heads_do_not_depend_on_rotations(data_dir: Path, small_frames: None) -> None:
    """Offsets, hashes and heads are the same with a rotation after each append as without any."""
    results: list[list[Any]] = [[], []]
    for rotating, directory in enumerate((data_dir.parent / "plain", data_dir)):
        async with EventLog.open(directory) as log:
            for n in range(12):
                results[rotating].append(await log.append_if(event(n), *log.head))
                if rotating:
                    await log.rotate()
                results[rotating].append(log.head)
                results[rotating].append(await log.read_line_hash_before(log.head.offset))
            ends = [result.end_offset for result in results[rotating][0::9]]
            results[rotating] += [await log.read_line_hash_before(end) for end in ends]
            results[rotating] += [[r.event.data async for r in log.read_from(end)] for end in ends]

    assert results[0] == results[1]


MEMORY = """
import asyncio, pathlib, re, resource, sys
from eventfold import EventLog

def peak():
    # On Linux, what `getrusage` says counts the process from which this one was forked, too.
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)

async def main():
    async with EventLog.open(sys.argv[1]) as log:
        before = peak()
        await log.rotate()
        rotated = peak()
        count = 0
        async for piece in log.read_slices():
            count += len(piece.events)
        print(count, rotated - before, peak() - before)

asyncio.run(main())
"""


async def test_rotating_and_reading_a_large_log_takes_little_memory(tmp_path: Path) -> None:
    """100 MB are archived and read in another process, which needs less than 64 MiB more than before."""
    size = 100_000_000
    lines = b"".join(
        b'{"type":"counted","data":{"n":%d,"text":"%s"},"ts":1700000000}\n' % (n, os.urandom(450).hex().encode())
        for n in range(1000)
    )
    directory = tmp_path / "data"
    directory.mkdir()
    with (directory / "app.jsonl").open("wb") as file:
        for _ in range(size // len(lines) + 1):
            file.write(lines)
    output = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", MEMORY, str(directory)], capture_output=True, check=True
    )
    count, rotating, in_all = map(int, output.stdout.split())
    print(f"rotating: {rotating} KiB on top, reading back: {in_all} KiB")

    assert count == (size // len(lines) + 1) * 1000
    assert in_all < 64 * 1024


async def test_a_rotation_whose_last_newline_is_damaged_is_refused(damaged_dir: Path) -> None:
    """The rotation's file says that a line ends there, and the log says that it does not."""
    data = line(0) + line(1)
    damaged_dir.mkdir()
    damaged_dir.joinpath("app.jsonl").write_bytes(data[:-1] + b"x" + line(2))
    damaged_dir.joinpath(f"app.jsonl.next.0.{len(data)}.0").touch()
    with pytest.raises(CorruptLogError) as caught:
        await EventWriter.open(damaged_dir)

    assert caught.value.offset == len(data)
    assert damaged_dir.joinpath(f"app.jsonl.next.0.{len(data)}.0").exists()


@pytest.mark.parametrize(("left_out", "whole"), [(85, 1), (80, 2), (79, 2), (1, 2)])
async def test_an_archive_truncated_inside_a_frame_or_its_record_is_reported(
    damaged_dir: Path, left_out: int, whole: int
) -> None:
    """Only a rotation leaves that behind in a crash: readers return what is before it, and writers change nothing."""
    async with EventWriter.open(damaged_dir) as writer:
        for n in range(2):
            await writer.append(event(n))
            await writer.rotate()
    size = writer.archive_path.stat().st_size
    os.truncate(writer.archive_path, size - left_out)
    found = []
    with pytest.raises(CorruptLogError, match="ends in a frame"):
        async for record in EventReader(damaged_dir).read_full():
            found.append(record.event.data["n"])
    with pytest.raises(CorruptLogError, match="ends in a frame"):
        await EventWriter.open(damaged_dir)

    assert found == list(range(whole))
    assert writer.archive_path.stat().st_size == size - left_out
