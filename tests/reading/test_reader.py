"""The reader: complete events and batches from the start of any line, and clear errors for everything else."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.support import START, counted_turns, event, line, numbers, records, settle, write_log

from eventfold import (
    CorruptLogError,
    Event,
    EventReader,
    EventWriter,
    Head,
    LogClosedError,
    SyncMode,
    WaitResult,
    line_hash,
)

BAD_LINES = {
    "no JSON": b"not json\n",
    "half an object": b'{"type":"a","data":{}\n',
    "a list": b"[]\n",
    "a string": b'"a"\n',
    "null": b"null\n",
    "no type": b'{"data":{},"ts":1}\n',
    "a type that is no string": b'{"type":1,"data":{},"ts":1}\n',
    "no data": b'{"type":"a","ts":1}\n',
    "no ts": b'{"type":"a","data":{}}\n',
    "a negative ts": b'{"type":"a","data":{},"ts":-1}\n',
    "a fractional ts": b'{"type":"a","data":{},"ts":1.5}\n',
    "an id that is no string": b'{"type":"a","data":{},"ts":1,"id":1}\n',
    "two objects": b'{"type":"a","data":{},"ts":1}{"type":"a","data":{},"ts":1}\n',
    "two objects and a blank line": b'{"type":"a","data":{},"ts":1} {"type":"a","data":{},"ts":1}\n\n',
    "an object over two lines": b'{"type":"a",\n"data":{},"ts":1}\n',
    "bad UTF-8": b'{"type":"a","data":{"x":"\xff"},"ts":1}\n',
    "NUL bytes": b"\0\0\0\0\n",
    "something behind the object": b'{"type":"a","data":{},"ts":1} x\n',
    "a batch from its middle": line(1, batch="2,2"),
}


async def read_to_damage(reader: Any) -> tuple[list[Any], CorruptLogError]:
    """Returns the numbers of the events before the damage, and the error."""
    found: list[Any] = []
    with pytest.raises(CorruptLogError) as caught:
        async for record in reader.read_full():
            found.append(record.event.data["n"])
    return found, caught.value


@pytest.mark.parametrize("case", BAD_LINES)
async def test_a_bad_line_ends_reading_after_all_good_events(damaged_dir: Path, case: str) -> None:
    """The error names the file and the line's offset, and nothing after the line is returned."""
    good = [line(n) for n in range(50)]
    write_log(damaged_dir, *good, BAD_LINES[case], line(50))
    found, error = await read_to_damage(EventReader(damaged_dir))

    assert found == list(range(50))
    assert error.offset == sum(map(len, good))
    assert Path(error.path) == damaged_dir / "app.jsonl"
    assert error.reason
    assert str(error.offset) in str(error)
    assert "app.jsonl" in str(error)


async def test_a_bad_line_far_into_the_log_is_found_at_its_offset(damaged_dir: Path) -> None:
    """The line is not in the first block."""
    good = b"".join(line(n) for n in range(30_000))
    write_log(damaged_dir, good, b"bad\n", line(1))
    found, error = await read_to_damage(EventReader(damaged_dir))

    assert len(found) == 30_000
    assert error.offset == len(good)


@pytest.mark.parametrize(
    "key", ['"type":""', '"type":"a","batch":[3,2]', '"type":"a","batch":[0,2]', '"type":"a","batch":"x"']
)
async def test_lines_that_another_program_may_write_are_read(damaged_dir: Path, key: str) -> None:
    """The type may be empty, and a `batch` that is not a position in a batch leaves its event on its own."""
    write_log(damaged_dir, line(0), f'{{{key},"data":{{"n":1}},"ts":1}}\n'.encode(), line(2), line(3, batch="1,1"))
    reader = EventReader(damaged_dir)

    assert await numbers(reader) == [0, 1, 2, 3]
    assert [r.event.data["n"] async for r in reader.read_back()] == [3, 2, 1, 0]


async def test_blank_lines_are_skipped(damaged_dir: Path) -> None:
    """Blank lines count in the offsets, but are not events."""
    write_log(damaged_dir, b"\n", line(0), b"\n \t\n", line(1), b"\r\n", line(2))
    found = await records(EventReader(damaged_dir))

    assert [record.event.data["n"] for record in found] == [0, 1, 2]
    assert [record.start_offset for record in found] == [1, 5 + len(line(0)), 7 + len(line(0)) + len(line(1))]
    assert [record.end_offset - record.start_offset for record in found] == [len(line(n)) for n in range(3)]
    assert [record.line_hash for record in found] == [line_hash(line(n)) for n in range(3)]


async def test_unknown_keys_are_ignored(damaged_dir: Path) -> None:
    """A line may have additional keys, and its keys may be in any order."""
    raw = b'{"ts":1,"new":{"x":[1]},"data":[2],"type":"a","zzz":null,"meta":3}\n'
    write_log(damaged_dir, raw)
    [record] = await records(EventReader(damaged_dir))

    assert record.event == Event("a", [2], ts=1, meta=3)
    assert record.line_hash == line_hash(raw)


async def test_a_line_may_contain_spaces(damaged_dir: Path) -> None:
    """A line of another program may have spaces; its hash is that of its own bytes."""
    raw = b'  { "type" : "a", "data" : {"b": 1}, "ts" : 5 } \r\n'
    write_log(damaged_dir, line(0), raw, line(1))
    found = await records(EventReader(damaged_dir))

    assert [record.event.type for record in found] == ["counted", "a", "counted"]
    assert found[1].line_hash == line_hash(raw)


async def test_records_have_their_offsets_and_hash(data_dir: Path) -> None:
    """Offsets and hash are those that `append` returned, and the end of one record is the start of the next."""
    async with EventWriter.open(data_dir) as writer:
        results = [await writer.append(event(n)) for n in range(3)] + await writer.append_many([event(3), event(4)])
        found = await records(writer.reader())

    assert [(r.start_offset, r.end_offset, r.line_hash) for r in found] == [
        (r.start_offset, r.end_offset, r.line_hash) for r in results
    ]
    assert [r.event for r in found] == [event(n) for n in range(5)]


async def test_reading_can_begin_at_the_start_of_any_line(data_dir: Path) -> None:
    """From the offset of an event, the reader returns that event and all later ones; from the head, none."""
    async with EventWriter.open(data_dir) as writer:
        results = [await writer.append(event(n)) for n in range(6)]
        reader = writer.reader()
        rests = [[r.event.data["n"] for r in await records(reader, result.start_offset)] for result in results]
        nothing = await records(reader, writer.head.offset)

    assert rests == [list(range(n, 6)) for n in range(6)]
    assert nothing == []


async def test_reading_may_begin_inside_a_batch(data_dir: Path) -> None:
    """Reading can continue from any offset that a record had."""
    async with EventWriter.open(data_dir) as writer:
        results = await writer.append_many([event(n) for n in range(4)])
        rest = await records(writer.reader(), results[1].end_offset)

    assert [record.event.data["n"] for record in rest] == [2, 3]


async def test_a_batch_is_found_even_if_its_key_is_written_with_escapes(damaged_dir: Path) -> None:
    """Two events of a batch of three are not part of the log yet, also if they are appended to a log that was read."""
    first = b'{"type":"a","data":{"n":0},"ts":1}\n'
    batch = [b'{"type":"a","data":{"n":%d},"ts":1,"b\\u0061tch":[%d,3]}\n' % (n, n) for n in (1, 2, 3)]
    write_log(damaged_dir, first)
    reader = EventReader(damaged_dir)

    heads, found = [], []
    for added in (b"", *batch):
        with damaged_dir.joinpath("app.jsonl").open("ab") as file:
            file.write(added)
        heads.append((await reader.head()).offset)
        found.append(await numbers(reader))

    assert heads == [len(first)] * 3 + [len(first + b"".join(batch))]
    assert found == [[0], [0], [0], [0, 1, 2, 3]]


@pytest.mark.parametrize("sizes", [(60_000, 3_000, 3_000), (3_000, 60_000, 3_000), (200_000,) * 12, (70_000, 10)])
async def test_a_batch_that_crosses_slices_is_complete(data_dir: Path, sizes: tuple[int, ...]) -> None:
    """The lines may be of any size and may lie anywhere in what is read at once."""
    async with EventWriter.open(data_dir, sync=SyncMode.OS) as writer:
        await writer.append(event(0))
        await writer.append_many([Event("a", "x" * size, ts=1) for size in sizes])
        found = await records(writer.reader())

    assert [len(record.event.data) for record in found[1:]] == list(sizes)


async def test_a_batch_larger_than_many_blocks_is_complete(data_dir: Path) -> None:
    """The batch has many thousand small events, and there are events before and after it."""
    async with EventWriter.open(data_dir, sync=SyncMode.OS) as writer:
        await writer.append(event(0))
        await writer.append_many([event(n) for n in range(1, 30_000)])
        await writer.append(event(30_000))
        found = await numbers(writer.reader())

    assert found == list(range(30_001))


async def test_lines_longer_than_a_block_are_read(data_dir: Path) -> None:
    """A line of several megabytes lies between small ones."""
    async with EventWriter.open(data_dir, sync=SyncMode.OS) as writer:
        await writer.append(Event("a", "s", ts=1))
        await writer.append(Event("a", "x" * 3_500_000, ts=1))
        await writer.append(Event("a", "e", ts=1))
        found = await records(writer.reader())

    assert [len(record.event.data) for record in found] == [1, 3_500_000, 1]
    assert found[-1].start_offset == found[1].end_offset


async def test_reading_ends_at_the_head_at_its_start(data_dir: Path) -> None:
    """Events that are appended during a pass belong to the next pass."""
    async with EventWriter.open(data_dir) as writer:
        await writer.append_many([event(n) for n in range(3)])
        found = []
        async for record in writer.reader().read_full():
            found.append(record.event.data["n"])
            await writer.append(event(99))
        later = await numbers(writer.reader())

    assert found == [0, 1, 2]
    assert later == [0, 1, 2, 99, 99, 99]


@pytest.mark.parametrize("offset", [-1, -(2**70), True, 1.0, "0", None])
async def test_an_invalid_offset_is_a_value_error(data_dir: Path, offset: Any) -> None:
    """Tested with a negative number and another type, in every method that takes an offset."""
    write_log(data_dir, line(0), line(1))
    reader = EventReader(data_dir)

    with pytest.raises(ValueError, match="offset"):
        await records(reader, offset)
    with pytest.raises(ValueError, match="offset"):
        await reader.has_new_events(offset)
    with pytest.raises(ValueError, match="offset"):
        await reader.read_line_hash_before(offset)
    with pytest.raises(ValueError, match="offset"):
        await reader.wait_for_events(offset, 0)


@pytest.mark.parametrize("beyond", [1, 10**6, 2**70])
async def test_an_offset_beyond_the_head_is_a_value_error(data_dir: Path, beyond: int) -> None:
    """The message contains the offset and the head."""
    data = write_log(data_dir, line(0), line(1))
    reader = EventReader(data_dir)
    offset = len(data) + beyond

    with pytest.raises(ValueError, match=f"{offset} is beyond the head at {len(data)}"):
        await records(reader, offset)
    with pytest.raises(ValueError, match="beyond the head"):
        await reader.has_new_events(offset)
    with pytest.raises(ValueError, match="beyond the head"):
        await reader.read_line_hash_before(offset)


async def test_every_offset_inside_a_line_is_a_value_error(data_dir: Path) -> None:
    """Reading, and asking for the hash before an offset, is possible only where a line begins."""
    data = write_log(data_dir, line(0), line(1))
    reader = EventReader(data_dir)
    starts = {0, len(line(0)), len(data)}
    for offset in starts:
        await records(reader, offset)
        await reader.read_line_hash_before(offset)
    inside = set(range(len(data))) - starts

    assert len(inside) == len(data) - 2
    for offset in inside:
        with pytest.raises(ValueError, match=f"offset {offset} "):
            await records(reader, offset)
        with pytest.raises(ValueError, match=f"offset {offset} "):
            await reader.read_line_hash_before(offset)


async def test_a_directory_that_does_not_exist_is_an_empty_log(tmp_path: Path) -> None:
    """Reading it creates nothing, and every question has an answer."""
    directory = tmp_path / "missing"
    reader = EventReader(str(directory))

    assert await reader.head() == Head(0, "")
    assert await records(reader) == []
    assert await reader.has_new_events(0) is False
    assert await reader.active_log_size() == 0
    assert await reader.read_line_hash_before(0) is None
    assert await reader.wait_for_events(0, 0.01) == WaitResult(False, 0)
    with pytest.raises(ValueError, match="beyond the head"):
        await records(reader, 1)
    assert not directory.exists()


async def test_an_empty_file_is_an_empty_log(data_dir: Path) -> None:
    """The file was created, but nothing was appended."""
    write_log(data_dir)
    reader = EventReader(data_dir)

    assert await reader.head() == Head(0, "")
    assert await records(reader) == []


async def test_a_reader_sees_a_log_that_is_created_later(data_dir: Path) -> None:
    """The same reader works before and after the log is created."""
    reader = EventReader(data_dir)
    before = await numbers(reader)
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(1))
        after = await numbers(reader)

    assert (before, after) == ([], [1])


async def test_the_head_is_the_end_of_the_last_line(data_dir: Path) -> None:
    """In a log that this process doesn't write, it comes from the file."""
    data = write_log(data_dir, line(0), line(1))

    assert await EventReader(data_dir).head() == (len(data), line_hash(line(1)))


async def test_has_new_events_compares_with_the_head(data_dir: Path) -> None:
    """The result is true for an offset before the head, and false at the head."""
    data = write_log(data_dir, line(0), line(1))
    reader = EventReader(data_dir)

    assert await reader.has_new_events(0) is True
    assert await reader.has_new_events(len(line(0))) is True
    assert await reader.has_new_events(len(data)) is False


async def test_active_log_size_also_counts_incomplete_lines(damaged_dir: Path) -> None:
    """The method returns the size of the file."""
    data = write_log(damaged_dir, line(0), b"half")

    assert await EventReader(damaged_dir).active_log_size() == len(data)


@pytest.mark.parametrize("size", [1, 4_070, 4_096, 5_000, 20_000, 300_000, 2_000_000])
async def test_the_hash_before_an_offset_is_found_for_lines_of_any_length(data_dir: Path, size: int) -> None:
    """The lengths are around the size of one read backwards, and far above it."""
    big = b'{"type":"a","data":"' + b"x" * size + b'","ts":1}\n'
    write_log(data_dir, line(0), big, line(1))
    reader = EventReader(data_dir)

    assert await reader.read_line_hash_before(0) is None
    assert await reader.read_line_hash_before(len(line(0))) == line_hash(line(0))
    assert await reader.read_line_hash_before(len(line(0) + big)) == line_hash(big)


async def test_reading_lets_other_tasks_run(data_dir: Path) -> None:
    """A long pass does not hold the event loop until its end."""
    write_log(data_dir, b"".join(line(n) for n in range(20_000)))
    async with counted_turns() as turns:
        async for _ in EventReader(data_dir).read_full():
            pass

    assert turns[0] > 5


async def test_a_caller_may_stop_reading_early(data_dir: Path) -> None:
    """After leaving the loop early, a caller can start again, and no file stays open."""
    write_log(data_dir, b"".join(line(n) for n in range(50_000)))
    reader = EventReader(data_dir)
    open_before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    reading = reader.read_full()
    first = await anext(reading)
    await reading.aclose()  # type: ignore[attr-defined]
    again = await anext(reader.read_full())
    await settle()
    open_after = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0

    assert first == again
    assert open_after <= open_before + 1


async def test_many_may_read_at_once(data_dir: Path) -> None:
    """Readers share no state that they could disturb."""
    write_log(data_dir, b"".join(line(n) for n in range(500)))
    reader = EventReader(data_dir)
    found = await asyncio.gather(*(numbers(reader) for _ in range(20)))

    assert found == [list(range(500))] * 20


async def test_the_waits_of_a_writers_reader_end_when_the_writer_is_closed(data_dir: Path) -> None:
    """Nobody goes on waiting for events of a closed log."""
    writer = await EventWriter.open(data_dir)
    waiting = asyncio.create_task(writer.reader().wait_for_events(0))
    await settle()
    await writer.aclose()

    with pytest.raises(LogClosedError):
        await asyncio.wait_for(waiting, 10)


async def test_wait_for_events_ends_with_the_next_event(data_dir: Path) -> None:
    """The result says whether there is something new, and where the head is."""
    async with EventWriter.open(data_dir) as writer:
        waiting = asyncio.create_task(writer.reader().wait_for_events(0))
        await settle()
        waits = not waiting.done()
        result = await writer.append(event(1))
        woken = await asyncio.wait_for(waiting, 10)
        at_once = await writer.reader().wait_for_events(0)
        timeout = await writer.reader().wait_for_events(result.end_offset, 0.01)

    assert waits
    assert woken == at_once == WaitResult(True, result.end_offset)
    assert timeout == WaitResult(False, result.end_offset)


@pytest.mark.parametrize(("offset", "first"), [(0, 0), (None, 1)])
async def test_a_tail_yields_existing_and_new_events(data_dir: Path, offset: int | None, first: int) -> None:
    """The tail yields each event once, in order, from the offset or the current head, until the log is closed."""
    writer = await EventWriter.open(data_dir)
    await writer.append(event(0))
    found: list[int] = []
    complete = asyncio.Event()

    async def follow() -> None:
        async for record in writer.reader().tail(offset):
            found.append(record.event.data["n"])
            if found[-1] == 21:
                complete.set()

    following = asyncio.create_task(follow())
    await settle()
    for n in range(1, 20):
        await writer.append(event(n))
    await writer.append_many([event(20), event(21)])
    await asyncio.wait_for(complete.wait(), 10)
    await writer.aclose()
    await asyncio.wait_for(following, 10)

    assert found == list(range(first, 22))


def test_creating_a_reader_does_no_io(tmp_path: Path) -> None:
    """The paths are known without access to the disk."""
    reader = EventReader(tmp_path / "x")

    assert reader.dir == tmp_path / "x"
    assert reader.log_path == tmp_path / "x" / "app.jsonl"
    assert not (tmp_path / "x").exists()


async def test_a_record_has_the_event_s_own_time(data_dir: Path) -> None:
    """`ts` is the time in the event, not the time of the append."""
    write_log(data_dir, line(3))
    [record] = await records(EventReader(data_dir))

    assert record.event.ts == START + 3
