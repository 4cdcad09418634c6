"""The promises of every engine to several writers, and those of its index."""

from __future__ import annotations

import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from tests.conformance.events import event, numbers, soon
from tests.conformance.process import append_in_process

from eventfold import (
    ConditionalAppendError,
    Event,
    EventLog,
    Query,
)
from eventfold._address import Address

# Several writers


async def test_concurrent_writers_lose_nothing(shared: Address) -> None:
    """Each writer sees its own events in its own order, and all of them see the same log."""
    async with EventLog.open(shared) as one, EventLog.open(shared) as two:
        await asyncio.gather(*((one, two)[n % 2].append(event(n)) for n in range(400)))
        found = await numbers(one)

        assert await numbers(two) == found
    assert sorted(found) == list(range(400))
    assert [n for n in found if n % 2] == list(range(1, 400, 2))
    assert [n for n in found if not n % 2] == list(range(0, 400, 2))


async def test_of_two_writers_that_expect_the_same_head_one_succeeds(shared: Address) -> None:
    """If both increment a counter conditionally, no update is lost."""

    async def raise_counter(log: EventLog, times: int) -> None:
        for _ in range(times):
            while True:
                head = await log.reader().head()
                count = len(await numbers(log))
                if await log.reader().head() != head:
                    continue
                try:
                    await log.append_if(event(count), *head)
                    break
                except ConditionalAppendError:
                    pass

    async with EventLog.open(shared) as one, EventLog.open(shared) as two:
        await asyncio.gather(raise_counter(one, 10), raise_counter(two, 10))

        assert await numbers(one) == list(range(20))


async def test_writers_in_several_processes_lose_nothing(shared: Address) -> None:
    """The events of each process are in the order in which it appended them, and a tail here sees all of them."""
    seen: list[int] = []
    async with EventLog.open(shared) as log:

        async def tail() -> None:
            async for record in log.tail(0):
                seen.append(record.event.data["n"])

        tailing = asyncio.create_task(tail())
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, mp_context=spawn) as pool:
            loop = asyncio.get_running_loop()
            await asyncio.gather(
                *(loop.run_in_executor(pool, append_in_process, shared, first, 100) for first in (0, 1000)),
                *(log.append(event(2000 + n)) for n in range(100)),
            )
        await soon(lambda: len(seen) >= 300)
        written = await numbers(log)
    await tailing

    assert seen == written
    for first in (0, 1000, 2000):
        assert [n for n in written if first <= n < first + 1000] == list(range(first, first + 100))


async def test_an_id_that_writers_append_at_once_is_in_the_log_once(shared: Address, tmp_path: Path) -> None:
    """Each writer has its own index, as on two hosts; all of them get the result of the first."""
    opening = [EventLog.open(shared, index=tmp_path / f"index{n}", unique_ids=True) for n in range(2)]
    async with opening[0] as one, opening[1] as two:
        results = []
        for n in range(20):
            results += await asyncio.gather(*(log.append(Event("a", {"n": n}, id=f"id-{n}")) for log in (one, two)))
        found = await numbers(one)

    assert found == list(range(20))
    assert sum(result.duplicate for result in results) == 20
    assert [result.start_offset for result in results[::2]] == [result.start_offset for result in results[1::2]]


# The index


def tagged(n: int, *tags: str) -> Event:
    return Event("ab"[n % 2], {"n": n}, tags=tags, id=f"id-{n}")


async def test_reads_are_the_same_with_and_without_the_index(where: Address, index: bool | Path) -> None:
    """Events are read forwards and backwards, between any two events."""
    queries = [
        Query(tags={"x"}),
        Query({"a"}, {"x", "y"}),
        Query({"b"}, {"y"}) | Query(tags={"z"}),
        Query(tags={"none"}),
    ]
    found, expected = [], []
    async with EventLog.open(where, index=index) as log:
        results = []
        for n in range(40):
            tags = [tag for tag, every in (("x", 2), ("y", 3), ("z", 13)) if n % every == 0]
            results.append(await log.append(tagged(n, *tags)))
        for query in queries:
            for start, end in ((0, 40), (7, 40), (7, 25)):
                limits = results[start].start_offset, results[end - 1].end_offset
                found.append([r async for r in log.read_from(limits[0], query=query, until=limits[1])])
                expected.append([r async for r in log.reader().read_from(limits[0], query=query, until=limits[1])])
                found.append([r async for r in log.read_back(limits[1], query=query)])
                expected.append([r async for r in log.reader().read_back(limits[1], query=query)])

    assert found == expected
    assert [len(records) for records in found[::6]] == [20, 7, 10, 0]


async def test_a_condition_with_the_index_covers_the_whole_log(where: Address, index: bool | Path) -> None:
    """The condition covers earlier events of this writer and of another one; the error contains the offset."""
    async with EventLog.open(where, index=index) as log:
        await log.append_many([tagged(n, f"seat:{n}") for n in range(50)])
    async with EventLog.open(where, index=index) as log:
        own = await log.append(tagged(50, "seat:50"))
        await log.append_unless([tagged(51, "seat:51")], Query(tags={"seat:51"}))
        for seat in (7, 50, 51):
            with pytest.raises(ConditionalAppendError) as raised:
                await log.append_unless([tagged(99)], Query(tags={f"seat:{seat}"}))
            if seat == 50:
                assert raised.value.conflict.offset == own.start_offset
        await log.append_unless([tagged(52)], Query(tags={"seat:50"}), after=own.end_offset)

        assert await numbers(log) == list(range(53))


async def test_the_index_includes_events_that_were_appended_without_it(where: Address, index: bool | Path) -> None:
    """Tested with events from before the index was built, and from between two writers that used it."""
    async with EventLog.open(where) as log:
        await log.append(tagged(0, "a"))
    async with EventLog.open(where, index=index) as log:
        await log.append(tagged(1, "a"))
    async with EventLog.open(where) as log:
        await log.append(tagged(2, "a"))
    async with EventLog.open(where, index=index, unique_ids=True) as log:
        await log.append(tagged(3, "a"))

        assert [r.event.data["n"] async for r in log.read_from(query=Query(tags={"a"}))] == [0, 1, 2, 3]
        assert [(await log.append(tagged(n))).duplicate for n in range(4)] == [True] * 4


async def test_an_id_is_in_the_log_once(where: Address, index: bool | Path) -> None:
    """The events come at the same time, after reopening, and in a batch; each call gets the first result."""
    async with EventLog.open(where, index=index, unique_ids=True) as log:
        results = await asyncio.gather(log.append(tagged(0)), log.append(tagged(0)))
    async with EventLog.open(where, index=index, unique_ids=True) as log:
        results += [await log.append(tagged(0)), *await log.append_many([tagged(0)])]

        assert await numbers(log) == [0]
    assert len({(r.start_offset, r.end_offset, r.line_hash) for r in results}) == 1
    assert sorted(r.duplicate for r in results) == [False, True, True, True]


async def test_writers_share_the_index_of_the_engine(shared: Address, index: bool | Path) -> None:
    """Two writers reserve the same seats, beside one without the index, and each seat goes to one of them."""
    if index is not True:
        pytest.skip("this engine keeps no index")
    opening = [EventLog.open(shared, index=True), EventLog.open(shared, index=True), EventLog.open(shared)]

    async def reserve(log: EventLog, seat: int) -> bool:
        try:
            await log.append_unless([tagged(seat, f"seat:{seat}")], Query(tags={f"seat:{seat}"}))
        except ConditionalAppendError:
            return False
        return True

    async with opening[0] as one, opening[1] as two, opening[2] as without:
        taken = []
        for first in range(0, 60, 20):
            await without.append(tagged(first, f"seat:{first}"))
            seats = range(first, first + 20)
            taken += await asyncio.gather(*(reserve(log, seat) for seat in seats for log in (one, two)))
        found = await numbers(two)

    assert sorted(found) == list(range(60))
    assert sum(taken) == 57


async def test_a_tail_yields_the_events_of_all_writers(shared: Address) -> None:
    """The tail sees them in the order of the log."""
    seen: list[int] = []
    async with EventLog.open(shared) as one, EventLog.open(shared) as two:

        async def tail() -> None:
            async for record in one.tail(0):
                seen.append(record.event.data["n"])

        task = asyncio.create_task(tail())
        await asyncio.gather(*((one, two)[n % 2].append(event(n)) for n in range(200)))
        await soon(lambda: len(seen) >= 200)
        assert seen == await numbers(two)
    await task
