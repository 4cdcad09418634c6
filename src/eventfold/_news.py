"""The newest lines of a log, in memory: whoever waits for them need not read the disk.

A thousand tails may want the same lines at once. Each gets events of its own, which it may change, but where the lines
begin and end is found once for all of them.

Promise: the lines of the commits that are kept follow each other without a gap. Any thread may read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

from ._codec.decode import DECODE_ERRORS, Decoder
from ._codec.lines import SLICE_SIZE, Lines, join
from ._codec.selection import decode_events
from ._errors import CorruptLogError
from ._event import Head, Record

# How many commits, and bytes of them, are kept: a tail that is woken late finds there what it needs.
_KEPT_COMMITS, _KEPT_SIZE = 16, SLICE_SIZE


_Places: TypeAlias = tuple[list[int], list[int], list[bytes]] | tuple[()]


class News:
    """The lines of the newest commits, and the heads before and after each."""

    def __init__(self) -> None:
        # Like `_asked`, replaced as a whole, since other threads look at it.
        self._commits: tuple[tuple[Head, Head, Lines], ...] = ()
        self._size = 0  # of their lines, in bytes: offsets may count something else
        # The lines of which somebody has asked for the records, and what the others need besides the events.
        self._asked: tuple[Lines, _Places | None] | None = None

    def clear(self) -> None:
        """Forgets everything."""
        self._commits, self._asked = (), None

    def add(self, known: Head | None, head: Head, lines: Lines | None, awaited: bool) -> None:
        """Adds the lines between two heads; if they are unknown or many, there are no news.

        Unless they are `awaited`, they replace the older ones.
        """
        if (
            known is None
            or lines is None
            or not 0 < len(lines.data) <= SLICE_SIZE
            # If others append too, there may be something between the known head and these lines.
            or lines.start_offset != known.offset
        ):
            self.clear()
            return
        size = len(lines.data)
        if not awaited or not self._commits or self._commits[-1][1] != known:
            self._commits, self._size = ((known, head, lines),), size
            return
        commits = (*self._commits, (known, head, lines))
        self._size += size
        while len(commits) > _KEPT_COMMITS or self._size > _KEPT_SIZE:
            self._size -= len(commits[0][2].data)
            commits = commits[1:]
        self._commits = commits

    def since(self, start: Head, end: Head | None = None) -> tuple[Head, Lines] | None:
        """The lines from one head to another (None: to the last one), if they are here; and that head.

        The hash of the first head may be unknown ("").
        """
        commits = self._commits
        if not commits:
            return None
        first, last, lines = commits[-1]
        if first.offset == start.offset and start.line_hash in ("", first.line_hash) and end in (None, last):
            return last, lines  # as mostly
        found: list[Lines] = []
        for first, last, lines in reversed(commits):
            if end is None:
                end = last
            if not found and last != end:
                continue
            found.append(lines)
            if first.offset <= start.offset:
                same = first.offset == start.offset and start.line_hash in ("", first.line_hash)
                return (end, join(found[::-1])) if same else None
        return None

    def records(self, lines: Lines) -> Iterable[Record]:
        """The records of lines that `since` has returned. Raises `CorruptLogError` after everything before damage."""
        asked = self._asked
        if asked is None or asked[0] is not lines:
            self._asked = lines, None  # perhaps nobody else asks
            return _records(lines)
        places = asked[1]
        if places is None:
            places = _places(lines)
            self._asked = lines, places
        return _records(lines) if not places else map(Record, decode_events.decode_lines(lines.data), *places)


def _records(lines: Lines) -> Iterator[Record]:
    for piece in Decoder().feed(lines):
        yield from piece.records()


def _places(lines: Lines) -> _Places:
    """Where the events of these lines begin and end, and their lines; nothing unless each line is an event."""
    try:
        records = list(_records(lines))
        decode_events.decode_lines(lines.data)  # fails if a `batch` is not a position in one
    except (CorruptLogError, *DECODE_ERRORS):
        return ()
    texts = [record._line for record in records]
    if b"".join(texts) != lines.data:  # a blank line, say
        return ()
    return [record.start_offset for record in records], [record.end_offset for record in records], texts
