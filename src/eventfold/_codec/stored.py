"""The event as its line holds it: what the encoder writes and the decoder reads."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from .._event import Event


class StoredEvent(Event, frozen=True, eq=False, kw_only=True, omit_defaults=True, gc=False):
    """An event as its line holds it: nothing is filled in for it, and it may be line `i` (from 1) of a batch of `n`.

    All fields stand here again because their order is that of the keys in the line.
    """

    type: str  # the Rust crate writes an empty one too
    data: Any
    ts: Annotated[int, msgspec.Meta(ge=0)]
    id: str | None = None
    actor: str | None = None
    meta: Any = None
    tags: tuple[str, ...] = ()
    version: int = 1
    batch: tuple[int, int] | None = None
    worth_a_look = True  # see what stands for the events that a selection leaves out

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
    """What a pickled or deeply copied event is made of again: a place in a batch is of no use to it."""
    if version != 1:
        return StoredEvent(type=type, data=data, ts=ts, id=id, actor=actor, meta=meta, tags=tags, version=version)
    return Event(type, data, ts=ts, id=id, actor=actor, meta=meta, tags=tags)
