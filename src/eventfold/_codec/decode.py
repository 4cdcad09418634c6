"""Lines back into events: the decoder, and the slices of a log that it gives.

Promises: `Decoder` gives every event that it is fed, or says where the first bad line begins after giving all before
it; it never gives part of a batch. With a selection of types the lines of other types are not decoded, but each is JSON
with that type, on a line of its own (its text may be no UTF-8).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import msgspec

from .._errors import CorruptLogError
from .._event import Record, line_hash
from .lines import Lines, join
from .selection import BatchPlace, Found, decode_events, selection
from .stored import StoredEvent

_BAD_LINE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_BROKEN: BatchPlace = (0, 0)


class Slice:
    """Events that stand in the log one after the other, decoded together; offsets are bytes in the whole log.

    With a selection, `events` are only those of its `types`; the offsets are those of all that was looked at.
    """

    __slots__ = ("_found", "_lines", "end_offset", "events", "start_offset", "types")

    def __init__(
        self, lines: Lines, found: Found, events: list[StoredEvent], types: frozenset[str] | None = None
    ) -> None:
        self._lines = lines
        self._found = found
        self.events = events
        self.types = types
        self.start_offset = lines.start_offset
        self.end_offset = lines.offset_at(len(lines.data))

    def __repr__(self) -> str:
        return f"<Slice of {len(self.events)} events, offsets {self.start_offset} to {self.end_offset}>"

    def records(self) -> Iterator[Record]:
        """The events with their places in the log."""
        start = self.start_offset
        marks = self._lines.marks
        if marks:
            yield from self._records_between(marks)
            return
        for event, line in zip(self._found, self._lines.data.split(b"\n"), strict=False):
            end = start + len(line) + 1
            if isinstance(event, StoredEvent):
                yield Record(event, start, end, line)
            start = end

    def _records_between(self, marks: tuple[tuple[int, int], ...]) -> Iterator[Record]:
        position, index = 0, 1
        start = self.start_offset
        for event, line in zip(self._found, self._lines.data.split(b"\n"), strict=False):
            position += len(line) + 1
            if position >= marks[index][0]:
                end = marks[index][1]
                index += 1
            else:
                end = start + len(line) + 1
            if isinstance(event, StoredEvent):
                yield Record(event, start, end, line)
            start = end

    @property
    def last_line_hash(self) -> str:
        """The hash of the last line that was looked at."""
        data = self._lines.data
        return line_hash(data[data.rfind(b"\n", 0, -1) + 1 :])


class Decoder:
    """Turns the lines of a log, fed in order, into slices of events; with `types`, only events of those types.

    With `places`, a slice can give records; without, only its events are sure, which is faster to tell. Reading may
    begin inside a batch: its rest is then given.
    """

    def __init__(self, types: Collection[str] | None = None, *, places: bool = True) -> None:
        self._types = None if types is None else frozenset(types)
        self._selection = None if self._types is None else selection(self._types)
        self._places = places
        self._nothing_given = True
        self._held: list[Lines] = []
        self._held_size = self._worth_decoding = 0

    def feed(self, lines: Lines) -> Iterator[Slice]:
        """The events of these lines; a batch that goes on beyond them is held back until its end is fed.

        Raises `CorruptLogError` at the first line that holds no event, or where a batch begins that breaks off.
        """
        if not self._held:
            return self._decode(lines)
        self._held.append(lines)
        self._held_size += len(lines.data)
        # Trying again only once there is twice as much keeps a long batch from being decoded over and over.
        return self.finish() if self._held_size >= self._worth_decoding else iter(())

    def finish(self) -> Iterator[Slice]:
        """The events of what is held back, when nothing more will be fed for now."""
        if self._held:
            held, self._held = self._held, []
            yield from self._decode(join(held))

    def _hold(self, lines: Lines, size: int) -> None:
        """Holds back what follows the first `size` bytes."""
        rest = lines.part(size, len(lines.data))
        self._held = [rest]
        self._held_size, self._worth_decoding = len(rest.data), 2 * len(rest.data)

    def _decode(self, lines: Lines) -> Iterator[Slice]:
        data = lines.data
        found = self._decode_at_once(data)
        if found is None:
            yield from self._line_by_line(lines)
            return
        events = found if self._selection is None else [line for line in found if line.worth_a_look]
        # Two damages may cancel out in the number of lines, and events are what they are all the same. Where their
        # places are needed, it takes that every newline stands between two objects: then each has a line of its own.
        batched = [1 for line in events if line.batch]
        if (batched or self._places) and not (data.startswith(b"{") and data.count(b"}\n{") == len(found) - 1):
            yield from self._line_by_line(lines)
            return
        if batched:
            closed = self._closed(found)
            if closed is None:
                yield from self._line_by_line(lines)
                return
            if closed < len(found):
                size = sum(len(line) + 1 for line in data.split(b"\n", closed)[:closed])
                self._hold(lines, size)
                lines = lines.part(0, size)
                del found[closed:]
            events = found if self._selection is None else _wanted(found)
        self._nothing_given = self._nothing_given and not found
        if found:
            yield Slice(lines, found, events, self._types)

    def _decode_at_once(self, data: bytes) -> Found | None:
        """One object for each line, or None if that is not what the lines hold (a blank line counts too)."""
        try:
            found: Found = (self._selection or decode_events).decode_lines(data)
        except _BAD_LINE:
            return None
        # As many newlines as objects; counted so because that is several times as fast as `count`.
        return found if len(found) == len(data) - len(data.replace(b"\n", b"")) else None

    def _closed(self, found: Found) -> int | None:
        """How many lines stand before a batch that goes on beyond them; None if a batch is broken."""
        closed, due = 0, None
        for index, line in enumerate(found):
            due = _due_after(line.batch, due, self._nothing_given and index == 0)
            if due is _BROKEN:
                return None
            if due is None:
                closed = index + 1
        return closed

    def _line_by_line(self, lines: Lines) -> Iterator[Slice]:
        """The patient way, for lines among which some are blank or bad: one slice for each line or batch."""
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
                event = decode_events.decode(data[at:end])
            except _BAD_LINE as error:
                raise CorruptLogError(path, lines.offset_at(at), f"no event: {error}") from error
            due = _due_after(event.batch, due, self._nothing_given and at == first)
            if due is _BROKEN:
                raise CorruptLogError(path, lines.offset_at(first), "a batch breaks off here")
            found.append(event if self._selection is None else self._selection.look(event))
            at = end
            if due is None:
                self._nothing_given = False
                yield Slice(lines.part(first, end), found, _wanted(found), self._types)
                found = []
        if due is not None:
            self._hold(lines, first)


def _wanted(found: Found) -> list[StoredEvent]:
    return [line for line in found if isinstance(line, StoredEvent)]


def _due_after(batch: BatchPlace | None, due: BatchPlace | None, may_begin_inside: bool) -> BatchPlace | None:
    """The `batch` that the next line must have after one with this `batch`, which was `due`; None for any."""
    if batch is None:
        return None if due is None else _BROKEN
    index, size = batch
    if batch != due and (due is not None or (index != 1 and not may_begin_inside)):
        return _BROKEN
    if not 1 <= index <= size:
        return _BROKEN
    return None if index == size else (index + 1, size)


def batch_of(line: bytes) -> BatchPlace | None:
    """The place `(i, n)` of a line in its batch; None for a line that is in none, or is no event."""
    if b'"batch"' not in line:
        return None
    try:
        return decode_events.decode(line).batch
    except _BAD_LINE:
        return None
