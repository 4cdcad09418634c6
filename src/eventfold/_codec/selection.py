"""Decodes the lines of some event types only; of the others it looks at no more than it must."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, Literal, TypeAlias, Union

import msgspec

from .stored import StoredEvent

# How many types a selection tells apart; in a log with more of them it decodes every line.
_MOST_TYPES = 1000

BatchPlace: TypeAlias = tuple[int, int]


class _Passed(msgspec.Struct, frozen=True, gc=False):
    """A line whose event is not wanted. All that counts is whether it is in a batch: it is worth a look only then."""

    worth_a_look: BatchPlace | None = msgspec.field(name="batch", default=None)

    @property
    def batch(self) -> BatchPlace | None:
        return self.worth_a_look


Found: TypeAlias = list[Any]  # of StoredEvent and _Passed, one for each line


class _JustType(msgspec.Struct, gc=False):
    type: Annotated[str, msgspec.Meta(min_length=1)]


decode_events = msgspec.json.Decoder(StoredEvent)
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

    def decode_lines(self, data: bytes) -> Found:
        if self._decoder is not None:
            try:
                return self._decoder.decode_lines(data)
            except msgspec.ValidationError:
                pass  # a new type, or a bad line
        new = {line.type for line in _types.decode_lines(data)}.difference(self._structs)
        if len(self._structs) + len(new) > _MOST_TYPES or (self._decoder is not None and not new):
            return [self.look(event) for event in decode_events.decode_lines(data)]
        structs = self._structs | {type: _passed_struct(type) for type in new}
        decoder: Any = msgspec.json.Decoder(Union[tuple(structs.values())]) if structs else decode_events  # noqa: UP007
        self._structs, self._decoder = structs, decoder
        found: Found = decoder.decode_lines(data)
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


selection = lru_cache(maxsize=128)(_Selection)
