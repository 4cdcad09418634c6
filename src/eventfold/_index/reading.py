"""Reads the events that a query matches by looking up their offsets in the index, without reading the whole log."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from .._codec.decode import batch_position
from .._event import Record
from .._query import Query
from .._reader import EventReader
from .index import Index


async def read_from(
    index: Index, reader: EventReader, query: Query, offset: int, until: int | None
) -> AsyncIterator[Record]:
    """Yields and raises the same as `EventReader.read_from`."""
    known, [candidates] = await index.candidates([query], [offset])
    if candidates is None:
        async for record in reader.read_from(offset, query=query, until=until):
            yield record
        return
    await reader._check_range(offset, until)
    end = known if until is None or until >= known else await _before_open_batch(reader, until)
    async with aclosing(reader._events_at([start for start in candidates if start < end], query)) as found:  # type: ignore[type-var]
        async for records in found:
            for record in records:
                yield record


async def read_back(index: Index, reader: EventReader, query: Query, offset: int | None) -> AsyncIterator[Record]:
    """Yields and raises the same as `EventReader.read_back`."""
    end, [candidates] = await index.candidates([query], [0])
    if candidates is None:
        async for record in reader.read_back(offset, query=query):
            yield record
        return
    if offset is not None:
        await reader._check_range(offset, None)
        end = min(offset, end)
    async with aclosing(reader._events_at([start for start in candidates[::-1] if start < end], query)) as found:  # type: ignore[type-var]
        async for records in found:
            for record in reversed(records):
                yield record


async def _before_open_batch(reader: EventReader, end: int) -> int:
    """Where the batch begins that contains lines on both sides of `end`; `end` itself if there is no such batch."""
    lines_left = None  # the number of lines of the batch before `end` that have not been read
    async with aclosing(reader.read_back(end)) as records:  # type: ignore[type-var]
        async for record in records:
            if lines_left is None:
                index, size = batch_position(record._line) or (1, 1)
                if index == size:
                    return end
                lines_left = index
            lines_left -= record.start_offset < end
            end = record.start_offset
            if not lines_left:
                break
    return end
