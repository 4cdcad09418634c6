"""Conditions on queries, and decisions: an append depends on what its caller saw, whatever is appended in between."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.support import FaultInjector, event, numbers, recorded_reads, settle

from eventfold import (
    ConditionalAppendError,
    CorruptLogError,
    Event,
    EventLog,
    InvalidEventError,
    LockMode,
    Query,
    SyncMode,
    View,
)


def seat(number: int, n: int | str = 0, type: str = "reserved") -> Event:
    return Event(type, {"n": n}, ts=1, tags=(f"seat:{number}", "room:1"))


def of_seat(number: int) -> Query:
    return Query(tags={f"seat:{number}"})


# append_unless


async def test_events_are_appended_if_no_event_matches(data_dir: Path) -> None:
    async with EventLog.open(data_dir) as log:
        await log.append(seat(1))
        results = await log.append_unless([seat(2), seat(2)], of_seat(2))

        assert [result.end_offset for result in results] == [results[1].start_offset, log.head.offset]


async def test_a_matching_event_is_a_conflict_that_names_its_offset(data_dir: Path) -> None:
    async with EventLog.open(data_dir) as log:
        await log.append(seat(1))
        first = await log.append(seat(2))
        await log.append(seat(2))
        with pytest.raises(ConditionalAppendError) as caught:
            await log.append_unless([seat(2)], of_seat(2))

        assert caught.value.conflict.offset == first.start_offset
        assert str(first.start_offset) in str(caught.value)
        assert len(await numbers(log)) == 3


async def test_events_before_the_offset_do_not_count(data_dir: Path) -> None:
    async with EventLog.open(data_dir) as log:
        first = await log.append(seat(2))
        await log.append_unless([seat(2)], of_seat(2), after=first.end_offset)
        with pytest.raises(ConditionalAppendError):
            await log.append_unless([seat(2)], of_seat(2), after=first.end_offset)


@pytest.mark.parametrize(
    ("query", "in_the_way"),
    [
        (Query(), True),
        (Query(types={"reserved"}), True),
        (Query(types={"released"}), False),
        (Query(tags={"seat:1", "room:1"}), True),
        (Query(tags={"seat:1", "room:2"}), False),
        (Query(types={"released"}, tags={"seat:1"}), False),
        (Query(types={"released"}) | Query(tags={"seat:1"}), True),
    ],
    ids=repr,
)
@pytest.mark.parametrize("together", [True, False], ids=["in one batch", "one after the other"])
async def test_conditions_cover_the_log_and_the_same_group(
    data_dir: Path, query: Query, in_the_way: bool, together: bool
) -> None:
    async with EventLog.open(data_dir) as log:
        if together:
            first, second = await asyncio.gather(
                log.append(seat(1)), log.append_unless([seat(9)], query), return_exceptions=True
            )
            assert not isinstance(first, BaseException)
        else:
            await log.append(seat(1))
            [second] = await asyncio.gather(log.append_unless([seat(9)], query), return_exceptions=True)

        assert isinstance(second, ConditionalAppendError) == in_the_way


@pytest.mark.parametrize("index", [False, True])
async def test_all_events_of_a_conditional_append_are_appended_or_none(data_dir: Path, index: bool) -> None:
    async with EventLog.open(data_dir, index=index) as log:
        await log.append(Event("start"))
        outcomes = await asyncio.gather(
            log.append_unless([Event("a", tags=("x",)), Event("b", tags=("y",))], Query(tags={"x"})),
            log.append_unless([Event("c", tags=("z",)), Event("d", tags=("w",))], Query(tags={"y"})),
            log.append_many([Event("e", tags=("z",)), Event("f", tags=("v",))]),
            log.append_unless([Event("g", tags=("u",))], Query(tags={"v"})),
            log.append_unless([Event("h", tags=("w",))], Query(tags={"w"})),
            return_exceptions=True,
        )
        written = [(record.event.type, record.start_offset) async for record in log.read_full()]

    offsets = dict(written)
    assert list(offsets) == ["start", "a", "b", "e", "f", "h"]
    conflicts = {
        number: outcome.conflict.offset
        for number, outcome in enumerate(outcomes)
        if isinstance(outcome, ConditionalAppendError)
    }
    assert conflicts == {1: offsets["b"], 3: offsets["f"]}


@pytest.mark.parametrize("lock", [LockMode.FLOCK, LockMode.SHARED])
async def test_a_condition_without_events_leaves_the_head_of_its_group_as_it_is(data_dir: Path, lock: LockMode) -> None:
    """The head is that of the last line of the group, not the hash of nothing."""
    async with EventLog.open(data_dir, lock=lock, index=True) as log:
        start = await log.append(seat(1))
        results = await asyncio.gather(
            log.append(seat(1)),
            log.append_unless([], of_seat(2), after=start.end_offset),  # in the same group, thanks to the index
        )
        head = log.head
        tail = asyncio.create_task(anext(aiter(log.tail())))
        await settle()
        await log.append_if(seat(3, 70_000 * "x"), results[0].end_offset, results[0].line_hash)  # too long for memory
        seen = await asyncio.wait_for(tail, 10)

    assert results[1] == []
    assert head == (results[0].end_offset, results[0].line_hash)
    assert seen.start_offset == results[0].end_offset


async def test_of_a_thousand_conflicting_appends_one_succeeds(data_dir: Path) -> None:
    async with EventLog.open(data_dir, sync=SyncMode.OS) as log:
        outcomes = await asyncio.gather(
            *(log.append_unless([seat(n % 10, n)], of_seat(n % 10)) for n in range(1000)), return_exceptions=True
        )

        refused = sum(isinstance(outcome, ConditionalAppendError) for outcome in outcomes)
        assert refused == 990
        assert sorted(await numbers(log)) == list(range(10))


async def test_events_appended_while_a_condition_reads_the_log_are_checked_at_the_commit(
    data_dir: Path, faults: FaultInjector
) -> None:
    """The append waits behind a commit that is under way, which adds a conflicting event."""
    async with EventLog.open(data_dir) as log:
        await log.append(seat(1))
        gate = faults.freeze("write")
        first = asyncio.create_task(log.append(seat(2)))
        await gate.reached()
        second = asyncio.create_task(log.append_unless([seat(2)], of_seat(2)))
        await settle()
        gate.open()
        await first

        with pytest.raises(ConditionalAppendError):
            await second


async def filled(log: EventLog) -> list[int]:
    """Adds 300 events, more than are scanned for each condition, tagged by number; returns the offsets."""
    results = [await log.append_many([Event("a", {"n": n}, tags=(str(n),)) for n in range(150)])]
    results.append(await log.append_many([Event("a", {"n": n}, tags=(str(n),)) for n in range(150, 300)]))
    return [result.start_offset for some in results for result in some]


async def test_conditions_that_wait_together_read_the_log_once(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tested with conditions on types or after an offset, and with a cancelled call."""
    async with EventLog.open(data_dir) as log:
        offsets = await filled(log)
        read = recorded_reads(monkeypatch)
        queries = [Query(tags={str(n)}) for n in range(280, 320)] + [Query({"a"}), Query({"b"}), Query({"a"}, {"350"})]
        tasks = [asyncio.create_task(log.append_unless([], query)) for query in [*queries, Query(tags={"351"})]]
        await asyncio.sleep(0)
        tasks.pop().cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)

        assert read == [0]
        found = [outcome.conflict.offset for outcome in outcomes if isinstance(outcome, ConditionalAppendError)]
        assert found == [*offsets[280:], 0]
        assert outcomes[20:40] + outcomes[41:] == [[]] * 22

        later = [log.append_unless([], Query(tags={str(n)}), after=offsets[100]) for n in range(98, 102)]
        found = [isinstance(outcome, Exception) for outcome in await asyncio.gather(*later, return_exceptions=True)]
        assert found == [False, False, True, True]


async def test_each_condition_fails_if_the_log_cannot_be_read(tmp_path: Path) -> None:
    async with EventLog.open(tmp_path) as log:
        offsets = await filled(log)
        wrong = [log.append_unless([], Query(tags={str(n)}), after=offsets[9] + 1) for n in range(3)]
        right = [log.append_unless([], Query(tags={str(n)}), after=offsets[9]) for n in range(3)]
        outcomes = await asyncio.gather(*wrong, *right, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ValueError] * 3 + [list] * 3
        with open(tmp_path / "app.jsonl", "r+b") as file:
            file.seek(offsets[200])
            file.write(b"!")
        queries = [Query(tags={str(n)}) for n in (0, 149, 250, 300)]
        outcomes = await asyncio.gather(*map(log.append_unless, [[]] * 4, queries), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [
            ConditionalAppendError, ConditionalAppendError, CorruptLogError, CorruptLogError
        ]  # fmt: skip


async def test_a_condition_covers_the_archive_too(data_dir: Path) -> None:
    async with EventLog.open(data_dir) as log:
        await log.append(seat(1))
        await log.rotate()
        with pytest.raises(ConditionalAppendError):
            await log.append_unless([seat(1)], of_seat(1))
        await log.append_unless([seat(2)], of_seat(2))
    async with EventLog.open(data_dir) as log:
        with pytest.raises(ConditionalAppendError):
            await log.append_unless([seat(2)], of_seat(2))


async def test_the_error_about_a_wrong_argument_names_it(data_dir: Path) -> None:
    async with EventLog.open(data_dir) as log:
        await log.append(event(1))
        wrong: Any = {"seat:1"}
        with pytest.raises(TypeError, match="query must be a Query"):
            await log.append_unless([seat(1)], wrong)
        with pytest.raises(ValueError, match="beyond the head"):
            await log.append_unless([seat(1)], of_seat(1), after=10**6)
        with pytest.raises(InvalidEventError, match="event 2 of the batch of 2"):
            await log.append_unless([seat(1), Event("")], of_seat(1))

        assert await numbers(log) == [1]


async def test_conditions_agree_with_a_list(data_dir: Path) -> None:
    """A model that checks every event gives the same answers for random events, conditions and rotations."""
    choice = random.Random(7)
    model: list[Event] = []
    ends = [0]
    async with EventLog.open(data_dir, sync=SyncMode.OS) as log:
        for n in range(400):
            new = Event(choice.choice("abc"), {"n": n}, ts=1, tags=tuple(choice.sample("xyz", choice.randrange(3))))
            query = Query(choice.sample("abc", choice.randrange(2)), choice.sample("xyz", choice.randrange(3)))
            seen = choice.randrange(max(0, len(model) - 6), len(model) + 1)
            in_the_way = next((ends[i] for i in range(seen, len(model)) if query.matches(model[i])), None)
            if in_the_way is None:
                [result] = await log.append_unless([new], query, after=ends[seen])
                model.append(new)
                ends.append(result.end_offset)
            else:
                with pytest.raises(ConditionalAppendError) as caught:
                    await log.append_unless([new], query, after=ends[seen])
                assert caught.value.conflict.offset == in_the_way
            if choice.random() < 0.03:
                await log.rotate()

        assert [record.event async for record in log.read_full()] == model
    assert len(model) > 50


# decide


def count(state: Counter[str], event: Event) -> Counter[str]:
    state[event.tags[0]] += 1
    return state


def counts() -> View[Counter[str]]:
    return View("counts", count, Counter)


async def test_two_hundred_tasks_that_decide_about_fifty_entities_lose_no_update(data_dir: Path) -> None:
    """Each task appends the number of events that its entity has so far, and no number comes twice."""
    view = counts()
    async with EventLog.open(data_dir, views=[view], sync=SyncMode.OS) as log:

        def next_number(entity: str) -> Any:
            return lambda state: Event("counted", {"entity": entity, "n": state[entity]}, tags=(entity,))

        await asyncio.gather(
            *(log.decide(view, next_number(f"e:{n % 50}"), query=Query(tags={f"e:{n % 50}"})) for n in range(200))
        )
        found = Counter([(r.event.data["entity"], r.event.data["n"]) async for r in log.read_full()])

    assert set(found) == {(f"e:{entity}", n) for entity in range(50) for n in range(4)}
    assert set(found.values()) == {1}


async def test_without_a_query_any_event_in_between_counts(data_dir: Path) -> None:
    view = counts()
    async with EventLog.open(data_dir, views=[view]) as log:
        tried = []

        def decide(state: Counter[str]) -> Event:
            tried.append(state.total())
            return Event("decided", tags=("a",))

        await asyncio.gather(log.append(Event("other", tags=("b",))), log.decide(view, decide))

        assert tried in ([0, 1], [1])


async def test_a_decision_may_be_several_events_or_none(data_dir: Path) -> None:
    view = counts()
    async with EventLog.open(data_dir, views=[view]) as log:
        several = await log.decide("counts", lambda state: [Event("x", tags=("a",)), Event("y", tags=("a",))])
        none = await log.decide(view, lambda state: None)

        assert (len(several), none) == (2, [])
        assert (await log.wait_until(view))["a"] == 2


async def test_an_exception_of_a_decision_is_raised_and_nothing_is_appended(data_dir: Path) -> None:
    view = counts()
    async with EventLog.open(data_dir, views=[view]) as log:

        def refuse(state: Counter[str]) -> Event:
            raise LookupError("no such seat")

        with pytest.raises(LookupError, match="no such seat"):
            await log.decide(view, refuse)

        assert log.head.offset == 0


async def test_after_the_last_attempt_the_conflict_is_raised(data_dir: Path) -> None:
    view = counts()
    async with EventLog.open(data_dir, views=[view]) as log:
        tried = []
        others = []

        def decide(state: Counter[str]) -> Event:
            tried.append(1)
            others.append(asyncio.ensure_future(log.append(Event("other", tags=("a",)))))
            return Event("decided", tags=("a",))

        # Each time, the append that the decision itself starts comes before the decision's own event.
        real = log.append_unless

        async def late(*arguments: Any, **options: Any) -> Any:
            await others[-1]
            return await real(*arguments, **options)

        log.append_unless = late  # type: ignore[method-assign]
        with pytest.raises(ConditionalAppendError):
            await log.decide(view, decide, attempts=3)

    assert len(tried) == 3


@pytest.mark.parametrize("wrong", [5, "seat_sold", {"type": "seat_sold"}, b"seat_sold"])
async def test_the_error_about_a_decision_that_is_no_event_names_its_type(data_dir: Path, wrong: object) -> None:
    """A text or a dict is not taken for a collection of events."""
    async with EventLog.open(data_dir, views=[View("none", lambda state, event: state, 0)]) as log:
        with pytest.raises(InvalidEventError, match=f"{type(wrong).__name__} is not an Event"):
            await log.decide("none", lambda state: wrong)

        assert log.head.offset == 0


async def test_a_single_event_in_place_of_several_is_refused(data_dir: Path) -> None:
    """The error says how to write it."""
    async with EventLog.open(data_dir) as log:
        with pytest.raises(TypeError, match=r"such as \[event\]"):
            await log.append_many(seat(1))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"such as \[event\]"):
            await log.append_unless(seat(1), of_seat(1))  # type: ignore[arg-type]


async def test_a_decision_must_be_a_plain_function(data_dir: Path) -> None:
    view = counts()

    async def decide(state: Counter[str]) -> Event:
        return Event("x")

    wrong: Any = decide
    async with EventLog.open(data_dir, views=[view]) as log:
        with pytest.raises(TypeError, match="must be a plain function"):
            await log.decide(view, wrong)
        with pytest.raises(ValueError, match="attempts"):
            await log.decide(view, lambda state: None, attempts=0)
