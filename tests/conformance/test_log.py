"""The promises of every engine to a single program. No test in this module depends on files, tables or streams."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conformance.conftest import ENGINES
from tests.conformance.events import event, numbers, soon
from tests.generated import examples

from eventfold import (
    ConditionalAppendError,
    Event,
    EventfoldError,
    EventLog,
    EventReader,
    Head,
    LogClosedError,
    Query,
    View,
    line_hash,
)
from eventfold._address import Address


def total(state: int, event: Any) -> int:
    return state + int(event.data["n"])


# Appending and reading


async def test_a_new_log_is_empty(where: Address) -> None:
    """The head of a new log is 0, and it has no events."""
    async with EventLog.open(where) as log:
        assert log.head == Head(0, "")
        assert await numbers(log) == []


async def test_events_are_read_in_the_order_in_which_they_were_appended(where: Address) -> None:
    """The order holds even for events that wait for the same commit."""
    async with EventLog.open(where) as log:
        await asyncio.gather(*(log.append(event(n)) for n in range(500)))

        assert await numbers(log) == list(range(500))


async def test_an_append_returns_where_its_event_is(where: Address) -> None:
    """The end of an event is the start of the next, and the last end is the head."""
    async with EventLog.open(where) as log:
        results = [await log.append(event(0)), *await log.append_many([event(1), event(2)])]
        records = [record async for record in log.read_full()]
        heads = [log.head, await log.reader().head()]

    assert [(r.start_offset, r.end_offset, r.line_hash) for r in records] == [
        (r.start_offset, r.end_offset, r.line_hash) for r in results
    ]
    assert results[0].start_offset == 0
    assert [r.end_offset for r in results[:-1]] == [r.start_offset for r in results[1:]]
    assert heads == [Head(results[-1].end_offset, results[-1].line_hash)] * 2


async def test_acknowledged_events_are_there_after_reopening(where: Address) -> None:
    """The offsets and the head are the same as before."""
    async with EventLog.open(where) as log:
        await log.append_many([event(n) for n in range(10)])
        before, head = [record async for record in log.read_full()], log.head
    async with EventLog.open(where) as log:
        after = [record async for record in log.read_full()]

        assert log.head == head
    assert after == before


async def test_a_batch_is_in_the_log_completely_or_not_at_all(where: Address) -> None:
    """If one event of a batch can't be written, none is."""
    async with EventLog.open(where) as log:
        with pytest.raises(EventfoldError):
            await log.append_many([event(1), Event("bad", {"n": {1, 2}})])
        await log.append_many([event(2), event(3)])

        assert await numbers(log) == [2, 3]


async def test_reading_begins_at_any_event(where: Address) -> None:
    """The start and the end of each result are valid offsets to read from."""
    async with EventLog.open(where) as log:
        results = await log.append_many([event(n) for n in range(5)])

        for n, result in enumerate(results):
            assert await numbers(log, result.start_offset) == list(range(n, 5))
        assert await numbers(log, results[-1].end_offset) == []


@pytest.mark.parametrize("shift", [-1, 1])
async def test_reading_from_an_invalid_offset_is_an_error(where: Address, shift: int) -> None:
    """Such an offset is inside a line or beyond the head."""
    async with EventLog.open(where) as log:
        await log.append(event(1))
        with pytest.raises(ValueError):
            await numbers(log, log.head.offset + shift)


async def test_reading_ends_at_until(where: Address) -> None:
    """`until` may be the end of any event, even one that was committed together with others."""
    async with EventLog.open(where) as log:
        results = await log.append_many([event(0)]) + [await log.append(event(n)) for n in (1, 2)]
        results += await asyncio.gather(*(log.append(event(n)) for n in (3, 4, 5)))
        for count, result in enumerate(results, 1):
            found = [r.event.data["n"] async for r in log.read_from(until=result.end_offset)]
            assert found == list(range(count))


async def test_reading_backwards_gives_the_same_records_in_reverse(where: Address) -> None:
    """Reading backwards works from the head and from before any event."""
    async with EventLog.open(where) as log:
        assert [record async for record in log.read_back()] == []
        for n in range(0, 30, 6):
            await log.append(event(n))
            await log.append_many([event(n + 1), event(n + 2)])
            await asyncio.gather(*(log.append(event(n + i)) for i in (3, 4, 5)))
        await log.append(Event("large", {"n": 30, "text": "x" * 600_000}))
        await log.append(event(31))
        records = [record async for record in log.read_full()]
        found = [record async for record in log.read_back()]
        begun_inside = [[r async for r in log.read_back(records[n].start_offset)] for n in (4, 16, 31)]

    assert found == records[::-1]
    assert begun_inside == [records[:n][::-1] for n in (4, 16, 31)]


async def test_reading_backwards_from_inside_a_line_is_an_error(where: Address) -> None:
    """No part of an event is returned."""
    async with EventLog.open(where) as log:
        end = (await log.append(event(0))).end_offset
        await log.append(event(1))
        for offset in (5, end + 5):
            with pytest.raises(ValueError, match="offset"):
                [record async for record in log.read_back(offset)]


async def test_a_query_yields_only_matching_events(where: Address) -> None:
    """Tested for reading, reading backwards, tailing, consuming and folding."""
    query = Query({"a"}, {"x"}) | Query(tags={"y"})
    view: View[list[int]] = View("v", lambda state, e: [*state, e.data["n"]], [], query=query)
    async with EventLog.open(where, views=[view]) as log:
        for n in range(24):
            tags = tuple(tag for tag, every in (("x", 3), ("y", 7)) if n % every == 0)
            await log.append(Event("ab"[n % 2], {"n": n}, tags=tags))
        found = [r.event.data["n"] async for r in log.read_from(query=query)]
        back = [r.event.data["n"] async for r in log.read_back(query=query)]
        tail, consumer = log.tail(0, query=query), log.consumer("c", query=query)
        tailed = [(await anext(tail)).event.data["n"] for _ in found]
        consumed = [(await anext(consumer)).event.data["n"] for _ in found]
        folded = await log.wait_until(view)

    assert found == [0, 6, 7, 12, 14, 18, 21]
    assert back == found[::-1]
    assert tailed == consumed == folded == found


async def test_the_hash_of_each_line_can_be_looked_up(where: Address) -> None:
    """A caller asks for it by the offset at which the line ends."""
    async with EventLog.open(where) as log:
        results = await log.append_many([event(n) for n in range(3)])
        found = [await log.read_line_hash_before(result.end_offset) for result in results]

        assert await log.read_line_hash_before(0) is None
    assert found == [result.line_hash for result in results]


async def test_large_events_are_read_back(where: Address) -> None:
    """Lines of some megabytes lie among small ones."""
    async with EventLog.open(where) as log:
        large = Event("large", {"text": "ä" * 2_000_000})
        await asyncio.gather(log.append(event(1)), log.append(large), log.append(event(2)))
        found = [record.event async for record in log.read_full()]

    assert found[1] == large
    assert len(found) == 3


# Conditions


async def test_a_conditional_append_succeeds_at_the_expected_head(where: Address) -> None:
    """Each append is conditional on the result of the one before."""
    async with EventLog.open(where) as log:
        result = await log.append_if(event(0), 0, "")
        for n in range(1, 5):
            result = await log.append_if(event(n), result.end_offset, result.line_hash)

        assert await numbers(log) == [0, 1, 2, 3, 4]


async def test_a_conditional_append_at_another_head_writes_nothing(where: Address) -> None:
    """The error contains both heads."""
    async with EventLog.open(where) as log:
        await log.append(event(0))
        with pytest.raises(ConditionalAppendError) as raised:
            await log.append_if(event(1), 0, "")
        with pytest.raises(ConditionalAppendError):
            await log.append_if(event(1), log.head.offset, line_hash(b"another"))

        assert await numbers(log) == [0]
    conflict = raised.value.args[0]
    assert (conflict.expected_offset, conflict.actual_offset) == (0, log.head.offset)


async def test_of_many_appends_that_expect_the_same_head_one_succeeds(where: Address) -> None:
    """Tested also within one commit, with other appends around them."""
    async with EventLog.open(where) as log:
        outcomes = await asyncio.gather(
            *(log.append_if(event(n), 0, "") for n in range(20)), log.append(event(99)), return_exceptions=True
        )

        assert sum(isinstance(outcome, ConditionalAppendError) for outcome in outcomes) == 19
        assert len(await numbers(log)) == 2


async def test_an_append_refused_because_of_one_before_it_in_a_commit_names_real_offsets(where: Address) -> None:
    """Both calls wait together: the conflict has the offsets that the accepted event gets."""
    async with EventLog.open(where) as log:
        await log.append(event(0))
        head = log.head
        first, at_head, unless, last = await asyncio.gather(
            log.append_many([event(1), event(2)]),
            log.append_if(event(3), *head),
            log.append_unless([event(4)], Query(), after=head.offset),
            log.append_if(event(5), *head),
            return_exceptions=True,
        )

        assert await numbers(log) == [0, 1, 2]
    assert isinstance(first, list)
    for refused in (at_head, unless, last):
        assert isinstance(refused, ConditionalAppendError)
        assert refused.conflict.actual_offset == first[-1].end_offset
    assert isinstance(unless, ConditionalAppendError)
    assert unless.conflict.offset == first[0].start_offset


# Tails and waits


async def test_a_tail_misses_nothing_and_repeats_nothing(where: Address) -> None:
    """The tail starts while events are being appended."""
    seen: list[int] = []

    async with EventLog.open(where) as log:

        async def tail() -> None:
            async for record in log.tail(0):
                seen.append(record.event.data["n"])

        await log.append_many([event(n) for n in range(50)])
        task = asyncio.create_task(tail())
        for n in range(50, 150, 2):
            await asyncio.gather(log.append(event(n)), log.append(event(n + 1)))
        await soon(lambda: len(seen) >= 150)
    await task

    assert seen == list(range(150))


async def test_a_separate_reader_sees_the_events_of_the_writer(where: Address) -> None:
    """Like a reader in another process, it shares nothing with the log."""
    reader = EventReader(where)
    async with EventLog.open(where) as log:
        waiting = asyncio.ensure_future(anext(reader.tail()))
        await asyncio.sleep(0.2)
        await log.append(event(7))
        async with asyncio.timeout(10):
            record = await waiting
    await reader.aclose()

    assert record.event == event(7)


async def test_a_wait_ends_when_there_are_new_events(where: Address) -> None:
    """The wait ends at once if there already are new events, and otherwise after its time-out."""
    async with EventLog.open(where) as log:
        waiting = asyncio.ensure_future(log.wait_for_events(0))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await log.append(event(1))
        result = await waiting
        again = await log.wait_for_events(log.head.offset, timeout=0.05)

    assert (result.new_data, result.size) == (True, log.head.offset)
    assert not again.new_data


async def test_tails_waits_and_watches_end_when_the_log_is_closed(where: Address) -> None:
    """A wait raises an error; a tail and a watch simply end."""
    log = await EventLog.open(where, views=[View("total", total, 0)])
    await log.append(event(1))

    async def watch() -> list[int]:
        return [state async for state in log.watch("total")]

    async def tail() -> list[int]:
        return [record.event.data["n"] async for record in log.tail(0)]

    tasks = [asyncio.create_task(watch()), asyncio.create_task(tail())]
    waiting = asyncio.ensure_future(log.wait_for_events(log.head.offset))
    await asyncio.sleep(0.3)
    await log.aclose()
    async with asyncio.timeout(10):
        assert await asyncio.gather(*tasks) == [[1], [1]]
        with pytest.raises(LogClosedError):
            await waiting


async def test_a_tail_that_is_cancelled_leaves_the_log_usable(where: Address) -> None:
    """The tail is cancelled while it waits and while it reads."""
    async with EventLog.open(where) as log:

        async def tail() -> None:
            async for _ in log.tail(0):
                await asyncio.sleep(0)

        for n in range(20):
            task = asyncio.create_task(tail())
            await log.append(event(n))
            await asyncio.sleep(0.001 * n)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        assert await numbers(log) == list(range(20))


async def test_an_append_cancelled_in_the_queue_is_not_in_the_log(where: Address) -> None:
    """The appends before and after it are in the log."""
    async with EventLog.open(where) as log:
        tasks = [asyncio.ensure_future(log.append(event(n))) for n in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.wait(tasks)

        found = await numbers(log)
        assert (0 in found, 2 in found) == (True, True)
        assert found == sorted(found)
        await log.append(event(3))
        assert (await numbers(log))[-1] == 3


async def test_a_closed_log_refuses_appends(where: Address) -> None:
    """Appends that were called before the close are finished first."""
    log = await EventLog.open(where)
    tasks = [asyncio.ensure_future(log.append(event(n))) for n in range(10)]
    await asyncio.sleep(0)
    await log.aclose()
    await asyncio.gather(*tasks)
    with pytest.raises(LogClosedError):
        await log.append(event(10))
    await log.aclose()


# Views and consumers


async def test_a_view_continues_from_its_snapshot(where: Address) -> None:
    """The events before the snapshot are not folded again."""
    folded: list[int] = []

    def count(state: int, event: Any) -> int:
        folded.append(event.data["n"])
        return total(state, event)

    async with EventLog.open(where, views=[View("total", count, 0)]) as log:
        await log.append_many([event(n) for n in range(10)])
        await log.refresh_all()
        assert log.view("total") == 45
    folded.clear()
    async with EventLog.open(where, views=[View("total", count, 0)]) as log:
        assert (log.view("total"), folded) == (45, [])
        await log.append(event(5))
        await log.refresh_all()
        assert (log.view("total"), folded) == (50, [5])


async def test_a_read_only_view_works_while_a_writer_is_running(where: Address) -> None:
    """The view uses connections or descriptors of its own, and saves nothing."""
    async with EventLog.open(where) as log:
        result = await log.append(event(3))
        async with EventLog.open(where, read_only=True, views=[View("total", total, 0)]) as other:
            assert await other.wait_until("total", result.end_offset) == 3
            with pytest.raises(EventfoldError):
                await other.append(event(4))


async def test_a_read_only_view_continues_from_its_own_snapshot(where: Address, tmp_path: Path) -> None:
    """The snapshot is in a directory named by the caller, on any engine."""
    folded: list[int] = []

    def noting(state: int, event: Any) -> int:
        folded.append(event.data["n"])
        return total(state, event)

    async with EventLog.open(where) as log:
        for n in (3, 4):
            await log.append(event(n))
            views = [View("total", noting, 0)]
            async with EventLog.open(where, read_only=True, views=views, snapshots=tmp_path / "own") as other:
                await other.refresh_all()
        assert (other.views["total"].state, folded) == (7, [3, 4])


async def test_a_consumer_continues_after_its_last_commit(where: Address) -> None:
    """Records that were delivered but not committed are delivered again."""
    async with EventLog.open(where) as log:
        await log.append_many([event(n) for n in range(10)])
        consumer = log.consumer("mailer")
        async for record in consumer:
            if record.event.data["n"] == 4:
                await consumer.commit(record)
            if record.event.data["n"] == 6:
                break
    async with EventLog.open(where) as log:
        async for record in log.consumer("mailer"):
            assert record.event.data["n"] == 5
            break


async def test_documents_are_replaced_listed_and_deleted(where: Address) -> None:
    """Each kind of document has its own names."""
    async with EventLog.open(where) as log:
        documents = log.reader()._documents
        await documents.store("view", "b", b"1")
        await documents.store("view", "a.b", b"x" * 3_000_000)
        await documents.store("view", "b", b"2")
        await documents.store("consumer", "c", b"3")

        assert await documents.load("view", "b") == b"2"
        assert await documents.load("view", "a.b") == b"x" * 3_000_000
        assert await documents.names("view") == ["a.b", "b"]
        await documents.delete("view", "b")
        await documents.delete("view", "b")
        assert await documents.load("view", "b") is None
        assert (await documents.names("view"), await documents.names("consumer")) == (["a.b"], ["c"])


# Against a list

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 3)),
        st.tuples(st.just("append_if"), st.booleans()),
        st.tuples(st.just("reopen"), st.none()),
        st.tuples(st.just("read"), st.integers(0, 5)),
    ),
    max_size=12,
)


@pytest.mark.parametrize("engine", list(ENGINES))
@examples(15)
@given(steps=STEPS)
def test_random_steps_have_the_same_effect_on_a_log_and_a_list(
    request: pytest.FixtureRequest, engine: str, steps: list[tuple[str, Any]]
) -> None:
    """The steps are appends, conditions that hold or not, reopening, and reads from anywhere."""
    where = ENGINES[engine](request)
    # Only the address of this example's log, since directories and logs are numbered.
    asyncio.run(_compare(where, steps))


async def _compare(where: Address, steps: list[tuple[str, Any]]) -> None:
    model: list[int] = []
    places = [Head(0, "")]
    log = await EventLog.open(where)
    try:
        for step, argument in steps:
            if step == "append":
                new = [event(len(model) + i) for i in range(argument)]
                results = await log.append_many(new)
                model += [each.data["n"] for each in new]
                places += [Head(result.end_offset, result.line_hash) for result in results]
            elif step == "append_if" and (argument or len(places) > 1):
                expected = places[-1] if argument else places[0]
                try:
                    result = await log.append_if(event(len(model)), *expected)
                except ConditionalAppendError:
                    assert not argument
                else:
                    assert argument
                    model.append(len(model))
                    places.append(Head(result.end_offset, result.line_hash))
            elif step == "reopen":
                await log.aclose()
                log = await EventLog.open(where)
            elif step == "read":
                index = min(argument, len(places) - 1)
                assert await numbers(log, places[index].offset) == model[index:]
            assert log.head == places[-1]
        assert await numbers(log) == model
    finally:
        await log.aclose()
