"""Decodes lines into events: the decoder, and the slices of a log that it yields.

Promises: `Decoder` yields every event that it is fed, or yields all before the first bad line and then says where that
begins; it never yields part of a batch. With a query, lines that can't match, by their type or the text of its tags,
are not decoded, but each is JSON with a type on its own line (its text may not be valid UTF-8).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, repeat

import msgspec

from .._errors import CorruptLogError
from .._event import Record
from .._query import Query
from .lines import Lines, join, last_line, last_line_hash, texts_of
from .selection import BatchPlace, Found, decode_events, decode_line, place_of, selection
from .stored import StoredEvent

BAD_LINE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_BROKEN: BatchPlace = (0, 0)
# The positions in batches up to the first size are cached; those up to the second, of about 1 MB, for two sizes only.
_SMALL_BATCH, _LARGE_BATCH = 256, 10_000
# The fewest bytes that the line of an event takes, and a little less.
_SHORTEST_LINE = 20
# After so many blocks without a batch, the next ones are decoded as single lines.
_BLOCKS_WITHOUT_BATCH = 16


class Slice:
    """Consecutive events of the log, decoded together; offsets are bytes in the whole log.

    With a `query` (None: every event), `events` are only those that it matches; the offsets include all lines that were
    examined.
    """

    __slots__ = ("_found", "_parts", "_texts", "end_offset", "events", "query", "start_offset")

    def __init__(
        self,
        parts: list[Lines],
        found: Found,
        events: list[StoredEvent],
        query: Query | None = None,
        texts: list[bytes] | None = None,
    ) -> None:
        self._parts = parts
        self._found = found
        self._texts = texts
        self.events = events
        self.query = query
        self.start_offset = parts[0].start_offset
        self.end_offset = parts[-1].end_offset

    def __repr__(self) -> str:
        return f"<Slice of {len(self.events)} events, offsets {self.start_offset} to {self.end_offset}>"

    @property
    def _lines(self) -> Lines:
        """All lines, which are joined only if somebody needs them."""
        if len(self._parts) > 1:
            self._parts = [join(self._parts)]
        return self._parts[0]

    def records(self) -> Iterator[Record]:
        """The events with their offsets in the log."""
        lines = self._lines
        texts = texts_of(lines.data) if self._texts is None else self._texts
        offsets = list(accumulate(map(len, texts), initial=0 if lines.marks else lines.start_offset))
        if lines.marks:
            offsets = list(map(lines.offset_at, offsets))
        records = map(Record, self._found, offsets, offsets[1:], texts)
        if self.query is None:
            return records
        return (record for record in records if isinstance(record.event, StoredEvent))

    @property
    def last_line_hash(self) -> str:
        """The hash of the last line that was examined."""
        return last_line_hash(self._parts[-1].data)


class Decoder:
    """Turns the lines of a log, fed in order, into slices of events; with a `query`, only those that it matches.

    With `places`, a slice can return records; without, it has only events, which is faster. Reading may begin inside a
    batch, whose rest is then yielded; the log itself may not.
    """

    def __init__(self, query: Query | None = None, *, places: bool = True) -> None:
        self._query = None if query is None or query.matches_all else query
        self._selection = selection(self._query, True)
        self._single_selection = selection(self._query, False)
        self._places = places
        self._nothing_given = True
        # How many of the next blocks to decode as lines that may be in batches; a block with a batch sets it anew.
        self._expects_batches = 0
        # A batch whose end has not been fed yet: its lines so far, their objects, and the position of the next line.
        self._held: list[Lines] = []
        self._held_found: Found = []
        self._due: BatchPlace | None = None

    def feed(self, lines: Lines) -> Iterator[Slice]:
        """The events of these lines; a batch that continues beyond them is held back until its end is fed.

        Raises `CorruptLogError` at the first line that is not an event, or at the beginning of an incomplete batch.
        """
        if not lines.start_offset:
            self._nothing_given = False  # nothing comes before it, so a line that a batch lacks is lost
        if not self._expects_batches and self._due is None:
            texts = texts_of(lines.data) if self._places else None
            found = self._decode_at_once(lines.data, texts, False)
            if found is not None:
                yield from self._slice_of(lines, found, texts)
                return
            self._expects_batches = _BLOCKS_WITHOUT_BATCH
        for part in self._at_open_batch(lines):
            yield from self._feed_batches(part)

    def _at_open_batch(self, lines: Lines) -> list[Lines]:
        """The lines in two parts if a batch begins among them and continues beyond them."""
        data = lines.data
        index, size = batch_of(last_line(data)) or (1, 1)
        if index < size:
            if self._due is not None and index >= self._due[0] and size > len(data) // _SHORTEST_LINE:
                return [lines]  # the same batch, of which there is more than fits in here
            start = len(data)
            for _ in range(index):
                start = data.rfind(b"\n", 0, start - 1) + 1
                if not start:
                    return [lines]
            return [lines.part(0, start), lines.part(start, len(data))]
        return [lines]

    def _feed_batches(self, lines: Lines) -> Iterator[Slice]:
        """The same for lines that may be in batches."""
        texts = texts_of(lines.data) if self._places else None
        found = self._decode_at_once(lines.data, texts, True)
        if found is None:
            yield from self._line_by_line(lines)
            return
        batches = [line.batch for line in found]
        if self._due is not None or batches.count(None) < len(batches):
            if texts is None and not (lines.data.startswith(b"{") and lines.data.count(b"}\n{") == len(found) - 1):
                # Perhaps two objects are on one line, and none on another: the lines of a batch must be its events.
                yield from self._line_by_line(lines)
                return
            self._expects_batches = _BLOCKS_WITHOUT_BATCH
            yield from self._in_batches(lines, found, batches)
        else:
            self._expects_batches = max(0, self._expects_batches - 1)
            yield from self._slice_of(lines, found, texts)

    def _slice_of(self, lines: Lines, found: Found, texts: list[bytes] | None) -> Iterator[Slice]:
        if found:
            self._nothing_given = False
            events = found if self._query is None else [line for line in found if line.matters]
            yield Slice([lines], found, events, self._query, texts)

    def _in_batches(self, lines: Lines, found: Found, batches: list[BatchPlace | None]) -> Iterator[Slice]:
        """The slice of lines some of which are in batches; nothing yet if all of them are in one that continues."""
        progress = _follow(batches, self._due, self._nothing_given)
        if progress is None or (progress[1] is not None and progress[0]):
            yield from self._line_by_line(lines)
            return
        self._held.append(lines)
        self._held_found += found
        self._due = progress[1]
        if self._due is None:
            parts, found = self._held, self._held_found
            self._held, self._held_found, self._nothing_given = [], [], False
            yield Slice(parts, found, found if self._query is None else _wanted(found), self._query)

    def _decode_at_once(self, data: bytes, texts: list[bytes] | None, batches: bool) -> Found | None:
        """One object for each line, or None if that is not what the lines hold (a blank line counts too)."""
        try:
            return self._decode(data, texts, batches)
        except BAD_LINE:
            return None

    def _decode(self, data: bytes, texts: list[bytes] | None, batches: bool) -> Found | None:
        """The objects of the lines; without `batches`, an error or None if one of them is in a batch."""
        return (self._selection if batches else self._single_selection).decode(data, texts)

    def _line_by_line(self, lines: Lines) -> Iterator[Slice]:
        """The slow way, for lines some of which are blank or bad: one slice for each line or batch."""
        lines = join([*self._held, lines])
        self._held, self._held_found, self._due = [], [], None
        path, data = lines.path, lines.data
        found: Found = []
        first = at = 0
        due = None
        while at < len(data):
            end = data.index(b"\n", at) + 1
            if due is None:
                first = at
                if not data[at:end].strip():
                    yield Slice([lines.part(at, end)], [], [])
                    at = end
                    continue
            try:
                event = decode_line(data[at:end])
            except BAD_LINE as error:
                raise CorruptLogError(path, lines.offset_at(at), f"no event: {error}") from error
            due = _due_after(place_of(event.batch), due, self._nothing_given and at == first)
            if due is _BROKEN:
                raise CorruptLogError(path, lines.offset_at(first), "a batch breaks off here")
            found.append(self._selection.look(event))
            at = end
            if due is None:
                self._nothing_given = False
                yield Slice([lines.part(first, end)], found, _wanted(found), self._query)
                found = []
        if due is not None:
            self._held, self._held_found, self._due = [lines.part(first, len(data))], found, due


def _wanted(found: Found) -> list[StoredEvent]:
    return [line for line in found if isinstance(line, StoredEvent)]


def _follow(
    batches: list[BatchPlace | None], due: BatchPlace | None, may_begin_inside: bool
) -> tuple[int, BatchPlace | None] | None:
    """For lines with these positions, the first of which was `due`: how many come before a batch that continues beyond
    them, and the position of its next line (None: no batch is open). None if a batch is broken.
    """
    if due is None and may_begin_inside:
        due = batches[0]
    start = due or (None if batches[0] is None else (1, batches[0][1]))
    if start is not None and 1 <= start[0] <= start[1] <= _LARGE_BATCH:
        # The usual case, batches of one size, in one comparison.
        index, size = start
        count, places = len(batches), _batch(size)
        if index - 1 + count > size:
            places = places * (count // size + 2)
        if batches == places[index - 1 : index - 1 + count]:
            index = (index - 1 + count) % size
            return max(0, count - index), (index + 1, size) if index else None
    closed = at = 0
    while at < len(batches):
        if due is None and batches[at] is None:
            at += 1
            closed = at
            continue
        first = batches[at]
        index, size = due or (1, 0 if first is None else first[1])
        if not 1 <= index <= size:
            return None
        part = batches[at : at + size - index + 1]
        # All of them are compared at once: line by line, that would take as long as decoding.
        if part != _places(index, size, len(part)):
            return None
        at += len(part)
        index += len(part)
        due = (index, size) if index <= size else None
        if due is None:
            closed = at
    return closed, due


def _places(index: int, size: int, count: int) -> list[BatchPlace]:
    """The positions of `count` lines of a batch of `size`, from this index on."""
    if count == size <= _LARGE_BATCH:
        return _batch(size)
    return list(zip(range(index, index + count), repeat(size), strict=False))


def _batch(size: int) -> list[BatchPlace]:
    """The positions of all lines of a batch."""
    return _small_batch(size) if size <= _SMALL_BATCH else _large_batch(size)


def _new_batch(size: int) -> list[BatchPlace]:
    return list(zip(range(1, size + 1), repeat(size), strict=False))


_small_batch = lru_cache(maxsize=_SMALL_BATCH)(_new_batch)
_large_batch = lru_cache(maxsize=2)(_new_batch)


def _due_after(batch: BatchPlace | None, due: BatchPlace | None, may_begin_inside: bool) -> BatchPlace | None:
    """The `batch` that the next line must have after one with this `batch`, which was `due`; None for any."""
    if batch is None:
        return None if due is None else _BROKEN
    index, size = batch
    if batch != due and (due is not None or (index != 1 and not may_begin_inside)):
        return _BROKEN
    return None if index == size else (index + 1, size)


def batch_of(line: bytes) -> BatchPlace | None:
    """The position `(i, n)` of a line in its batch; None for a line that is in none, or is not an event."""
    if b'"batch"' not in line:
        return None
    try:
        return place_of(decode_events.decode(line).batch)
    except BAD_LINE:
        return None


def is_event(line: bytes) -> bool:
    """Whether a line, without its newline, is an event."""
    try:
        decode_line(line)
    except BAD_LINE:
        return False
    return True
