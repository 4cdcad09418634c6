"""The work of eventfold with tagged events: conditional appends, and reading the events of one tag."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter

from benchmarks._events import blocks, tagged_fields, tagged_lines
from eventfold import Event, EventLog, Query

from ._serve import Answer, Appender, reading_times, time_appends


class Conditional:
    """Appends an event only if the whole log has none with its tags."""

    def __init__(self, log: EventLog) -> None:
        self._log = log

    async def append(self, event: Event) -> None:
        await self._log.append_unless([event], Query(tags=event.tags))

    async def append_many(self, events: Sequence[Event]) -> None:
        raise NotImplementedError


async def append(dir: str, tasks: int, count: int, start: int, conditional: bool, index: bool) -> Answer:
    events = [Event(**tagged_fields(number)) for number in range(start, start + tasks * count)]

    @asynccontextmanager
    async def opened() -> AsyncIterator[Appender]:
        async with EventLog.open(dir, index=index) as log:
            yield Conditional(log) if conditional else log

    return await time_appends(opened(), events, tasks, 1)


def write(dir: str, events: int, tags: int) -> Answer:
    """Writes lines like those of single appends without eventfold."""
    with open(Path(dir, "app.jsonl"), "wb") as file:
        for start, count in blocks(events):
            file.writelines(tagged_lines(count, start, tags))
    return {}


async def build(dir: str) -> Answer:
    """Measures opening the log without an index file, and closing it, which completes the new index."""
    Path(dir, "index.sqlite").unlink(missing_ok=True)
    begun = perf_counter()
    async with EventLog.open(dir, index=True) as log:
        async for _ in log.read_from(query=Query(tags={"entity:0"})):
            pass
    return {"seconds": perf_counter() - begun}


async def read(dir: str, tags: list[int], index: bool) -> Answer:
    begun = perf_counter()
    async with EventLog.open(dir, index=index) as log:

        async def events_of(tag: str) -> int:
            return len([record async for record in log.read_from(query=Query(tags={tag}))])

        return await reading_times(begun, events_of, tags)
