"""Checks a batch of appends with the index, right before it is committed: which ids and tags are in the log.

The writer asks for a whole batch at once. What comes in between, and what is in the batch itself, is judged in the
append's turn.

Promises: of the appends with the same id, at most one is in the log, whoever made them, with or without the index file;
an append of what is in the log returns the results of the first one, even if its condition no longer holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from time import perf_counter
from typing import NamedTuple

from ._aio import UncancellableTask
from ._codec.keys import keys_of
from ._errors import InvalidEventError, copy_error
from ._event import AppendResult, Event, Head
from ._index import Answers
from ._judge import Append, Matcher, UniqueIds, conflict_with
from ._query import Query
from ._reader import EventReader

# Bytes of the log that each condition may be looked for in by itself.
_LITTLE = 8 * 1024
# Seconds for which reading holds the event loop at most.
_HOLD = 0.002


class NotIndexedError(Exception):
    """The index has no answer for a condition: the caller must read the log, and try again."""


def ids_of(events: Iterable[Event]) -> UniqueIds | None:
    """The ids of events that are appended together; None if none has one.

    Raises `InvalidEventError` if two have the same.
    """
    ids = [event.id for event in events if isinstance(event.id, str)]
    if len(set(ids)) < len(ids):
        twice = next(id for number, id in enumerate(ids) if id in ids[:number])
        raise InvalidEventError(f"two events of the batch have the id {twice!r}, but ids must be unique in this log")
    return UniqueIds(tuple(ids)) if ids else None


class _Reading(NamedTuple):
    query: Query
    checked: asyncio.Future[int]


class ConditionReads:
    """Reads the log for conditions, so that only the rest must be checked in an append's turn.

    All who ask at the same time for what stands behind the same offset are answered by reading it once.
    """

    def __init__(self, reader: EventReader) -> None:
        self._reader = reader
        self._waiting: dict[int, list[_Reading]] = {}
        self._task: UncancellableTask[None] | None = None

    async def read(self, query: Query, after: int) -> int:
        """The offset up to which it has looked. Raises `ConditionalAppendError`, and what reading raises."""
        head = await self._reader.head()
        if head.offset - after <= _LITTLE:
            # Mostly in memory: appends that need not wait stay in the order of their calls.
            return await self._read_for(query, after, max(head.offset, after))
        reading = _Reading(query, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(after, []).append(reading)
        if self._task is None:
            self._task = UncancellableTask(self._run(), "eventfold condition reader")
        return await reading.checked

    async def _run(self) -> None:
        while self._waiting:
            after, readings = self._waiting.popitem()
            try:
                checked = (await self._reader.head()).offset
                if len(readings) > 1:
                    await self._read_for_all(readings, after, checked)
            except Exception as error:
                _tell(readings, error)
            for reading in readings:
                if not reading.checked.done():
                    try:
                        _tell([reading], await self._read_for(reading.query, after, checked))
                    except Exception as error:
                        _tell([reading], error)
        self._task = None

    async def _read_for(self, query: Query, after: int, checked: int) -> int:
        async with aclosing(self._reader.read_from(after, query=query, until=checked)) as records:  # type: ignore[type-var]
            async for record in records:
                raise conflict_with(after, checked, record.start_offset)
        return checked

    async def _read_for_all(self, readings: Sequence[_Reading], after: int, checked: int) -> None:
        """Tells all of them, unless there is a line that is no event."""
        await self._reader.check_range(after, None)
        async with aclosing(self._reader._lines(Head(after, ""), checked)) as blocks:
            since = perf_counter()
            async for lines in blocks:
                events = keys_of(lines)
                if not all([keys.type for _, keys in events]):  # noqa: C419 (a generator takes twice as long)
                    return
                matcher = Matcher()
                matcher.add(0, events)
                for reading in readings:
                    found = matcher.first_match(reading.query, after)
                    if found is not None:
                        _tell([reading], conflict_with(after, checked, found))
                readings = [reading for reading in readings if not reading.checked.done()]
                if not readings:
                    return
                if perf_counter() - since > _HOLD:
                    await asyncio.sleep(0)
                    since = perf_counter()
        _tell(readings, checked)


def _tell(readings: Iterable[_Reading], outcome: int | Exception) -> None:
    for reading in readings:
        if reading.checked.done():  # cancelled, or told before
            continue
        if isinstance(outcome, Exception):
            reading.checked.set_exception(copy_error(outcome))
        else:
            reading.checked.set_result(outcome)


class Checks:
    """Looks up the appends of a batch in the index."""

    def __init__(self, index: Answers) -> None:
        self._index = index

    async def check(self, appends: Sequence[Append]) -> list[Append]:
        """Resolves the appends that must not be committed, and returns the others.

        For these it records up to where their ids and conditions were checked.
        """
        await self.check_ids(appends)
        await self._check_conditions(appends)
        return [append for append in appends if not append.future.done()]

    async def check_ids(self, appends: Sequence[Append]) -> None:
        """Resolves those of the appends whose ids are in the log."""
        appends = [append for append in appends if append.unique is not None]
        if not appends:
            return
        unique = [(append, append.unique) for append in appends if append.unique is not None]
        try:
            known, results = await self._index.results_of({id for _, ids in unique for id in ids.ids})
        except Exception as error:
            _fail(appends, error)
            return
        for append, ids in unique:
            ids.checked = known
            try:
                found = _results(ids, append.events, results)
            except InvalidEventError as error:
                _fail([append], error)
            else:
                if found is not None and not append.future.done():
                    append.future.set_result(found[0] if append.count is None else found)

    async def results_of(self, ids: UniqueIds | None, count: int) -> list[AppendResult] | None:
        """The results of an append of `count` events, if all are in the log; None if none is.

        Raises `InvalidEventError` if some of them are, and what reading the log raises.
        """
        if ids is None:
            return None
        _, results = await self._index.results_of(ids.ids)
        return _results(ids, count, results)

    async def _check_conditions(self, appends: Sequence[Append]) -> None:
        waiting = [
            append
            for append in appends
            if append.condition is not None and append.condition.checked is None and not append.future.done()
        ]
        if not waiting:
            return
        conditions = [append.condition for append in waiting if append.condition is not None]
        try:
            known, candidates = await self._index.candidates(
                [condition.query for condition in conditions], [condition.after for condition in conditions]
            )
            for append, condition, offsets in zip(waiting, conditions, candidates, strict=True):
                if append.future.done():
                    continue
                if offsets is None:
                    append.future.set_exception(NotIndexedError())
                    continue
                condition.checked = max(known, condition.after)
                if offsets and (found := await self._index.first_match(condition.query, offsets)) is not None:
                    _fail([append], conflict_with(condition.after, known, found))
        except Exception as error:
            _fail(waiting, error)


def _fail(appends: Iterable[Append], error: Exception) -> None:
    for append in appends:
        if not append.future.done():
            append.future.set_exception(copy_error(error))


def _results(unique: UniqueIds, count: int, results: dict[str, AppendResult]) -> list[AppendResult] | None:
    """The results of an append of `count` events, if all are in the log; None if none is."""
    found = [results[id] for id in unique.ids if id in results]
    if found and len(found) < count:
        listed = ", ".join(repr(id) for id in unique.ids if id in results)
        raise InvalidEventError(
            f"{len(found)} of the {count} events of the batch are in the log already (ids {listed}), and the others "
            "are not: nothing was appended; append those separately"
        )
    return found or None
