"""Folds events into states: one pass over the log can update the states of several views.

Promises: one pass reads and decompresses the log once; each fold gets its own event objects, unless it declares that it
shares them; whenever other tasks can run, `state` is the fold of all events before `position`; a state that a reducer
may have left partly changed is marked as suspect; other tasks can run every few milliseconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from itertools import islice
from operator import length_hint
from time import perf_counter
from types import CoroutineType
from typing import Any, Generic, TypeVar

from ._aio import HOLD
from ._codec.decode import Slice
from ._codec.lines import Lines
from ._errors import CorruptLogError, ReducerError, SchemaError
from ._event import Event, Head, Record
from ._query import Query, types_alone
from ._reader import EventReader

S = TypeVar("S")

# The maximum number of events in a run, which is what is folded between two looks at the clock. Reading the clock takes
# as long as a short reducer. A run is this long only if shorter runs have shown that the reducer is fast.
_LONGEST_RUN = 64


class Pacer:
    """Lets other tasks run when this task has held the event loop for long enough."""

    def __init__(self) -> None:
        self.since = perf_counter()

    async def pause(self) -> None:
        """Lets other tasks run once."""
        await asyncio.sleep(0)
        self.since = perf_counter()

    async def pause_if_due(self) -> None:
        """Lets other tasks run once, if this task has held the event loop for `HOLD` seconds."""
        if perf_counter() - self.since > HOLD:
            await self.pause()


class Fold(Generic[S]):
    """The state of one view in memory, and its reducer.

    `position` is the offset up to which events are folded, with the hash of the line before it, which may be unknown
    (""). `changes` grows whenever the state changes. From an error of the reducer until the next `start`, `suspect` is
    true, and `error` is the `ReducerError`, unless the reducer raised something other than an `Exception`.
    """

    def __init__(
        self,
        name: str,
        reducer: Callable[[S, Event], S],
        state: S,
        query: Query | None,
        *,
        accepts_none: bool,
        shares_events: bool,
    ) -> None:
        self.name = name
        self.query = None if query is None or query._matches_all else query
        self.shares_events = shares_events
        self.state = state
        self.position = Head(0, "")
        self.changes = 0
        self.suspect = False
        self.error: ReducerError | None = None
        self._reducer = reducer
        self._accepts_none = accepts_none
        self._run_length = 1  # the speed of the reducer is not known yet
        self._slice_seconds = HOLD / 2  # how long the last slice took; a guess for the first one

    def start(self, state: S, position: Head) -> None:
        """Continues from a state that no reducer has left partly changed."""
        self.state, self.position, self.suspect, self.error = state, position, False, None
        self.changes += 1

    async def fold(self, slice_: Slice, pacer: Pacer) -> None:
        """Folds a slice that begins at `position`.

        Raises `ReducerError`, or what the reducer raised if that is not an `Exception`. If cancelled in a pause, the
        events before the pause stay folded.
        """
        events: list[Any] = slice_.events
        matches = None
        if self.query is not None and self.query != slice_.query:
            matches = _matcher(self.query)
            events = list(filter(matches, events))
        starts: _StartOffsets | None = None  # rarely needed
        reducer, state, count, done = self._reducer, self.state, len(events), 0
        now = perf_counter()
        # A pause before the slice is cheap. Within the slice, the offset of an event would have to be looked up.
        if count and now - pacer.since + self._slice_seconds > HOLD:
            await pacer.pause()
            now = perf_counter()
        started = now
        while done < count:
            if done and now - pacer.since > HOLD:
                starts = starts or _StartOffsets(slice_, matches)
                if starts.begins_a_line(done):
                    self.state, self.position = state, Head(starts.of(done), "")
                    await pacer.pause()
                now = perf_counter()
            run = events[done : done + self._run_length]
            rest = iter(run)
            try:
                for event in rest:
                    state = reducer(state, event)
            except BaseException as error:
                index = done + len(run) - length_hint(rest) - 1
                self._fail(state, starts or _StartOffsets(slice_, matches), index, done, error)
                raise
            if (state is None and not self._accepts_none) or type(state) is CoroutineType:
                self._fail(state, starts or _StartOffsets(slice_, matches), done + len(run), done, None)
            done += len(run)
            self.changes += len(run)
            before, now = now, perf_counter()
            # The next run is twice as long, if it will probably take less than half of the allowed time.
            self._run_length = min(2 * self._run_length, _LONGEST_RUN) if (now - before) * 4 < HOLD else 1
        self._slice_seconds = now - started
        self.state, self.position = state, Head(slice_.end_offset, slice_.last_line_hash)

    def _fail(self, state: Any, starts: _StartOffsets, index: int, done: int, error: BaseException | None) -> None:
        """Stops before the event that failed. Raises `ReducerError`, unless `error` is not an `Exception`.

        `state` is what the reducer returned for the event before the one at `index`; `done` events were folded before
        this run. Without an `error`, the returned state itself is wrong.
        """
        cause: BaseException | None = error
        if type(state) is CoroutineType:
            state.close()
            cause = TypeError("the reducer returned a coroutine: it must be a plain function, not an async one")
        elif state is None and not self._accepts_none and isinstance(error, Exception | None) and index > done:
            cause = TypeError("the reducer returned None: it must return the state, even if it changed that in place")
        if cause is not error:
            index -= 1  # the reducer returned this state for the previous event
        self.state, self.position, self.suspect = state, Head(starts.of(index), ""), True
        self.changes += index - done
        if isinstance(cause, Exception):
            self.error = ReducerError(self.name, self.position.offset)
            self.error.__cause__ = cause
            raise self.error from cause

    def raise_error(self) -> None:
        """Raises the reducer's error again, if there is one."""
        if self.error is not None:
            raise ReducerError(self.error.view, self.error.offset) from self.error.__cause__


def _matcher(query: Query) -> Callable[[Event], bool]:
    """A function that tells whether a query matches an event. If only types matter, it is faster than the query."""
    types = types_alone(query)
    return query.matches if types is None else lambda event: event.type in types


class _StartOffsets:
    """The start offsets of a slice's events, which are looked up on demand and only in increasing order."""

    def __init__(self, slice_: Slice, matches: Callable[[Event], bool] | None) -> None:
        self._records = self._matching(slice_, matches)
        self._index = self._start = -1
        self._begins_a_line = True

    @staticmethod
    def _matching(slice_: Slice, matches: Callable[[Event], bool] | None) -> Iterator[Record]:
        for record in slice_.records():
            if matches is None or matches(record.event):
                yield record

    def of(self, index: int) -> int:
        """The start offset of an event, which must not come before the previously requested one."""
        for record in islice(self._records, index - self._index):
            self._begins_a_line = record.start_offset != self._start
            self._start = record.start_offset
        self._index = index
        return self._start

    def begins_a_line(self, index: int) -> bool:
        """Whether an event is the first or only one of its line; with the same restriction as `of`."""
        self.of(index)
        return self._begins_a_line


class _FoldGroup:
    """Folds that share the same event objects, and the decoder that produces them."""

    def __init__(self, folds: list[Fold[Any]], reader: EventReader) -> None:
        self.folds = folds
        query = folds[0].query
        for fold in folds[1:]:
            query = None if query is None or fold.query is None else query | fold.query
        self.decoder = reader._decoder(query, exact_offsets=False)

    async def fold(self, slices: Iterator[Slice], pacer: Pacer) -> list[Exception]:
        """Passes the slices to all folds, and removes those whose reducer raises. Returns the errors."""
        errors: list[Exception] = []
        try:
            for slice_ in slices:
                for fold in list(self.folds):
                    try:
                        await fold.fold(slice_, pacer)
                    except ReducerError as error:
                        errors.append(error)
                        self.folds.remove(fold)
                if not self.folds:
                    break
        except (CorruptLogError, SchemaError) as error:
            errors.append(error)
            self.folds.clear()
        return errors


async def fold_together(folds: Sequence[Fold[Any]], reader: EventReader, end: Head) -> list[Exception]:
    """One pass over the log, up to `end`, for folds with the same offset.

    An error of a reducer, or damage, stops only the folds that it affects. Returns these errors when all other folds
    have reached the end. Raises what reading raises.
    """
    groups = _groups(folds, reader)
    errors: list[Exception] = []
    pacer = Pacer()

    async def fold(lines: Lines) -> None:
        for group in groups:
            errors.extend(await group.fold(group.decoder.feed(lines), pacer))
            await pacer.pause_if_due()

    start = folds[0].position
    if not start.line_hash:
        start = Head(start.offset, next((fold.position.line_hash for fold in folds if fold.position.line_hash), ""))
    recent = await reader._recent(start, end)
    if recent is not None:
        await fold(recent)
        return errors
    async with aclosing(reader._lines(start, end.offset)) as blocks:
        async for lines in blocks:
            await fold(lines)
            groups = [group for group in groups if group.folds]
            if not groups:
                break
    return errors


def _groups(folds: Sequence[Fold[Any]], reader: EventReader) -> list[_FoldGroup]:
    """The folds, grouped by the event objects that they share."""
    if len(folds) == 1:
        return [_FoldGroup(list(folds), reader)]
    shared = [fold for fold in folds if fold.shares_events]
    if reader._typed_decoding is None:
        shared_by_query = [shared] if shared else []
    else:
        # An event that does not fit its class must stop only the folds that select events of its type.
        shared_by_query = [
            [fold for fold in shared if fold.query == query] for query in {fold.query for fold in shared}
        ]
    groups = [_FoldGroup([fold], reader) for fold in folds if not fold.shares_events]
    return groups + [_FoldGroup(group, reader) for group in shared_by_query]
