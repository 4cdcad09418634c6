"""Other programs change the files: under a running writer, under a running tail, and before the log is opened.

Such a change causes a clear error, and never a silent loss or a hang.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from tests.crash.mounts import Disk, Ext4, ext4, tmpfs
from tests.processes import add_lines
from tests.support import event, line, numbers, write_log

from eventfold import CorruptLogError, Event, EventLog, EventReader, EventWriter, View, WriterFailedError
from eventfold._files import segments

Harm = Callable[[Path], object]
FOUR = b"".join(line(n) for n in range(4))
# The replacements for a log: one of the same length with other events, and a longer one with other line ends.
AS_LONG = b"".join(line(n) for n in range(4, 8))
LONGER = b"".join(line(n) for n in range(1000, 1020))


def put(directory: Path, data: bytes) -> None:
    """Replaces the log by another file, atomically."""
    write_log(directory.with_name("other"), data)
    os.replace(directory.with_name("other") / "app.jsonl", directory / "app.jsonl")


def delete(directory: Path) -> None:
    (directory / "app.jsonl").unlink()


def delete_what_has_another_link(directory: Path) -> None:
    os.link(directory / "app.jsonl", directory / "backup")
    delete(directory)


def cut(size: int) -> Harm:
    return lambda directory: os.truncate(directory / "app.jsonl", size)


HARMS: dict[str, Harm] = {
    "deleted": delete,
    "deleted, with another link": delete_what_has_another_link,
    "moved": lambda directory: (directory / "app.jsonl").rename(directory / "app.jsonl.1"),
    "replaced": lambda directory: put(directory, AS_LONG),
    "emptied": cut(0),
    "cut in a line": cut(len(FOUR) - 5),
    "made longer": lambda directory: add_lines(directory, line(9)),
}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
async def test_a_writer_whose_file_was_changed_refuses_appends(damaged_dir: Path, harm: Harm) -> None:
    """Each append raises an error that says so, nothing is written anywhere, and the log can be closed."""
    async with EventWriter.open(damaged_dir) as writer:
        await writer.append_many(event(n) for n in range(4))
        harm(damaged_dir)
        before = contents(damaged_dir)
        outcomes = await asyncio.gather(*(writer.append(event(n)) for n in range(10, 13)), return_exceptions=True)
        with pytest.raises(WriterFailedError):
            await writer.append(event(13))
        with pytest.raises(WriterFailedError):
            await writer.rotate()

    assert [type(error) for error in outcomes] == [WriterFailedError] * 3
    assert all("changed by another program" in str(error) for error in outcomes)
    assert contents(damaged_dir) == before


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
async def test_a_writer_whose_file_was_changed_does_not_rotate(damaged_dir: Path, harm: Harm) -> None:
    """A rotation would archive something that is no longer the log, or overwrite the file that replaced it."""
    async with EventWriter.open(damaged_dir) as writer:
        await writer.append_many(event(n) for n in range(4))
        harm(damaged_dir)
        before = contents(damaged_dir)
        with pytest.raises(WriterFailedError, match="changed by another program"):
            await writer.rotate()

    assert contents(damaged_dir) == before


async def test_a_writer_can_still_write_to_a_file_that_was_made_read_only(data_dir: Path) -> None:
    """Permissions are checked at the opening; a rotation makes a new file with the usual ones."""
    async with EventLog.open(data_dir) as log:
        await log.append(event(0))
        log.log_path.chmod(0o444)
        await log.append(event(1))
        await log.rotate()
        await log.append(event(2))
        found = await numbers(log)

    assert found == [0, 1, 2]


@pytest.mark.skipif(not os.geteuid(), reason="root may write whatever its mode says")
async def test_a_read_only_file_can_be_read_but_not_opened_for_writing(data_dir: Path) -> None:
    """The error is the system's own."""
    write_log(data_dir, FOUR)
    (data_dir / "app.jsonl").chmod(0o444)
    with pytest.raises(PermissionError):
        await EventLog.open(data_dir)
    found = await numbers(EventReader(data_dir))

    assert found == [0, 1, 2, 3]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Ext4]:
    """A file system with support for immutable files, which not even root may write to."""
    with ext4(tmp_path / "disk") as mounted:
        yield mounted


async def test_an_immutable_file_refuses_appends_and_openings(disk: Ext4) -> None:
    """Once the file is writable again, an open writer must be reopened, and nothing is lost."""
    directory = disk.path / "data"
    async with EventLog.open(directory) as log:
        await log.append(event(0))
        disk.protect(log.log_path, True)
        with pytest.raises((OSError, WriterFailedError)):
            await log.append(event(1))
    with pytest.raises(PermissionError):
        await EventLog.open(directory)
    during = await numbers(EventReader(directory))
    disk.protect(directory / "app.jsonl", False)
    async with EventLog.open(directory) as log:
        await log.append(event(2))
        after = await numbers(log)

    assert during == [0]
    assert after == [0, 2]


# Under a tail

TAIL_HARMS: dict[str, Harm] = {
    "deleted": delete,
    "replaced by one as long": lambda directory: put(directory, AS_LONG),
    "replaced by a longer one": lambda directory: put(directory, LONGER),
    "replaced by a shorter one": lambda directory: put(directory, line(0)),
    "emptied": cut(0),
    "cut after a line": cut(len(line(0))),
    "cut in a line": cut(len(FOUR) - 5),
}


@pytest.mark.parametrize("harm", TAIL_HARMS.values(), ids=TAIL_HARMS)
async def test_a_tail_ends_with_an_error_if_its_log_was_changed(damaged_dir: Path, harm: Harm) -> None:
    """Events that replaced those that it has yielded are not yielded, since it is unknown which of them are new."""
    write_log(damaged_dir, FOUR)
    given: list[int] = []

    async def follow() -> None:
        async for record in EventReader(damaged_dir).tail(0):
            given.append(record.event.data["n"])

    tail = asyncio.create_task(follow())
    while len(given) < 4:
        await asyncio.sleep(0.001)
    harm(damaged_dir)
    n = 100
    async with asyncio.timeout(20):
        while not tail.done():
            add_lines(damaged_dir, line(n))
            n += 1
            await asyncio.sleep(0.01)

    with pytest.raises(CorruptLogError, match=r"app\.jsonl"):
        await tail
    assert given == [0, 1, 2, 3]


async def test_a_tail_ends_with_an_error_if_a_directory_replaces_its_log(damaged_dir: Path) -> None:
    """The error is the system's own."""
    write_log(damaged_dir, FOUR)
    async with asyncio.timeout(20), aclosing(EventReader(damaged_dir).tail(0)) as tail:
        for _ in range(4):
            await anext(tail)
        delete(damaged_dir)
        (damaged_dir / "app.jsonl").mkdir()
        with pytest.raises(IsADirectoryError):
            await anext(tail)


@pytest.mark.skipif(not os.geteuid(), reason="root may read whatever its mode says")
async def test_a_tail_ends_with_an_error_if_it_may_no_longer_read_its_log(damaged_dir: Path) -> None:
    """The error is the system's own."""
    write_log(damaged_dir, FOUR)
    async with asyncio.timeout(20), aclosing(EventReader(damaged_dir).tail(0)) as tail:
        for _ in range(4):
            await anext(tail)
        with (damaged_dir / "app.jsonl").open("ab") as file:
            (damaged_dir / "app.jsonl").chmod(0)
            file.write(line(4))
        with pytest.raises(PermissionError):
            await anext(tail)


async def test_reading_continues_in_a_file_that_was_deleted_or_replaced(
    damaged_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is still open."""
    monkeypatch.setattr(segments, "BLOCK_SIZE", 1000)
    write_log(damaged_dir, *map(line, range(1000)))
    async with aclosing(EventReader(damaged_dir).read_full()) as reading:
        found = [(await anext(reading)).event.data["n"]]
        put(damaged_dir, AS_LONG)
        found += [record.event.data["n"] async for record in reading]

    assert found == list(range(1000))


async def test_reading_ends_with_an_error_if_the_file_is_truncated(damaged_dir: Path) -> None:
    """Before the error, it returns events that were there, in order."""
    write_log(damaged_dir, *map(line, range(20_000)))
    found = []
    async with aclosing(EventReader(damaged_dir).read_full()) as reading:
        found.append((await anext(reading)).event.data["n"])
        os.truncate(damaged_dir / "app.jsonl", 0)
        with pytest.raises(CorruptLogError, match="the file ends here"):
            async for record in reading:
                found.append(record.event.data["n"])

    assert found == list(range(len(found)))
    assert len(found) < 20_000


# A read-only file system


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Disk]:
    """A file system with a log of four events; the test makes it read-only when it has finished writing."""
    with tmpfs(tmp_path / "disk") as mounted:
        write_log(mounted.path / "data", FOUR)
        yield mounted


def count(state: int, event: Event) -> int:
    return state + 1


async def test_a_log_on_a_read_only_file_system_can_be_read(read_only: Disk) -> None:
    """Views fold, and tails and consumers yield events; whatever would write raises the system's own error."""
    directory = read_only.path / "data"
    async with EventLog.open(directory) as log:
        await log.rotate()
        await log.append(event(4))
    read_only.make_read_only()
    with pytest.raises(OSError, match="Read-only file system"):
        await EventLog.open(directory)
    with pytest.raises(OSError, match="Read-only file system"):
        await EventLog.open(read_only.path / "new")
    async with EventLog.open(directory, views=[View("count", count, 0)], read_only=True) as log:
        found = await numbers(log)
        state = log.view("count")
        async with aclosing(log.tail(0)) as tail:
            tailed = [(await anext(tail)).event.data["n"] for _ in range(5)]
        consumer = log.consumer("mailer")
        async for record in consumer:
            with pytest.raises(OSError, match="Read-only file system"):
                await consumer.commit(record)
            break

    assert found == tailed == [0, 1, 2, 3, 4]
    assert state == 5
