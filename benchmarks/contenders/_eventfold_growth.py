"""The work of eventfold on existing logs of different lengths, for the benchmark `growth`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from itertools import count
from pathlib import Path
from time import perf_counter, time_ns

from benchmarks._events import Totals, add, tagged_fields, tagged_lines
from benchmarks._probe import growth
from eventfold import Event, EventLog, EventReader, EventWriter, Query, View, build_index, verify

from ._serve import Answer, Unsupported, percentiles

# The number of events after a tail's start, and after the offset on which a decision is based.
BEHIND = 100
LAST = 50

# Numbers of events that are in no log, so that conditions on their tags never fail, in any process.
_new = count(time_ns())


def _view() -> View[Totals]:
    return View("totals", add, Totals)


def _event() -> Event:
    return Event(**tagged_fields(next(_new)))


async def _times(work: Callable[[], Awaitable[object]], times: int) -> Answer:
    """Measures the median time of `times` calls."""
    seconds = []
    for _ in range(times):
        begun = perf_counter()
        await work()
        seconds.append(perf_counter() - begun)
    return {"seconds": percentiles(seconds)["p50"]}


async def open_(dir: str, times: int) -> Answer:
    seconds = []
    for _ in range(times // 4 + 2):
        begun = perf_counter()
        async with EventLog.open(dir, views=[_view()]):
            seconds.append(perf_counter() - begun)
    # The first opening may have to catch up or to write a snapshot.
    return {"seconds": percentiles(seconds[1:])["p50"]}


async def refresh(dir: str, times: int) -> Answer:
    """Refreshes with nothing new, in a process without a writer, after the files have been at rest for a while."""
    await asyncio.sleep(0.06)
    reader, view = EventReader(dir), _view()
    await view.refresh(reader)
    return await _times(lambda: view.refresh(reader), 10 * times)


async def refresh_one(dir: str, times: int) -> Answer:
    """Refreshes with one new event, written as if by another process."""
    reader, view = EventReader(dir), _view()
    state, seconds = await view.refresh(reader), []
    fd = os.open(Path(dir, "app.jsonl"), os.O_WRONLY | os.O_APPEND)
    try:
        for _ in range(times):
            before = state.events
            os.write(fd, b"".join(tagged_lines(1, next(_new))))
            begun = perf_counter()
            state = await view.refresh(reader)
            seconds.append(perf_counter() - begun)
            if state.events != before + 1:
                raise AssertionError(f"{before} events became {state.events}")
    finally:
        os.close(fd)
    return {"seconds": percentiles(seconds)["p50"]}


async def append(dir: str, times: int) -> Answer:
    async with EventWriter.open(dir) as log:
        return await _times(lambda: log.append(_event()), 5 * times)


async def condition_recent(dir: str, times: int) -> Answer:
    """Checks a condition on the last events."""
    async with EventLog.open(dir) as log:

        async def once() -> None:
            event = _event()
            await log.append_unless([event], Query(tags=event.tags), after=after)

        after = await _back(log.reader(), BEHIND)
        return await _times(once, times)


async def condition_index(dir: str, times: int) -> Answer:
    """Checks a condition on the whole log, with the index."""
    async with EventLog.open(dir, index=True) as log:

        async def once() -> None:
            event = _event()
            await log.append_unless([event], Query(tags=event.tags))

        await once()
        return await _times(once, 5 * times)


async def condition(dir: str) -> Answer:
    """Checks a condition on the whole log, without an index."""
    async with EventLog.open(dir) as log:
        event = _event()
        with growth() as peak:
            begun = perf_counter()
            await log.append_unless([event], Query(tags=event.tags))
            return {"seconds": perf_counter() - begun, "bytes": peak()}


async def _back(reader: EventReader, events: int) -> int:
    """The offset at which the last `events` events begin."""
    place = (await reader.head()).offset
    async with aclosing(reader.read_back()) as records:  # type: ignore[type-var]
        async for record in records:
            place, events = record.start_offset, events - 1
            if not events:
                break
    return place


async def tail(dir: str, times: int) -> Answer:
    """Measures the time from a tail's start to its first event, with a new reader."""
    offset = await _back(EventReader(dir), BEHIND)

    async def once() -> None:
        async with aclosing(EventReader(dir).tail(offset)) as records:  # type: ignore[type-var]
            async for _ in records:
                return

    return await _times(once, times)


async def last(dir: str, times: int) -> Answer:
    """Reads the last events with a new reader, as `eventfold cat --last` does."""
    return await _times(lambda: _back(EventReader(dir), LAST), times)


async def replay(dir: str) -> Answer:
    """Opens the log without a snapshot."""
    Path(dir, "views", "totals.snapshot.json").unlink(missing_ok=True)
    with growth() as peak:
        begun = perf_counter()
        async with EventLog.open(dir, views=[_view()]):
            return {"seconds": perf_counter() - begun, "bytes": peak()}


async def verified(dir: str) -> Answer:
    with growth() as peak:
        begun = perf_counter()
        report = await verify(dir)
        answer = {"seconds": perf_counter() - begun, "bytes": peak()}
    if not report.ok:
        raise AssertionError(str(report.problems[0]))
    return answer


async def index(dir: str) -> Answer:
    Path(dir, "index.sqlite").unlink(missing_ok=True)
    with growth() as peak:
        begun = perf_counter()
        await build_index(dir)
        return {"seconds": perf_counter() - begun, "bytes": peak()}


async def open_index(dir: str) -> Answer:
    """Opens the log with a snapshot and the index, whose pages and sums are checked."""
    async with EventLog.open(dir, views=[_view()], index=True):
        pass
    with growth() as peak:
        begun = perf_counter()
        async with EventLog.open(dir, views=[_view()], index=True):
            return {"seconds": perf_counter() - begun, "bytes": peak()}


async def archive(dir: str) -> Answer:
    """Rotates the whole log, and appends some events, so that the active log is not empty."""
    async with EventWriter.open(dir) as log:
        with growth() as peak:
            begun = perf_counter()
            await log.rotate()
            answer = {"seconds": perf_counter() - begun, "bytes": peak()}
        await log.append_many([_event() for _ in range(2)])
    return answer


FLAT: dict[str, Callable[[str, int], Awaitable[Answer]]] = {
    "open": open_,
    "refresh": refresh,
    "refresh, one": refresh_one,
    "append": append,
    "condition, recent": condition_recent,
    "condition, index": condition_index,
    "tail": tail,
    "last": last,
}
WHOLE: dict[str, Callable[[str], Awaitable[Answer]]] = {
    "condition": condition,
    "replay": replay,
    "verify": verified,
    "index": index,
    "open, index": open_index,
    "archive": archive,
}


async def grow(dir: str, what: str, times: int) -> Answer:
    if what in WHOLE:
        return await WHOLE[what](dir)
    if what not in FLAT:
        raise Unsupported
    return await FLAT[what](dir, times)
