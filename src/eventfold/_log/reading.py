"""The methods of `EventLog` that read and wait: those of its reader."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection

from .._backup import backup
from .._codec.decode import Slice
from .._consumer import Consumer
from .._event import Head, Record
from .._index import Index, read_back, read_from
from .._info import LogInfo, info
from .._query import Query
from .._reader import EventReader, WaitResult
from .parts import LogParts


class ReadingLog(LogParts):
    """The methods of a log that read it, wait for it and describe it."""

    def reader(self) -> EventReader:
        """A reader of this log, whose tails and waits end when the log is closed."""
        return self._reader

    def read_from(
        self, offset: int = 0, *, query: Query | None = None, until: int | None = None
    ) -> AsyncIterator[Record]:
        """The events from `offset` up to the head as it is when reading begins.

        Args:
            offset: Where to begin, in bytes of the whole log; a line must begin there.
            query: Which events to give; None for all.
            until: Where to end, in bytes of the whole log; a line must end there. Beyond the head, or None: the head.

        Raises:
            ValueError: The offset is negative, beyond the head, or not where a line begins; `until` is before it, or
                inside a line.
            CorruptLogError: The log is damaged; raised after all events before the damage.
            OSError: The log could not be read.
        """
        index = self._index_for(query)
        if index is None or query is None:
            return self._reader.read_from(offset, query=query, until=until)
        return read_from(index, self._reader, query, offset, until)

    def read_back(self, offset: int | None = None, *, query: Query | None = None) -> AsyncIterator[Record]:
        """The events before `offset`, newest first; it starts at once, however large the log is.

        Args:
            offset: Where to begin, in bytes of the whole log; a line must end there. None for the current head.
            query: Which events to give; None for all.

        Raises:
            ValueError: The offset is negative, beyond the head, or not where a line ends.
            CorruptLogError: The log is damaged; raised after all events that follow the damage.
            OSError: The log could not be read.
        """
        index = self._index_for(query)
        if index is None or query is None:
            return self._reader.read_back(offset, query=query)
        return read_back(index, self._reader, query, offset)

    def _index_for(self, query: Query | None) -> Index | None:
        """The index, if the log has one that can find the events of a query."""
        if self._writer_or_none is None or query is None or not query.has_tags:
            return None
        return self._writer_or_none._index

    def read_full(self) -> AsyncIterator[Record]:
        """All events up to the head as it is when reading begins; raises what `read_from` does."""
        return self._reader.read_full()

    def read_slices(
        self,
        offset: int = 0,
        *,
        query: Query | None = None,
        types: Collection[str] | None = None,
        after: str = "",
    ) -> AsyncGenerator[Slice, None]:
        """The same events as `read_from`, a few hundred at a time and several times as fast.

        Args:
            offset: Where to begin, in bytes of the whole log; a line must begin there.
            query: Which events to yield; None for all. Lines that can't match are checked only for their form.
            types: Short for a query of these types (empty: no event).
            after: The hash of the line that ended at `offset` when it was read, if known: a different log in its place
                raises `CorruptLogError`.

        Raises:
            ValueError: The offset is negative, beyond the head, or not where a line begins.
            CorruptLogError: The log is damaged; raised after all events before the damage.
            OSError: The log could not be read.
        """
        return self._reader.read_slices(offset, query=query, types=types, after=after)

    def tail(self, offset: int | None = None, *, query: Query | None = None) -> AsyncIterator[Record]:
        """The events from `offset`, then each new one, until the log is closed. Cancelling it leaves nothing behind.

        Args:
            offset: Where to begin, in bytes of the whole log; None for the current head.
            query: Which events to give; None for all.

        Raises:
            ValueError: The offset is negative, beyond the head, or not where a line begins.
            CorruptLogError: The log is damaged, or no longer the one that was read.
            OSError: The log could not be read.
        """
        return self._reader.tail(offset, query=query)

    def consumer(self, name: str, *, start: int | None = 0, query: Query | None = None) -> Consumer:
        """A named reader whose committed offset is kept on disk.

        Args:
            name: 1 to 128 characters of `A-Z a-z 0-9 . _ -`, not starting with a dot.
            start: Where it begins if nothing is committed yet, in bytes of the whole log; None for the current head.
            query: Which events to yield; None for all. It is not kept on disk.

        Raises:
            ValueError: The name is not allowed.
        """
        return Consumer(self._reader, name, start=start, query=query)

    async def wait_for_events(self, offset: int, timeout: float | None = None) -> WaitResult:
        """Waits until the head is beyond `offset`. Cancelling it leaves nothing behind.

        Args:
            offset: In bytes of the whole log.
            timeout: In seconds; None to wait for as long as it takes.

        Returns:
            Whether there are new events, which is also its truth value, and the head's offset.

        Raises:
            LogClosedError: The log was closed meanwhile.
            ValueError: The offset is negative.
            CorruptLogError: The log is damaged.
            OSError: The log could not be read.
        """
        return await self._reader.wait_for_events(offset, timeout)

    async def has_new_events(self, offset: int) -> bool:
        """Whether there are events at or after `offset` (bytes in the whole log).

        Raises:
            ValueError: The offset is negative or beyond the head.
            CorruptLogError: The log is damaged.
            OSError: The log could not be read.
        """
        return await self._reader.has_new_events(offset)

    async def active_log_size(self) -> int:
        """The size of `app.jsonl` in bytes; 0 if there is none. Raises `OSError`."""
        return await self._reader.active_log_size()

    async def read_line_hash_before(self, offset: int) -> str | None:
        """The hash of the line that ends at `offset` (bytes in the whole log); None at 0.

        Raises:
            ValueError: The offset is negative, beyond the head, or not where a line begins.
            CorruptLogError: The log is damaged.
            OSError: The log could not be read.
        """
        return await self._reader.read_line_hash_before(offset)

    async def info(self) -> LogInfo:
        """The log at a glance: head, sizes, views and consumers with their lag, who holds the lock.

        Raises:
            CorruptLogError: The head is unknown because of damage.
            OSError: The log could not be read.
        """
        return await info(self._reader)

    async def backup(self, dir: str | os.PathLike[str], progress: Callable[[int, int], object] | None = None) -> Head:
        """Copies the log while it is in use, so that the copy opens at once; an older copy is brought up to date.

        If cancelled, it stops soon, and leaves what was there, or a copy of a part of the log; copy again to finish it.

        Args:
            dir: The directory of the copy: a new one, an empty one, or an older copy of this log.
            progress: Called repeatedly with the number of bytes copied so far and in total.

        Returns:
            The head of the copy.

        Raises:
            EventfoldError: The log is not kept in files, or `dir` contains something other than an older copy of it.
            LogLockedError: The copy is open for writing.
            CorruptLogError: The log or the copy is damaged.
            OSError: A file could not be read or written.
        """
        # With the snapshots beside the log, wherever this process keeps its own.
        reader = EventReader._of_source(self._reader._source, self._reader._scope)
        return await backup(reader, dir, progress)
