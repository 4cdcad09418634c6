"""Unique ids: an event whose id is in the log is not appended again."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from pathlib import Path

import pytest
from tests.support import recorded_reads, records

from eventfold import (
    Catalog,
    ConditionalAppendError,
    Event,
    EventLog,
    InvalidEventError,
    LockMode,
    Query,
    SyncMode,
    View,
)
from eventfold._aio import AsyncOpener
from eventfold._index import id_filter
from eventfold._index.store import Store


def event(n: int, id: str | None = None, *tags: str) -> Event:
    return Event("paid", {"n": n}, ts=1, id=id, tags=tags)


def opened(data_dir: Path, lock: LockMode = LockMode.FLOCK) -> AsyncOpener[EventLog]:
    return EventLog.open(data_dir, index=True, unique_ids=True, lock=lock)


async def ids(log: EventLog) -> list[str | None]:
    return [record.event.id for record in await records(log)]


async def test_the_second_append_gives_the_result_of_the_first(data_dir: Path) -> None:
    async with opened(data_dir) as log:
        first = await log.append(event(1, "a"))
        await log.append(event(2))
        second = await log.append(event(3, "a"))

        assert not first.duplicate
        assert second.duplicate
        assert (second.start_offset, second.end_offset, second.line_hash) == (
            first.start_offset,
            first.end_offset,
            first.line_hash,
        )
        assert await ids(log) == ["a", None]


async def test_of_two_appends_of_an_id_in_one_group_the_first_is_appended(data_dir: Path) -> None:
    async with opened(data_dir) as log:
        results = await asyncio.gather(*(log.append(event(n, "a")) for n in range(100)))

        assert [result.duplicate for result in results] == [False] + 99 * [True]
        assert len({result.start_offset for result in results}) == 1
        assert await ids(log) == ["a"]


async def test_appends_stay_in_the_order_of_their_calls(data_dir: Path) -> None:
    async with opened(data_dir) as log:
        await asyncio.gather(*(log.append(event(n, f"id {n}" if n % 2 else None)) for n in range(100)))

        assert [record.event.data["n"] for record in await records(log)] == list(range(100))


async def test_an_id_is_known_after_a_rotation_and_a_restart(data_dir: Path) -> None:
    async with opened(data_dir) as log:
        first = await log.append(event(1, "a"))
        await log.rotate()
        assert (await log.append(event(2, "a"))).duplicate
    (data_dir / "index.sqlite").unlink()
    async with opened(data_dir) as log:
        result = await log.append(event(3, "a"))

        assert result.duplicate
        assert result.end_offset == first.end_offset


async def test_a_batch_that_is_in_the_log_is_a_duplicate_as_a_whole(data_dir: Path) -> None:
    async with opened(data_dir) as log:
        first = await log.append_many([event(1, "a"), event(2, "b")])
        second = await log.append_many([event(1, "b"), event(2, "a")])

        assert [result.start_offset for result in second] == [first[1].start_offset, first[0].start_offset]
        assert all(result.duplicate for result in second)


@pytest.mark.parametrize("other", [event(2, "new"), event(2)])
async def test_a_batch_of_which_a_part_is_in_the_log_is_refused_with_its_ids(data_dir: Path, other: Event) -> None:
    async with opened(data_dir) as log:
        await log.append(event(1, "old"))
        with pytest.raises(InvalidEventError, match="'old'"):
            await log.append_many([event(1, "old"), other])

        assert await ids(log) == ["old"]


async def test_a_batch_with_the_same_id_twice_is_refused(data_dir: Path) -> None:
    async with opened(data_dir) as log:
        with pytest.raises(InvalidEventError, match="'a'"):
            await log.append_many([event(1, "a"), event(2, "a")])


async def test_a_repeated_conditional_append_is_a_duplicate_and_no_conflict(data_dir: Path) -> None:
    async with opened(data_dir) as log:
        first = await log.append_if(event(1, "a"), 0, "")
        again = await log.append_if(event(1, "a"), 0, "")
        assert again.duplicate
        assert again.start_offset == first.start_offset
        with pytest.raises(ConditionalAppendError):
            await log.append_if(event(1, "b"), 0, "")

        for query in (Query(tags={"t"}), Query(types={"paid"})):
            number = log.head.offset
            [unless] = await log.append_unless([event(2, f"c{number}", "t")], query, after=number)
            [repeated] = await log.append_unless([event(2, f"c{number}", "t")], query, after=number)
            assert (unless.duplicate, repeated.duplicate) == (False, True)
            with pytest.raises(ConditionalAppendError):
                await log.append_unless([event(2, f"d{number}", "t")], query, after=number)


async def test_a_repeated_decision_is_appended_once(data_dir: Path) -> None:
    def count(state: int, event: Event) -> int:
        return state + 1

    async with EventLog.open(
        data_dir, index=True, unique_ids=True, views=[View("count", count, 0, state_type=int)]
    ) as log:
        for _ in range(3):
            await log.decide("count", lambda count: event(count, "request 7"))

        assert await ids(log) == ["request 7"]


async def test_objects_of_a_catalog_have_unique_ids_too(data_dir: Path) -> None:
    import msgspec

    catalog = Catalog()

    @catalog.event("paid")
    class Paid(msgspec.Struct):
        n: int

    async with EventLog.open(data_dir, index=True, unique_ids=True, catalog=catalog) as log:
        assert not (await log.append(Paid(1), id="a")).duplicate
        assert (await log.append(Paid(1), id="a")).duplicate


async def test_an_append_that_fails_leaves_its_id_free(data_dir: Path) -> None:
    async with opened(data_dir) as log:
        with pytest.raises(InvalidEventError):
            await log.append(event(float("nan"), "a"))  # type: ignore[arg-type]
        assert not (await log.append(event(1, "a"))).duplicate


async def test_several_writers_append_an_id_once(data_dir: Path) -> None:
    async with opened(data_dir, LockMode.SHARED) as one, opened(data_dir, LockMode.SHARED) as two:
        results = await asyncio.gather(*(log.append(event(n, f"id {n}")) for n in range(100) for log in (one, two)))

        assert sum(not result.duplicate for result in results) == 100
        assert sorted(map(str, await ids(one))) == sorted(f"id {n}" for n in range(100))
        for n in range(100):
            assert results[2 * n].start_offset == results[2 * n + 1].start_offset


def _fails(*args: object) -> None:
    raise sqlite3.OperationalError("unable to open database file")


async def test_without_the_index_file_the_log_is_read_once_for_all_new_ids(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with EventLog.open(data_dir) as log:
        first, *_ = [await log.append(event(n, id)) for n, id in enumerate(["a", "b", "a", *map(str, range(100))])]
    monkeypatch.setattr(Store, "open", _fails)
    read = recorded_reads(monkeypatch)
    async with opened(data_dir) as log:
        for n in range(50):
            assert not (await log.append(event(n, f"new-{n}"))).duplicate
        assert read == [0]
        assert (await log.append(event(1, "a"))).start_offset == first.start_offset
        assert (await log.append(event(3, "new-7"))).duplicate
        assert len(await ids(log)) == 153


async def test_without_the_index_file_ids_with_the_same_key_are_distinguished(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "open", _fails)
    monkeypatch.setattr(id_filter, "_bits_of", lambda text: [0])
    async with opened(data_dir) as log:
        results = [await log.append(event(n, str(n % 7))) for n in range(14)]
        assert [result.duplicate for result in results] == [False] * 7 + [True] * 7
        assert [result.start_offset for result in results[:7]] == [result.start_offset for result in results[7:]]


async def test_unique_ids_need_the_index(data_dir: Path) -> None:
    with pytest.raises(ValueError, match="index=True"):
        await EventLog.open(data_dir, unique_ids=True)


async def test_without_unique_ids_an_id_may_come_twice(data_dir: Path) -> None:
    async with EventLog.open(data_dir, index=True) as log:
        await log.append(event(1, "a"))
        assert not (await log.append(event(2, "a"))).duplicate


async def test_the_builder_has_the_option(data_dir: Path) -> None:
    async with EventLog.builder(data_dir).index(unique_ids=True).open() as log:
        await log.append(event(1, "a"))
        assert (await log.append(event(2, "a"))).duplicate


@pytest.mark.parametrize("seed", range(3))
async def test_random_appends_from_many_tasks_agree_with_a_set(tmp_path: Path, seed: int) -> None:
    """Many tasks append in all ways, with restarts in between: each acknowledged id is in the log exactly once."""
    choice = random.Random(seed)
    acknowledged: dict[str, int] = {}

    async def work(log: EventLog) -> None:
        for _ in range(20):
            chosen = [f"id {choice.randrange(60)}" for _ in range(choice.choice([1, 1, 1, 2]))]
            events = [event(0, id, f"tag {choice.randrange(5)}") for id in chosen]
            try:
                if len(events) == 1 and choice.random() < 0.5:
                    results = [await log.append(events[0])]
                elif choice.random() < 0.5:
                    results = await log.append_many(events)
                else:
                    results = await log.append_unless(events, Query(tags=events[0].tags), after=log.head.offset)
            except (InvalidEventError, ConditionalAppendError):
                continue
            for id, result in zip(chosen, results, strict=True):
                assert acknowledged.setdefault(id, result.start_offset) == result.start_offset

    for _ in range(3):
        async with EventLog.open(tmp_path, index=True, unique_ids=True, sync=SyncMode.OS, max_log_size=5000) as log:
            await asyncio.gather(*(work(log) for _ in range(20)))
    async with EventLog.open(tmp_path) as log:
        found = [(record.event.id, record.start_offset) for record in await records(log)]
    assert len(found) == len(dict(found))
    assert dict(found) == acknowledged
