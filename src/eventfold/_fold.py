"""Folding: a state and the reducer that carries it forward, and one pass over the log for several of them.

Promises: the bytes are read and decompressed once for all, and each fold gets event objects of its own unless it says
that it shares them; whenever other tasks can run, `state` is the fold over the log up to `place`; a state that a
reducer may have left half changed is marked as suspect; other tasks can run every few milliseconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import aclosing
from itertools import islice
from operator import length_hint
from time import perf_counter
from types import CoroutineType
from typing import Any, Generic, TypeVar

from ._codec.decode import Slice
from ._errors import CorruptLogError, ReducerError, SchemaError
from ._event import Event, Head, Record
from ._query import Query, types_alone
from ._reader import EventReader

S = TypeVar("S")

# The maximum number of seconds for which folding holds the event loop, apart from the events of one block.
_HOLD = 0.002
# The most events between two readings of the clock, which cost as much as a short reducer; blocks grow to this size
# only once shorter ones have shown that the reducer is fast.
_LARGEST_BLOCK = 64


class Pacer:
    """Lets other tasks run when this one has held the event loop for long enough."""

    def __init__(self) -> None:
        self.since = perf_counter()

    async def pause(self) -> None:
        """Lets other tasks run once."""
        await asyncio.sleep(0)
        self.since = perf_counter()

    async def pause_if_due(self) -> None:
        """Lets other tasks run once, if it is time."""
        if perf_counter() - self.since > _HOLD:
            await self.pause()


class Fold(Generic[S]):
    """The state of one view in memory, and its reducer.

    `folded` counts the changes of the state. `suspect` is true from the moment the reducer raised until `start`;
    `error` is what it raised, as long as it is suspect.
    """

    def __init__(
        self,
        name: str,
        reducer: Callable[[S, Event], S],
        state: S,
        query: Query | None,
        *,
        takes_none: bool,
        shares_events: bool,
    ) -> None:
        self.name = name
        self.query = None if query is None or query.matches_all else query
        self.shares_events = shares_events
        self.state = state
        self.place = Head(0, "")
        self.folded = 0
        self.suspect = False
        self.error: ReducerError | None = None
        self._reducer = reducer
        self._takes_none = takes_none
        self._block = 1  # the speed of the reducer is not known yet
        self._slice_took = _HOLD / 2  # seconds; not known either

    def start(self, state: S, place: Head) -> None:
        """Continues from a state that is known to be good."""
        self.state, self.place, self.suspect, self.error = state, place, False, None
        self.folded += 1

    async def fold(self, piece: Slice, pacer: Pacer) -> None:
        """Folds a slice that begins at the state's place.

        Raises `ReducerError`, or what the reducer raises if that is not an `Exception`. If cancelled in a pause, the
        state keeps what was folded.
        """
        events: list[Any] = piece.events
        matches = None
        if self.query is not None and self.query != piece.query:
            matches = _matcher(self.query)
            events = list(filter(matches, events))
        starts = _Starts(piece, matches)
        reducer, state, count, done = self._reducer, self.state, len(events), 0
        now = perf_counter()
        # Between two slices a pause costs little; within one, the offset must be looked up.
        if count and now - pacer.since + self._slice_took > _HOLD:
            await pacer.pause()
            now = perf_counter()
        begun = now
        while done < count:
            if done and now - pacer.since > _HOLD:
                if starts.begins_a_line(done):
                    self.state, self.place = state, Head(starts.of(done), "")
                    await pacer.pause()
                now = perf_counter()
            block = events[done : done + self._block]
            rest = iter(block)
            try:
                for event in rest:
                    state = reducer(state, event)
            except BaseException as error:
                self._fail(state, starts, done + len(block) - length_hint(rest) - 1, done, error)
                raise
            if (state is None and not self._takes_none) or type(state) is CoroutineType:
                self._fail(state, starts, done + len(block), done, None)
            done += len(block)
            self.folded += len(block)
            before, now = now, perf_counter()
            # Twice as many events in the next one, if they would take less than half the time.
            self._block = min(2 * self._block, _LARGEST_BLOCK) if (now - before) * 4 < _HOLD else 1
        self._slice_took = now - begun
        self.state, self.place = state, Head(piece.end_offset, piece.last_line_hash)

    def _fail(self, state: Any, starts: _Starts, index: int, done: int, error: BaseException | None) -> None:
        """Stays before the event that failed. Raises `ReducerError`, unless `error` is not an `Exception`."""
        cause: BaseException | None = error
        if type(state) is CoroutineType:
            state.close()
            cause = TypeError("the reducer returned a coroutine: it must be a plain function, not an async one")
        elif state is None and not self._takes_none and isinstance(error, Exception | None) and index > done:
            cause = TypeError("the reducer returned None: it must return the state, even if it changed that in place")
        if cause is not error:
            index -= 1  # the event before is the one for which the reducer returned this
        self.state, self.place, self.suspect = state, Head(starts.of(index), ""), True
        self.folded += index - done
        if isinstance(cause, Exception):
            self.error = ReducerError(self.name, self.place.offset)
            self.error.__cause__ = cause
            raise self.error from cause

    def raise_error(self) -> None:
        """Raises the reducer's error again, if the state is suspect because of one."""
        if self.error is not None:
            raise ReducerError(self.error.view, self.error.offset) from self.error.__cause__


def _matcher(query: Query) -> Callable[[Event], bool]:
    """A function that matches events with a query, faster than the query itself if only types matter."""
    types = types_alone(query)
    return query.matches if types is None else lambda event: event.type in types


class _Starts:
    """The start offsets of a slice's events, looked up in order and on demand."""

    def __init__(self, piece: Slice, matches: Callable[[Event], bool] | None) -> None:
        self._records = self._of_events(piece, matches)
        self._index = self._start = -1
        self._begins_a_line = True

    @staticmethod
    def _of_events(piece: Slice, matches: Callable[[Event], bool] | None) -> Iterator[Record]:
        for record in piece.records():
            if matches is None or matches(record.event):
                yield record

    def of(self, index: int) -> int:
        """The start offset of an event; never ask for one before the last one."""
        for record in islice(self._records, index - self._index):
            self._begins_a_line = record.start_offset != self._start
            self._start = record.start_offset
        self._index = index
        return self._start

    def begins_a_line(self, index: int) -> bool:
        """Whether an event is the only one of its line, or the first; asked for in the same order."""
        self.of(index)
        return self._begins_a_line


class _Stream:
    """Folds that share the same event objects."""

    def __init__(self, folds: list[Fold[Any]], reader: EventReader) -> None:
        self.folds = folds
        query = folds[0].query
        for fold in folds[1:]:
            query = None if query is None or fold.query is None else query | fold.query
        self.decoder = reader._decoder(query, exact_offsets=False)

    async def take(self, slices: Iterator[Slice], pacer: Pacer) -> list[Exception]:
        """Passes the slices to all folds, and drops those whose reducer raises; returns the errors."""
        errors: list[Exception] = []
        try:
            for piece in slices:
                for fold in list(self.folds):
                    try:
                        await fold.fold(piece, pacer)
                    except ReducerError as error:
                        errors.append(error)
                        self.folds.remove(fold)
                if not self.folds:
                    break
        except (CorruptLogError, SchemaError) as error:
            errors.append(error)
            self.folds.clear()
        return errors


async def fold_together(folds: Iterable[Fold[Any]], reader: EventReader, end: int | None = None) -> list[Exception]:
    """One pass over the log, up to `end` (None: the current head), for folds at the same offset.

    Returns the errors of the reducers, and of damage in the log, each once the others are done. Raises what reading
    raises.
    """
    folds = list(folds)
    shared = [fold for fold in folds if fold.shares_events]
    streams = [_Stream([fold], reader) for fold in folds if not fold.shares_events]
    if reader._typing is None:
        groups = [shared] if shared else []
    else:
        # An event that does not fit its class must stop only the folds that want events of its type.
        groups = [[fold for fold in shared if fold.query == query] for query in {fold.query for fold in shared}]
    streams += [_Stream(group, reader) for group in groups]
    errors: list[Exception] = []
    pacer = Pacer()
    start = Head(folds[0].place.offset, next((fold.place.line_hash for fold in folds if fold.place.line_hash), ""))
    async with aclosing(reader._lines(start, end)) as blocks:
        async for lines in blocks:
            for stream in streams:
                errors += await stream.take(stream.decoder.feed(lines), pacer)
                await pacer.pause_if_due()
            streams = [stream for stream in streams if stream.folds]
            if not streams:
                break
    return errors
