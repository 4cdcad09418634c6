"""The methods of `EventLog` that read events and wait for new ones, mostly with its reader."""

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
from .base import LogBase


class ReadingLog(LogBase):
    """The methods of a log that read it, wait for new events and describe it."""

    def reader(self) -> EventReader:
        """A reader of this log, whose tails and waits end when the log is closed."""
        return self._reader

    def read_from(
        self, offset: int = 0, *, query: Query | None = None, until: int | None = None
    ) -> AsyncIterator[Record]:
        """The events from `offset` up to the head as it is when reading begins. Cancelling it leaves nothing behind.

        Args:
            offset: Where to begin, in bytes of the whole log; a line must begin there.
            query: Which events to yield; None for all.
            until: Where to end, in bytes of the whole log; a line must end there. If it is None or beyond the head,
                reading ends at the head. A batch that continues beyond it is left out completely.

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
        """The events before `offset`, newest first. Cancelling it leaves nothing behind.

        It starts at once and takes little memory, however large the log is.

        Args:
            offset: Where to begin, in bytes of the whole log; a line must end there. None for the current head.
            query: Which events to yield; None for all.

        Raises:
            ValueError: The offset is negative, beyond the head, or not where a line ends.
            CorruptLogError: The log is damaged, or a batch is incomplete; raised after all events that follow it.
            OSError: The log could not be read.
        """
        index = self._index_for(query)
        if index is None or query is None:
            return self._reader.read_back(offset, query=query)
        return read_back(index, self._reader, query, offset)

    def _index_for(self, query: Query | None) -> Index | None:
        """The index, if there is one and it can find the events of a query."""
        if self._writer_or_none is None or query is None or not query._has_tags:
            return None
        return self._writer_or_none._index

    def read_full(self) -> AsyncIterator[Record]:
        """All events up to the head as it is when reading begins: see `read_from`."""
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

        A slice has `events`, `start_offset`, `end_offset`, and `records()`, which returns the events with their
        offsets. Cancelling it leaves nothing behind.

        Args:
            offset: Where to begin, in bytes of the whole log; a line must begin there.
            query: Which events to yield; None for all. Of the lines that can't match, only the form is checked.
            types: Short for a query of these types (empty: no event); can't be combined with a query.
            after: The hash of the line that ends at `offset`, if it is known from an earlier read. If a different line
                ends there now, `CorruptLogError` is raised.

        Raises:
            ValueError: The offset is negative, beyond the head, or not where a line begins.
            CorruptLogError: The log is damaged; raised after all events before the damage.
            OSError: The log could not be read.
        """
        return self._reader.read_slices(offset, query=query, types=types, after=after)

    def tail(self, offset: int | None = None, *, query: Query | None = None) -> AsyncIterator[Record]:
        """The events from `offset` and then each new one, until the log is closed. Cancelling it leaves nothing behind.

        Args:
            offset: Where to begin, in bytes of the whole log; a line must begin there. None for the current head.
            query: Which events to yield; None for all.

        Raises:
            ValueError: The offset is negative, beyond the head, or not where a line begins.
            CorruptLogError: The log is damaged, or is no longer the one that was read.
            OSError: The log could not be read.
        """
        return self._reader.tail(offset, query=query)

    def consumer(self, name: str, *, start: int | None = 0, query: Query | None = None) -> Consumer:
        """Creates a consumer: a named reader whose committed offset is kept on disk.

        Args:
            name: 1 to 128 characters of `A-Z a-z 0-9 . _ -`, not starting with a dot.
            start: Where it begins if nothing is committed yet, in bytes of the whole log; None for the current head.
            query: Which events to yield; None for all. The query is not stored.

        Returns:
            The consumer, to use in `async for`.

        Raises:
            ValueError: The name is not allowed.
            TypeError: `query` is not a `Query`.
        """
        return Consumer(self._reader, name, start=start, query=query)

    async def wait_for_events(self, offset: int, timeout: float | None = None) -> WaitResult:
        """Waits until the head is beyond `offset`. Cancelling it leaves nothing behind.

        Args:
            offset: In bytes of the whole log.
            timeout: In seconds; None to wait without a limit.

        Returns:
            Whether the head is beyond the offset, which is also the truth value, and the offset of the head.

        Raises:
            LogClosedError: The log was closed.
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
        """The size of `app.jsonl` in bytes; 0 if the file does not exist.

        Raises:
            EventfoldError: The log is not kept in files.
            OSError: The size could not be read.
        """
        return await self._reader.active_log_size()

    async def read_line_hash_before(self, offset: int) -> str | None:
        """The hash of the line that ends at `offset` (bytes in the whole log); None at 0.

        Raises:
            ValueError: The offset is negative, beyond the head, or no line ends there.
            CorruptLogError: The log is damaged.
            OSError: The log could not be read.
        """
        return await self._reader.read_line_hash_before(offset)

    async def info(self) -> LogInfo:
        """The log at a glance: its head, its sizes, its views and consumers with their lag, and its writer.

        Returns:
            The information, which is not updated later.

        Raises:
            CorruptLogError: The head is unknown because of damage.
            OSError: The log could not be read.
        """
        return await info(self._reader)

    async def backup(self, dir: str | os.PathLike[str], progress: Callable[[int, int], object] | None = None) -> Head:
        """Copies the log, which may be in use, to a directory that can be opened as a log; an older copy is updated.

        If cancelled, it stops soon and leaves an older copy; call it again to finish the copy.

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
        # This reader copies the snapshots beside the log, even if this process keeps its snapshots elsewhere.
        reader = EventReader._of_source(self._reader._source, self._reader._scope)
        return await backup(reader, dir, progress)
