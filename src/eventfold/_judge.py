"""Decides which appends of a batch hold, by the log as it is when their turn comes.

An engine calls this at the one moment at which nothing can come in between: with the turn, the row lock or the expected
sequence in its hand. Pure: no I/O.

Promise: each append is judged as if all before it in the batch were in the log already.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice, repeat
from typing import Any

import msgspec

from ._codec.keys import Keys, keys_of
from ._codec.lines import Lines, last_line_hash
from ._errors import AppendConflict, ConditionalAppendError
from ._event import Head
from ._query import Query
from ._tracing import Span


class Condition(msgspec.Struct, gc=False):
    """No event at or behind the offset `after` may match the query.

    What stands before `checked` has been looked at already; from there on it is judged in the turn. `checked` is None
    until the index was asked.
    """

    query: Query
    after: int
    checked: int | None

    @property
    def start(self) -> int:
        """From where on the events are still to be looked at."""
        return self.after if self.checked is None else self.checked


class UniqueIds(msgspec.Struct, gc=False):
    """The ids of an append, of which none may be in the log. What stands before `checked` was looked at already."""

    ids: tuple[str, ...]
    checked: int = 0


class DuplicateIdError(Exception):
    """Events with these ids are in the log already: tells the writer to look for them."""


class Append(msgspec.Struct, eq=False, gc=False):
    """One call that waits to be committed: its whole lines, and what must hold for them to be written.

    `expected` is the head that it needs, None for any.
    """

    data: bytes
    future: asyncio.Future[Any]
    expected: Head | None = None
    condition: Condition | None = None
    count: int | None = None  # of lines; None for one line, whose result is wanted by itself and not in a list
    unique: UniqueIds | None = None
    span: Span | None = None  # that of the call, where it is traced

    @property
    def events(self) -> int:
        """How many events it appends."""
        return 1 if self.count is None else self.count

    @property
    def is_judged(self) -> bool:
        """Whether what is in the log decides about it, so that nothing may come in between judging and writing."""
        return self.expected is not None or self.condition is not None or self.unique is not None


class Judgement(msgspec.Struct):
    """`outcomes` has the position in `data` of each append's first line, or why it may not be written."""

    outcomes: Sequence[int | Exception]
    data: bytes
    head: Head


def lines_needed_from(appends: Iterable[Append]) -> int | None:
    """The offset from which on `judge` needs the lines of the log; None where no append has a query or unique ids."""
    judged = [append for append in appends if append.condition is not None or append.unique is not None]
    if not judged:
        return None
    checked = [append.condition.start for append in judged if append.condition is not None]
    checked += [append.unique.checked for append in judged if append.unique is not None]
    return min(checked)


def judge(appends: Sequence[Append], head: Head, recent: Iterable[Lines] = ()) -> Judgement:
    """Judges the appends in order, the first by `head`.

    `recent` are the lines from `lines_needed_from(appends)` up to the head. The resulting head assumes offsets that
    count bytes.
    """
    # What `is_judged` says, without a call for each.
    unconditional = [
        append.data
        for append in appends
        if append.expected is None and append.condition is None and append.unique is None
    ]
    if len(unconditional) == len(appends):  # mostly so: nothing to judge, only positions to count
        positions = list(accumulate(map(len, unconditional), initial=0))
        size = positions.pop()
        return Judgement(positions, b"".join(unconditional), _head_after(head, unconditional, size))
    outcomes: list[int | Exception] = []
    accepted: list[bytes] = []
    position = 0
    events = [event for lines in recent for event in keys_of(lines)]
    ids = {keys.id: start for start, keys in events if keys.id is not None}
    matcher = None
    appended: Iterable[list[tuple[int, Keys]]] = repeat([])
    if any(append.condition is not None for append in appends):
        matcher, appended = _Matcher(), _events_of(appends)
        matcher.add(events)
    for append, own in zip(appends, appended, strict=False):
        # First, since whoever appends again what is in the log wants to hear that, and not of a conflict with it.
        unique = append.unique
        if unique is not None and any(ids.get(id, -1) >= unique.checked for id in unique.ids):
            outcomes.append(DuplicateIdError())
            continue
        if append.expected is not None:
            now = _head_after(head, accepted, position)
            if append.expected != now:
                outcomes.append(_conflict(append.expected, now))
                continue
        if append.condition is not None and matcher is not None:
            found = matcher.first_match(append.condition.query, append.condition.start)
            if found is not None:
                outcomes.append(conflict_with(append.condition.after, head.offset + position, found))
                continue
        outcomes.append(position)
        if matcher is not None:
            matcher.add([(head.offset + position + start, keys) for start, keys in own])
        if unique is not None:
            ids.update(dict.fromkeys(unique.ids, sys.maxsize))
        position += len(append.data)
        accepted.append(append.data)
    return Judgement(outcomes, b"".join(accepted), _head_after(head, accepted, position))


def conflict_with(after: int, head: int, offset: int) -> ConditionalAppendError:
    """The error for an event at `offset` that is in the way of a condition on what stands behind `after`."""
    return ConditionalAppendError(AppendConflict(after, head, "", None, offset))


def _events_of(appends: Sequence[Append]) -> Iterator[list[tuple[int, Keys]]]:
    """For each append, where in its data each event stands, with its keys. All are decoded at once: that is faster."""
    events = iter(keys_of(Lines("", 0, b"".join([append.data for append in appends]))))
    begin = 0
    for append in appends:
        yield [(start - begin, keys) for start, keys in islice(events, append.count or append.data.count(b"\n"))]
        begin += len(append.data)


class _Matcher:
    """The newest events by type and by tag, so that a thousand conditions don't look at a thousand events each."""

    def __init__(self) -> None:
        self._all: list[tuple[int, Keys]] = []
        self._by_type: dict[str, list[tuple[int, Keys]]] = {}
        self._by_tag: dict[str, list[tuple[int, Keys]]] = {}

    def add(self, events: Iterable[tuple[int, Keys]]) -> None:
        for event in events:
            keys = event[1]
            self._all.append(event)
            self._by_type.setdefault(keys.type, []).append(event)
            for tag in keys.tags:
                self._by_tag.setdefault(tag, []).append(event)

    def first_match(self, query: Query, offset: int) -> int | None:
        """The offset of the first event at or behind an offset that matches; None if none does."""
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

    def _candidates(self, types: frozenset[str], tags: frozenset[str]) -> list[list[tuple[int, Keys]]]:
        """The fewest events among which all are that an item of a query matches."""
        if tags:
            return [min([self._by_tag.get(tag, []) for tag in tags], key=len)]
        if types:
            return [self._by_type.get(type, []) for type in types]
        return [self._all]


def _head_after(head: Head, accepted: list[bytes], size: int) -> Head:
    if not accepted:
        return head
    return Head(head.offset + size, last_line_hash(accepted[-1]))


def _conflict(expected: Head, head: Head) -> ConditionalAppendError:
    actual_hash = head.line_hash if expected.offset == head.offset else None
    return ConditionalAppendError(AppendConflict(expected.offset, head.offset, expected.line_hash, actual_hash))
