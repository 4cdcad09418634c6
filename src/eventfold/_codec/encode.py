"""Encodes an event as a line: compact JSON and a newline, with the keys in the order `type`, `data`, `ts`, `id`,
`actor`, `meta`, `tags`, `version`, `batch`.

The format is that of the Rust crate eventfold 0.2.0, which ignores `tags`, `version` and `batch`.

Promise: `encode_line` returns only lines that read back as the same event, here and in the Rust crate. For any other
event, the error says what is wrong, and where.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import isfinite
from typing import Any

import msgspec

from .._errors import InvalidEventError
from .._event import Event
from .stored import StoredEvent

# serde_json refuses a 128th level of nesting, and the event itself is the first level.
MAX_DEPTH = 127
MIN_INT, MAX_INT = -(2**63), 2**64 - 1


_encode = msgspec.json.Encoder().encode


def encode_line(event: Event, max_size: int, batch: tuple[int, int] | None = None) -> bytes:
    """The event's line with its newline, at most `max_size` bytes.

    Raises `InvalidEventError` for an event that would not read back the same, here or in the Rust crate.
    """
    fault = None if _is_plain(event) else _event_fault(event)
    if fault is None:
        try:
            # The fields of both classes have the order of the keys on the line.
            line = _encode(event if batch is None and type(event) is Event else _stored(event, batch))
        except UnicodeEncodeError:
            fault = _event_fault(event, text=True) or "it contains a lone surrogate"
        except (TypeError, ValueError, RecursionError) as error:
            fault = str(error)
        else:
            if len(line) < max_size:
                return line + b"\n"
            fault = f"its line has {len(line) + 1} bytes, and max_event_size is {max_size}"
    which = "this event" if batch is None else f"event {batch[0]} of the batch of {batch[1]}"
    raise InvalidEventError(f"{which} can't be written: {fault}")


def encode_batch(events: Iterable[Event], max_size: int) -> list[bytes]:
    """The lines of the events of a batch, all of which are in the log or none. Raises `InvalidEventError`."""
    events = list(events)
    count = len(events)
    if count == 1:
        return [encode_line(events[0], max_size)]
    lines = []
    for i, (event, end) in enumerate(zip(events, _batch_ends(count), strict=True), 1):
        try:
            # The same line as that of a `StoredEvent`, whose last key is `batch`, but without creating that.
            line = _encode(event)[:-1] + end if _is_plain(event) else b""
        except UnicodeEncodeError:
            line = b""
        lines.append(line if 0 < len(line) <= max_size else encode_line(event, max_size, (i, count)))
    return lines


def _batch_ends(count: int) -> Sequence[bytes]:
    """The ends of the lines of a batch, from the key `batch` on."""
    return _cached_batch_ends(count) if count <= 1000 else _create_batch_ends(count)


def _create_batch_ends(count: int) -> Sequence[bytes]:
    return [b',"batch":[%d,%d]}\n' % (i, count) for i in range(1, count + 1)]


# Cached, since most programs append batches of only a few sizes.
_cached_batch_ends = lru_cache(maxsize=16)(_create_batch_ends)


def _stored(event: Event, batch: tuple[int, int] | None) -> StoredEvent:
    return StoredEvent(
        type=event.type,
        data=event.data,
        ts=event.ts,
        id=event.id,
        actor=event.actor,
        meta=event.meta,
        tags=event.tags,
        version=event.version if isinstance(event, StoredEvent) else 1,
        batch=batch,
    )


def _is_plain(event: Event) -> bool:
    """A fast check for the usual kind of event, which can only be invalid because of a lone surrogate in a string."""
    if (
        type(event) is not Event
        or type(event.type) is not str
        or not event.type
        or type(event.ts) is not int
        or not 0 <= event.ts <= MAX_INT
        or (event.id is not None and type(event.id) is not str)
        or (event.actor is not None and type(event.actor) is not str)
        or (event.tags != () and not _are_plain(event.tags))
        or (event.meta is not None and not _has_plain_values(event.meta, 2))
    ):
        return False
    return _has_plain_values(event.data, 2)


def _has_plain_values(value: Any, depth: int) -> bool:
    """Whether a value is a dict or a list whose parts need no further check; `depth` is its level in the line."""
    if type(value) is dict:
        for key in value:
            if type(key) is not str:
                return False
        value = value.values()
    elif type(value) is not list:
        return False
    for item in value:
        kind = type(item)
        if kind is int:
            if not MIN_INT <= item <= MAX_INT:
                return False
        elif kind is float:
            if not isfinite(item):
                return False
        elif kind not in _SIMPLE_TYPES and (depth == MAX_DEPTH or not _has_plain_values(item, depth + 1)):
            return False
    return True


def _are_plain(tags: Any) -> bool:
    if type(tags) is not tuple:
        return False
    for tag in tags:  # a generator takes twice as long
        if type(tag) is not str or not tag:
            return False
    return len(tags) == 1 or len(set(tags)) == len(tags)


def _event_fault(event: Event, text: bool = False) -> str | None:
    """What is wrong with an event, and where.

    With `text`, strings are searched for lone surrogates too, which is only necessary if the encoder has failed.
    """
    if not isinstance(event, Event):
        return f"{type(event).__name__} is not an Event"
    if not isinstance(event.type, str) or not event.type:
        return f"type must be a non-empty string, not {event.type!r}"
    if not isinstance(event.ts, int) or isinstance(event.ts, bool) or not 0 <= event.ts <= MAX_INT:
        return f"ts must be whole seconds from 0 to 2^64-1, not {event.ts!r}"
    if not isinstance(event.id, _OPTIONAL_TEXT):
        return f"id must be a string, not {event.id!r}"
    if not isinstance(event.actor, _OPTIONAL_TEXT):
        return f"actor must be a string, not {event.actor!r}"
    if wrong_tags := _tags_fault(event.tags):
        return f"tags: {wrong_tags}"
    if text:
        for name in ("type", "id", "actor"):
            if _has_surrogate(getattr(event, name) or ""):
                return f"{name}: a lone surrogate in {getattr(event, name)!r}"
    if fault := _fault(event.data, 2, text):
        return f"data{fault[0]}: {fault[1]}"
    if event.meta is not None and (fault := _fault(event.meta, 2, text)):
        return f"meta{fault[0]}: {fault[1]}"
    return None


def _tags_fault(tags: Any) -> str | None:
    if not isinstance(tags, tuple):
        return f"they must be a tuple of strings, not {tags!r}"
    for tag in tags:
        if not isinstance(tag, str) or not tag:
            return f"a tag must be a non-empty string, not {tag!r}"
        if _has_surrogate(tag):
            return f"a lone surrogate in {tag!r}"
    if len(set(tags)) < len(tags):
        return f"there are duplicates in {tags!r}"
    return None


_OPTIONAL_TEXT = (str, type(None))
_SIMPLE_TYPES = frozenset({str, bool, type(None)})


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def _fault(value: Any, depth: int, text: bool) -> tuple[str, str] | None:
    """The path of a part of a value that can't be written as JSON, and the reason; None if all can be written.

    `depth` is the level of nesting of the value in the line. A cycle is reported as nesting that is too deep.
    """
    if not isinstance(value, _CONTAINERS):
        return _scalar_fault(value, text)
    if depth > MAX_DEPTH:
        return "", f"nesting is deeper than {MAX_DEPTH} levels, or a cycle"
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                return "", f"the key {key!r} is not a string"
            if text and _has_surrogate(key):
                return "", f"a lone surrogate in the key {key!r}"
            if (type(item) not in _SIMPLE_TYPES or text) and (fault := _fault(item, depth + 1, text)):
                return f".{key}{fault[0]}", fault[1]
    else:
        for index, item in enumerate(value):
            if (type(item) not in _SIMPLE_TYPES or text) and (fault := _fault(item, depth + 1, text)):
                return f"[{index}]{fault[0]}", fault[1]
    return None


_CONTAINERS = (dict, list, tuple)


def _scalar_fault(value: Any, text: bool) -> tuple[str, str] | None:
    if isinstance(value, int):
        return None if MIN_INT <= value <= MAX_INT else ("", f"{value} is outside -2^63 to 2^64-1")
    if isinstance(value, float):
        return None if isfinite(value) else ("", f"{value!r} is not a JSON number")
    if value is None:
        return None
    if isinstance(value, str):
        return ("", f"a lone surrogate in {value!r}") if text and _has_surrogate(value) else None
    return "", f"{type(value).__name__} is not a JSON type"
