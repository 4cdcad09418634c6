"""Tagged events, and the queries that find them."""

from __future__ import annotations

from eventfold import (
    Event,
    EventLog,
    Query,
)

WRITE_BATCH_SIZE = 5000


def tagged(n: int, *tags: str, type: str = "counted") -> Event:
    return Event(type, {"n": n}, ts=1, tags=tags)


def tag(name: str) -> Query:
    return Query(tags={name})


async def numbers(log: EventLog, query: Query) -> list[int]:
    return [record.event.data["n"] async for record in log.read_from(query=query)]


async def fill(log: EventLog, count: int, start: int = 0) -> None:
    await log.append_many([tagged(n, f"seven:{n % 7}", f"own:{n}") for n in range(start, start + count)])


async def numbers_from(log: EventLog, offset: int, query: Query) -> list[int]:
    return [record.event.data["n"] async for record in log.read_from(offset, query=query)]
