"""A slow, literal reading of the lines of a log: one `json.loads` for each line, and the documented rules one by one.

A line is an event if it is a JSON object whose `type` is a string, whose `data` is any JSON value and whose `ts` is an
integer of 0 or more. `id` and `actor` are strings or null, `meta` is any JSON value, `tags` is a list of strings, and
`version` is an integer. `batch` is any JSON value, but only two integers `[i, n]` with i from 1 to n have a meaning.
Other keys are ignored, and so are blank lines. The lines of a batch are next to each other, in order and complete; a
batch that the end of the log cuts short is not part of the log yet.
"""

from __future__ import annotations

import json
from math import isfinite
from typing import Any, NamedTuple

from eventfold import Event

_KEYS = {"type", "data", "ts", "id", "actor", "meta", "tags", "version", "batch"}


class UnsureError(Exception):
    """The rules don't decide whether this line is an event, so a decoder may give either answer."""


class Line(NamedTuple):
    """An event and its offsets; `batch` is its position in its batch."""

    start: int
    end: int
    event: Event
    batch: tuple[int, int] | None


class Reading(NamedTuple):
    """The result of reading: the events, then the error at `fault` if there is one; `head` is where the log ends."""

    lines: list[Line]
    fault: int | None
    head: int


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _value(found: Any) -> Any:
    """Checks a value that was parsed with pairs in place of objects; each part of it must be text or a number."""
    if isinstance(found, tuple):
        return {_value(key): _value(value) for key, value in found}
    if isinstance(found, list):
        return [_value(each) for each in found]
    if isinstance(found, str) and any("\ud800" <= char <= "\udfff" for char in found):
        raise ValueError("no text")
    if isinstance(found, float) and not isfinite(found):
        raise ValueError("out of range")
    return found


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(key: str, value: Any) -> None:
    if key == "type":
        good = isinstance(value, str)
    elif key == "ts":
        good = _is_int(value) and value >= 0
    elif key in ("id", "actor"):
        good = value is None or isinstance(value, str)
    elif key == "tags":
        good = isinstance(value, list) and all(isinstance(tag, str) for tag in value)
    elif key == "version":
        good = _is_int(value)
    else:
        good = True
    if not good:
        raise ValueError(key)


def parse(line: bytes) -> tuple[Event, tuple[int, int] | None]:
    """Returns the event in a line. Raises `ValueError` if it has none, and `UnsureError` if the rules don't decide."""
    try:
        # Bytes that are not UTF-8 become lone surrogates, which are refused wherever they matter.
        text = line.decode("utf-8", "surrogateescape")
        pairs = json.loads(text, parse_constant=_no_constant, object_pairs_hook=tuple)
    except RecursionError:
        raise UnsureError from None
    if line.count(b"[") + line.count(b"{") > 400:
        raise UnsureError  # The greatest depth depends on the stack.
    if not isinstance(pairs, tuple):
        raise ValueError("no object")
    fields: dict[str, Any] = {}
    unsure = False
    for key, found in pairs:
        if key in _KEYS:
            fields[key] = _value(found)
            _check(key, fields[key])
        else:
            try:
                _value([key, found])
            except ValueError:
                unsure = True  # The content of ignored keys is not checked.
    if not {"type", "data", "ts"} <= fields.keys():
        raise ValueError("a key is missing")
    if unsure:
        raise UnsureError
    batch = fields.pop("batch", None)
    fields.pop("version", None)
    fields["tags"] = tuple(fields.pop("tags", ()))
    place = (batch[0], batch[1]) if _is_place(batch) else None
    return Event(fields.pop("type"), fields.pop("data"), **fields), place


def _is_place(batch: Any) -> bool:
    return isinstance(batch, list) and len(batch) == 2 and all(map(_is_int, batch)) and 1 <= batch[0] <= batch[1]


def read(data: bytes, start: int = 0) -> Reading:
    """Returns what an active log with these bytes contains from `start` on. Raises `UnsureError`."""
    lines: list[Line] = []
    pending: list[Line] = []
    head = _head(data)
    at = start
    while at < head:
        end = data.index(b"\n", at) + 1
        if pending or data[at:end].strip():
            try:
                line = Line(at, end, *parse(data[at : end - 1]))
            except ValueError:
                return Reading(lines, at, head)
            expected = None if not pending else (pending[-1].batch[0] + 1, pending[-1].batch[1])
            first = (pending or [line])[0].start
            if line.batch is None:
                broken = bool(pending)
            elif pending:
                broken = line.batch != expected
            else:  # Reading may begin inside a batch, but no log does.
                broken = line.batch[0] > 1 and (not start or bool(lines))
            if broken:
                return Reading(lines, first, head)
            pending.append(line)
            if line.batch is None or line.batch[0] == line.batch[1]:
                lines += pending
                pending = []
        at = end
    return Reading(lines, None, head)


def _head(data: bytes) -> int:
    """Returns where the log ends: after the last newline, or before the batches at the end that are incomplete."""
    end = data.rfind(b"\n") + 1
    if not end:
        return 0
    begin = _begin_of_incomplete_batch(data, end)
    return end if begin is None else _head(data[:begin])


def _begin_of_incomplete_batch(data: bytes, end: int) -> int | None:
    """Returns where the batch begins that the end cuts short; None if there is none."""
    starts = [0, *(at + 1 for at in range(end - 1) if data[at : at + 1] == b"\n")]
    places = []
    for begin, stop in zip(reversed(starts), reversed([*starts[1:], end]), strict=True):
        try:
            batch = parse(data[begin : stop - 1])[1]
        except ValueError:
            batch = None
        places.append(begin)
        if batch is None or (len(places) == 1 and not batch[0] < batch[1]):
            break
        if len(places) == 1:
            index, count = batch
        elif batch != (index - len(places) + 1, count):
            break
        if batch[0] == 1:
            return begin
    return None
