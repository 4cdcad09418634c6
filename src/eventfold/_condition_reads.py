"""Reads the log for conditions that no index answers, before their appends wait for their turn.

In the turn, only what has been appended since must then be checked.

Promise: each condition is answered as if the log were read for it alone, up to the offset that it is given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from typing import NamedTuple

from ._aio import LoopBreaks, UncancellableTask
from ._codec.keys import headers_of
from ._errors import copy_error
from ._event import Head
from ._judge import Matcher, conflict_with
from ._query import Query
from ._reader import EventReader

# The number of bytes of the log that are read for each condition separately.
_LITTLE = 8 * 1024


class _Reading(NamedTuple):
    query: Query
    checked: asyncio.Future[int]


class ConditionReads:
    """The reads of one writer.

    One read answers all callers that wait at the same time for what follows the same offset.
    """

    def __init__(self, reader: EventReader) -> None:
        self._reader = reader
        self._waiting: dict[int, list[_Reading]] = {}
        self._task: UncancellableTask[None] | None = None

    async def read(self, query: Query, after: int) -> int:
        """Returns the offset up to which nothing matches. Raises `ConditionalAppendError`, and what reading raises."""
        head = await self._reader.head()
        if head.offset - after <= _LITTLE:
            # This part is mostly in memory, so that such appends stay in the order of their calls.
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
                _resolve(readings, error)
            for reading in readings:
                if not reading.checked.done():
                    try:
                        _resolve([reading], await self._read_for(reading.query, after, checked))
                    except Exception as error:
                        _resolve([reading], error)
        self._task = None

    async def _read_for(self, query: Query, after: int, checked: int) -> int:
        async with aclosing(self._reader.read_from(after, query=query, until=checked)) as records:  # type: ignore[type-var]
            async for record in records:
                raise conflict_with(after, checked, record.start_offset)
        return checked

    async def _read_for_all(self, readings: Sequence[_Reading], after: int, checked: int) -> None:
        """Resolves all of them, unless a line is not an event."""
        await self._reader.check_range(after, None)
        async with aclosing(self._reader._lines(Head(after, ""), checked)) as blocks:
            pause = LoopBreaks()
            async for lines in blocks:
                events = headers_of(lines)
                if not all([keys.type for _, keys in events]):  # noqa: C419 (a generator takes twice as long)
                    return
                matcher = Matcher()
                matcher.add(0, events)
                for reading in readings:
                    found = matcher.first_match(reading.query, after)
                    if found is not None:
                        _resolve([reading], conflict_with(after, checked, found))
                readings = [reading for reading in readings if not reading.checked.done()]
                if not readings:
                    return
                await pause()
        _resolve(readings, checked)


def _resolve(readings: Iterable[_Reading], outcome: int | Exception) -> None:
    for reading in readings:
        if reading.checked.done():  # It was cancelled, or resolved before.
            continue
        if isinstance(outcome, Exception):
            reading.checked.set_exception(copy_error(outcome))
        else:
            reading.checked.set_result(outcome)
