"""Finding a span of the archive: which commit records are read for it, and that old places mislead nobody."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from tests import support
from tests.crash.oracle import Opened, append
from tests.support import line

from eventfold import CorruptLogError, EventReader
from eventfold._files import archive, frames, span_lookup
from eventfold._files.archive import Archive
from eventfold._files.frames import RECORD_SIZE, write_frames


def lines(start: int, end: int) -> list[bytes]:
    """Returns the lines of these events."""
    return [line(n) for n in range(start, end)]


@pytest.fixture(autouse=True)
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes frames of a few lines each."""
    support.small_frames(monkeypatch, 200)


@pytest.fixture
def records_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the position of every commit record that is read."""
    positions: list[int] = []
    record_before = frames.record_before

    def counted(fd: int, position: int) -> frames.Span | None:
        positions.append(position)
        return record_before(fd, position)

    for module in (archive, span_lookup):
        monkeypatch.setattr(module, "record_before", counted)
    return positions


def span_count(directory: Path) -> int:
    """Returns how many spans the archive has."""
    opened = opened_archive(directory / "archive.jsonl.zst")
    try:
        return len(list(opened.spans()))
    finally:
        opened.close()


def opened_archive(path: Path) -> Archive:
    fd = os.open(path, os.O_RDWR)
    return Archive(path, fd, os.fstat(fd).st_size)


async def numbers_backwards(directory: Path) -> list[int]:
    """Returns the numbers of all events, newest first."""
    return [record.event.data["n"] async for record in EventReader(directory).read_back()]


def test_reading_backwards_reads_each_commit_record_a_few_times(tmp_path: Path, records_read: list[int]) -> None:
    """For each frame, not all records behind it; also after another rotation has added frames."""
    directory = tmp_path / "data"
    with Opened(directory) as opened:
        for start, end in ((0, 400), (400, 440)):
            append(opened.active, b"".join(lines(start, end)))
            opened.rotate()
            spans = span_count(directory)
            for _ in range(2):
                records_read.clear()
                found = asyncio.run(numbers_backwards(directory))

                assert found == list(range(end - 1, -1, -1))
                assert len(records_read) < 5 * spans

    assert spans > 100


def test_each_event_in_the_archive_is_found_by_a_few_commit_records(tmp_path: Path, records_read: list[int]) -> None:
    """This is how events that the index has found are read, and the hashes of lines."""
    directory = tmp_path / "data"
    with Opened(directory) as opened:
        append(opened.active, b"".join(lines(0, 400)))
        opened.rotate()

    async def look_up() -> int:
        reader = EventReader(directory)
        records = [record async for record in reader.read_from()]
        records_read.clear()
        found = [each async for each in reader._events_at([record.start_offset for record in records])]
        assert found == [[record] for record in records]
        for record in records:
            assert await reader.read_line_hash_before(record.end_offset) == record.line_hash
        return len(records)

    events = asyncio.run(look_up())

    assert events == 400
    assert len(records_read) < 10 * events


def test_places_of_frames_that_a_recovery_cut_mislead_nobody(tmp_path: Path) -> None:
    """The file is the same, but other frames are in the place of those that were cut."""
    path = tmp_path / "archive.jsonl.zst"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    written = lines(0, 60)
    end = write_frames(fd, 0, 0, written)
    for kept in (30, 29, 1, 0):
        opened = opened_archive(path)
        spans = list(opened.spans())
        for span in spans:
            assert opened.line_at(span.first_offset).data == written[spans.index(span)]
        opened.close()
        position, offset = (spans[kept - 1].after, spans[kept - 1].end_offset) if kept else (0, 0)
        os.truncate(path, position)
        more = [line(n, type="other" * (1 + n % 3)) for n in range(100 * kept, 100 * kept + 40)]
        written = written[:kept] + more
        end = write_frames(fd, position, offset, more)
        opened = opened_archive(path)
        at = 0
        for text in written:
            assert opened.line_at(at).data == text
            assert opened.block_before(at + len(text)).data == text
            at += len(text)
        opened.close()
    os.close(fd)
    assert end == path.stat().st_size


def test_a_damaged_commit_record_is_found_although_its_place_is_known(tmp_path: Path) -> None:
    """What comes before it is still found."""
    path = tmp_path / "archive.jsonl.zst"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    written = lines(0, 20)
    write_frames(fd, 0, 0, written)
    opened = opened_archive(path)
    spans = list(opened.spans())
    assert opened.line_at(0).data == written[0]
    os.pwrite(fd, b"\xff" * 8, spans[10].after - RECORD_SIZE + 20)

    assert opened.line_at(spans[9].first_offset).data == written[9]
    with pytest.raises(CorruptLogError):
        opened.line_at(spans[10].first_offset)
    opened.close()
    os.close(fd)
