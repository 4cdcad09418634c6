"""Lines back into events: the decoder, and the slices of a log that it gives.

Promises: `Decoder` gives every event that it is fed, or says where the first bad line begins after giving all before
it; it never gives part of a batch. With a selection of types the lines of other types are not decoded, but each is JSON
with that type, on a line of its own (its text may be no UTF-8).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, Union

import msgspec

from ._errors import CorruptLogError
from ._event import Record, StoredEvent, line_hash

# What is decoded in one go: small enough for the processor's cache and for the event loop's patience.
SLICE_SIZE = 64 * 1024
# How many types a selection tells apart; in a log with more of them it decodes every line.
_MOST_TYPES = 1000

_BAD_LINE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_Place: TypeAlias = tuple[int, int]
_BROKEN: _Place = (0, 0)


class Lines(NamedTuple):
    """Whole lines of one file, and the offset in the whole log at which they begin."""

    path: Path
    start_offset: int
    data: bytes

    def cut(self, size: int = SLICE_SIZE) -> Iterator[Lines]:
        """The same lines in pieces of about `size` bytes, or of one longer line."""
        start = 0
        while start < len(self.data):
            end = self.data.rfind(b"\n", start, start + size) + 1 or self.data.index(b"\n", start) + 1
            yield Lines(self.path, self.start_offset + start, self.data[start:end])
            start = end


class _Passed(msgspec.Struct, frozen=True, gc=False):
    """A line whose event is not wanted. All that counts is whether it is in a batch: it is worth a look only then."""

    worth_a_look: _Place | None = msgspec.field(name="batch", default=None)

    @property
    def batch(self) -> _Place | None:
        return self.worth_a_look


_Found: TypeAlias = list[Any]  # of StoredEvent and _Passed, one for each line


class _JustType(msgspec.Struct, gc=False):
    type: Annotated[str, msgspec.Meta(min_length=1)]


_events = msgspec.json.Decoder(StoredEvent)
_types = msgspec.json.Decoder(_JustType)


class _Selection:
    """Decodes the events of some types in one pass over the lines of all.

    To `msgspec` the lines are a union of structs that is tagged by `type`, in which the types that are not wanted have
    no fields. It must know every type, so the decoder is made anew whenever one turns up.
    """

    def __init__(self, wanted: frozenset[str]) -> None:
        self._wanted = {str.__str__(type) for type in wanted}
        self._structs: dict[str, Any] = {type: _wanted_struct(type) for type in self._wanted}
        self._decoder: msgspec.json.Decoder[Any] | None = None

    def decode_lines(self, data: bytes) -> _Found:
        if self._decoder is not None:
            try:
                return self._decoder.decode_lines(data)
            except msgspec.ValidationError:
                pass  # a new type, or a bad line
        new = {line.type for line in _types.decode_lines(data)}.difference(self._structs)
        if len(self._structs) + len(new) > _MOST_TYPES or (self._decoder is not None and not new):
            return [self.look(event) for event in _events.decode_lines(data)]
        structs = self._structs | {type: _passed_struct(type) for type in new}
        decoder: Any = msgspec.json.Decoder(Union[tuple(structs.values())]) if structs else _events  # noqa: UP007
        self._structs, self._decoder = structs, decoder
        found: _Found = decoder.decode_lines(data)
        return found

    def look(self, event: StoredEvent) -> StoredEvent | _Passed:
        """The event if it is wanted."""
        return event if event.type in self._wanted else _Passed(event.batch)


def _wanted_struct(type: str) -> Any:
    # The tag takes the key `type`, so the field has another, which no line has: or its value would not be this one.
    field = msgspec.field(name="eventfold type", default=type)
    return msgspec.defstruct(
        "StoredEvent",
        [("type", Literal[type], field)],
        bases=(StoredEvent,),
        tag_field="type",
        tag=type,
        frozen=True,
        eq=False,
        kw_only=True,
        omit_defaults=True,
        gc=False,
    )


def _passed_struct(type: str) -> Any:
    return msgspec.defstruct("_Passed", [], bases=(_Passed,), tag_field="type", tag=type, frozen=True, gc=False)


_selection = lru_cache(maxsize=128)(_Selection)


class Slice:
    """Events that stand in the log one after the other, decoded together; offsets are bytes in the whole log.

    With a selection, `events` are only those of its `types`; the offsets are those of all that was looked at.
    """

    __slots__ = ("_found", "_lines", "end_offset", "events", "start_offset", "types")

    def __init__(
        self, lines: Lines, found: _Found, events: list[StoredEvent], types: frozenset[str] | None = None
    ) -> None:
        self._lines = lines
        self._found = found
        self.events = events
        self.types = types
        self.start_offset = lines.start_offset
        self.end_offset = lines.start_offset + len(lines.data)

    def __repr__(self) -> str:
        return f"<Slice of {len(self.events)} events, offsets {self.start_offset} to {self.end_offset}>"

    def records(self) -> Iterator[Record]:
        """The events with their places in the log."""
        start = self.start_offset
        for event, line in zip(self._found, self._lines.data.split(b"\n"), strict=False):
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
        self._selection = None if self._types is None else _selection(self._types)
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
            yield from self._decode(held[0]._replace(data=b"".join(lines.data for lines in held)))

    def _hold(self, lines: Lines, size: int) -> None:
        """Holds back what follows the first `size` bytes."""
        rest = lines.data[size:]
        self._held = [Lines(lines.path, lines.start_offset + size, rest)]
        self._held_size, self._worth_decoding = len(rest), 2 * len(rest)

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
                lines = lines._replace(data=data[:size])
                del found[closed:]
            events = found if self._selection is None else _wanted(found)
        self._nothing_given = self._nothing_given and not found
        if found:
            yield Slice(lines, found, events, self._types)

    def _decode_at_once(self, data: bytes) -> _Found | None:
        """One object for each line, or None if that is not what the lines hold (a blank line counts too)."""
        try:
            found: _Found = (self._selection or _events).decode_lines(data)
        except _BAD_LINE:
            return None
        # As many newlines as objects; counted so because that is several times as fast as `count`.
        return found if len(found) == len(data) - len(data.replace(b"\n", b"")) else None

    def _closed(self, found: _Found) -> int | None:
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
        path, start, data = lines
        found: _Found = []
        first = at = 0
        due = None
        while at < len(data):
            end = data.index(b"\n", at) + 1
            if due is None:
                first = at
                if not data[at:end].strip():
                    yield Slice(Lines(path, start + at, data[at:end]), [], [])
                    at = end
                    continue
            try:
                event = _events.decode(data[at:end])
            except _BAD_LINE as error:
                raise CorruptLogError(path, start + at, f"no event: {error}") from error
            due = _due_after(event.batch, due, self._nothing_given and at == first)
            if due is _BROKEN:
                raise CorruptLogError(path, start + first, "a batch breaks off here")
            found.append(event if self._selection is None else self._selection.look(event))
            at = end
            if due is None:
                self._nothing_given = False
                yield Slice(Lines(path, start + first, data[first:end]), found, _wanted(found), self._types)
                found = []
        if due is not None:
            self._hold(lines, first)


def _wanted(found: _Found) -> list[StoredEvent]:
    return [line for line in found if isinstance(line, StoredEvent)]


def _due_after(batch: _Place | None, due: _Place | None, may_begin_inside: bool) -> _Place | None:
    """The `batch` that the next line must have after one with this `batch`, which was `due`; None for any."""
    if batch is None:
        return None if due is None else _BROKEN
    index, size = batch
    if batch != due and (due is not None or (index != 1 and not may_begin_inside)):
        return _BROKEN
    if not 1 <= index <= size:
        return _BROKEN
    return None if index == size else (index + 1, size)


def batch_of(line: bytes) -> _Place | None:
    """The place `(i, n)` of a line in its batch; None for a line that is in none, or is no event."""
    if b'"batch"' not in line:
        return None
    try:
        return _events.decode(line).batch
    except _BAD_LINE:
        return None
