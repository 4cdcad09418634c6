"""Lines back into events: the decoder, and the slices of a log that it gives.

Promises: `Decoder` gives every event that it is fed, or says where the first bad line begins after giving all before
it; it never gives part of a batch. With a query, lines that it can't match by their type, or by the text of its tags,
are not decoded, but each is JSON with a type, on a line of its own (its text may be no UTF-8).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, repeat

import msgspec

from .._errors import CorruptLogError
from .._event import Record
from .._query import Query
from .lines import Lines, join, last_line_hash
from .selection import BatchPlace, Found, decode_events, decode_line, place_of, selection
from .stored import StoredEvent

BAD_LINE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_BROKEN: BatchPlace = (0, 0)
# The places in batches up to this size are kept.
_SMALL_BATCH = 256


class Slice:
    """Events that stand in the log one after the other, decoded together; offsets are bytes in the whole log.

    With a `query` (None: every event), `events` are only those that it matches; the offsets are those of all that was
    looked at.
    """

    __slots__ = ("_found", "_lines", "end_offset", "events", "query", "start_offset")

    def __init__(self, lines: Lines, found: Found, events: list[StoredEvent], query: Query | None = None) -> None:
        self._lines = lines
        self._found = found
        self.events = events
        self.query = query
        self.start_offset = lines.start_offset
        self.end_offset = lines.offset_at(len(lines.data))

    def __repr__(self) -> str:
        return f"<Slice of {len(self.events)} events, offsets {self.start_offset} to {self.end_offset}>"

    def records(self) -> Iterator[Record]:
        """The events with their places in the log."""
        lines = self._lines.data.split(b"\n")
        lines.pop()  # what follows the last newline: nothing
        ends = accumulate(map((1).__add__, map(len, lines)), initial=0 if self._lines.marks else self.start_offset)
        offsets = list(map(self._lines.offset_at, ends)) if self._lines.marks else list(ends)
        records = map(Record, self._found, offsets, offsets[1:], lines)
        if self.query is None:
            return records
        return (record for record in records if isinstance(record.event, StoredEvent))

    @property
    def last_line_hash(self) -> str:
        """The hash of the last line that was looked at."""
        return last_line_hash(self._lines.data)


class Decoder:
    """Turns the lines of a log, fed in order, into slices of events; with a `query`, only those that it matches.

    With `places`, a slice can give records; without, only its events are sure, which is faster to tell. Reading may
    begin inside a batch: its rest is then given.
    """

    def __init__(self, query: Query | None = None, *, places: bool = True) -> None:
        self._query = None if query is None or query.matches_all else query
        self._selection = None if self._query is None else selection(self._query)
        self._places = places
        self._nothing_given = True
        # A batch whose end is still to come: its lines up to now, what they hold, and the place of the next one.
        self._held: list[Lines] = []
        self._held_found: Found = []
        self._due: BatchPlace | None = None

    def feed(self, lines: Lines) -> Iterator[Slice]:
        """The events of these lines; a batch that goes on beyond them is held back until its end is fed.

        Raises `CorruptLogError` at the first line that holds no event, or where a batch begins that breaks off.
        """
        data = lines.data
        found = self._decode_at_once(data)
        if found is None:
            yield from self._line_by_line(lines)
            return
        events = found if self._selection is None else [line for line in found if line.worth_a_look]
        # A list of those that are in one takes two thirds of the time of `any` over a list of all.
        batched = self._due is not None or bool([1 for line in events if line.batch])
        # Two damages may cancel out in the number of lines, and events are what they are all the same. Where their
        # places are needed, it takes that every newline stands between two objects: then each has a line of its own.
        if (batched or self._places) and not (data.startswith(b"{") and data.count(b"}\n{") == len(found) - 1):
            yield from self._line_by_line(lines)
            return
        if batched:
            progress = _follow([line.batch for line in found], self._due, self._nothing_given)
            if progress is None:
                yield from self._line_by_line(lines)
                return
            closed, self._due = progress
            if self._due is not None and not closed:
                self._held.append(lines)
                self._held_found += found
                return
            rest = None
            if self._due is not None:
                size = len(data.rsplit(b"\n", len(found) - closed + 1)[0]) + 1
                rest, lines = lines.part(size, len(data)), lines.part(0, size)
            found, left = found[:closed], found[closed:]
            if self._held:
                lines, found = join([*self._held, lines]), self._held_found + found
            self._held, self._held_found = [] if rest is None else [rest], left
            events = found if self._selection is None else _wanted(found)
        self._nothing_given = self._nothing_given and not found
        if found:
            yield Slice(lines, found, events, self._query)

    def _decode_at_once(self, data: bytes) -> Found | None:
        """One object for each line, or None if that is not what the lines hold (a blank line counts too)."""
        try:
            found = self._decode_lines(data)
        except BAD_LINE:
            return None
        # As many newlines as objects; counted so because that is several times as fast as `count`.
        return found if len(found) == len(data) - len(data.replace(b"\n", b"")) else None

    def _decode_lines(self, data: bytes) -> Found:
        found: Found = (self._selection or decode_events).decode_lines(data)
        return found

    def _line_by_line(self, lines: Lines) -> Iterator[Slice]:
        """The patient way, for lines among which some are blank or bad: one slice for each line or batch."""
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
                    yield Slice(lines.part(at, end), [], [])
                    at = end
                    continue
            try:
                event = decode_line(data[at:end])
            except BAD_LINE as error:
                raise CorruptLogError(path, lines.offset_at(at), f"no event: {error}") from error
            due = _due_after(place_of(event.batch), due, self._nothing_given and at == first)
            if due is _BROKEN:
                raise CorruptLogError(path, lines.offset_at(first), "a batch breaks off here")
            found.append(event if self._selection is None else self._selection.look(event))
            at = end
            if due is None:
                self._nothing_given = False
                yield Slice(lines.part(first, end), found, _wanted(found), self._query)
                found = []
        if due is not None:
            self._held, self._held_found, self._due = [lines.part(first, len(data))], found, due


def _wanted(found: Found) -> list[StoredEvent]:
    return [line for line in found if isinstance(line, StoredEvent)]


def _follow(
    batches: list[BatchPlace | None], due: BatchPlace | None, may_begin_inside: bool
) -> tuple[int, BatchPlace | None] | None:
    """How many lines stand before a batch that goes on beyond them, and the place of its next line (None: no batch is
    open), for lines with these places of which the first was `due`. None if a batch is broken.
    """
    if due is None and may_begin_inside and batches:
        due = batches[0]
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
        # All of them compared at once: a line at a time would take as long as decoding it does.
        if part != _places(index, size, len(part)):
            return None
        at += len(part)
        index += len(part)
        due = (index, size) if index <= size else None
        if due is None:
            closed = at
    return closed, due


def _places(index: int, size: int, count: int) -> list[BatchPlace]:
    """The places of so many lines of a batch of `size`, from the one with this index on."""
    if count == size <= _SMALL_BATCH:
        return _small_batch(size)
    return list(zip(range(index, index + count), repeat(size), strict=False))


@lru_cache(maxsize=_SMALL_BATCH)
def _small_batch(size: int) -> list[BatchPlace]:
    return list(zip(range(1, size + 1), repeat(size), strict=False))


def _due_after(batch: BatchPlace | None, due: BatchPlace | None, may_begin_inside: bool) -> BatchPlace | None:
    """The `batch` that the next line must have after one with this `batch`, which was `due`; None for any."""
    if batch is None:
        return None if due is None else _BROKEN
    index, size = batch
    if batch != due and (due is not None or (index != 1 and not may_begin_inside)):
        return _BROKEN
    return None if index == size else (index + 1, size)


def batch_of(line: bytes) -> BatchPlace | None:
    """The place `(i, n)` of a line in its batch; None for a line that is in none, or is no event."""
    if b'"batch"' not in line:
        return None
    try:
        return place_of(decode_events.decode(line).batch)
    except BAD_LINE:
        return None


def is_event(line: bytes) -> bool:
    """Whether a line, without its newline, holds an event."""
    try:
        decode_line(line)
    except BAD_LINE:
        return False
    return True
