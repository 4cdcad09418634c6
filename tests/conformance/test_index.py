"""The index in a local file: its answers are the same on each engine, whatever happened to the file."""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
from pathlib import Path

import pytest
from tests.conformance.conftest import ENGINES

from eventfold import ConditionalAppendError, Event, EventLog, Query
from eventfold._address import Address


def event(n: int, *tags: str) -> Event:
    return Event("paid", {"n": n}, ts=1, id=f"id {n}", tags=tags)


async def numbers(log: EventLog, query: Query) -> list[int]:
    return [record.event.data["n"] async for record in log.read_from(0, query=query)]


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return tmp_path / "own.sqlite"


@pytest.fixture
def other(request: pytest.FixtureRequest) -> Address:
    """Another log, on the same engine as `where`."""
    return ENGINES[request.node.callspec.params["where"]](request)


async def test_reading_by_tag_finds_the_same_events_as_reading_everything(where: Address, index: Path) -> None:
    """Tested also with two tags, after an offset, and backwards."""
    async with EventLog.open(where, index=index) as log:
        for start in range(0, 300, 50):
            await asyncio.gather(*(log.append(event(n, f"a:{n % 7}", f"b:{n % 3}")) for n in range(start, start + 50)))
        everything = [record async for record in log.read_full()]
        half = everything[150].start_offset
        for query in (Query(tags={"a:3"}), Query(tags={"a:3", "b:1"}), Query(tags={"a:1"}) | Query(tags={"b:2"})):
            expected = [record for record in everything if query.matches(record.event)]

            assert [record async for record in log.read_from(0, query=query)] == expected
            assert [record async for record in log.read_back(query=query)] == expected[::-1]
            assert [record async for record in log.read_from(half, query=query)] == [
                record for record in expected if record.start_offset >= half
            ]


async def test_a_conflict_names_the_offset_of_the_event(where: Address, index: Path) -> None:
    async with EventLog.open(where, index=index) as log:
        results = await log.append_many([event(n, f"order:{n}") for n in range(20)])
        with pytest.raises(ConditionalAppendError) as caught:
            await log.append_unless([event(20, "order:7")], Query(tags={"order:7"}))
        await log.append_unless([event(21, "order:7")], Query(tags={"order:7"}), after=results[7].end_offset)
        await log.append_unless([event(22, "order:99")], Query(tags={"order:99"}))

        assert caught.value.conflict.offset == results[7].start_offset
        assert await numbers(log, Query(tags={"order:7"})) == [7, 21]


@pytest.mark.parametrize("fate", ["kept", "deleted", "behind", "another log's", "garbage"])
async def test_an_id_is_known_after_a_restart_whatever_happened_to_the_file(
    where: Address, other: Address, index: Path, fate: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with EventLog.open(where, index=index, unique_ids=True) as log:
        first = await log.append_many([event(n, "all") for n in range(10)])
    shutil.copy(index, index.with_suffix(".old"))
    async with EventLog.open(where, index=index, unique_ids=True) as log:
        last = await log.append_many([event(n, "all") for n in range(10, 20)])
    if fate in ("deleted", "behind", "another log's"):
        index.unlink()
    if fate == "behind":
        index.with_suffix(".old").rename(index)
    if fate == "garbage":
        index.write_bytes(b"x" * 8192)
    if fate == "another log's":
        async with EventLog.open(other, index=index, unique_ids=True) as log:
            await log.append_many([event(n, "other") for n in range(100, 130)])
            await log.append(event(5, "other"))
    caplog.clear()

    async with EventLog.open(where, index=index, unique_ids=True) as log:
        with caplog.at_level(logging.WARNING, "eventfold"):
            again = [await log.append(event(5)), *await log.append_many([event(n) for n in range(18, 20)])]
            new = await log.append(event(20, "all"))
        assert [result.duplicate for result in again] == [True] * 3
        assert [result.start_offset for result in again] == [
            first[5].start_offset,
            last[8].start_offset,
            last[9].start_offset,
        ]
        assert not new.duplicate
        assert await numbers(log, Query(tags={"all"})) == list(range(21))
        assert await numbers(log, Query(tags={"other"})) == []
    warned = [record.getMessage() for record in caplog.records if "is rebuilt" in record.getMessage()]
    assert len(warned) == (fate in ("another log's", "garbage"))


@pytest.mark.parametrize("seed", range(3))
async def test_two_writers_with_an_index_each_agree_about_ids_and_conditions(
    shared: Address, tmp_path: Path, seed: int
) -> None:
    """Each one learns of the other's events late, so that look-ups are checked again."""
    choice = random.Random(seed)
    async with (
        EventLog.open(shared, index=tmp_path / "one.sqlite", unique_ids=True) as one,
        EventLog.open(shared, index=tmp_path / "other.sqlite", unique_ids=True) as other,
    ):

        async def append(log: EventLog, n: int) -> None:
            for _ in range(10):
                number = choice.randrange(40)
                await asyncio.sleep(choice.random() / 100)
                try:
                    if number % 2:
                        tag = f"once:{number}"
                        await log.append_unless([Event("claimed", {"n": n}, tags=(tag,))], Query(tags={tag}))
                    else:
                        await log.append(event(number, "counted"))
                except ConditionalAppendError:
                    pass

        await asyncio.gather(*(append(log, n) for n in range(10) for log in (one, other)))

        found = [record.event async for record in one.read_full()]
        ids = [each.id for each in found if each.id is not None]
        claims = [each.tags for each in found if each.type == "claimed"]
        assert len(ids) == len(set(ids)) > 10
        assert len(claims) == len(set(claims)) > 10
        for log in (one, other):
            counted = [each.data["n"] for each in found if "counted" in each.tags]
            assert await numbers(log, Query(tags={"counted"})) == counted
