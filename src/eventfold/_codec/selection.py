"""Decodes the lines of the events that a query selects, and as little as possible of all other lines.

Each decoder exists twice: one allows lines of batches, and one refuses them, by an error or by returning None. The
second is faster, since its caller need not look for batches in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from typing import Any, Literal, Protocol, TypeAlias, Union

import msgspec

from .._query import Query, types_alone
from .lines import split_lines
from .stored import StoredEvent

# How many types a selection distinguishes; in a log with more of them, it decodes every line.
_MOST_TYPES = 1000

# The number of a line in its batch, from 1, and the number of lines in that batch.
BatchPosition: TypeAlias = tuple[int, int]


class _Skipped(msgspec.Struct, frozen=True, gc=False):
    """The placeholder of an event that is not selected."""

    # True for a line in a batch, which the decoder needs even if the event is not selected. The key `batch` is read
    # into this field so that one attribute decides for any decoded line; for a `StoredEvent`, it is always true.
    relevant: BatchPosition | None = msgspec.field(name="batch", default=None)

    @property
    def batch(self) -> BatchPosition | None:
        return self.relevant


DecodedLines: TypeAlias = list[Any]  # a StoredEvent or a _Skipped for each line


class _TypeOnly(msgspec.Struct, gc=False):
    type: str


class _SkippedSingle(_Skipped, frozen=True, gc=False):
    """The placeholder of an event outside of batches."""

    relevant: None = msgspec.field(name="batch", default=None)


class _SkippedLine(_Skipped, kw_only=True, frozen=True, gc=False):
    """The placeholder of a line of any type, which must have one."""

    type: str


class _SkippedSingleLine(_SkippedSingle, kw_only=True, frozen=True, gc=False):
    """The placeholder of a line of any type outside of batches, which must have a type."""

    type: str


class _AnyBatch(StoredEvent, frozen=True, eq=False, kw_only=True, omit_defaults=True, gc=False):
    """An event whose key `batch` is not a position in a batch: another program may use that key for something else."""

    batch: Any = None


class _Single(StoredEvent, frozen=True, eq=False, kw_only=True, omit_defaults=True, gc=False):
    """An event outside of batches."""

    batch: None = None


decode_events = msgspec.json.Decoder(StoredEvent)
_decode_any_batch = msgspec.json.Decoder(_AnyBatch).decode
_decode_types = msgspec.json.Decoder(_TypeOnly)


def decode_line(line: bytes) -> StoredEvent:
    """The event of one line. Raises what `msgspec` raises if it is not an event."""
    try:
        return decode_events.decode(line)
    except msgspec.ValidationError:
        return _decode_any_batch(line)


def as_batch_position(batch: Any) -> BatchPosition | None:
    """The value of an event's key `batch`, if it is a position in a batch; otherwise None."""
    if isinstance(batch, list) and list(map(type, batch)) == [int, int]:
        batch = tuple(batch)  # the value of a second key `batch`, whose first one was not a position
    return batch if isinstance(batch, tuple) and 1 <= batch[0] <= batch[1] else None


class LinesDecoder:
    """Decodes lines into objects of one type: exactly one for each line."""

    def __init__(self, type: Any, dec_hook: Callable[[type, Any], Any] | None = None) -> None:
        self._type = type
        self._dec_hook = dec_hook

    @cached_property
    def _line(self) -> msgspec.json.Decoder[Any]:
        return msgspec.json.Decoder(self._type, dec_hook=self._dec_hook)

    @cached_property
    def _array(self) -> msgspec.json.Decoder[Any]:
        return msgspec.json.Decoder(list[self._type], dec_hook=self._dec_hook)  # type: ignore[name-defined]

    def decode(self, data: bytes, lines: list[bytes] | None) -> DecodedLines:
        """The objects of the lines in `data`; `lines` are the same lines in a list. It is faster without `lines`.

        Raises what `msgspec` raises, also for a line without an object or with several objects.
        """
        if lines is not None:
            return list(map(self._line.decode, lines))
        # `decode_lines` would accept two objects on one line. With a blank line elsewhere, the number of objects would
        # still be right. In an array, both are errors, and decoding it takes no longer than counting the lines. Only a
        # newline and a comma that were swapped would not be noticed.
        items = data.replace(b"\n", b"\n,")
        decoded: DecodedLines = self._array.decode(b"".join((b"[", memoryview(items)[:-1], b"]")))
        if len(decoded) != len(items) - len(data):
            raise msgspec.DecodeError("there are more or fewer objects than lines")
        return decoded


_any_lines = LinesDecoder(StoredEvent)
_single_lines = LinesDecoder(_Single)
_skip_lines = LinesDecoder(_SkippedLine)
_skip_singles = LinesDecoder(_SkippedSingleLine)


class Selection(Protocol):
    """Decodes lines: those of selected events into events, all others into placeholders."""

    def decode(self, data: bytes, lines: list[bytes] | None) -> DecodedLines | None:
        """Like `LinesDecoder.decode`. Returns None if only a selection that allows batches can decode the lines."""

    def select(self, event: StoredEvent) -> Any:
        """The event if it is selected, otherwise its placeholder."""


class _AllEvents:
    """Selects every event."""

    def __init__(self, allow_batches: bool) -> None:
        self._lines = _any_lines if allow_batches else _single_lines

    def decode(self, data: bytes, lines: list[bytes] | None) -> DecodedLines:
        return self._lines.decode(data, lines)

    def select(self, event: StoredEvent) -> StoredEvent:
        return event


class TaggedLines:
    """Decodes lines as a union of structs tagged by `type`: each line becomes the struct of its type.

    `msgspec` must know every type, so the decoder is recreated whenever a new type occurs, with a struct from
    `new_struct`.
    """

    def __init__(self, types: Iterable[str], new_struct: Callable[[str], Any], dec_hook: Any = None) -> None:
        self._new_struct = new_struct
        self._dec_hook = dec_hook
        self._structs: dict[str, Any] = {type: new_struct(type) for type in map(str.__str__, types)}
        self._decoder: LinesDecoder | None = None

    def decode(self, data: bytes, lines: list[bytes] | None) -> DecodedLines | None:
        """Like `LinesDecoder.decode`. Returns None if a line does not fit its type's struct, or for too many types.

        Raises what `msgspec` raises for a line that is not JSON with a type.
        """
        if self._decoder is not None:
            try:
                return self._decoder.decode(data, lines)
            except msgspec.ValidationError:
                pass  # a new type, or a line that does not fit
        new = {line.type for line in _decode_types.decode_lines(data)}.difference(self._structs)
        if len(self._structs) + len(new) > _MOST_TYPES or (self._decoder is not None and not new):
            return None
        structs = self._structs | {type: self._new_struct(type) for type in new}
        if not structs:
            return None  # only blank lines
        decoder = LinesDecoder(Union[tuple(structs.values())], self._dec_hook)  # noqa: UP007
        self._structs, self._decoder = structs, decoder
        try:
            return decoder.decode(data, lines)
        except msgspec.ValidationError:
            return None


class _ByType:
    """Selects the events of some types. The structs of all other types have no fields, so their data is not decoded."""

    def __init__(self, types: frozenset[str], allow_batches: bool) -> None:
        self._types = types
        self._allow_batches = allow_batches
        self._lines = TaggedLines(types, self._new_struct)

    def _new_struct(self, type: str) -> Any:
        new_struct = event_struct if type in self._types else skipped_struct
        return new_struct(type, self._allow_batches)

    def decode(self, data: bytes, lines: list[bytes] | None) -> DecodedLines | None:
        decoded = self._lines.decode(data, lines)
        if decoded is not None or not self._allow_batches:
            return decoded
        return [self.select(event) for event in _any_lines.decode(data, lines)]

    def select(self, event: StoredEvent) -> StoredEvent | _Skipped:
        return event if event.type in self._types else _Skipped(event.batch)


def event_struct(type: str, allow_batches: bool, *fields: tuple[str, Any] | tuple[str, Any, Any]) -> Any:
    """The struct of the events of one type; `fields` replace those of `StoredEvent` by narrower ones."""
    base = StoredEvent if allow_batches else _Single
    # The struct's tag takes the key `type`. The field of that name, whose value is this type by default, must therefore
    # be read from a different key, which no line has.
    type_field = msgspec.field(name="eventfold type", default=type)
    return msgspec.defstruct(
        "StoredEvent",
        [("type", Literal[type], type_field), *fields],
        bases=(base,),
        tag_field="type",
        tag=type,
        frozen=True,
        eq=False,
        kw_only=True,
        omit_defaults=True,
        gc=False,
    )


def skipped_struct(type: str, allow_batches: bool) -> Any:
    """The struct of the placeholders of one type."""
    base = _Skipped if allow_batches else _SkippedSingle
    return msgspec.defstruct("_Skipped", [], bases=(base,), tag_field="type", tag=type, frozen=True, gc=False)


class _Filter:
    """Decodes the events of all types that a query may select, and then checks their tags."""

    def __init__(self, query: Query, allow_batches: bool) -> None:
        self._query = query
        self._events: Selection = (
            _AllEvents(allow_batches) if query.types is None else _by_type(query.types, allow_batches)
        )

    def decode(self, data: bytes, lines: list[bytes] | None) -> DecodedLines | None:
        decoded = self._events.decode(data, lines)
        if decoded is None:
            return None
        return [self.select(line) if isinstance(line, StoredEvent) else line for line in decoded]

    def select(self, event: StoredEvent) -> StoredEvent | _Skipped:
        return event if self._query._matches_type_and_tags(event.type, event.tags) else _Skipped(event.batch)


class _ByTag(_Filter):
    """For a query in which every item has tags: decodes only lines whose text contains the longest tag of an item.

    A line with a backslash is decoded too, since its tags may be written with escapes.
    """

    def __init__(self, query: Query, allow_batches: bool) -> None:
        super().__init__(query, allow_batches)
        # The longest tag is likely to be the rarest.
        self._texts = {msgspec.json.encode(max(item.tags, key=lambda tag: (len(tag), tag))) for item in query.items}
        self._skip = _skip_lines if allow_batches else _skip_singles

    def decode(self, data: bytes, lines: list[bytes] | None) -> DecodedLines:
        decoded = self._skip.decode(data, lines)
        if not self._may_match(data):
            return decoded
        for number, line in enumerate(split_lines(data) if lines is None else lines):
            if self._may_match(line):
                decoded[number] = self.select(decode_events.decode(line))
        return decoded

    def _may_match(self, text: bytes) -> bool:
        return b"\\" in text or any(tag in text for tag in self._texts)


_by_type = lru_cache(maxsize=256)(_ByType)


@lru_cache(maxsize=256)
def selection(query: Query | None, allow_batches: bool) -> Selection:
    """The selection of the events that a query matches; None selects every event.

    A query that matches every event must be given as None.
    """
    if query is None:
        return _AllEvents(allow_batches)
    types = types_alone(query)
    if types is not None:
        return _by_type(types, allow_batches)
    return _ByTag(query, allow_batches) if query._has_tags else _Filter(query, allow_batches)
