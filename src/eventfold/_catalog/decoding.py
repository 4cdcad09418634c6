"""Decodes lines into typed events: events whose data is an object of the class that the catalog has for their type.

A line whose event is of the current version is decoded in one step, with the object as the event's data. If a line of a
block does not fit, the block is decoded into plain data, and each event is converted separately.
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
from .._codec.selection import DecodedLines, TaggedLines, event_struct, skipped_struct
from .._codec.stored import StoredEvent
from .._errors import SchemaError
from .._event import Event, PartialRecord, Record
from .._logging import WARNING, log_event
from .._query import Query, types_alone
from .catalog import Catalog
from .schema import MismatchError, Schema, decode_other

OnMismatch: TypeAlias = Literal["raise", "skip"]


class TypedDecoding:
    """What a reader needs for typed events: the catalog, and what happens to an event that does not fit its class."""

    def __init__(self, catalog: Catalog, on_mismatch: OnMismatch) -> None:
        self.catalog = catalog
        self.on_mismatch = on_mismatch
        # Cached, since creating a decoder takes longer than decoding a few events.
        self.typed_lines = lru_cache(maxsize=128)(self._typed_lines)

    def _typed_lines(self, types: frozenset[str] | None, allow_batches: bool) -> TaggedLines:
        """Decodes lines of these types (None: of all types) into typed events, and all others into placeholders."""
        schemas = self.catalog._schemas

        def new_struct(type: str) -> Any:
            if types is not None and type not in types:
                return skipped_struct(type, allow_batches)
            schema = schemas.get(type)
            return event_struct(type, allow_batches) if schema is None else _typed_struct(type, allow_batches, schema)

        return TaggedLines(schemas if types is None else types, new_struct, dec_hook=decode_other)

    def decoder(self, query: Query | None, *, exact_offsets: bool) -> Decoder:
        """A decoder that yields typed events."""
        return TypedDecoder(self, query, exact_offsets=exact_offsets)

    def backwards_decoder(self, query: Query | None) -> BackwardsDecoder:
        """A decoder that yields typed events, newest first."""
        return TypedBackwardsDecoder(self, query)

    def events_of(self, event: StoredEvent, query: Query | None) -> tuple[StoredEvent, ...]:
        """The typed events into which an event on a line is converted, as far as a query matches them.

        Raises `MismatchError`.
        """
        if query is not None and not query.matches(event) and self.catalog._is_current(event):
            return ()
        converted = self.catalog._upcasted(event.type, event.data, event.version)
        return tuple(
            msgspec.structs.replace(event, type=type, data=data, version=version)
            for type, data, version in converted
            if query is None or query._matches_type_and_tags(type, event.tags)
        )

    def handle_mismatch(self, mismatch: MismatchError, event: Event, offset: int) -> None:
        """Raises `SchemaError` or, if events that do not fit are to be skipped, logs a warning."""
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


def typed_decoding(catalog: Catalog | None, on_mismatch: OnMismatch) -> TypedDecoding | None:
    """Checks the options and returns what a reader needs for typed events; None without a catalog.

    Raises `TypeError` or `ValueError` for a wrong option, and what `Catalog._check` raises.
    """
    if on_mismatch not in ("raise", "skip"):
        raise ValueError(f'on_mismatch must be "raise" or "skip", not {on_mismatch!r}')
    if catalog is None:
        return None
    if not isinstance(catalog, Catalog):
        raise TypeError(f"catalog must be a Catalog, not {catalog!r}")
    catalog._check()
    return TypedDecoding(catalog, on_mismatch)


def _typed_struct(type: str, allow_batches: bool, schema: Schema) -> Any:
    """The struct of the typed events of one type. A line of a different version does not fit it."""
    version: Any = Literal[schema.version]
    field = ("version", version, 1) if schema.version == 1 else ("version", version)
    return event_struct(type, allow_batches, ("data", schema.cls), field)


class TypedSlice(Slice):
    """A slice in which a line may have been converted into any number of events."""

    __slots__ = ("_events_of_lines",)

    def __init__(self, lines: Lines, events_of_lines: list[tuple[StoredEvent, ...]], query: Query | None) -> None:
        super().__init__([lines], [], [event for events in events_of_lines for event in events], query)
        self._events_of_lines = events_of_lines

    def records(self) -> Iterator[Record]:
        for line in Slice(self._blocks, self._events_of_lines, []).records():
            events: Any = line.event  # a tuple, since that is what was passed to `Slice` above
            yield from _records_of(line, events)


def _records_of(line: Record, events: tuple[StoredEvent, ...]) -> list[Record]:
    """The records of the events of one line."""
    kinds = [PartialRecord] * (len(events) - 1) + [Record]
    return [
        kind(event, line.start_offset, line.end_offset, line._line) for kind, event in zip(kinds, events, strict=False)
    ]


class TypedDecoder(Decoder):
    """Yields events whose data is an object of the class of their type, if the catalog has one.

    An event that does not fit is skipped, or raises `SchemaError` after all events before it were yielded.
    """

    def __init__(self, decoding: TypedDecoding, query: Query | None, *, exact_offsets: bool) -> None:
        widened = decoding.catalog._widened(query)
        super().__init__(widened, exact_offsets=exact_offsets)
        self._decoding = decoding
        self._typed_query = None if query is None or query._matches_all else query
        self._selects_more = widened != query
        types = None if self._query is None else types_alone(self._query)
        # If the query has tags, most lines are not decoded at all, and the events of the other lines are converted.
        self._typed_lines: tuple[TaggedLines, ...] = ()
        if self._query is None or types is not None:
            self._typed_lines = decoding.typed_lines(types, False), decoding.typed_lines(types, True)
        # Whether some of the events that were fed, or of the open batch, have plain data.
        self._has_plain = False

    def feed(self, lines: Lines) -> Iterator[Slice]:
        if not self._open_batch:
            self._has_plain = False
        for slice_ in super().feed(lines):
            events = slice_.events
            if not events or (self._all_match(events) and (not self._has_plain or self._convert_all(events))):
                slice_.query = self._typed_query
                yield slice_
            else:
                yield from self._convert_each(slice_)

    def _decode(self, data: bytes, texts: list[bytes] | None, allow_batches: bool) -> DecodedLines | None:
        if self._typed_lines:
            decoded = self._typed_lines[allow_batches].decode(data, texts)
            if decoded is not None or not allow_batches:
                return decoded
        self._has_plain = True
        return super()._decode(data, texts, allow_batches)

    def _line_by_line(self, lines: Lines) -> Iterator[Slice]:
        self._has_plain = True
        return super()._line_by_line(lines)

    def _all_match(self, events: list[StoredEvent]) -> bool:
        query = self._typed_query
        return query is None or not self._selects_more or all(map(query.matches, events))

    def _convert_all(self, events: list[StoredEvent]) -> bool:
        """Converts the data of all events. Converts none and returns false if one needs an upcaster or does not fit."""
        schemas = self._decoding.catalog._schemas
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
            # Nothing else has a reference to the immutable event yet.
            force_setattr(event, "data", data)
        return True

    def _convert_each(self, slice_: Slice) -> Iterator[Slice]:
        """The slow way, for events of older versions and those that don't fit."""
        decoded: list[Any] = slice_._decoded
        lines = slice_._lines
        events_of_lines: list[tuple[StoredEvent, ...]] = []
        for event in decoded:
            events: tuple[StoredEvent, ...] = ()
            if isinstance(event, StoredEvent):
                try:
                    events = self._decoding.events_of(event, self._typed_query)
                except MismatchError as mismatch:
                    before = len(lines.data) - len(lines.data.split(b"\n", len(events_of_lines))[-1])
                    try:
                        self._decoding.handle_mismatch(mismatch, event, lines.offset_at(before))
                    except SchemaError:
                        if before:
                            yield TypedSlice(lines.part(0, before), events_of_lines, self._typed_query)
                        raise
            events_of_lines.append(events)
        yield TypedSlice(lines, events_of_lines, self._typed_query)


class TypedBackwardsDecoder(BackwardsDecoder):
    """Does what `TypedDecoder` does, newest events first."""

    def __init__(self, decoding: TypedDecoding, query: Query | None) -> None:
        super().__init__(decoding.catalog._widened(query))
        self._decoding = decoding
        self._typed_query = None if query is None or query._matches_all else query

    def feed(self, lines: Lines) -> Iterator[Record]:
        for record in super().feed(lines):
            event: Any = record.event
            try:
                events = self._decoding.events_of(event, self._typed_query)
            except MismatchError as mismatch:
                self._decoding.handle_mismatch(mismatch, event, record.start_offset)
            else:
                yield from reversed(_records_of(record, events))
