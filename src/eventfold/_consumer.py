"""`Consumer`: a named reader whose offset in the log is kept on disk.

Its file, `consumers/NAME.json`, contains the `offset` after the last committed record and the `hash` of that record's
line. Each record is yielded at least once: a record that was not committed is yielded again after a restart.

Promises: a commit is on disk when it returns, and the committed offset never decreases; a committed offset that does
not belong to this log, because one of them was restored from a backup, is an error.
"""

from __future__ import annotations

import asyncio
import errno
import weakref
from collections.abc import AsyncIterator
from contextlib import aclosing

import msgspec

from . import _tracing
from ._documents import DocumentLock, LockingDocuments, check_name
from ._engine import Paths
from ._errors import CorruptLogError, EventfoldError, LogClosedError
from ._event import PartialRecord, Record
from ._logging import INFO, log_event
from ._query import Query, query_of
from ._reader import EventReader

# Seconds between two attempts to lock a name that another process holds.
TAKE_OVER_INTERVAL = 0.1


class CommittedOffset(msgspec.Struct):
    """The content of a consumer's file."""

    offset: int
    hash: str


class Checkpoint:
    """A consumer's committed offset. It is always read from the file, since another process may have changed it."""

    def __init__(self, reader: EventReader, name: str, start: int | None, query: Query | None) -> None:
        self.reader = reader
        self.name = name
        self.start = start
        self.query = query_of(query, None)
        self.committed: int | None = None  # what was last read or written; the file may have changed since
        check_name("consumer", name)
        self._path = reader._documents.location("consumer", name)
        self._verified = b""  # the content of the file that is known to belong to this log

    async def commit(self, record: Record) -> None:
        async with await self._lock():
            committed = await self.last_commit()
            end, line_hash = record.end_offset, ""
            if isinstance(record, PartialRecord):
                # The later events of the same line are not processed yet, so only what precedes the line is committed.
                end = record.start_offset
                if committed is not None and end <= committed <= record.end_offset:
                    return
                if not end:
                    return
                line_hash = await self.reader.read_line_hash_before(end) or ""
            if committed is not None and end < committed:
                raise ValueError(
                    f"consumer {self.name!r} has committed up to offset {committed}, and can't go back to {end}"
                )
            if end != committed:
                data = msgspec.json.encode(CommittedOffset(end, line_hash or record.line_hash))
                # Even if cancelled, this ends before the lock is released.
                await self.reader._documents.store("consumer", self.name, data)
                self.committed, self._verified = end, data

    async def _lock(self) -> asyncio.Lock:
        """The lock that every consumer of this name in this event loop holds during a commit."""
        key = (await self.reader._identity(), self.name, id(asyncio.get_running_loop()))
        return _locks.setdefault(key, asyncio.Lock())

    async def last_commit(self) -> int | None:
        """The offset of the last commit; None if there is none. Raises `CorruptLogError` if it is not in this log."""
        data = await self.reader._documents.load("consumer", self.name)
        if data is None:
            return None
        try:
            stored = msgspec.json.decode(data, type=CommittedOffset)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CorruptLogError(
                self._path, 0, f"this is not a consumer's committed offset: {error}; remove the file to start again"
            ) from error
        if data != self._verified:
            try:
                found = await self.reader.read_line_hash_before(stored.offset)
            except ValueError as error:
                raise CorruptLogError(self._path, stored.offset, f"its offset is not in this log: {error}") from error
            if found != stored.hash:
                raise CorruptLogError(
                    self._path, stored.offset, "its offset is not in this log: a different line ends there"
                )
        self.committed, self._verified = stored.offset, data
        return stored.offset


def unreadable(reader: EventReader, error: OSError) -> str:
    """What to report about a document whose file can't be read. Raises the error if a server can't be reached."""
    if not isinstance(getattr(reader._source, "layout", None), Paths):
        raise error
    return f"it can't be read: {error.strerror}"


async def move_consumer(reader: EventReader, name: str, offset: int) -> None:
    """Sets a consumer's committed offset to any value. No process may be reading under its name.

    Raises `ValueError` for an offset that is beyond the head or not where a line begins, and `OSError`.
    """
    line_hash = await reader.read_line_hash_before(offset)
    if line_hash is None:
        await reader._documents.delete("consumer", name)
    else:
        await reader._documents.store("consumer", name, msgspec.json.encode(CommittedOffset(offset, line_hash)))


class Consumer:
    """An async iterator over the records after the last committed one, and then over each new one.

    Each `async for` begins after the last commit, and ends when the log is closed. Offsets are bytes in the whole log.
    If a step is cancelled, the iteration ends, and the next `async for` begins after the last commit.

    Only one iteration at a time runs under a name. In the same process, a second one raises an `EventfoldError`. In
    another process, a second one waits until the first one, or its process, ends. If a log is on a server, a process
    that can't reach the server for a while loses the name to a waiting process. It then waits for the name itself, and
    continues after the last commit. A commit of a record from before the loss raises an `EventfoldError`.

    A commit covers all records before the committed one, even those that the query does not match. An iteration raises
    `CorruptLogError` if the committed offset is not in this log, and otherwise what `EventReader.tail` raises.

    Args:
        reader: A reader of the log. `EventLog.consumer` creates a consumer with the reader of the log.
        name: 1 to 128 characters of `A-Z a-z 0-9 . _ -`, not starting with a dot.
        start: Where to begin if nothing is committed yet, in bytes of the whole log; None for the current head.
        query: Which events to yield; None for all. The query is not stored.

    Raises:
        ValueError: The name is not allowed.
        TypeError: `query` is not a `Query`.
    """

    def __init__(self, reader: EventReader, name: str, *, start: int | None = 0, query: Query | None = None) -> None:
        self._checkpoint = Checkpoint(reader, name, start, query)
        self._iteration: _Iteration | None = None

    def __repr__(self) -> str:
        checkpoint = self._checkpoint
        location = str(checkpoint.reader._source.location)
        return f"<Consumer {checkpoint.name!r} of {location!r}, committed up to {checkpoint.committed}>"

    @property
    def name(self) -> str:
        """The consumer's name, which its file has too."""
        return self._checkpoint.name

    def __aiter__(self) -> AsyncIterator[Record]:
        return _Iteration(self._checkpoint)

    async def __anext__(self) -> Record:
        if self._iteration is None:
            self._iteration = _Iteration(self._checkpoint)
        try:
            return await anext(self._iteration)
        except BaseException:
            # The iteration has ended. The next step begins a new one, after the last commit.
            self._iteration = None
            raise

    async def commit(self, record: Record) -> None:
        """Commits a record and all records before it. When this returns, the commit is on disk.

        If cancelled, the commit may or may not have been made. If it was made, committing an older record raises
        `ValueError`.

        Args:
            record: A record that the consumer yielded.

        Raises:
            ValueError: The record is before the last committed one, which another process may have committed.
            TypeError: `record` is not a `Record`.
            CorruptLogError: The committed offset on disk is not in this log.
            EventfoldError: Another process has taken over the consumer's name while this one could not reach the
                server.
            OSError: The offset could not be read or written. The committed offset is unchanged.
        """
        if not isinstance(record, Record):
            raise TypeError(
                f"commit takes a Record that the consumer yielded, not {type(record).__name__}: {record!r}; "
                "write `async for record in consumer: ...; await consumer.commit(record)`"
            )
        checkpoint = self._checkpoint
        with _tracing.span(
            "eventfold.consumer_commit",
            log=str(checkpoint.reader._source.location),
            consumer=checkpoint.name,
            offset=record.end_offset,
        ):
            await checkpoint.commit(record)


class _Iteration:
    """One iteration of a consumer, which holds the lock of the consumer's name while it runs."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._records: AsyncIterator[Record] | None = None
        self._key: tuple[str, str] | None = None
        self._lock: DocumentLock | None = None

    def __aiter__(self) -> _Iteration:
        return self

    async def __anext__(self) -> Record:
        if self._records is None:
            self._records = await self._begin()
        try:
            record = await anext(self._records)
            while self._lock is not None and not self._checkpoint.reader._closed and await self._lock.was_lost():
                known = self._checkpoint.committed
                committed = await self._acquire_name()
                # If no other process has committed anything, this iteration can continue.
                if committed != known:
                    async with aclosing(self._records):  # type: ignore[type-var]
                        self._records = self._records_after(committed)
                    record = await anext(self._records)
            return record
        except BaseException:
            self._end()
            raise

    async def _begin(self) -> AsyncIterator[Record]:
        checkpoint = self._checkpoint
        key = (await checkpoint.reader._identity(), checkpoint.name)
        other = _running.get(key)
        if other is not None and other is not self and not other._checkpoint.reader._closed:
            raise EventfoldError(f"consumer {checkpoint.name!r} is being read elsewhere in this process")
        _running[key] = self
        self._key = key
        try:
            return self._records_after(await self._acquire_name())
        except BaseException:
            self._end()
            raise

    async def _acquire_name(self) -> int | None:
        """Waits for the lock of the consumer's name; then returns the offset of the last commit."""
        if self._lock is not None:
            self._lock.release()
        self._lock = await _lock_name(self._checkpoint)
        return await self._checkpoint.last_commit()

    def _records_after(self, committed: int | None) -> AsyncIterator[Record]:
        checkpoint = self._checkpoint
        start = checkpoint.start if committed is None else committed
        return checkpoint.reader.tail(start, query=checkpoint.query)

    def _end(self) -> None:
        if self._key is not None and _running.get(self._key) is self:
            del _running[self._key]
        if self._lock is not None:
            self._lock.release()


async def _lock_name(checkpoint: Checkpoint) -> DocumentLock | None:
    """Locks a consumer's name, as soon as no other process holds it; None if nothing can be locked.

    Raises `StopAsyncIteration` if the log is closed before that.
    """
    reader = checkpoint.reader
    if not isinstance(reader._documents, LockingDocuments):
        return None
    waiting = False
    while True:
        try:
            lock = await reader._documents.lock("consumer", checkpoint.name)
        except LogClosedError:
            raise StopAsyncIteration from None
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                return None  # no process can commit there either
            raise
        if lock is not None:
            reader._scope.release_at_close(lock)
            return lock
        if reader._closed:
            raise StopAsyncIteration
        if not waiting:
            waiting = True
            log_event(
                INFO,
                "consumer.waiting",
                "consumer '%(consumer)s' is waiting because another process reads under its name",
                consumer=checkpoint.name,
            )
        await asyncio.sleep(TAKE_OVER_INTERVAL)


_running: weakref.WeakValueDictionary[tuple[str, str], _Iteration] = weakref.WeakValueDictionary()
_locks: weakref.WeakValueDictionary[tuple[str, str, int], asyncio.Lock] = weakref.WeakValueDictionary()
