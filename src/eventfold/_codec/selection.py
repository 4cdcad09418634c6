"""Decodes the lines of the events that a query selects, and as little as possible of the others.

Each kind of decoder exists twice: for lines that may be in batches, and for single ones. The second raises an error, or
returns None, if a line is in a batch; so nobody has to look for batches in what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from typing import Any, Literal, Protocol, TypeAlias, Union

import msgspec

from .._query import Query, types_alone
from .lines import texts_of
from .stored import StoredEvent

# How many types a selection distinguishes; in a log with more of them, it decodes every line.
_MOST_TYPES = 1000

BatchPlace: TypeAlias = tuple[int, int]


class _Skipped(msgspec.Struct, frozen=True, gc=False):
    """A line whose event is not wanted. It matters only if it is in a batch."""

    matters: BatchPlace | None = msgspec.field(name="batch", default=None)

    @property
    def batch(self) -> BatchPlace | None:
        return self.matters


Found: TypeAlias = list[Any]  # of StoredEvent and _Skipped, one for each line


class _JustType(msgspec.Struct, gc=False):
    type: str


class _SkippedSingle(_Skipped, frozen=True, gc=False):
    """The same, in no batch."""

    matters: None = msgspec.field(name="batch", default=None)


class _SkippedLine(_Skipped, kw_only=True, frozen=True, gc=False):
    """A line of any type that is not wanted; it is checked that it has one."""

    type: str


class _SkippedSingleLine(_SkippedSingle, kw_only=True, frozen=True, gc=False):
    """The same, in no batch."""

    type: str


class _AnyBatch(StoredEvent, frozen=True, eq=False, kw_only=True, omit_defaults=True, gc=False):
    """An event whose `batch` is not a position in a batch: others may use that key for something else."""

    batch: Any = None


class _Single(StoredEvent, frozen=True, eq=False, kw_only=True, omit_defaults=True, gc=False):
    """An event in no batch."""

    batch: None = None


decode_events = msgspec.json.Decoder(StoredEvent)
_decode_any_batch = msgspec.json.Decoder(_AnyBatch).decode
_types = msgspec.json.Decoder(_JustType)


def decode_line(line: bytes) -> StoredEvent:
    """The event of one line. Raises what `msgspec` raises if it is not an event."""
    try:
        return decode_events.decode(line)
    except msgspec.ValidationError:
        return _decode_any_batch(line)


def place_of(batch: Any) -> BatchPlace | None:
    """The position in a batch, if the value of the key `batch` is one."""
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

    def decode(self, data: bytes, lines: list[bytes] | None) -> Found:
        """The objects of the lines in `data`; faster without `lines`, the same lines in a list.

        Raises what `msgspec` raises, also for a line without an object or with several.
        """
        if lines is not None:
            return list(map(self._line.decode, lines))
        # `decode_lines` would accept two objects on one line, and a blank line elsewhere would hide them from a count.
        # In an array, both are errors, and that costs no more than counting. Only a newline and a comma that changed
        # places would be accepted.
        items = data.replace(b"\n", b"\n,")
        found: Found = self._array.decode(b"".join((b"[", memoryview(items)[:-1], b"]")))
        if len(found) != len(items) - len(data):
            raise msgspec.DecodeError("there are more or fewer objects than lines")
        return found


_any_lines = LinesDecoder(StoredEvent)
_single_lines = LinesDecoder(_Single)
_pass_lines = LinesDecoder(_SkippedLine)
_pass_singles = LinesDecoder(_SkippedSingleLine)


class Selection(Protocol):
    """Decodes lines, into events only if these are wanted."""

    def decode(self, data: bytes, lines: list[bytes] | None) -> Found | None:
        """The same as `LinesDecoder.decode`; None for lines that only the decoder for lines in batches can decode."""

    def look(self, event: StoredEvent) -> Any:
        """The event if it is wanted, otherwise a placeholder."""


class Everything:
    """Decodes every event."""

    def __init__(self, batches: bool) -> None:
        self._lines = _any_lines if batches else _single_lines

    def decode(self, data: bytes, lines: list[bytes] | None) -> Found:
        return self._lines.decode(data, lines)

    def look(self, event: StoredEvent) -> StoredEvent:
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

    def decode(self, data: bytes, lines: list[bytes] | None) -> Found | None:
        """The same as `LinesDecoder.decode`; None if a line does not fit its type's struct, or for too many types.

        Raises what `msgspec` raises for a line that is not JSON with a type.
        """
        if self._decoder is not None:
            try:
                return self._decoder.decode(data, lines)
            except msgspec.ValidationError:
                pass  # a new type, or a line that does not fit
        new = {line.type for line in _types.decode_lines(data)}.difference(self._structs)
        if len(self._structs) + len(new) > _MOST_TYPES or (self._decoder is not None and not new):
            return None
        structs = self._structs | {type: self._new_struct(type) for type in new}
        if not structs:
            return []
        decoder = LinesDecoder(Union[tuple(structs.values())], self._dec_hook)  # noqa: UP007
        self._structs, self._decoder = structs, decoder
        try:
            return decoder.decode(data, lines)
        except msgspec.ValidationError:
            return None


class _ByType:
    """Decodes the events of some types; the structs of the types that are not wanted have no fields."""

    def __init__(self, wanted: frozenset[str], batches: bool) -> None:
        self._wanted = wanted
        self._batches = batches
        self._lines = TaggedLines(wanted, self._new_struct)

    def _new_struct(self, type: str) -> Any:
        make = event_struct if type in self._wanted else skipped_struct
        return make(type, self._batches)

    def decode(self, data: bytes, lines: list[bytes] | None) -> Found | None:
        found = self._lines.decode(data, lines)
        if found is not None or not self._batches:
            return found
        return [self.look(event) for event in _any_lines.decode(data, lines)]

    def look(self, event: StoredEvent) -> StoredEvent | _Skipped:
        """The event if it is wanted, otherwise a placeholder."""
        return event if event.type in self._wanted else _Skipped(event.batch)


def event_struct(type: str, batches: bool, *fields: tuple[str, Any] | tuple[str, Any, Any]) -> Any:
    """The struct of the events of one type; `fields` have narrower types than those of any event."""
    base = StoredEvent if batches else _Single
    # The tag takes the key `type`, so the field has a key that no line has; otherwise its value would not be this one.
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


def skipped_struct(type: str, batches: bool) -> Any:
    """The struct of the lines of a type that is not wanted."""
    base = _Skipped if batches else _SkippedSingle
    return msgspec.defstruct("_Skipped", [], bases=(base,), tag_field="type", tag=type, frozen=True, gc=False)


class _Filter:
    """Decodes events whose type may be wanted, and then checks their tags."""

    def __init__(self, query: Query, batches: bool) -> None:
        self._query = query
        self._events: Selection = Everything(batches) if query.types is None else _by_type(query.types, batches)

    def decode(self, data: bytes, lines: list[bytes] | None) -> Found | None:
        found = self._events.decode(data, lines)
        if found is None:
            return None
        return [self.look(line) if isinstance(line, StoredEvent) else line for line in found]

    def look(self, event: StoredEvent) -> StoredEvent | _Skipped:
        return event if self._query.matches_keys(event.type, event.tags) else _Skipped(event.batch)


class _ByTag(_Filter):
    """For a query in which every item has tags: decodes only lines whose text contains one of these.

    A tag may be written with escapes, so a line with a backslash is decoded too.
    """

    def __init__(self, query: Query, batches: bool) -> None:
        super().__init__(query, batches)
        # One tag of each item: the longest, which is likely to be the rarest.
        self._texts = {msgspec.json.encode(max(item.tags, key=lambda tag: (len(tag), tag))) for item in query.items}
        self._pass = _pass_lines if batches else _pass_singles

    def decode(self, data: bytes, lines: list[bytes] | None) -> Found:
        found = self._pass.decode(data, lines)
        if not self._may_be_in(data):
            return found
        for number, line in enumerate(texts_of(data) if lines is None else lines):
            if self._may_be_in(line):
                found[number] = self.look(decode_events.decode(line))
        return found

    def _may_be_in(self, data: bytes) -> bool:
        return b"\\" in data or any(text in data for text in self._texts)


_by_type = lru_cache(maxsize=256)(_ByType)


@lru_cache(maxsize=256)
def selection(query: Query | None, batches: bool) -> Selection:
    """A selection of the events that a query matches, which is not one that matches everything (None: every event)."""
    if query is None:
        return Everything(batches)
    types = types_alone(query)
    if types is not None:
        return _by_type(types, batches)
    return _ByTag(query, batches) if all(item.tags for item in query.items) else _Filter(query, batches)
