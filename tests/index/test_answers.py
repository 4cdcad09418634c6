"""The index: conditions and reads by tags give the same answers as without it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from itertools import combinations_with_replacement
from pathlib import Path

import pytest
from tests.index.events import fill, numbers, numbers_from, tag, tagged

from eventfold import (
    ConditionalAppendError,
    CorruptLogError,
    Event,
    EventLog,
    EventReader,
    Query,
    Record,
    SyncMode,
)
from eventfold._codec import keys
from eventfold._files.source import FileSource
from eventfold._index import index
from eventfold._index.index import MAX_CANDIDATES


async def test_events_of_a_tag_are_read_in_order_and_backwards(data_dir: Path) -> None:
    async with EventLog.open(data_dir, index=True) as log:
        await fill(log, 50)

        assert await numbers(log, tag("seven:3")) == list(range(3, 50, 7))
        backwards = [record.event.data["n"] async for record in log.read_back(query=tag("seven:3"))]
        assert backwards == list(range(3, 50, 7))[::-1]


async def test_reading_by_tags_does_not_read_the_rest_of_the_log(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the lines that are returned are read, each from its own offset."""
    async with EventLog.open(data_dir, index=True) as log:
        await fill(log, 5000)
        await numbers(log, tag("own:0"))
        read: list[int] = []
        lines_at = FileSource.lines_at

        async def noted(source: FileSource, offsets: Sequence[int]) -> object:
            read.extend(offsets)
            return await lines_at(source, offsets)

        with monkeypatch.context() as patch:
            patch.setattr(FileSource, "lines_at", noted)
            patch.setattr(FileSource, "blocks", None)
            [record] = [record async for record in log.read_from(query=tag("own:4321"))]

        assert read == [record.start_offset]


@pytest.mark.parametrize("offset", ["start", "end"])
async def test_reading_by_tags_respects_the_start_and_the_end(data_dir: Path, offset: str) -> None:
    async with EventLog.open(data_dir, index=True) as log:
        results = [await log.append(tagged(n, "a")) for n in range(5)]

        found = [
            record.event.data["n"]
            async for record in log.read_from(results[1].start_offset, query=tag("a"), until=results[3].end_offset)
        ]
        assert found == [1, 2, 3]
        before = [record.event.data["n"] async for record in log.read_back(results[2].end_offset, query=tag("a"))]
        assert before == [2, 1, 0]


@pytest.mark.parametrize("archived", [False, True])
async def test_every_range_is_the_same_with_and_without_the_index(data_dir: Path, archived: bool) -> None:
    """The test has batches that cross the ends of the range, lines longer than one read, and all offsets."""
    async with EventLog.open(data_dir, index=True) as log:
        results = [await log.append(tagged(0, "a"))]
        results += await log.append_many([tagged(n, "a" if n % 2 else "b") for n in range(1, 5)])
        results += [await log.append(Event("long", {"n": 5, "text": "x" * 50_000}, tags=("a",)))]
        results += await log.append_many([tagged(6, "a"), tagged(7, "a")])
        if archived:
            await log.rotate()
        offsets = [0, *(result.end_offset for result in results)]
        reader = EventReader(data_dir)
        for start, end in combinations_with_replacement(offsets, 2):
            with_index = [record async for record in log.read_from(start, query=tag("a"), until=end)]
            assert with_index == [record async for record in reader.read_from(start, query=tag("a"), until=end)]
        for end in offsets:
            with_index = [record async for record in log.read_back(end, query=tag("a"))]
            assert with_index == [record async for record in reader.read_back(end, query=tag("a"))]


async def test_events_before_damage_are_yielded_first(tmp_path: Path) -> None:
    async with EventLog.open(tmp_path, index=True) as log:
        results = [await log.append(tagged(n, "a")) for n in range(5)]
        assert len(await numbers(log, tag("a"))) == 5
        with open(tmp_path / "app.jsonl", "r+b") as file:
            file.seek(results[3].start_offset)
            file.write(b"!")
        found = []
        with pytest.raises(CorruptLogError) as caught:
            async for record in log.read_from(query=tag("a")):
                found.append(record.event.data["n"])

    assert found == [0, 1, 2]
    assert caught.value.offset == results[3].start_offset


async def test_an_offset_inside_a_line_is_refused_as_without_the_index(data_dir: Path) -> None:
    async with EventLog.open(data_dir, index=True) as log:
        await log.append(tagged(0, "a"))
        await log.append(tagged(1, "b"))
        with pytest.raises(ValueError, match="not where a line begins"):
            await numbers_from(log, 3, tag("a"))
        with pytest.raises(ValueError, match="beyond the head"):
            await numbers_from(log, 10_000, tag("a"))
        with pytest.raises(ValueError, match="not where a line begins"):
            await log.append_unless([tagged(2, "a")], tag("a"), after=3)


async def test_the_condition_of_an_append_covers_the_whole_log(data_dir: Path) -> None:
    async with EventLog.open(data_dir, index=True) as log:
        await fill(log, 100)
        await log.rotate()
        first = await log.append_unless([tagged(1, "new")], tag("new"))
        with pytest.raises(ConditionalAppendError) as caught:
            await log.append_unless([tagged(2, "new")], tag("new"))
        assert caught.value.conflict.offset == first[0].start_offset

        with pytest.raises(ConditionalAppendError):
            await log.append_unless([tagged(2, "own:5")], tag("own:5"))


async def test_many_conditions_at_once_are_checked_with_the_file_memory_and_each_other(data_dir: Path) -> None:
    """There are more conditions than one query to the file takes, and each tag is wanted by one append or by two."""
    async with EventLog.open(data_dir, index=True) as log:
        in_file = {f"own:{n}": (await log.append(tagged(n, f"own:{n}"))).start_offset for n in range(0, 300, 3)}
    async with EventLog.open(data_dir, index=True) as log:
        in_memory = {f"own:{n}": (await log.append(tagged(n, f"own:{n}"))).start_offset for n in range(1, 300, 3)}
        wanted = [f"own:{n}" for n in range(300)] + [f"own:{n}" for n in range(2, 300, 6)]
        outcomes = await asyncio.gather(
            *(log.append_unless([tagged(0, "other"), tagged(1, name)], tag(name)) for name in wanted),
            return_exceptions=True,
        )
        taken = in_file | in_memory
        for name, outcome in zip(wanted, outcomes, strict=True):
            if name in taken:
                assert isinstance(outcome, ConditionalAppendError)
                assert outcome.conflict.offset == taken[name]
            else:
                assert isinstance(outcome, list)
                taken[name] = outcome[1].start_offset
        offsets = [record.start_offset async for record in log.read_full() if record.event.tags[0] in taken]
        assert offsets == sorted(taken.values())


async def test_a_condition_with_an_offset_ignores_earlier_events_in_the_file(data_dir: Path) -> None:
    async with EventLog.open(data_dir, index=True) as log:
        results = [await log.append(tagged(n, "a", f"own:{n}")) for n in range(10)]
    async with EventLog.open(data_dir, index=True) as log:
        outcomes = await asyncio.gather(
            *(
                log.append_unless([], tag(f"own:{n}"), after=result.start_offset if n % 2 else result.end_offset)
                for n, result in enumerate(results)
            ),
            return_exceptions=True,
        )
        assert [isinstance(outcome, ConditionalAppendError) for outcome in outcomes] == [n % 2 == 1 for n in range(10)]


async def test_two_texts_with_the_same_key_are_distinguished(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test gives every tag the same hash."""
    for module in (index, keys):
        monkeypatch.setattr(module, "key_of_tag", lambda text: 7)
    async with EventLog.open(data_dir, index=True) as log:
        await log.append(tagged(0, "a"))
        await log.append_unless([tagged(1, "b")], tag("b"))

        assert await numbers(log, tag("a")) == [0]
        assert await numbers(log, tag("b")) == [1]


async def test_a_tag_of_too_many_events_is_searched_for_in_the_log(data_dir: Path) -> None:
    async with EventLog.open(data_dir, index=True) as log:
        await log.append_many([tagged(n, "common") for n in range(MAX_CANDIDATES + 10)])
    async with EventLog.open(data_dir, index=True) as log:
        assert len(await numbers(log, tag("common"))) == MAX_CANDIDATES + 10
        with pytest.raises(ConditionalAppendError):
            await log.append_unless([tagged(0, "common")], tag("common"))
        await log.append_unless([tagged(0, "rare")], Query(types={"other"}, tags={"common"}))


async def test_many_events_of_one_tag_are_not_read_one_by_one(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tested with events in the file, and with events that are not in the file yet."""
    async with EventLog.open(data_dir, index=True) as log:
        await log.append_many([tagged(n, "common") for n in range(MAX_CANDIDATES + 1)])

        def fail(source: FileSource, offsets: Sequence[int]) -> None:
            raise AssertionError(f"{len(offsets)} lines are read one by one")

        monkeypatch.setattr(FileSource, "lines_at", fail)
        assert len(await numbers(log, tag("common"))) == MAX_CANDIDATES + 1


async def test_the_index_may_be_in_another_directory(data_dir: Path, tmp_path: Path) -> None:
    async with EventLog.open(data_dir, index=tmp_path / "elsewhere.sqlite") as log:
        await fill(log, 10)
        assert await numbers(log, tag("own:3")) == [3]
    assert (tmp_path / "elsewhere.sqlite").exists()
    assert not (data_dir / "index.sqlite").exists()


async def test_a_read_only_log_has_no_index(data_dir: Path) -> None:
    with pytest.raises(ValueError, match="read_only"):
        await EventLog.open(data_dir, index=True, read_only=True)


@pytest.mark.parametrize("seed", range(3))
async def test_random_histories_are_the_same_with_and_without_the_index(tmp_path: Path, seed: int) -> None:
    """The model is a log without an index, which reads every event."""
    random_ = random.Random(seed)

    def query() -> Query:
        found = Query(
            types=random_.sample(["a", "b", "c"], random_.randrange(3)),
            tags=random_.sample(["x", "y", "z"], random_.randrange(1, 3)),
        )
        return found | query() if random_.random() < 0.3 else found

    def events() -> list[Event]:
        return [
            tagged(random_.randrange(100), *random_.sample(["x", "y", "z", "w"], random_.randrange(3)), type=type)
            for type in random_.choices(["a", "b", "c"], k=random_.randrange(1, 4))
        ]

    async def all_of(records: object) -> list[Record]:
        return [record async for record in records]  # type: ignore[attr-defined]

    plain = await EventLog.open(tmp_path / "plain", sync=SyncMode.OS)
    indexed = await EventLog.open(tmp_path / "indexed", sync=SyncMode.OS, index=True)
    offsets = [0]
    try:
        for step in range(150):
            action = random_.random()
            if action < 0.4:
                batch = events()
                results = await plain.append_many(batch)
                assert await indexed.append_many(batch) == results
                offsets.append(results[-1].end_offset)
            elif action < 0.7:
                batch, condition, after = events(), query(), random_.choice(offsets)
                outcomes = []
                for log in (plain, indexed):
                    try:
                        outcomes.append(str(await log.append_unless(batch, condition, after=after)))
                    except ConditionalAppendError as error:
                        outcomes.append(f"conflict at {error.conflict.offset}")
                assert outcomes[0] == outcomes[1], (step, condition, after)
            elif action < 0.95:
                wanted, start = query(), random_.choice(offsets)
                assert await all_of(plain.read_from(start, query=wanted)) == await all_of(
                    indexed.read_from(start, query=wanted)
                )
                assert await all_of(plain.read_back(start, query=wanted)) == await all_of(
                    indexed.read_back(start, query=wanted)
                )
            elif action < 0.975:
                await plain.rotate()
                await indexed.rotate()
            else:
                await indexed.aclose()
                indexed = await EventLog.open(tmp_path / "indexed", sync=SyncMode.OS, index=True)
    finally:
        await plain.aclose()
        await indexed.aclose()


async def test_a_condition_on_types_alone_is_checked_by_reading_the_log(data_dir: Path) -> None:
    async with EventLog.open(data_dir, index=True) as log:
        await log.append_unless([tagged(0)], Query(types={"counted"}))
        with pytest.raises(ConditionalAppendError):
            await log.append_unless([tagged(1)], Query(types={"counted"}))
        await log.append_unless([tagged(1)], Query(types={"counted"}), after=log.head.offset)
