"""The event and its line: the codec between them, with the checks on the way in and out.

A line is one event as compact JSON and a newline, its keys in the order `type`, `data`, `ts`, `id`, `actor`, `meta`,
`batch`. The format is that of the Rust crate eventfold 0.2.0; `batch` is ours, and the crate passes over it.

Promises: `encode_line` gives only lines that read back as they went in, here and in the Rust crate, and names what it
refuses and where it stands. `Decoder` gives every event that it is fed, or says where the first bad line begins after
giving all before it; it never gives part of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import xxhash

from ._errors import CorruptLogError, InvalidEventError

# serde_json refuses the 128th level, and the event itself is the first.
MAX_DEPTH = 127
MIN_INT, MAX_INT = -(2**63), 2**64 - 1
# What is decoded in one go: small enough for the processor's cache and for the event loop's patience.
SLICE_SIZE = 64 * 1024


def line_hash(line: bytes) -> str:
    """The xxh64 (seed 0, 16 hex digits) of a line without its newline; one newline at the end is left out."""
    return xxhash.xxh64_hexdigest(line.removesuffix(b"\n"))


class Head(NamedTuple):
    """The offset (bytes) after the log's last line, with that line's hash; `(0, "")` for an empty log."""

    offset: int
    line_hash: str


class AppendResult(msgspec.Struct, frozen=True):
    """Where an event's line stands in the whole log (bytes), and its hash."""

    start_offset: int
    end_offset: int
    line_hash: str


def _now() -> int:
    return int(time.time())


class _TypeAndData(msgspec.Struct, frozen=True, eq=False):
    """The two fields of `Event` that may be given by position."""

    type: str
    data: Any = {}


class Event(_TypeAndData, frozen=True, eq=False, kw_only=True):
    """Something that happened: an immutable record, equal to another by value.

    `type` says what kind of event it is; `data` and `meta` are any JSON values; `ts` is in whole seconds since the Unix
    epoch, now if not given. The values are checked when the event is appended.
    """

    ts: int = msgspec.field(default_factory=_now)
    id: str | None = None
    actor: str | None = None
    meta: Any = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Event):
            return NotImplemented
        return (
            self.type == other.type
            and self.data == other.data
            and self.ts == other.ts
            and self.id == other.id
            and self.actor == other.actor
            and self.meta == other.meta
        )

    def __repr__(self) -> str:
        options = "".join(
            f", {name}={value!r}"
            for name, value in (("id", self.id), ("actor", self.actor), ("meta", self.meta))
            if value is not None
        )
        return f"Event({self.type!r}, {self.data!r}, ts={self.ts!r}{options})"


class _StoredEvent(Event, frozen=True, eq=False, kw_only=True, omit_defaults=True, gc=False):
    """An event as its line holds it: nothing is filled in for it, and it may be line `i` (from 1) of a batch of `n`.

    All fields stand here again because their order is that of the keys in the line.
    """

    type: Annotated[str, msgspec.Meta(min_length=1)]
    data: Any
    ts: Annotated[int, msgspec.Meta(ge=0)]
    id: str | None = None
    actor: str | None = None
    meta: Any = None
    batch: tuple[int, int] | None = None


class _Unread(msgspec.Struct, frozen=True, gc=False):
    """A line whose payload is not decoded yet, since it may not be wanted."""

    type: Annotated[str, msgspec.Meta(min_length=1)]
    data: msgspec.Raw
    ts: Annotated[int, msgspec.Meta(ge=0)]
    id: str | None = None
    actor: str | None = None
    meta: Any = None
    batch: tuple[int, int] | None = None

    def read(self) -> _StoredEvent:
        """The event."""
        return _StoredEvent(
            type=self.type,
            data=_decode_value(self.data),
            ts=self.ts,
            id=self.id,
            actor=self.actor,
            meta=self.meta,
            batch=self.batch,
        )


class Record(msgspec.Struct, frozen=True):
    """An event as it stands in the log; its offsets are bytes in the whole log."""

    event: Event
    start_offset: int
    end_offset: int
    _line: bytes

    @property
    def line_hash(self) -> str:
        """The hash of the event's line, computed when asked for."""
        return line_hash(self._line)

    def __repr__(self) -> str:
        return f"Record({self.event!r}, start_offset={self.start_offset}, end_offset={self.end_offset})"


_encode = msgspec.json.Encoder().encode
_events = msgspec.json.Decoder(_StoredEvent)
_unread = msgspec.json.Decoder(_Unread)
_decode_value = msgspec.json.Decoder().decode


def encode_line(event: Event, max_size: int, batch: tuple[int, int] | None = None) -> bytes:
    """The event's line with its newline, at most `max_size` bytes.

    Raises `InvalidEventError` for an event that does not read back the same here and in the Rust crate.
    """
    fault = _event_fault(event)
    if fault is None:
        try:
            line = _encode(
                _StoredEvent(
                    type=event.type,
                    data=event.data,
                    ts=event.ts,
                    id=event.id,
                    actor=event.actor,
                    meta=event.meta,
                    batch=batch,
                )
            )
        except UnicodeEncodeError:
            fault = _event_fault(event, text=True) or "it holds a lone surrogate"
        except (TypeError, ValueError, RecursionError) as error:
            fault = str(error)
        else:
            if len(line) < max_size:
                return line + b"\n"
            fault = f"its line has {len(line) + 1} bytes, and max_event_size is {max_size}"
    raise InvalidEventError(f"this event can't be written: {fault}")


def _event_fault(event: Event, text: bool = False) -> str | None:
    """What is wrong with an event and where; `text` looks for lone surrogates too, which the encoder finds faster."""
    if not isinstance(event, Event):
        return f"{type(event).__name__} is not an Event"
    if not isinstance(event.type, str) or not event.type:
        return f"type must be a string that is not empty, not {event.type!r}"
    if not isinstance(event.ts, int) or isinstance(event.ts, bool) or not 0 <= event.ts <= MAX_INT:
        return f"ts must be whole seconds from 0 to 2^64-1, not {event.ts!r}"
    if not isinstance(event.id, _OPTIONAL_TEXT):
        return f"id must be a string, not {event.id!r}"
    if not isinstance(event.actor, _OPTIONAL_TEXT):
        return f"actor must be a string, not {event.actor!r}"
    if text:
        for name in ("type", "id", "actor"):
            if _has_surrogate(getattr(event, name) or ""):
                return f"{name}: a lone surrogate in {getattr(event, name)!r}"
    if fault := _fault(event.data, 2, text):
        return f"data{fault[0]}: {fault[1]}"
    if event.meta is not None and (fault := _fault(event.meta, 2, text)):
        return f"meta{fault[0]}: {fault[1]}"
    return None


_OPTIONAL_TEXT = (str, type(None))
_HARMLESS = frozenset({str, bool, type(None)})


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def _fault(value: Any, depth: int, text: bool) -> tuple[str, str] | None:
    """Where in a JSON value something is that no line can hold, and why; None if it is fine.

    `depth` is the level in the line that the value would have as a container. A cycle is found as nesting too deep.
    """
    kind = type(value)
    if kind in _HARMLESS and not text:
        return None
    if kind is int or kind is float or not isinstance(value, _CONTAINERS):
        return _scalar_fault(value, text)
    if depth > MAX_DEPTH:
        return "", f"nesting is deeper than {MAX_DEPTH} levels, or a cycle"
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                return "", f"the key {key!r} is no string"
            if text and _has_surrogate(key):
                return "", f"a lone surrogate in the key {key!r}"
            if (type(item) not in _HARMLESS or text) and (fault := _fault(item, depth + 1, text)):
                return f".{key}{fault[0]}", fault[1]
    else:
        for index, item in enumerate(value):
            if (type(item) not in _HARMLESS or text) and (fault := _fault(item, depth + 1, text)):
                return f"[{index}]{fault[0]}", fault[1]
    return None


_CONTAINERS = (dict, list, tuple)


def _scalar_fault(value: Any, text: bool) -> tuple[str, str] | None:
    if isinstance(value, int):
        return None if MIN_INT <= value <= MAX_INT else ("", f"{value} is outside -2^63 to 2^64-1")
    if isinstance(value, float):
        return None if isfinite(value) else ("", f"{value!r} is no JSON number")
    if value is None:
        return None
    if isinstance(value, str):
        return ("", f"a lone surrogate in {value!r}") if text and _has_surrogate(value) else None
    return "", f"{type(value).__name__} is no JSON type"


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


class Slice:
    """Events that stand in the log one after the other, decoded together; offsets are bytes in the whole log.

    With a selection of types, `events` are only those; the offsets are those of all that was looked at.
    """

    __slots__ = ("_kept", "_lines", "end_offset", "events", "start_offset")

    def __init__(self, lines: Lines, events: list[_StoredEvent], kept: list[int] | None = None) -> None:
        self._lines = lines
        self._kept = kept
        self.events = events
        self.start_offset = lines.start_offset
        self.end_offset = lines.start_offset + len(lines.data)

    def __repr__(self) -> str:
        return f"<Slice of {len(self.events)} events, offsets {self.start_offset} to {self.end_offset}>"

    def records(self) -> Iterator[Record]:
        """The events with their places in the log."""
        lines = self._lines.data.split(b"\n")
        kept = range(len(self.events)) if self._kept is None else self._kept
        start = index = 0
        for at, event in zip(kept, self.events, strict=True):
            while index < at:
                start += len(lines[index]) + 1
                index += 1
            end = start + len(lines[at]) + 1
            yield Record(event, self.start_offset + start, self.start_offset + end, lines[at])
            start, index = end, at + 1

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
        found = self._decode_at_once(lines.data)
        closed = None if found is None else self._closed(found)
        if found is None or closed is None:
            yield from self._line_by_line(lines)
            return
        if closed < len(found):
            size = sum(len(line) + 1 for line in lines.data.split(b"\n", closed)[:closed])
            self._hold(lines, size)
            lines = lines._replace(data=lines.data[:size])
            del found[closed:]
        try:
            piece = Slice(lines, found) if self._types is None else self._select(lines, found)
        except _BAD_LINE:
            yield from self._line_by_line(lines)
        else:
            self._nothing_given = self._nothing_given and not found
            if lines.data:
                yield piece

    def _decode_at_once(self, data: bytes) -> list[Any] | None:
        """One object for each line, or None if that is not what the lines hold (a blank line counts too)."""
        decoder: msgspec.json.Decoder[Any] = _events if self._types is None else _unread
        try:
            found = decoder.decode_lines(data)
        except _BAD_LINE:
            return None
        # As many newlines as objects; counted so because that is several times as fast as `count`.
        if len(found) != len(data) - len(data.replace(b"\n", b"")):
            return None
        # Two damages may cancel out in that number, and events are what they are all the same. Where their places are
        # needed, it takes that every newline stands between two objects: then each has a line of its own.
        if self._places or [event for event in found if event.batch]:
            alone = data.startswith(b"{") and data.count(b"}\n{") == len(found) - 1
            return found if alone else None
        return found

    def _closed(self, found: list[Any]) -> int | None:
        """How many lines stand before a batch that goes on beyond them; None if a batch is broken."""
        if not [event for event in found if event.batch]:
            return len(found)
        closed, due = 0, None
        for index, event in enumerate(found):
            due = _due_after(event.batch, due, self._nothing_given and index == 0)
            if due is _BROKEN:
                return None
            if due is None:
                closed = index + 1
        return closed

    def _select(self, lines: Lines, found: list[_Unread]) -> Slice:
        types = self._types or ()
        kept = [index for index, event in enumerate(found) if event.type in types]
        return Slice(lines, [found[index].read() for index in kept], kept)

    def _line_by_line(self, lines: Lines) -> Iterator[Slice]:
        """The patient way, for lines among which some are blank or bad: one slice for each line or batch."""
        path, start, data = lines
        events: list[_StoredEvent] = []
        first = at = 0
        due = None
        while at < len(data):
            end = data.index(b"\n", at) + 1
            if due is None:
                first = at
                if not data[at:end].strip():
                    yield Slice(Lines(path, start + at, data[at:end]), [])
                    at = end
                    continue
            try:
                event = _events.decode(data[at:end])
            except _BAD_LINE as error:
                raise CorruptLogError(path, start + at, f"no event: {error}") from error
            due = _due_after(event.batch, due, self._nothing_given and at == first)
            if due is _BROKEN:
                raise CorruptLogError(path, start + first, "a batch breaks off here")
            events.append(event)
            at = end
            if due is None:
                kept = [i for i, e in enumerate(events) if self._types is None or e.type in self._types]
                self._nothing_given = False
                yield Slice(Lines(path, start + first, data[first:end]), [events[i] for i in kept], kept)
                events = []
        if due is not None:
            self._hold(lines, first)


_BAD_LINE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_BROKEN = (0, 0)


def _due_after(
    batch: tuple[int, int] | None, due: tuple[int, int] | None, may_begin_inside: bool
) -> tuple[int, int] | None:
    """The `batch` that the next line must have after one with this `batch`, which was `due`; None for any."""
    if batch is None:
        return None if due is None else _BROKEN
    index, size = batch
    if batch != due and (due is not None or (index != 1 and not may_begin_inside)):
        return _BROKEN
    if not 1 <= index <= size:
        return _BROKEN
    return None if index == size else (index + 1, size)


def batch_of(line: bytes) -> tuple[int, int] | None:
    """The place `(i, n)` of a line in its batch; None for a line that is in none, or is no event."""
    if b'"batch"' not in line:
        return None
    try:
        return _unread.decode(line).batch
    except _BAD_LINE:
        return None
