"""The `eventsourcing` package with its SQLite recorder, called as its applications call it.

The recorder is used directly, with events already encoded by msgspec: aggregates, and the package's own mapper and
transcoder, would come on top. Each order is an aggregate of four events. The package is synchronous: a single task
calls it directly, which blocks the event loop but is faster; several tasks call it in threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Any
from uuid import UUID

import msgspec
from eventsourcing.persistence import ApplicationRecorder, InfrastructureFactory, IntegrityError, StoredEvent
from eventsourcing.utils import Environment

from benchmarks._events import TYPES, PlainEvent, Totals, add, blocks, plain_events

from ._serve import Answer, serve, time_appends, time_conditional

# The version of an order's event.
VERSIONS = {type: number for number, type in enumerate(TYPES, 1)}
# How many notifications are selected at once.
PAGE = 1_000

encode = msgspec.json.Encoder().encode


def stored(event: PlainEvent, version: int | None = None) -> StoredEvent:
    """Version numbers begin at 1."""
    order, number = (event.data["order"], VERSIONS[event.type]) if version is None else (0, version)
    return StoredEvent(UUID(int=order), number, event.type, encode(event))


@asynccontextmanager
async def recorder(dir: str) -> AsyncIterator[ApplicationRecorder]:
    environment = {"PERSISTENCE_MODULE": "eventsourcing.sqlite", "SQLITE_DBNAME": str(Path(dir, "events.db"))}
    factory: Any = InfrastructureFactory.construct(Environment("benchmark", environment))
    opened = factory.application_recorder()
    with opened.datastore.transaction(commit=False) as cursor:
        cursor.execute("PRAGMA synchronous")
        if cursor.fetchone()[0] < 2:
            raise AssertionError("this build of SQLite does not sync each commit by default")
    try:
        yield opened
    finally:
        factory.close()


class Log:
    def __init__(self, recorder: ApplicationRecorder, call: Callable[..., Any]) -> None:
        self._recorder, self._call = recorder, call

    async def append(self, event: PlainEvent) -> None:
        await self._call(self._recorder.insert_events, [stored(event)])

    async def append_many(self, events: Sequence[PlainEvent]) -> None:
        await self._call(self._recorder.insert_events, list(map(stored, events)))


async def directly(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def caller(tasks: int) -> Callable[..., Any]:
    return directly if tasks == 1 else asyncio.to_thread


class Eventsourcing:
    @asynccontextmanager
    async def log(self, dir: str, tasks: int) -> AsyncIterator[Log]:
        async with recorder(dir) as opened:
            yield Log(opened, caller(tasks))

    async def append(self, dir: str, tasks: int, count: int, batch: int) -> Answer:
        return await time_appends(self.log(dir, tasks), plain_events(tasks * count * batch), tasks, batch)

    async def append_if(self, dir: str, tasks: int, count: int) -> Answer:
        """Appends from all tasks to one aggregate, each with the version after the latest that it knows."""
        events = plain_events(tasks * count)
        async with recorder(dir) as opened:
            call, version = caller(tasks), 0

            async def attempt() -> bool:
                nonlocal version
                mine = version + 1
                try:
                    await call(opened.insert_events, [stored(events[mine - 1], mine)])
                except IntegrityError:
                    return False
                version = max(version, mine)
                return True

            return await time_conditional(attempt, tasks, count)

    async def write(self, dir: str, events: int, distinct: int | None) -> Answer:
        async with recorder(dir) as opened:
            for start, count in blocks(events, distinct):
                opened.insert_events(list(map(stored, plain_events(count, start))))
        return {}

    async def replay(self, dir: str, views: int, types: list[str] | None) -> Answer:
        decoder = msgspec.json.Decoder(PlainEvent)
        begun = perf_counter()
        async with recorder(dir) as opened:
            states = [Totals() for _ in range(views)]
            start = 1
            while page := opened.select_notifications(start, PAGE, topics=types or ()):
                for notification in page:
                    event = decoder.decode(notification.state)
                    for number, state in enumerate(states):
                        states[number] = add(state, event)
                start = page[-1].id + 1
            return {"seconds": perf_counter() - begun, **msgspec.structs.asdict(states[-1])}


if __name__ == "__main__":
    serve(Eventsourcing())
