"""Reading only some of the events: by a query, up to an offset, and backwards."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path

import pytest
from tests.support import START, event, line, records, write_log

from eventfold import (
    CorruptLogError,
    Event,
    EventReader,
    EventWriter,
    Query,
    Record,
    SyncMode,
)
from eventfold._codec.lines import Lines
from eventfold._files.segments import LogSegments

# Only some of the events, and to an offset


async def tagged_log(writer: EventWriter) -> list[Event]:
    """Creates a log of events with tags, some in batches; returns the events."""
    made = [Event("ab"[n % 2], {"n": n}, ts=START, tags=(f"order:{n % 5}", f"customer:{n % 3}")) for n in range(60)]
    for n in range(0, 60, 4):
        await writer.append(made[n])
        await writer.append_many(made[n + 1 : n + 4])
    return made


QUERY = Query({"a"}, {"order:3"}) | Query(tags={"order:1", "customer:2"})


async def test_a_query_leaves_out_events_that_do_not_match(data_dir: Path) -> None:
    """Records and slices have the same offsets as in a full read, also in the archive."""
    async with EventWriter.open(data_dir, sync=SyncMode.OS) as writer:
        made = await tagged_log(writer)
        for _ in range(2):
            reader = EventReader(data_dir)
            expected = [record for record in await records(reader) if QUERY.matches(record.event)]

            assert [record async for record in reader.read_from(query=QUERY)] == expected
            assert [e async for piece in reader.read_slices(query=QUERY) for e in piece.events] == [
                e for e in made if QUERY.matches(e)
            ]
            assert expected
            await writer.rotate()


async def test_event_types_can_be_given_instead_of_a_query(data_dir: Path) -> None:
    """`event_types` and a query together are refused, since they could contradict each other."""
    async with EventWriter.open(data_dir, sync=SyncMode.OS) as writer:
        await tagged_log(writer)
        reader = writer.reader()
        short = [e async for piece in reader.read_slices(types=["a"]) for e in piece.events]
        long = [e async for piece in reader.read_slices(query=Query({"a"})) for e in piece.events]

        assert short == long
        assert len(short) == 30
        with pytest.raises(ValueError, match="types"):
            await anext(reader.read_slices(query=Query({"a"}), types=["a"]))


async def test_a_query_of_the_wrong_type_is_refused(data_dir: Path) -> None:
    """For example, a set of types is easily passed by mistake."""
    reader = EventReader(data_dir)
    for reading in (reader.read_from, reader.tail, reader.read_back):
        with pytest.raises(TypeError, match="query must be a Query"):
            await anext(reading(0, query={"a"}))  # type: ignore[call-arg,operator,type-var]


async def test_reading_ends_at_until(data_dir: Path) -> None:
    """The event that begins at `until` is not returned; if `until` is beyond the head, reading ends at the head."""
    async with EventWriter.open(data_dir) as writer:
        results = [await writer.append(event(n)) for n in range(4)]
        reader = writer.reader()
        ends = [0, *(result.end_offset for result in results), 10**9]
        found = [len([r async for r in reader.read_from(until=end)]) for end in ends]
        between = [r.event.data["n"] async for r in reader.read_from(ends[1], until=ends[3])]

    assert found == [0, 1, 2, 3, 4, 4]
    assert between == [1, 2]


async def test_a_batch_that_crosses_until_is_left_out(data_dir: Path) -> None:
    """No part of the batch is returned."""
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(0))
        batch = await writer.append_many([event(1), event(2)])
        found = [r.event.data["n"] async for r in writer.reader().read_from(until=batch[0].end_offset)]

    assert found == [0]


async def test_an_until_that_is_no_end_of_a_line_is_refused(data_dir: Path) -> None:
    """Such an `until` may be inside a line, before the start offset, or not an offset at all."""
    async with EventWriter.open(data_dir) as writer:
        results = [await writer.append(event(n)) for n in range(2)]
        reader = writer.reader()
        for offset, until in ((0, 5), (results[0].end_offset, 0), (0, -1), (0, True)):
            with pytest.raises(ValueError, match=r"until|offset"):
                await anext(reader.read_from(offset, until=until))


# Backwards


async def backwards(reader: EventReader, offset: int | None = None, query: Query | None = None) -> list[Record]:
    return [record async for record in reader.read_back(offset, query=query)]


async def test_reading_backwards_gives_the_same_records_in_reverse(data_dir: Path) -> None:
    """Tested with batches, in the active log, in the archive, and across both."""
    async with EventWriter.open(data_dir, sync=SyncMode.OS) as writer:
        assert await backwards(writer.reader()) == []
        for _ in range(3):
            await tagged_log(writer)
            forwards = await records(EventReader(data_dir))
            found = await backwards(EventReader(data_dir))

            assert found == forwards[::-1]
            assert [r.line_hash for r in found] == [r.line_hash for r in forwards[::-1]]
            await writer.rotate()
            assert await backwards(EventReader(data_dir)) == forwards[::-1]
            selected = await backwards(EventReader(data_dir), query=QUERY)
            assert selected == [r for r in forwards[::-1] if QUERY.matches(r.event)]


async def test_reading_backwards_can_begin_before_any_line(data_dir: Path) -> None:
    """Each event's end offset gives the events before it."""
    async with EventWriter.open(data_dir, sync=SyncMode.OS) as writer:
        await tagged_log(writer)
        await writer.rotate()
        await tagged_log(writer)
        forwards = await records(writer.reader())
        for count in range(0, len(forwards), 7):
            assert await backwards(writer.reader(), forwards[count].start_offset) == forwards[:count][::-1]


async def test_lines_longer_than_a_block_are_read_backwards(data_dir: Path) -> None:
    """The lines may be of any length, and so may those around them."""
    async with EventWriter.open(data_dir, sync=SyncMode.OS) as writer:
        for n, size in enumerate([10, 65_000, 70_000, 1, 300_000, 2_000_000, 5]):
            await writer.append(Event("a", {"n": n, "text": "x" * size}))
        forwards = await records(writer.reader())

        assert await backwards(writer.reader()) == forwards[::-1]


async def test_an_incomplete_batch_at_the_end_is_not_read_backwards(damaged_dir: Path) -> None:
    """An incomplete batch is not part of the log."""
    write_log(damaged_dir, line(0), line(1, batch="1,3"), line(2, batch="2,3"), b'{"type"')

    assert [r.event.data["n"] for r in await backwards(EventReader(damaged_dir))] == [0]


async def test_reading_the_newest_event_does_not_read_the_rest_of_a_large_log(
    damaged_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one block at the end is read; each further block is read when it is needed."""
    write_log(damaged_dir, b"".join(line(n) for n in range(50_000)))
    read_block, sizes = LogSegments.block_before, []

    def counted(segments: LogSegments, offset: int) -> Lines:
        block = read_block(segments, offset)
        sizes.append(len(block.data))
        return block

    monkeypatch.setattr(LogSegments, "block_before", counted)
    async with aclosing(EventReader(damaged_dir).read_back()) as reading:
        newest = await anext(reading)
        blocks_for_one = len(sizes)
        rest = [record.event.data["n"] async for record in reading]

    assert newest.event.data["n"] == 49_999
    assert blocks_for_one == 1
    assert rest == list(range(49_998, -1, -1))
    assert max(sizes) <= 64 * 1024


@pytest.mark.parametrize("place", [0, 1, 5_000])
async def test_damage_ends_reading_backwards_after_all_later_events(damaged_dir: Path, place: int) -> None:
    """The error contains the offset of the bad line."""
    lines = [line(n) for n in range(6000)]
    write_log(damaged_dir, *lines[:place], b"bad\n", *lines[place:])
    found = []
    with pytest.raises(CorruptLogError) as caught:
        async for record in EventReader(damaged_dir).read_back():
            found.append(record.event.data["n"])

    assert found == list(range(5999, place - 1, -1))
    assert caught.value.offset == sum(map(len, lines[:place]))


@pytest.mark.parametrize(
    "places",
    [["1,2"], ["2,2"], ["1,3", "3,3"], ["1,2", ""], ["", "2,2"], ["1,2", "1,2", "2,2"], ["2,3", "3,3"]],
)
async def test_an_incomplete_batch_ends_reading_backwards(damaged_dir: Path, places: list[str]) -> None:
    """Reading forwards raises the same error, unless it begins inside the batch."""
    write_log(damaged_dir, line(0), *(line(n, batch=place) for n, place in enumerate(places, 1)), line(9))
    found = []
    with pytest.raises(CorruptLogError, match="this batch is incomplete"):
        async for record in EventReader(damaged_dir).read_back():
            found.append(record.event.data["n"])

    assert found[:1] == [9]


async def test_blank_lines_are_skipped_backwards(damaged_dir: Path) -> None:
    """Blank lines count in the offsets."""
    write_log(damaged_dir, b"\n", line(0), b"\n \t\n", line(1), b"\r\n", line(2))
    reader = EventReader(damaged_dir)

    assert await backwards(reader) == (await records(reader))[::-1]


async def test_damage_in_the_archive_ends_reading_backwards(damaged_dir: Path) -> None:
    """Events that were archived later are still returned."""
    async with EventWriter.open(damaged_dir, sync=SyncMode.OS) as writer:
        for n in range(3):
            await writer.append_many([event(10 * n + i) for i in range(10)])
            await writer.rotate()
    archive = bytearray((damaged_dir / "archive.jsonl.zst").read_bytes())
    archive[30] ^= 0xFF  # The damage is in the first frame.
    (damaged_dir / "archive.jsonl.zst").write_bytes(archive)
    found = []
    with pytest.raises(CorruptLogError):
        async for record in EventReader(damaged_dir).read_back():
            found.append(record.event.data["n"])

    assert found == list(range(29, 9, -1))


async def test_an_offset_where_no_line_ends_is_refused_backwards(data_dir: Path) -> None:
    """Such an offset may be negative, beyond the head, or inside a line of the active log or the archive."""
    async with EventWriter.open(data_dir) as writer:
        head = (await writer.append(event(0))).end_offset
        for _ in range(2):
            for offset in (-1, head + 1, 5):
                with pytest.raises(ValueError, match="offset"):
                    await backwards(EventReader(data_dir), offset)
            await writer.rotate()


async def test_reading_backwards_continues_during_a_rotation(data_dir: Path) -> None:
    """The events to be read next may have moved to the archive meanwhile."""
    async with EventWriter.open(data_dir, sync=SyncMode.OS) as writer:
        await writer.append_many([Event("a", {"n": n, "text": "x" * 1000}) for n in range(500)])
        found = []
        async for record in writer.reader().read_back():
            found.append(record.event.data["n"])
            if len(found) == 10:
                await writer.append(event(1000))
                await writer.rotate()

    assert found == list(range(499, -1, -1))
