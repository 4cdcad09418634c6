"""The event as stored on its line: what the encoder writes and the decoder reads."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from .._event import Event


class StoredEvent(Event, frozen=True, eq=False, kw_only=True, omit_defaults=True, gc=False):
    """An event as stored on its line, without default values; `batch` is `(i, n)` for line `i` (from 1) of `n`.

    All fields are repeated here because the order of the fields is the order of the keys on the line.
    """

    type: str  # the Rust crate also writes an empty one
    data: Any
    ts: Annotated[int, msgspec.Meta(ge=0)]
    id: str | None = None
    actor: str | None = None
    meta: Any = None
    tags: tuple[str, ...] = ()
    version: int = 1
    batch: tuple[int, int] | None = None
    relevant = True  # not a field: see `_Skipped.relevant`

    def __reduce__(self) -> tuple[Any, ...]:
        return _event, (self.type, self.data, self.ts, self.id, self.actor, self.meta, self.tags, self.version)


def _event(
    type: str,
    data: Any,
    ts: int,
    id: str | None,
    actor: str | None,
    meta: Any,
    tags: tuple[str, ...],
    version: int,
) -> Event:
    """Creates a pickled or deeply copied event without its position in a batch, which has a meaning only in the log."""
    if version != 1:
        return StoredEvent(type=type, data=data, ts=ts, id=id, actor=actor, meta=meta, tags=tags, version=version)
    return Event(type, data, ts=ts, id=id, actor=actor, meta=meta, tags=tags)
