"""The costs and gains of the index on PostgreSQL, for `benchmarks.engines`: the same log with and without the index.

Each appended event has its own tag, and the condition is that no event in the whole log has this tag. The log already
has ten events of each of its tags, far apart. Appends without a condition go to another log, so that this one does not
grow.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from itertools import count
from statistics import median
from time import perf_counter
from typing import Any

from eventfold import Event, EventLog, Query

from ._events import tagged_fields
from ._harness import Case, Figures, Table

PLAIN, INDEX = "postgres", "postgres, index"
EVENTS_OF_A_TAG = 10
TASKS = 1_000
# Tags that are read in a round; without the index, each read scans the log.
_READ = {PLAIN: 1, INDEX: 20}
Appends = Callable[[Callable[[int], Awaitable[Any]], int, float], Awaitable[Figures]]


class TaggedLog:
    """A log in the database with tagged events, and one for appends, opened with the index or without it."""

    def __init__(self, name: str, server: str, events: int) -> None:
        self.name = name
        self._address = f"{server}?log={name.replace(', ', '_')}"
        self._tags = events // EVENTS_OF_A_TAG
        self._new, self._next_tag = count(events), count()
        self._log: EventLog
        self._appended: EventLog

    async def open(self) -> None:
        self._log = await EventLog.open(f"{self._address}_tagged", index=self.name == INDEX)
        self._appended = await EventLog.open(f"{self._address}_appended", index=self.name == INDEX)
        for start in range(0, self._tags * EVENTS_OF_A_TAG, TASKS):
            numbers = range(start, min(start + TASKS, self._tags * EVENTS_OF_A_TAG))
            await asyncio.gather(*(self._log.append(Event(**tagged_fields(n, self._tags))) for n in numbers))

    async def append(self, _: int) -> None:
        await self._appended.append(self._event())

    async def append_unless(self, _: int) -> None:
        event = self._event()
        await self._log.append_unless([event], Query(tags=event.tags))

    def _event(self) -> Event:
        return Event(**tagged_fields(next(self._new)))

    async def read(self) -> Figures:
        """Reads the events of tags that have not been read before."""
        times = []
        for _ in range(_READ[self.name]):
            tag = f"entity:{next(self._next_tag) * 7919 % self._tags}"
            begun = perf_counter()
            found = [record async for record in self._log.read_from(query=Query(tags={tag}))]
            times.append(perf_counter() - begun)
            if len(found) != EVENTS_OF_A_TAG:
                raise AssertionError(f"{self.name} found {len(found)} events of {tag}")
        return {"p50": median(times) * 1e3}

    async def aclose(self) -> None:
        await self._log.aclose()
        await self._appended.aclose()


def tables(
    runner: asyncio.Runner, places: Mapping[str, str], options: argparse.Namespace, appends: Appends
) -> Iterator[Table]:
    """`appends` measures calls from many tasks."""
    logs = [TaggedLog(name, places["postgres"], options.tagged) for name in (PLAIN, INDEX)]
    for log in logs:
        runner.run(log.open())

    def case(work: str, log: TaggedLog, measure: Callable[[], Any]) -> Case:
        return Case(work, log.name, lambda: runner.run(measure()), reference=f"{work}, {PLAIN}")

    works: dict[str, Callable[[TaggedLog], Any]] = {
        "unconditional": lambda log: log.append,
        "conditional": lambda log: log.append_unless,
    }
    size = f"a log of {options.tagged:,} events"
    yield Table(
        "index-append",
        f"appends of tagged events, conditional ones to {size}",
        {"rate": "events/s", "cpu": "µs an event"},
        [
            case(f"{work}, {TASKS:,} tasks", log, lambda call=call, log=log: appends(call(log), TASKS, options.seconds))
            for work, call in works.items()
            for log in logs
        ],
        more_is_better=True,
        notes=["The processor time is the client's, without the server's."],
    )
    yield Table(
        "index-read",
        f"the {EVENTS_OF_A_TAG} events of one tag in {size}",
        {"p50": "ms"},
        [case("reading", log, log.read) for log in logs],
    )
    for log in logs:
        runner.run(log.aclose())
