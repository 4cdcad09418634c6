"""The newest lines of a log, in memory, so that the tails that wait for them need not read the disk.

A thousand tails may need the same lines at once. Each of them gets its own events, which it may change, but the offsets
of the events are found only once.

Promise: the kept lines are consecutive. Any thread may read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

from ._codec.decode import DECODE_ERRORS, Decoder
from ._codec.lines import SLICE_SIZE, Lines, join
from ._codec.selection import decode_events
from ._errors import CorruptLogError
from ._event import Head, Record

# How many commits, and how many bytes of lines, are kept for tails that wake late.
_KEPT_COMMITS, _KEPT_SIZE = 16, SLICE_SIZE

# The heads before and after each commit, and its lines.
_Commits: TypeAlias = tuple[tuple[Head, Head, Lines], ...]
# The start offsets, the end offsets and the text of all lines; empty if they must be decoded with a `Decoder`.
_Bounds: TypeAlias = tuple[list[int], list[int], list[bytes]] | tuple[()]


class RecentLines:
    """The lines of the newest commits, and the heads before and after each commit."""

    def __init__(self) -> None:
        # This and `_requested` are replaced, never changed, since other threads may be reading them.
        self._commits: _Commits = ()
        # The lines whose records were requested last, and their bounds from the second request on.
        self._requested: tuple[Lines, _Bounds | None] | None = None

    def clear(self) -> None:
        """Forgets all lines."""
        self._commits, self._requested = (), None

    def replace(self, previous: Head | None, head: Head, lines: Lines | None, older: _Commits = ()) -> None:
        """Keeps only the lines from the previous head to a new one, and `older` commits that end at the previous head.

        If the lines are unknown or too large, forgets all lines.
        """
        if (
            previous is None
            or lines is None
            or not 0 < len(lines.data) <= SLICE_SIZE
            # Another writer may have appended something between the previous head and these lines.
            or lines.start_offset != previous.offset
        ):
            self.clear()
        else:
            commit = (previous, head, lines)
            self._commits = _newest((*older, commit)) if older else (commit,)

    def add(self, previous: Head | None, head: Head, lines: Lines | None) -> None:
        """Like `replace`, but keeps the commits that are here too, if they end at the previous head."""
        older = self._commits
        self.replace(previous, head, lines, older if older and older[-1][1] == previous else ())

    def since(self, start: Head, end: Head | None = None) -> tuple[Head, Lines] | None:
        """The lines from one head to another (None: to the last one), and that second head; None if they are not here.

        The hash of the first head may be unknown ("").
        """
        commits = self._commits
        if not commits:
            return None
        first, last, lines = commits[-1]
        if first.offset == start.offset and start.line_hash in ("", first.line_hash) and end in (None, last):
            return last, lines  # the usual case
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
        """The records of lines that `since` has returned. Raises `CorruptLogError` after all records before damage."""
        requested = self._requested
        if requested is None or requested[0] is not lines:
            self._requested = lines, None  # finding the bounds pays off only if the same lines are requested again
            return _records(lines)
        bounds = requested[1]
        if bounds is None:
            bounds = _bounds(lines)
            self._requested = lines, bounds
        return _records(lines) if not bounds else map(Record, decode_events.decode_lines(lines.data), *bounds)


def _newest(commits: _Commits) -> _Commits:
    """The last of these commits, as many as may be kept."""
    size = sum([len(lines.data) for _, _, lines in commits])
    while len(commits) > _KEPT_COMMITS or size > _KEPT_SIZE:
        size -= len(commits[0][2].data)
        commits = commits[1:]
    return commits


def _records(lines: Lines) -> Iterator[Record]:
    for slice_ in Decoder().feed(lines):
        yield from slice_.records()


def _bounds(lines: Lines) -> _Bounds:
    """The bounds of the lines; empty unless each line is an event."""
    try:
        records = list(_records(lines))
        decode_events.decode_lines(lines.data)  # fails if a key `batch` has some other meaning
    except (CorruptLogError, *DECODE_ERRORS):
        return ()
    texts = [record._line for record in records]
    if b"".join(texts) != lines.data:  # a line is blank, for example
        return ()
    return [record.start_offset for record in records], [record.end_offset for record in records], texts
