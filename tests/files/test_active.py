"""Opening the active log: what a crash left at its end is cut and kept; damage in the middle is left alone."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tests.support import FaultInjector, event, line, numbers, records, write_log

from eventfold import CorruptLogError, EventReader, EventWriter, Head, line_hash

TAILS = {
    "half a line": line(2)[:20],
    "one byte": b"{",
    "all but the newline": line(2)[:-1],
    "NUL bytes": b"\0" * 5000,
    "half a line and NUL bytes": line(2)[:10] + b"\0" * 100,
    "a long half line": b'{"type":"a","data":"' + b"x" * 100_000,
    "garbage": b"\xff\xfe\r\t",
    "an open batch": line(2, batch="1,3") + line(3, batch="2,3"),
    "an open batch of one line": line(2, batch="1,2"),
    "an open batch and half a line": line(2, batch="1,3") + line(3, batch="2,3") + line(4, batch="3,3")[:-1],
    "an open batch and NUL bytes": line(2, batch="1,3") + b"\0" * 64,
    "two open batches": line(2, batch="1,2") + line(3, batch="1,3") + line(4, batch="2,3"),
    "a long open batch": b"".join(line(2, batch=f"{i},1001") for i in range(1, 1001)),
}
WHOLE = line(0) + line(1)


@pytest.mark.parametrize("tail", TAILS)
async def test_an_incomplete_end_is_cut_off_and_kept_with_a_warning(
    damaged_dir: Path, caplog: pytest.LogCaptureFixture, tail: str
) -> None:
    """The log continues after its last complete line, and the removed bytes go into a file named after their offset."""
    write_log(damaged_dir, WHOLE, TAILS[tail])
    with caplog.at_level(logging.WARNING, "eventfold"):
        async with EventWriter.open(damaged_dir) as writer:
            head = writer.head
            await writer.append(event(9))
            found = await numbers(writer.reader())
    torn = damaged_dir / f"app.jsonl.torn.{len(WHOLE)}"

    assert head == Head(len(WHOLE), line_hash(line(1)))
    assert found == [0, 1, 9]
    assert torn.read_bytes() == TAILS[tail]
    assert [(record.name, record.levelname) for record in caplog.records] == [("eventfold", "WARNING")]
    assert f"cut {len(TAILS[tail])} bytes" in caplog.text
    assert torn.name in caplog.text


@pytest.mark.parametrize("tail", TAILS)
async def test_a_reader_ignores_an_incomplete_end(damaged_dir: Path, tail: str) -> None:
    """Before a writer has cut it, readers stop after the last complete line or batch, and change nothing."""
    data = write_log(damaged_dir, WHOLE, TAILS[tail])
    reader = EventReader(damaged_dir)
    found, head = await numbers(reader), await reader.head()

    assert found == [0, 1]
    assert head == Head(len(WHOLE), line_hash(line(1)))
    assert (damaged_dir / "app.jsonl").read_bytes() == data


@pytest.mark.parametrize("tail", TAILS)
async def test_a_log_with_only_an_incomplete_line_is_empty(damaged_dir: Path, tail: str) -> None:
    """The very first write may be the one that was interrupted."""
    write_log(damaged_dir, TAILS[tail])
    before = await EventReader(damaged_dir).head()
    async with EventWriter.open(damaged_dir) as writer:
        head = writer.head
        result = await writer.append(event(1))

    assert before == head == (0, "")
    assert result.start_offset == 0
    assert (damaged_dir / "app.jsonl.torn.0").read_bytes() == TAILS[tail]


async def test_an_intact_log_is_opened_without_a_warning(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is cut, kept or logged."""
    data = write_log(data_dir, WHOLE, line(2, batch="1,2"), line(3, batch="2,2"))
    with caplog.at_level(logging.DEBUG, "eventfold"):
        async with EventWriter.open(data_dir) as writer:
            head = writer.head

    assert head == Head(len(data), line_hash(line(3, batch="2,2")))
    assert sorted(path.name for path in data_dir.iterdir()) == ["app.jsonl", "app.jsonl.base"]
    assert caplog.records == []


async def test_the_bytes_are_kept_before_they_are_cut_off(damaged_dir: Path, faults: FaultInjector) -> None:
    """If they can't be saved, nothing is cut, and the opening fails with the system's error."""
    data = write_log(damaged_dir, WHOLE, line(2)[:20])
    faults.fail("rename")
    with pytest.raises(OSError, match="made to fail"):
        await EventWriter.open(damaged_dir)
    after = (damaged_dir / "app.jsonl").read_bytes()
    async with EventWriter.open(damaged_dir) as writer:
        found = await numbers(writer.reader())

    assert after == data
    assert found == [0, 1]


async def test_valid_lines_after_damage_are_never_cut_off(damaged_dir: Path) -> None:
    """Damage in the middle stays as it is; reading reports it after the good events before it."""
    data = write_log(damaged_dir, line(0), b"\0" * 30 + b"\n", line(1))
    async with EventWriter.open(damaged_dir) as writer:
        await writer.append(event(2))
        found = []
        with pytest.raises(CorruptLogError) as caught:
            async for record in writer.reader().read_full():
                found.append(record.event.data["n"])

    assert found == [0]
    assert caught.value.offset == len(line(0))
    assert (damaged_dir / "app.jsonl").read_bytes() == data + line(2)


async def test_an_incomplete_batch_in_the_middle_is_never_cut_off(damaged_dir: Path) -> None:
    """Complete lines follow it, so it is damage and not a torn tail."""
    data = write_log(damaged_dir, line(0), line(1, batch="1,3"), line(2))
    async with EventWriter.open(damaged_dir) as writer:
        found = []
        with pytest.raises(CorruptLogError, match="batch") as caught:
            async for record in writer.reader().read_full():
                found.append(record.event.data["n"])

    assert found == [0]
    assert caught.value.offset == len(line(0))
    assert (damaged_dir / "app.jsonl").read_bytes() == data


async def test_the_bytes_of_an_earlier_recovery_are_not_read_as_a_log(damaged_dir: Path) -> None:
    """Two recoveries leave two files, and neither is read as part of the log."""
    write_log(damaged_dir, WHOLE, b"first")
    async with EventWriter.open(damaged_dir) as writer:
        await writer.append(event(2))
    with (damaged_dir / "app.jsonl").open("ab") as file:
        file.write(b"second")
    async with EventWriter.open(damaged_dir) as writer:
        found = await numbers(writer.reader())
    kept = {path.name: path.read_bytes() for path in damaged_dir.glob("*.torn.*")}

    assert found == [0, 1, 2]
    assert kept == {
        f"app.jsonl.torn.{len(WHOLE)}": b"first",
        f"app.jsonl.torn.{len(WHOLE + line(2))}": b"second",
    }


async def test_the_bytes_of_an_earlier_recovery_at_the_same_offset_are_kept(damaged_dir: Path) -> None:
    """If a program crashes twice in its first write after the same event, both remain for a person to look at."""
    for torn in (b"first", b"second"):
        write_log(damaged_dir, WHOLE, torn)
        async with EventWriter.open(damaged_dir):
            pass
    kept = b"".join(path.read_bytes() for path in damaged_dir.glob("*.torn.*"))

    assert b"first" in kept
    assert b"second" in kept


async def test_opening_syncs_the_files_of_a_killed_process(data_dir: Path, faults: FaultInjector) -> None:
    """Data that is only in the page cache must be on disk before anything relies on it."""
    write_log(data_dir, WHOLE)
    syncs, directories = faults.count("sync"), faults.count("sync_dir")
    async with EventWriter.open(data_dir):
        opened = len(syncs), directories[-1:]

    assert opened == (1, [(data_dir,)])


async def test_opening_does_not_read_the_whole_log(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the end of a log of a megabyte is read."""
    import os

    write_log(data_dir, b"".join(line(n) for n in range(20_000)))
    pread, read = os.pread, []

    def noted(fd: int, size: int, position: int) -> bytes:
        read.append(size)
        return pread(fd, size, position)

    monkeypatch.setattr(os, "pread", noted)
    async with EventWriter.open(data_dir) as writer:
        opened = sum(read)
        head = writer.head
    monkeypatch.undo()

    assert head.offset == (data_dir / "app.jsonl").stat().st_size > 1_000_000
    assert opened < 100_000


async def test_a_last_line_of_any_length_is_found(data_dir: Path) -> None:
    """The head's hash covers the whole line, however far back the line begins."""
    big = b'{"type":"a","data":{"n":"' + b"x" * 3_000_000 + b'"},"ts":1}\n'
    data = write_log(data_dir, line(0), big)
    async with EventWriter.open(data_dir) as writer:
        head = writer.head
        found = await records(writer.reader())

    assert head == Head(len(data), line_hash(big))
    assert [record.line_hash for record in found] == [line_hash(line(0)), line_hash(big)]
