"""Looks up keys in the file of the index: all concurrent lookups are made in one call to the thread."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import NamedTuple

from .._aio import UncancellableTask
from .._threads import Thread
from .store import Store, StoredOffsets


class _Lookup(NamedTuple):
    wanted: Collection[tuple[int, int]]
    result: asyncio.Future[dict[tuple[int, int], StoredOffsets]]


class Lookups:
    """The lookups in one file, which find at most `limit` offsets for each key."""

    def __init__(self, store: Store, thread: Thread, limit: int) -> None:
        self._store = store
        self._thread = thread
        self._limit = limit
        self._waiting: list[_Lookup] = []
        self._task: UncancellableTask[None] | None = None

    async def find(self, wanted: Collection[tuple[int, int]]) -> dict[tuple[int, int], StoredOffsets]:
        """Returns, for each pair of a key and a start offset, the stored offsets from the start on, if there are any.

        The result may also include the pairs of concurrent callers. Raises `sqlite3.Error`.
        """
        if not wanted:
            return {}
        lookup = _Lookup(wanted, asyncio.get_running_loop().create_future())
        self._waiting.append(lookup)
        if self._task is None:
            self._task = UncancellableTask(self._run(), "eventfold index reader")
        return await lookup.result

    async def _run(self) -> None:
        while lookups := self._waiting:
            self._waiting = []
            wanted = {pair for lookup in lookups for pair in lookup.wanted}
            try:
                found = await self._thread.call(self._store.find, wanted, self._limit)
            except Exception as error:
                for lookup in lookups:
                    if not lookup.result.done():
                        lookup.result.set_exception(error)
                continue
            for lookup in lookups:
                if not lookup.result.done():
                    lookup.result.set_result(found)
        self._task = None
