"""Decodes lines into typed events: events whose data is an object of the class that the catalog has for their type.

Events of the current version are decoded directly into objects together with their lines. If a line of a block does not
fit, the block is decoded as plain data, and each event is converted separately.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import msgspec
from msgspec.structs import force_setattr

from .._codec.backwards import BackwardsDecoder
from .._codec.decode import Decoder, Slice
from .._codec.lines import Lines
from .._codec.selection import Found, TaggedLines, event_struct, skipped_struct
from .._codec.stored import StoredEvent
from .._errors import SchemaError
from .._event import Event, PartialRecord, Record
from .._logging import WARNING, log_event
from .._query import Query, types_alone
from .catalog import Catalog
from .schema import MismatchError, Schema, decode_other

OnMismatch: TypeAlias = Literal["raise", "skip"]


class Typing:
    """What a reader needs for typed events: the catalog, and what to do with an event that does not fit."""

    def __init__(self, catalog: Catalog, on_mismatch: OnMismatch) -> None:
        self.catalog = catalog
        self.on_mismatch = on_mismatch
        # A refresh of ten events must not wait for a new decoder.
        self.lines_of_types = lru_cache(maxsize=128)(self._lines_of_types)

    def _lines_of_types(self, wanted: frozenset[str] | None, batches: bool) -> TaggedLines:
        """Decodes lines of the wanted types (None: any) with their objects, and skips the others."""
        schemas = self.catalog.schemas

        def new_struct(type: str) -> Any:
            if wanted is not None and type not in wanted:
                return skipped_struct(type, batches)
            schema = schemas.get(type)
            return event_struct(type, batches) if schema is None else _struct_of(type, batches, schema)

        return TaggedLines(schemas if wanted is None else wanted, new_struct, dec_hook=decode_other)

    def decoder(self, query: Query | None, *, places: bool) -> Decoder:
        """A decoder whose events have objects as their data."""
        return TypedDecoder(self, query, places=places)

    def backwards_decoder(self, query: Query | None) -> BackwardsDecoder:
        """The same, newest events first."""
        return TypedBackwardsDecoder(self, query)

    def events_of(self, event: StoredEvent, wanted: Query | None) -> tuple[StoredEvent, ...]:
        """The events that an event on a line becomes, without those that are not wanted. Raises `MismatchError`."""
        if wanted is not None and not wanted.matches(event) and self.catalog.is_current(event):
            return ()
        converted = self.catalog.upcasted(event.type, event.data, event.version)
        return tuple(
            msgspec.structs.replace(event, type=type, data=data, version=version)
            for type, data, version in converted
            if wanted is None or wanted.matches_keys(type, event.tags)
        )

    def mismatch(self, mismatch: MismatchError, event: Event, offset: int) -> None:
        """Raises `SchemaError`, or logs a warning if such events are skipped."""
        error = SchemaError(offset, event.type, mismatch.field, mismatch.reason)
        if self.on_mismatch == "raise":
            raise error from mismatch
        log_event(
            WARNING,
            "event.skipped",
            "skipped an event: %(error)s",
            offset=offset,
            type=event.type,
            field=mismatch.field,
            error=error,
        )


def typing_of(catalog: Catalog | None, on_mismatch: OnMismatch) -> Typing | None:
    """What a reader needs for a catalog; None without one. Raises what `Catalog.check` raises."""
    if on_mismatch not in ("raise", "skip"):
        raise ValueError(f'on_mismatch must be "raise" or "skip", not {on_mismatch!r}')
    if catalog is None:
        return None
    if not isinstance(catalog, Catalog):
        raise TypeError(f"catalog must be a Catalog, not {catalog!r}")
    catalog.check()
    return Typing(catalog, on_mismatch)


def _struct_of(type: str, batches: bool, schema: Schema) -> Any:
    """The struct of events with an object as their data, which a line of another version does not fit."""
    version: Any = Literal[schema.version]
    field = ("version", version, 1) if schema.version == 1 else ("version", version)
    return event_struct(type, batches, ("data", schema.cls), field)


class TypedSlice(Slice):
    """A slice in which some lines become no event or several."""

    __slots__ = ("_events_of_lines",)

    def __init__(self, lines: Lines, events_of_lines: list[tuple[StoredEvent, ...]], query: Query | None) -> None:
        super().__init__([lines], [], [event for events in events_of_lines for event in events], query)
        self._events_of_lines = events_of_lines

    def records(self) -> Iterator[Record]:
        for line in Slice(self._parts, self._events_of_lines, []).records():
            events: Any = line.event  # all of them, not one
            yield from _records_of(line, events)


def _records_of(line: Record, events: tuple[StoredEvent, ...]) -> list[Record]:
    """The records of the events of one line."""
    kinds = [PartialRecord] * (len(events) - 1) + [Record]
    return [
        kind(event, line.start_offset, line.end_offset, line._line) for kind, event in zip(kinds, events, strict=False)
    ]


class TypedDecoder(Decoder):
    """Yields events whose data is an object of the class of their type, if the catalog has one.

    At the first event that does not fit, raises `SchemaError` after yielding all before it, or skips the event.
    """

    def __init__(self, typing: Typing, query: Query | None, *, places: bool) -> None:
        sources = typing.catalog.sources(query)
        super().__init__(sources, places=places)
        self._typing = typing
        self._wanted = None if query is None or query.matches_all else query
        self._is_wider = sources != query
        types = None if self._query is None else types_alone(self._query)
        # With tags in the query, most lines are not decoded at all; the others are converted.
        self._typed_lines: tuple[TaggedLines, ...] = ()
        if self._query is None or types is not None:
            self._typed_lines = typing.lines_of_types(types, False), typing.lines_of_types(types, True)
        # Whether some of the events that are fed, or held back, have plain data.
        self._has_plain = False

    def feed(self, lines: Lines) -> Iterator[Slice]:
        if not self._held:
            self._has_plain = False
        for slice_ in super().feed(lines):
            events = slice_.events
            if not events or (self._wants(events) and (not self._has_plain or self._convert_all(events))):
                slice_.query = self._wanted
                yield slice_
            else:
                yield from self._convert_each(slice_)

    def _decode(self, data: bytes, texts: list[bytes] | None, batches: bool) -> Found | None:
        if self._typed_lines:
            found = self._typed_lines[batches].decode(data, texts)
            if found is not None or not batches:
                return found
        self._has_plain = True
        return super()._decode(data, texts, batches)

    def _line_by_line(self, lines: Lines) -> Iterator[Slice]:
        self._has_plain = True
        return super()._line_by_line(lines)

    def _wants(self, events: list[StoredEvent]) -> bool:
        wanted = self._wanted
        return wanted is None or not self._is_wider or all(map(wanted.matches, events))

    def _convert_all(self, events: list[StoredEvent]) -> bool:
        """Converts the data of all events, or of none if an upcaster is needed for one."""
        schemas = self._typing.catalog.schemas
        typed: list[tuple[StoredEvent, Any]] = []
        try:
            for event in events:
                if (schema := schemas.get(event.type)) is not None:
                    if event.version != schema.version:
                        return False
                    typed.append((event, schema.decode(event.data)))
        except MismatchError:
            return False
        for event, data in typed:
            # Nobody else has seen the event yet.
            force_setattr(event, "data", data)
        return True

    def _convert_each(self, slice_: Slice) -> Iterator[Slice]:
        """The slow way, for events of older versions and those that don't fit."""
        found: list[Any] = slice_._found
        lines = slice_._lines
        events_of_lines: list[tuple[StoredEvent, ...]] = []
        for event in found:
            events: tuple[StoredEvent, ...] = ()
            if isinstance(event, StoredEvent):
                try:
                    events = self._typing.events_of(event, self._wanted)
                except MismatchError as mismatch:
                    before = len(lines.data) - len(lines.data.split(b"\n", len(events_of_lines))[-1])
                    try:
                        self._typing.mismatch(mismatch, event, lines.offset_at(before))
                    except SchemaError:
                        if before:
                            yield TypedSlice(lines.part(0, before), events_of_lines, self._wanted)
                        raise
            events_of_lines.append(events)
        yield TypedSlice(lines, events_of_lines, self._wanted)


class TypedBackwardsDecoder(BackwardsDecoder):
    """Does what `TypedDecoder` does, newest events first."""

    def __init__(self, typing: Typing, query: Query | None) -> None:
        super().__init__(typing.catalog.sources(query))
        self._typing = typing
        self._wanted = None if query is None or query.matches_all else query

    def feed(self, lines: Lines) -> Iterator[Record]:
        for record in super().feed(lines):
            event: Any = record.event
            try:
                events = self._typing.events_of(event, self._wanted)
            except MismatchError as mismatch:
                self._typing.mismatch(mismatch, event, record.start_offset)
            else:
                yield from reversed(_records_of(record, events))
