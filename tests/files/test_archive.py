"""The archive: frames and records, what a plain decoder reads from them, and what damage causes."""

from __future__ import annotations

import asyncio
import os
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from tests import support
from tests.crash.oracle import Opened, Oracle, append, read, zstd
from tests.crash.recorder import read_files, write_files
from tests.support import event, line, numbers

from eventfold import CorruptLogError, Event, EventLog, EventReader, EventWriter
from eventfold._files import archive
from eventfold._files.archive import Archive
from eventfold._files.frames import RECORD_SIZE

RECORD = struct.Struct("<II8sIIQQQQQQQ")


@pytest.fixture
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes frames of a few lines each."""
    support.small_frames(monkeypatch, 200)


def lines(start: int, end: int) -> bytes:
    """Returns the lines of these events."""
    return b"".join(map(line, range(start, end)))


def rotated(directory: Path) -> bytes:
    """Creates a log with an archive of several frames from two rotations, and an active log; returns all lines."""
    with Opened(directory) as opened:
        append(opened.active, lines(0, 9))
        opened.rotate()
        append(opened.active, lines(9, 20))
        opened.rotate()
        append(opened.active, lines(20, 25))
    return lines(0, 25)


def records_of(data: bytes) -> list[tuple[int, ...]]:
    """Returns the commit records of an archive, each with its position, found by their format alone."""
    found, position = [], 0
    while position < len(data):
        decompressor = zstd.ZstdDecompressor()
        decompressor.decompress(data[position:])
        position = len(data) - len(decompressor.unused_data)
        found.append((position, *RECORD.unpack_from(data, position)))
        position += RECORD.size
    return found


def test_each_frame_has_a_record_that_describes_it(tmp_path: Path, small_frames: None) -> None:
    """The record contains the frame's offsets, number of events, hashes and sizes, little-endian, in 80 bytes."""
    whole_log = rotated(tmp_path / "data")
    data = (tmp_path / "data" / "archive.jsonl.zst").read_bytes()
    offset = start = 0
    records = records_of(data)
    for position, magic, rest, name, version, zero, first, end, events, last, size, whole, own in records:
        text = whole_log[first:end]

        assert (magic, rest, name, version, zero) == (0x184D2A5B, 72, b"EVTFOLD\0", 1, 0)
        assert (first, size) == (offset, position - start)
        assert zstd.decompress(data[start:position]) == text
        assert events == text.count(b"\n")
        assert last == xxhash.xxh64_intdigest(text.splitlines()[-1])
        assert whole == xxhash.xxh64_intdigest(text)
        assert own == xxhash.xxh64_intdigest(data[position : position + 72])
        offset, start = end, position + RECORD_SIZE
    assert RECORD_SIZE == RECORD.size == 80
    assert offset == len(lines(0, 20))
    assert len(records) >= 6


def test_frames_have_their_content_size_and_a_checksum(tmp_path: Path, small_frames: None) -> None:
    """The zstd header of each frame states the size of its content, so that a decoder knows it beforehand."""
    rotated(tmp_path / "data")
    data = (tmp_path / "data" / "archive.jsonl.zst").read_bytes()
    start = 0
    for position, *_, first, end, _events, _last, _size, _whole, _own in records_of(data):
        info = zstd.get_frame_info(data[start:position])

        assert info.decompressed_size == end - first
        assert data[start + 4] & 0b100
        start = position + RECORD_SIZE


def test_a_plain_decoder_reads_the_same_lines(tmp_path: Path) -> None:
    """The decoder skips the records."""
    whole_log = rotated(tmp_path / "data")

    assert zstd.decompress((tmp_path / "data" / "archive.jsonl.zst").read_bytes()) == whole_log[: len(lines(0, 20))]


def test_frames_contain_at_most_their_size_or_one_longer_line(tmp_path: Path, small_frames: None) -> None:
    """Short lines share a frame up to its size, and a longer line has a frame of its own."""
    long = b'{"type":"long","data":"' + b"x" * 1000 + b'","ts":1}\n'
    with Opened(tmp_path / "data") as opened:
        append(opened.active, lines(0, 5) + long + lines(5, 12))
        opened.rotate()
    sizes = [record[7] - record[6] for record in records_of((tmp_path / "data" / "archive.jsonl.zst").read_bytes())]

    assert sum(sizes) == len(lines(0, 12)) + len(long)
    assert [size for size in sizes if size > 200] == [len(long)]
    assert len(sizes) <= 6


async def test_lines_longer_than_several_frames_are_read_from_the_archive(data_dir: Path) -> None:
    """After a rotation, an event of 9 MiB between small ones can be read from 0 and from its own offset."""
    long = Event("long", "x" * (9 * 2**20), ts=1)
    async with EventLog.open(data_dir) as log:
        await log.append(event(0))
        place = await log.append(long)
        await log.append(event(1))
        await log.rotate()
        whole = [record.event async for record in log.read_full()]
        rest = [record.event async for record in log.read_from(place.start_offset)]
        found = await log.read_line_hash_before(place.end_offset)

    assert whole == [event(0), long, event(1)]
    assert rest == whole[1:]
    assert found == place.line_hash


async def test_a_large_archive_without_records_is_read(damaged_dir: Path, small_frames: None) -> None:
    """The Rust crate wrote one frame, larger than ours; it can be read completely and from any of its lines."""
    data = lines(0, 200)
    cut = data.rindex(b"\n", 0, 5000) + 1
    archive = zstd.compress(data[:cut]) + zstd.compress(data[cut:])
    await asyncio.to_thread(write_files, damaged_dir, {"app.jsonl": b"", "archive.jsonl.zst": archive})
    reader = EventReader(damaged_dir)
    before = await numbers(reader)
    async with EventLog.open(damaged_dir) as log:
        after = await numbers(log)
        rest = [record.event.data["n"] async for record in log.read_from(len(lines(0, 120)))]

    assert before == after == list(range(200))
    assert rest == list(range(120, 200))


async def test_reading_from_an_offset_reads_only_later_frames(
    data_dir: Path, small_frames: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last events of a long archive are read without decompressing or reading the frames before them."""
    async with EventLog.open(data_dir) as log:
        ends = [(await log.append(event(n))).end_offset for n in range(200)]
        await log.rotate()
        size = (await asyncio.to_thread((data_dir / "archive.jsonl.zst").stat)).st_size
        positions = []
        frame = archive.read_frame

        def counted(fd: int, span: archive.Span) -> bytes | None:
            positions.append(span.position)
            return frame(fd, span)

        monkeypatch.setattr(archive, "read_frame", counted)
        found = [record.event.data["n"] async for record in log.read_from(ends[-3])]
        hashed = await log.read_line_hash_before(ends[-2])

    assert found == [198, 199]
    assert hashed
    assert positions
    assert min(positions) > size * 0.9


async def test_an_offset_inside_a_line_of_the_archive_is_refused(data_dir: Path, small_frames: None) -> None:
    """Wherever in the archive the offset is, a read never returns half an event."""
    async with EventLog.open(data_dir) as log:
        ends = {0} | {(await log.append(event(n))).end_offset for n in range(12)}
        await log.rotate()
        for offset in range(max(ends)):
            if offset in ends:
                continue
            with pytest.raises(ValueError, match="not where a line begins"):
                await anext(log.read_from(offset))
            with pytest.raises(ValueError, match="not where a line begins"):
                await log.read_line_hash_before(offset)

    assert len(ends) == 13


async def read_until_damage(directory: Path) -> tuple[list[tuple[int, int, str]], CorruptLogError | None]:
    """Returns what can be read from 0, and the error that ended the read."""
    found = []
    try:
        async for record in EventReader(directory).read_full():
            found.append((record.start_offset, record.end_offset, record.line_hash))
    except CorruptLogError as error:
        return found, error
    return found, None


def flip_a_bit(data: bytes, position: int) -> bytes:
    """Changes one bit."""
    return data[:position] + bytes([data[position] ^ (1 << position % 8)]) + data[position + 1 :]


def overwrite(data: bytes, position: int) -> bytes:
    """Makes 16 bytes zero."""
    return data[:position] + bytes(len(data[position : position + 16])) + data[position + 16 :]


def cut_out(data: bytes, position: int) -> bytes:
    """Removes 7 bytes from the middle."""
    return data[:position] + data[position + 7 :]


@pytest.mark.parametrize("damage", [flip_a_bit, overwrite, cut_out])
async def test_damage_in_the_archive_is_reported_and_never_read_as_events(
    tmp_path: Path, small_frames: None, damage: Callable[[bytes, int], bytes]
) -> None:
    """Wherever the damage is, a read returns the exact events, or those before it and an error with file and offset."""
    oracle = Oracle(await asyncio.to_thread(rotated, tmp_path / "data"))
    files = await asyncio.to_thread(read_files, tmp_path / "data")
    archive = files["archive.jsonl.zst"]
    whole = [(r.start_offset, r.end_offset, r.line_hash) for r in await read(tmp_path / "data")]
    frames = [(first, end, position + RECORD_SIZE) for position, *_, first, end, _, _, _, _, _ in records_of(archive)]
    reported, failures = 0, []
    for position in range(0, len(archive), 3):
        damaged = damage(archive, position)
        if damaged == archive:
            continue
        directory = tmp_path / str(position)
        await asyncio.to_thread(write_files, directory, files | {"archive.jsonl.zst": damaged})
        found, error = await read_until_damage(directory)
        # the frame that is damaged, or whose record is
        begins, ends = next((first, end) for first, end, after in frames if position < after)
        where = f"at {position} of {len(archive)}, in the frame from {begins}"
        if error is None:
            if found != whole:
                failures.append(f"{where}: {len(found)} events of {len(whole)} and no error")
            continue
        reported += 1
        if found != whole[: len(found)]:
            failures.append(f"{where}: other events")
        if found and found[-1][1] != error.offset:
            failures.append(f"{where}: {error} after the events up to {found[-1][1]}")
        if error.path != directory / "archive.jsonl.zst" or error.offset > ends:
            failures.append(f"{where}: {error}")
        if sum(end <= begins for _, end, _ in whole) > len(found):
            failures.append(f"{where}: only {len(found)} events are served of those before it; {error.offset}")

    assert not failures, f"{len(failures)}:\n" + "\n".join(failures[:20])
    assert reported > 100
    assert oracle.data


async def test_a_truncated_archive_is_reported_or_has_fewer_events(tmp_path: Path, small_frames: None) -> None:
    """A read returns a prefix of the archived events, and raises nothing but `CorruptLogError`."""
    await asyncio.to_thread(rotated, tmp_path / "data")
    files = await asyncio.to_thread(read_files, tmp_path / "data")
    archived = len(lines(0, 20))
    whole = [(r.start_offset, r.end_offset, r.line_hash) for r in await read(tmp_path / "data")]
    archive = files["archive.jsonl.zst"]
    for size in range(0, len(archive), 5):
        directory = tmp_path / str(size)
        await asyncio.to_thread(write_files, directory, files | {"archive.jsonl.zst": archive[:size]})
        found, error = await read_until_damage(directory)
        before = [place for place in found if place in whole and place[1] <= archived]

        assert found[: len(before)] == whole[: len(before)]
        assert error is None or error.path == directory / "archive.jsonl.zst"


@pytest.mark.parametrize("damage", [flip_a_bit, overwrite, cut_out])
async def test_damage_in_the_active_log_is_reported_or_read_as_another_valid_event(
    tmp_path: Path, small_frames: None, damage: Callable[[bytes, int], bytes]
) -> None:
    """Plain text has no checksum: everything before the damaged line is exact, and only `CorruptLogError` is raised."""
    await asyncio.to_thread(rotated, tmp_path / "data")
    files = await asyncio.to_thread(read_files, tmp_path / "data")
    log, base = files["app.jsonl"], len(lines(0, 20))
    whole = [(r.start_offset, r.end_offset, r.line_hash) for r in await read(tmp_path / "data")]
    reported = 0
    for position in range(0, len(log), 2):
        directory = tmp_path / str(position)
        await asyncio.to_thread(write_files, directory, files | {"app.jsonl": damage(log, position)})
        found, error = await read_until_damage(directory)
        before = [place for place in whole if place[1] <= base + position]
        reported += error is not None

        assert found[: len(before)] == before
        if error is not None:
            assert error.path == directory / "app.jsonl"
            assert error.offset == (found[-1][1] if found else 0)
    assert reported > 20


async def test_bytes_that_are_not_an_archive_are_reported(damaged_dir: Path) -> None:
    """A reader and a writer both raise an error that names the file, and leave it unchanged."""
    garbage = random.Random(3).randbytes(500)
    await asyncio.to_thread(write_files, damaged_dir, {"app.jsonl": line(0), "archive.jsonl.zst": garbage})
    with pytest.raises(CorruptLogError) as by_reader:
        await read(damaged_dir)
    with pytest.raises(CorruptLogError) as by_writer:
        await EventLog.open(damaged_dir)

    assert (by_reader.value.path, by_reader.value.offset) == (damaged_dir / "archive.jsonl.zst", 0)
    assert (by_writer.value.path, by_writer.value.offset) == (damaged_dir / "archive.jsonl.zst", 0)
    assert await asyncio.to_thread(read_files, damaged_dir) == {"app.jsonl": line(0), "archive.jsonl.zst": garbage}


@pytest.mark.parametrize("name", ["rotated", "archive_only", "stale_snapshot"])
async def test_frames_of_the_rust_crate_get_one_record(compat: Callable[[str], Path], name: str) -> None:
    """When a writer opens, it adds one record that describes all of them, and changes nothing before it."""
    directory = compat(name)
    before = (directory / "archive.jsonl.zst").read_bytes()
    was = [(r.start_offset, r.end_offset, r.line_hash) for r in await read(directory)]
    async with EventLog.open(directory):
        pass
    after = (directory / "archive.jsonl.zst").read_bytes()
    record = RECORD.unpack(after[-RECORD.size :])
    text = zstd.decompress(before)

    assert after[: -RECORD.size] == before
    assert record[5:8] == (0, len(text), text.count(b"\n"))
    assert record[9:11] == (len(before), xxhash.xxh64_intdigest(text))
    assert zstd.decompress(after) == text
    assert [(r.start_offset, r.end_offset, r.line_hash) for r in await read(directory)] == was


@pytest.mark.parametrize("cut", [1, 7, 50])
async def test_an_incomplete_frame_of_the_rust_crate_is_cut_off(compat: Callable[[str], Path], cut: int) -> None:
    """What a crash left after the last complete frame is removed; before that, readers ignore it."""
    directory = compat("rotated")
    archive = directory / "archive.jsonl.zst"
    whole = archive.read_bytes()
    oracle = Oracle(zstd.decompress(whole) + (directory / "app.jsonl").read_bytes())
    archive.write_bytes(whole + zstd.compress(lines(0, 20))[:cut])
    oracle.check_records(await read(directory), len(oracle.data))
    async with EventLog.open(directory):
        pass

    assert archive.read_bytes()[: -RECORD.size] == whole
    oracle.check_records(await read(directory), len(oracle.data))


def test_an_archive_is_read_up_to_a_given_size(tmp_path: Path, small_frames: None) -> None:
    """Readers ignore frames after that size, since they belong to a rotation that is under way."""
    rotated(tmp_path / "data")
    path = tmp_path / "data" / "archive.jsonl.zst"
    for position, *_, end, _, _, _, _, _ in records_of(path.read_bytes()):
        archive = Archive(path, os.open(path, os.O_RDONLY), position + RECORD_SIZE)
        data = b"".join(found.data for found in archive.lines(0, lambda: 100))
        head = archive.head
        archive.close()

        assert data == lines(0, 20)[:end]
        assert head == Oracle(lines(0, 20)).head(end)


@pytest.mark.parametrize(
    "name", ["archive_only", "empty", "long_lines", "plain", "rotated", "stale_snapshot", "torn_tail"]
)
async def test_a_directory_of_the_rust_crate_is_appended_to_rotated_and_reopened(
    compat: Callable[[str], Path], name: str
) -> None:
    """The events keep their offsets and hashes, and a plain decoder still finds the lines."""
    directory = compat(name)
    archive, log = directory / "archive.jsonl.zst", (directory / "app.jsonl").read_bytes()
    whole = (zstd.decompress(archive.read_bytes()) if archive.exists() else b"") + log[: log.rfind(b"\n") + 1]
    Oracle(whole).check_records(await read(directory), len(whole))
    for n in range(3):
        async with EventLog.open(directory) as opened:
            result = await opened.append(event(n))
            whole += line(n)
            Oracle(whole).check_records([record async for record in opened.read_full()], len(whole))
            await opened.rotate()
            Oracle(whole).check_records([record async for record in opened.read_full()], len(whole))

        assert result.end_offset == len(whole)
        assert zstd.decompress(archive.read_bytes()) == whole
        assert (directory / "app.jsonl").read_bytes() == b""


@pytest.mark.parametrize("harm", ["left out", "doubled"])
async def test_a_frame_left_out_or_doubled_with_its_record_is_reported(
    damaged_dir: Path, small_frames: None, harm: str
) -> None:
    """The events before it are returned, and then an error says where it is."""
    async with EventWriter.open(damaged_dir) as writer:
        for n in range(12):
            await writer.append(event(n))
        await writer.rotate()
    path = writer.archive_path
    data = path.read_bytes()
    first, second = [match.end() - 16 + RECORD_SIZE for match in re.finditer(b"EVTFOLD\0", data)][:2]
    path.write_bytes(data[:first] + data[second:] if harm == "left out" else data[:second] + data[first:])
    given = []
    with pytest.raises(CorruptLogError) as caught:
        async for record in EventReader(damaged_dir).read_full():
            given.append(record)

    assert [record.event.data["n"] for record in given] == list(range(len(given)))
    assert caught.value.offset == given[-1].end_offset
