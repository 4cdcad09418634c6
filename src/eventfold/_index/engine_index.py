"""`EngineIndex`: an index that the log's engine keeps, and writes together with the events.

Events from before the index was created are missing in it, and so are those of writers that do not use it. The engine
knows the offset up to which the index is complete, and each lookup first adds what is missing.

Promise: an answer has every event up to the head at the moment of the lookup.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import suppress

from .._engine import EngineKeys
from .._errors import EventfoldError, LogClosedError
from .._logging import WARNING, log_event
from .._reader import EventReader
from .index import MAX_CANDIDATES, Index
from .store import StoredOffsets


class EngineIndex(Index):
    """The index of one log in its engine, for one event loop. Open it with `open`; `reader` reads the log."""

    def __init__(self, keys: EngineKeys, reader: EventReader) -> None:
        super().__init__(reader)
        self._keys = keys
        self._extending = asyncio.Lock()
        self._opening: asyncio.Task[None] | None = None

    @classmethod
    def open(cls, keys: EngineKeys, reader: EventReader) -> EngineIndex:
        """Opens the index, and starts to add what is missing in the background."""
        index = cls(keys, reader)
        index._opening = asyncio.create_task(index._complete(), name="eventfold index")
        return index

    async def _complete(self) -> None:
        try:
            await self._find([])
        except (OSError, EventfoldError) as error:
            if not isinstance(error, LogClosedError):
                log_event(
                    WARNING,
                    "index.follow_failed",
                    "the index %(path)s can't follow the log: %(error)s",
                    path=self._reader._source.location,
                    error=error,
                )

    async def _find(self, wanted: Collection[tuple[int, int]]) -> tuple[int, dict[tuple[int, int], StoredOffsets]]:
        pairs = list(wanted)
        known, head, found = await self._keys.find(pairs, MAX_CANDIDATES + 1)
        while known < head:
            async with self._extending:  # the first of several concurrent lookups does the work for all of them
                await self._keys.extend(head)
            known, _, found = await self._keys.find(pairs, MAX_CANDIDATES + 1)
        return known, {
            pair: StoredOffsets(offsets[:MAX_CANDIDATES], len(offsets) <= MAX_CANDIDATES)
            for pair, offsets in zip(pairs, found, strict=True)
            if offsets
        }

    async def aclose(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])

    def abandon(self) -> None:
        if self._opening is not None:
            with suppress(RuntimeError):  # the event loop is closed
                self._opening.cancel()
