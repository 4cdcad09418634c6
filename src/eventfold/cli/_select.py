"""Which events a command shows, and where in the log it finds the last of them."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Collection
from contextlib import aclosing
from datetime import datetime
from typing import Any, NamedTuple

from .._aio import in_thread
from .._engine import Paths
from .._event import Event, Record
from .._files.paths import Layout
from .._files.segments import LogSegments, last_line_end
from .._query import Query
from .._reader import EventReader

# Bytes of the log that are looked at first for the last events, and how much more each time they are not enough.
_FIRST_WINDOW, _GROWTH = 64 * 1024, 8


class Selection(NamedTuple):
    """What an event must be like. Times are in seconds since the Unix epoch; `until` is exclusive."""

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
    """Seconds since the Unix epoch, or a date and time in ISO 8601 (local time, unless it says otherwise)."""
    if text.isascii() and text.isdigit():
        return int(text)
    try:
        return int(datetime.fromisoformat(text).timestamp())
    except ValueError:
        raise ValueError(
            f"{text!r} is no time: write 2026-01-31, 2026-01-31T12:00, 2026-01-31T12:00Z, or seconds since 1970"
        ) from None


def selection(
    types: Collection[str] = (), tags: Collection[str] = (), since: str | None = None, until: str | None = None
) -> Selection:
    """The selection that the options of a command name. Raises `ValueError`."""
    return Selection(
        Query(types=types, tags=tags),
        None if since is None else parse_time(since),
        None if until is None else parse_time(until),
    )


async def between(reader: EventReader, start: int, end: int | None, wanted: Selection) -> AsyncIterator[Record]:
    """The wanted events from one offset to another (exclusive; None: the head of now)."""
    records: Any = reader.read_from(start)
    async with aclosing(records):
        async for record in records:
            if end is not None and record.start_offset >= end:
                return
            if wanted.matches(record.event):
                yield record


async def last(reader: EventReader, count: int, end: int, wanted: Selection) -> list[Record]:
    """The last `count` wanted events before an offset, oldest first, from as little of the log as that takes."""
    window = _FIRST_WINDOW
    while True:
        start = await _line_start(reader, end - window)
        found = deque([record async for record in between(reader, start, end, wanted)], maxlen=count)
        if len(found) == count or not start:
            return list(found)
        window *= _GROWTH


async def _line_start(reader: EventReader, offset: int) -> int:
    """Where a line begins, at or before an offset, and not far from it where the log is in files; else 0."""
    paths = getattr(reader._source, "layout", None)
    if offset <= 0 or not isinstance(paths, Paths):
        return 0
    return await in_thread(_line_start_in_files, Layout(paths.dir), offset)


def _line_start_in_files(layout: Layout, offset: int) -> int:
    with LogSegments(layout) as segments:
        if segments.damage is not None:
            return 0
        if segments.fd is not None and offset > segments.base:
            return segments.base + last_line_end(segments.fd, 0, offset - segments.base)
        start = 0
        if segments.archive is not None:
            start = next((span.first_offset for span in segments.archive.spans_from(offset)), 0)
        return min(start, offset)
