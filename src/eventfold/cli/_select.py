"""Selects and finds the events that a command prints."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Collection
from contextlib import aclosing
from datetime import datetime
from typing import Any, NamedTuple

from .._event import Event, Record
from .._query import Query
from .._reader import EventReader


class Selection(NamedTuple):
    """The events that a command's options select. Times are in Unix seconds; `until` is exclusive."""

    query: Query
    since: int | None = None
    until: int | None = None

    def matches(self, event: Event) -> bool:
        return (
            (self.since is None or event.ts >= self.since)
            and (self.until is None or event.ts < self.until)
            and self.query.matches(event)
        )


def parse_time(text: str) -> int:
    """Parses Unix seconds, or a date and time in ISO 8601, which is local time unless it has a UTC offset.

    A fraction is rounded up: compared with whole seconds, the result then gives the same answers as the exact time.
    """
    if text.isascii() and text.isdigit():
        return int(text)
    try:
        return math.ceil(datetime.fromisoformat(text).timestamp())
    except ValueError:
        raise ValueError(
            f"{text!r} is not a time: write 2026-01-31, 2026-01-31T12:00, 2026-01-31T12:00Z, or seconds since 1970"
        ) from None


def selection(
    types: Collection[str] = (), tags: Collection[str] = (), since: str | None = None, until: str | None = None
) -> Selection:
    """Returns the selection that a command's options describe. Raises `ValueError`."""
    return Selection(
        Query(types=types, tags=tags),
        None if since is None else parse_time(since),
        None if until is None else parse_time(until),
    )


async def between(reader: EventReader, start: int, end: int | None, wanted: Selection) -> AsyncIterator[Record]:
    """Yields the selected events from one offset to another, which is exclusive (None: the current head)."""
    records: Any = reader.read_from(start, query=wanted.query, until=end)
    async with aclosing(records):
        async for record in records:
            if wanted.matches(record.event):
                yield record


async def last(reader: EventReader, count: int, start: int, end: int | None, wanted: Selection) -> list[Record]:
    """Returns the last `count` selected events between two offsets (None: the current head), oldest first."""
    found: deque[Record] = deque()
    records: Any = reader.read_back(end, query=wanted.query)
    async with aclosing(records):
        async for record in records:
            if record.start_offset < start:
                break
            if wanted.matches(record.event):
                found.appendleft(record)
                if len(found) == count:
                    break
    return list(found)
