"""The values that everything else handles: events, records of them in the log, heads, results of appends.

Promise: they are immutable, and do no I/O.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import msgspec
import xxhash


def line_hash(line: bytes) -> str:
    """The xxh64 (seed 0, 16 hex digits) of a line without its newline; a newline at the end is ignored."""
    return xxhash.xxh64_hexdigest(line.removesuffix(b"\n"))


class Head(NamedTuple):
    """The offset (bytes) after the log's last line, with that line's hash; `(0, "")` for an empty log."""

    offset: int
    line_hash: str


class AppendResult(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Where an event's line is in the whole log (bytes), and its hash.

    `duplicate` is true if nothing was appended because an event with the same id was in the log: this is where it is.
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
    """The two fields of `Event` that may be given by position."""

    type: str
    # Not `dict`: with that as the default, an empty dict would be left out of the line.
    data: Any = msgspec.field(default_factory=_no_data)


class Event(_TypeAndData, frozen=True, eq=False, kw_only=True, omit_defaults=True, gc=False):
    """Something that happened: an immutable record, compared by value.

    `type` says what kind of event it is; `data` and `meta` are any JSON values; `ts` is in whole seconds since the Unix
    epoch, now if not given. `tags` are strings by which the event can be found and conditions can be stated, such as
    `order:7`. The values are checked when the event is appended.
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
    """An event in the log; its offsets are bytes in the whole log."""

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
    """One of several events of a single line, but not the last one, so its line is not finished yet."""
