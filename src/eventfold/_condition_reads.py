"""Checks conditions without an index: reads the log before the append enters the queue.

When the append is judged, only the events that were appended after this read must be checked.

Promise: each condition gets the same answer as if the log were read for it alone, up to the offset that is returned.
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

# Up to this number of bytes, the log is read for each condition separately.
_READ_SEPARATELY = 8 * 1024


class _PendingRead(NamedTuple):
    query: Query
    checked: asyncio.Future[int]


class ConditionReads:
    """The reads of one writer. Concurrent conditions on the events after the same offset share one read."""

    def __init__(self, reader: EventReader) -> None:
        self._reader = reader
        self._pending: dict[int, list[_PendingRead]] = {}
        self._task: UncancellableTask[None] | None = None

    async def read(self, query: Query, after: int) -> int:
        """Returns the offset up to which no event matches. Raises `ConditionalAppendError`, and what reading raises."""
        head = await self._reader.head()
        if head.offset - after <= _READ_SEPARATELY:
            # Usually, these lines are in memory. Then reading does not wait, and appends keep the order of their calls.
            return await self._read_for(query, after, max(head.offset, after))
        pending = _PendingRead(query, asyncio.get_running_loop().create_future())
        self._pending.setdefault(after, []).append(pending)
        if self._task is None:
            self._task = UncancellableTask(self._run(), "eventfold condition reader")
        return await pending.checked

    async def _run(self) -> None:
        while self._pending:
            after, reads = self._pending.popitem()
            try:
                checked = (await self._reader.head()).offset
                if len(reads) > 1:
                    await self._read_for_all(reads, after, checked)
            except Exception as error:
                _resolve(reads, error)
            for read in reads:
                if not read.checked.done():
                    try:
                        _resolve([read], await self._read_for(read.query, after, checked))
                    except Exception as error:
                        _resolve([read], error)
        self._task = None

    async def _read_for(self, query: Query, after: int, checked: int) -> int:
        async with aclosing(self._reader.read_from(after, query=query, until=checked)) as records:  # type: ignore[type-var]
            async for record in records:
                raise conflict_with(after, checked, record.start_offset)
        return checked

    async def _read_for_all(self, reads: Sequence[_PendingRead], after: int, checked: int) -> None:
        """Resolves the reads; if a line is not an event, only those that conflict with an event before that line."""
        await self._reader._check_range(after, None)
        async with aclosing(self._reader._lines(Head(after, ""), checked)) as blocks:
            pause = LoopBreaks()
            async for lines in blocks:
                events = headers_of(lines)
                if not all([header.type for _, header in events]):  # noqa: C419 (a generator takes twice as long)
                    return
                matcher = Matcher()
                matcher.add(0, events)
                for read in reads:
                    found = matcher.first_match(read.query, after)
                    if found is not None:
                        _resolve([read], conflict_with(after, checked, found))
                reads = [read for read in reads if not read.checked.done()]
                if not reads:
                    return
                await pause()
        _resolve(reads, checked)


def _resolve(reads: Iterable[_PendingRead], outcome: int | Exception) -> None:
    for read in reads:
        if read.checked.done():  # it was cancelled, or resolved before
            continue
        if isinstance(outcome, Exception):
            read.checked.set_exception(copy_error(outcome))
        else:
            read.checked.set_result(outcome)
