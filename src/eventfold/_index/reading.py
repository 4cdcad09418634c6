"""Reads the events of a few tags by the index, instead of the whole log."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from .._event import Record
from .._query import Query
from .._reader import EventReader
from .index import Index


async def read_from(
    index: Index, reader: EventReader, query: Query, offset: int, until: int | None
) -> AsyncIterator[Record]:
    """What `EventReader.read_from` gives, with its errors."""
    known, [places] = await index.places([(query, offset)])
    if places is None:
        async for record in reader.read_from(offset, query=query, until=until):
            yield record
        return
    await reader.check_range(offset, until)
    end = known if until is None else min(until, known)
    for place in places:
        if place < end:
            for record in await events_at(reader, query, place):
                if record.end_offset <= end:
                    yield record


async def read_back(index: Index, reader: EventReader, query: Query, offset: int | None) -> AsyncIterator[Record]:
    """What `EventReader.read_back` gives, with its errors."""
    end, [places] = await index.places([(query, 0)])
    if places is None:
        async for record in reader.read_back(offset, query=query):
            yield record
        return
    if offset is not None:
        await reader.check_range(offset, None)
        end = min(offset, end)
    for place in reversed(places):
        if place < end:
            for record in reversed(await events_at(reader, query, place)):
                yield record


async def events_at(reader: EventReader, query: Query, offset: int) -> list[Record]:
    """The events of the line that begins at an offset, as far as the query matches them."""
    found: list[Record] = []
    async with aclosing(reader.read_from(offset)) as records:  # type: ignore[type-var]
        async for record in records:
            if record.start_offset != offset:
                break
            if query.matches(record.event):
                found.append(record)
    return found
