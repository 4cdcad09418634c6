"""Finds the span of an archive that contains an offset, without reading all records after it each time.

A record refers only to what comes before it, so the first search reads the records one by one, from the end. The
positions of the spans are then cached, which takes 16 bytes for each span.

Promise: a span is always read from its record in the file; cached positions only save reading other records.
"""

from __future__ import annotations

import os
import threading
from array import array
from bisect import bisect_left
from operator import neg

from .frames import Span, record_before

_CACHED_ARCHIVES = 8


class _SpanPositions:
    """The positions of one archive's spans, from one of the last spans back to the earliest that was needed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ends = array("Q")  # the positions in the file after the spans' records, in descending order
        self.starts = array("Q")  # the spans' first offsets

    def find(self, fd: int, last: Span, offset: int) -> Span | None:
        """The span before `last` that contains an offset; None if a record is damaged, or a position out of date."""
        self._add_newest(fd, last)
        index = bisect_left(self.starts, -offset, key=neg)
        if index < len(self.ends):
            span = record_before(fd, self.ends[index])
            return span if span is not None and span.first_offset == self.starts[index] else None
        span = record_before(fd, self.ends[-1]) if self.ends else None
        while span is not None and span.first_offset > offset:
            span = _previous(fd, span)
            if span is not None:
                self.ends.append(span.after)
                self.starts.append(span.first_offset)
        return span

    def _add_newest(self, fd: int, last: Span) -> None:
        """Adds the spans that were appended since the last search."""
        if self.ends and self.ends[0] >= last.position:
            return
        newest = self.ends[0] if self.ends else 0
        added = []
        span = _previous(fd, last)
        while span is not None and newest and span.after > newest:
            added.append(span)
            span = _previous(fd, span)
        if span is None or span.after != newest:
            # Nothing was cached, or a recovery has cut the archive, which has grown again since.
            self.ends, self.starts = array("Q"), array("Q")
            if span is not None:
                added.append(span)
        self.ends = array("Q", [span.after for span in added]) + self.ends
        self.starts = array("Q", [span.first_offset for span in added]) + self.starts


def _previous(fd: int, span: Span) -> Span | None:
    """The span before another one; None if there is none, or if its record is damaged."""
    before = record_before(fd, span.position)
    return before if before is not None and before.end_offset == span.first_offset else None


_cache: dict[tuple[int, int], _SpanPositions] = {}
_cache_lock = threading.Lock()


def span_containing(fd: int, last: Span, offset: int) -> Span | None:
    """The span of an archive that contains an offset; None if it can't be found by the records.

    `last` is the last span of the archive.
    """
    if last.first_offset <= offset:
        return last
    stat = os.fstat(fd)
    key = stat.st_dev, stat.st_ino
    with _cache_lock:
        positions = _cache.pop(key, None) or _SpanPositions()
        _cache[key] = positions
        while len(_cache) > _CACHED_ARCHIVES:
            del _cache[next(iter(_cache))]
    with positions.lock:
        span = positions.find(fd, last, offset)
    if span is None or not span.first_offset <= offset < span.end_offset or span.after > last.position:
        # The file is damaged, or a recovery has cut it, and it has grown again since.
        with _cache_lock:
            _cache.pop(key, None)
        return None
    return span


def _after_fork() -> None:
    global _cache_lock
    _cache_lock = threading.Lock()
    _cache.clear()


# If threads of the parent held the locks at the fork, the child's copies would never be released.
os.register_at_fork(after_in_child=_after_fork)
