"""Decides which appends of a group are accepted, by the log as it is when their turn comes.

An engine calls this at the moment when nothing can come in between: while it holds the turn, the row lock or the
expected sequence. Pure: no I/O.

Promise: each append is judged as if all accepted ones before it in the group were in the log already.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import msgspec

from ._codec.keys import Header, headers_of
from ._codec.lines import Lines, last_line_hash, split_lines
from ._errors import AppendConflict, ConditionalAppendError
from ._event import Event, Head
from ._query import Query
from ._tracing import Span


class Condition(msgspec.Struct, gc=False):
    """No event at or after the offset `after` may match the query.

    What is before `checked` has been checked already; the rest is judged in the turn. `checked` is None until the index
    was asked. `events` are the events to append, so that their lines need not be decoded.
    """

    query: Query
    after: int
    checked: int | None
    events: Sequence[Event]

    @property
    def start(self) -> int:
        """The offset from which events must still be checked."""
        return self.after if self.checked is None else self.checked


class UniqueIds(msgspec.Struct, gc=False):
    """The ids of an append, none of which may be in the log. What is before `checked` has been checked already."""

    ids: tuple[str, ...]
    checked: int = 0


class DuplicateIdError(Exception):
    """Events with these ids are in the log already: the writer must look them up."""


class Requirements(msgspec.Struct, gc=False):
    """What an append requires of the log's content. Nothing else may be written between judging and writing it.

    `expected` is the head that it requires; None for any head.
    """

    expected: Head | None = None
    condition: Condition | None = None
    unique: UniqueIds | None = None


class Append(msgspec.Struct, eq=False, gc=False):
    """One call that waits to be committed: its whole lines, and what must hold for them to be written.

    The result of the future is an `AppendResult` for each of the `lines` or, without `lines`, for the only line.
    """

    data: bytes
    future: asyncio.Future[Any]
    requirements: Requirements | None = None
    lines: Sequence[bytes] | None = None  # the same as `data`, one by one
    span: Span | None = None  # the call's span, if it is traced

    @property
    def events(self) -> int:
        """How many events it appends."""
        return 1 if self.lines is None else len(self.lines)


class Judgement(msgspec.Struct):
    """`outcomes` has the position in `data` of each append's first line, or why it may not be written."""

    outcomes: list[int | Exception]
    data: bytes
    head: Head


def any_required(appends: Iterable[Append]) -> bool:
    """Whether any of the appends requires something of the log's content: usually none does."""
    for append in appends:  # noqa: SIM110 (a generator takes four times as long)
        if append.requirements is not None:
            return True
    return False


def lines_needed_from(appends: Iterable[Append]) -> int | None:
    """The offset from which `judge` needs the lines of the log; None if no append has a query or unique ids."""
    if not any_required(appends):
        return None
    required = [append.requirements for append in appends if append.requirements is not None]
    checked = [needed.condition.start for needed in required if needed.condition is not None]
    checked += [needed.unique.checked for needed in required if needed.unique is not None]
    return min(checked, default=None)


def accept_all(appends: Sequence[Append], head: Head) -> Judgement:
    """What `judge` returns for appends that require nothing: there are only positions to count."""
    positions: list[int | Exception]
    if len(appends) == 1:  # mostly, in a program that awaits each append
        data, positions = appends[0].data, [0]
    else:
        accepted = [append.data for append in appends]
        data = b"".join(accepted)
        positions = list(accumulate(map(len, accepted), initial=0))
        positions.pop()  # the end of the last one
    return Judgement(positions, data, Head(head.offset + len(data), last_line_hash(data)) if data else head)


def judge(appends: Sequence[Append], head: Head, recent: Iterable[Lines] = ()) -> Judgement:
    """Judges the appends in order, the first by `head`.

    `recent` are the lines from `lines_needed_from(appends)` up to the head. The resulting head assumes offsets that
    count bytes.
    """
    if not any_required(appends):
        return accept_all(appends, head)
    outcomes: list[int | Exception] = []
    accepted: list[bytes] = []
    position = 0
    events = [event for lines in recent for event in headers_of(lines)]
    ids = {keys.id: start for start, keys in events if keys.id is not None}
    matcher = None
    if any([_required(append).condition is not None for append in appends]):  # noqa: C419 (a generator takes longer)
        matcher = Matcher()
        matcher.add(0, events)
    for append in appends:
        # First, since a repeated append must be reported as a duplicate, not as a conflict with itself.
        required = _required(append)
        unique, condition = required.unique, required.condition
        if unique is not None and any([ids.get(id, -1) >= unique.checked for id in unique.ids]):  # noqa: C419
            outcomes.append(DuplicateIdError())
            continue
        if required.expected is not None:
            now = _head_after(head, accepted, position)
            if required.expected != now:
                outcomes.append(_conflict(required.expected, now))
                continue
        if condition is not None and matcher is not None:
            found = matcher.first_match(condition.query, condition.start)
            if found is not None:
                outcomes.append(conflict_with(condition.after, head.offset + position, found))
                continue
        outcomes.append(position)
        if matcher is not None:
            matcher.add(head.offset + position, _events_of(append, condition))
        if unique is not None:
            ids.update(dict.fromkeys(unique.ids, sys.maxsize))
        if append.data:  # otherwise the head would get the hash of no line
            position += len(append.data)
            accepted.append(append.data)
    return Judgement(outcomes, b"".join(accepted), _head_after(head, accepted, position))


def conflict_with(after: int, head: int, offset: int) -> ConditionalAppendError:
    """The error for an event at `offset` that conflicts with a condition on what follows `after`."""
    return ConditionalAppendError(AppendConflict(after, head, "", None, offset))


_NOTHING = Requirements()


def _required(append: Append) -> Requirements:
    return append.requirements or _NOTHING


def _events_of(append: Append, condition: Condition | None) -> Iterable[tuple[int, Event | Header]]:
    """The events of an append, or their headers, each with its position in the append's data."""
    if condition is None:
        return headers_of(Lines("", 0, append.data))
    events = condition.events
    if len(events) == 1:
        return [(0, events[0])]
    return zip(accumulate(map(len, split_lines(append.data)), initial=0), events, strict=False)


class Matcher:
    """The newest events by type and by tag, so that a thousand conditions don't check a thousand events each."""

    def __init__(self) -> None:
        self._all: list[tuple[int, Event | Header]] = []
        self._by_tag: dict[str, list[tuple[int, Event | Header]]] = {}
        # Contains only the first `_typed` events until it is needed: few conditions have a type without a tag.
        self._by_type: dict[str, list[tuple[int, Event | Header]]] = {}
        self._typed = 0

    def add(self, offset: int, events: Iterable[tuple[int, Event | Header]]) -> None:
        """Adds events at positions relative to `offset`. They must come after all events that were added before."""
        for start, keys in events:
            event = (offset + start, keys)
            self._all.append(event)
            for tag in keys.tags:
                if tag in self._by_tag:
                    self._by_tag[tag].append(event)
                else:
                    self._by_tag[tag] = [event]

    def first_match(self, query: Query, offset: int) -> int | None:
        """The offset of the first event at or after an offset that matches; None if none does."""
        first = None
        for types, tags in query.items:
            for candidates in self._candidates(types, tags):
                for start, keys in candidates:
                    if (
                        start >= offset
                        and (first is None or start < first)
                        and (not types or keys.type in types)
                        and tags.issubset(keys.tags)
                    ):
                        first = start
        return first

    def _candidates(self, types: frozenset[str], tags: frozenset[str]) -> Iterable[list[tuple[int, Event | Header]]]:
        """The smallest lists of events that include all that an item of a query matches."""
        if tags:
            for tag in tags:
                if tag not in self._by_tag:  # the usual case
                    return ()
            return (min([self._by_tag[tag] for tag in tags], key=len),)
        if types:
            for event in self._all[self._typed :]:
                self._by_type.setdefault(event[1].type, []).append(event)
            self._typed = len(self._all)
            return [self._by_type.get(type, []) for type in types]
        return (self._all,)


def _head_after(head: Head, accepted: list[bytes], size: int) -> Head:
    if not accepted:
        return head
    return Head(head.offset + size, last_line_hash(accepted[-1]))


def _conflict(expected: Head, head: Head) -> ConditionalAppendError:
    actual_hash = head.line_hash if expected.offset == head.offset else None
    return ConditionalAppendError(AppendConflict(expected.offset, head.offset, expected.line_hash, actual_hash))
