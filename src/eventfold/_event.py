"""The basic values: events, their records in the log, heads, and the results of appends.

Promise: they are immutable, and do no I/O.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import msgspec
import xxhash


def line_hash(line: bytes) -> str:
    """The hash of a line: the xxh64 (seed 0, 16 hex digits) of its bytes, without a newline at the end."""
    return xxhash.xxh64_hexdigest(line.removesuffix(b"\n"))


class Head(NamedTuple):
    """The end of a log: the offset after its last line, in bytes, and that line's hash; `(0, "")` for an empty log."""

    offset: int
    line_hash: str


class AppendResult(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """The result of an append.

    Attributes:
        start_offset: Where the event's line begins, in bytes of the whole log.
        end_offset: Where the event's line ends.
        line_hash: The hash of the line.
        duplicate: Whether nothing was appended, because an event with the same id was in the log already. Then the
            other fields are those of that event.
    """

    start_offset: int
    end_offset: int
    line_hash: str
    duplicate: bool = False


def _now() -> int:
    return int(time.time())


def _no_data() -> dict[str, Any]:
    return {}


class _TypeAndData(msgspec.Struct, frozen=True, eq=False, gc=False):
    """The fields of `Event` that may be positional arguments."""

    type: str
    # Not `default_factory=dict`, with which msgspec would omit an empty dict from the line.
    data: Any = msgspec.field(default_factory=_no_data)


class Event(_TypeAndData, frozen=True, eq=False, kw_only=True, omit_defaults=True, gc=False):
    """Something that happened: an immutable record, compared by value. The values are checked when it is appended.

    Args:
        type: The kind of event, such as `"order_placed"`.
        data: Any JSON value.
        ts: The time, in whole seconds since the Unix epoch; the current time if not given.
        id: A unique id, if the event needs one.
        actor: Who or what caused the event.
        meta: Any JSON value, for details that are not part of `data`.
        tags: Strings such as `"order:7"`, by which the event can be found and conditions can be stated.
    """

    ts: int = msgspec.field(default_factory=_now)
    id: str | None = None
    actor: str | None = None
    meta: Any = None
    tags: tuple[str, ...] = ()

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
            and self.tags == other.tags
        )

    def __repr__(self) -> str:
        options = "".join(
            f", {name}={value!r}"
            for name, value in (
                ("id", self.id),
                ("actor", self.actor),
                ("meta", self.meta),
                ("tags", self.tags or None),
            )
            if value is not None
        )
        return f"Event({self.type!r}, {self.data!r}, ts={self.ts!r}{options})"


class Record(msgspec.Struct, frozen=True, gc=False):
    """An event in the log.

    Attributes:
        event: The event.
        start_offset: Where the event's line begins, in bytes of the whole log.
        end_offset: Where the event's line ends.
    """

    event: Event
    start_offset: int
    end_offset: int
    _line: bytes  # with its newline

    @property
    def line_hash(self) -> str:
        """The hash of the event's line, calculated on demand."""
        return line_hash(self._line)

    def __repr__(self) -> str:
        return f"Record({self.event!r}, start_offset={self.start_offset}, end_offset={self.end_offset})"


class PartialRecord(Record, frozen=True, gc=False):
    """One of several events into which a line was converted, but not the last one: later ones have the same offsets."""
