"""Finds the span of an archive that contains an offset, without reading all records after it each time.

Records refer only to what comes before them, so the first search reads them one by one, from the end. Where each span
is, is kept: 16 bytes for a frame of 4 MiB.

Promise: what is returned is what the record in the file says now; the places only save reading others.
"""

from __future__ import annotations

import os
import threading
from array import array
from bisect import bisect_left
from operator import neg

from .frames import Span, record_before

# Of how many archives the places are kept.
_ARCHIVES = 8


class _Places:
    """The places of one archive's spans, from one of the last ones back to the earliest that was needed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ends = array("Q")  # positions in the file after the records
        self.starts = array("Q")  # their first offsets

    def find(self, fd: int, last: Span, offset: int) -> Span | None:
        """The span before `last` that contains an offset; None if a record is damaged, or a place out of date."""
        self._begin_at(fd, last)
        at = bisect_left(self.starts, -offset, key=neg)
        if at < len(self.ends):
            span = record_before(fd, self.ends[at])
            return span if span is not None and span.first_offset == self.starts[at] else None
        span = record_before(fd, self.ends[-1]) if self.ends else None
        while span is not None and span.first_offset > offset:
            span = _previous(fd, span)
            if span is not None:
                self.ends.append(span.after)
                self.starts.append(span.first_offset)
        return span

    def _begin_at(self, fd: int, last: Span) -> None:
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
            # These are the first ones, or a recovery cut the archive and it has grown again.
            self.ends, self.starts = array("Q"), array("Q")
            if span is not None:
                added.append(span)
        self.ends = array("Q", [span.after for span in added]) + self.ends
        self.starts = array("Q", [span.first_offset for span in added]) + self.starts


def _previous(fd: int, span: Span) -> Span | None:
    """The span before another; None for the first one, and if its record is damaged."""
    before = record_before(fd, span.position)
    return before if before is not None and before.end_offset == span.first_offset else None


_known: dict[tuple[int, int], _Places] = {}
_known_lock = threading.Lock()


def span_with(fd: int, last: Span, offset: int) -> Span | None:
    """The span of an archive that contains an offset, `last` being its last one; None if records don't lead there."""
    if last.first_offset <= offset:
        return last
    stat = os.fstat(fd)
    key = stat.st_dev, stat.st_ino
    with _known_lock:
        places = _known.pop(key, None) or _Places()
        _known[key] = places
        while len(_known) > _ARCHIVES:
            del _known[next(iter(_known))]
    with places.lock:
        span = places.find(fd, last, offset)
    if span is None or not span.first_offset <= offset < span.end_offset or span.after > last.position:
        # The file is damaged, or a recovery cut it and it has grown again.
        with _known_lock:
            _known.pop(key, None)
        return None
    return span


def _after_fork() -> None:
    global _known_lock
    _known_lock = threading.Lock()
    _known.clear()


# In a forked child, the threads that held the locks in the parent will never release them.
os.register_at_fork(after_in_child=_after_fork)
