"""`Consumer`: a named reader whose offset in the log is kept on disk.

Its file, `consumers/NAME.json`, contains the `offset` after the last committed record and the `hash` of that record's
line. A record that was yielded but not committed is yielded again after a restart: at least once.

Promises: a commit is completely on disk when it returns, and never goes back; an offset that is not in this log
(restored from a backup, say) is an error.
"""

from __future__ import annotations

import asyncio
import errno
import weakref
from collections.abc import AsyncIterator
from contextlib import aclosing

import msgspec

from . import _tracing
from ._engine import DocumentLock, LockingDocuments, Paths, check_name
from ._errors import CorruptLogError, EventfoldError, LogClosedError
from ._event import PartialRecord, Record
from ._logging import INFO, log_event
from ._query import Query, query_of
from ._reader import EventReader

# Seconds between two attempts to read under a name that another process is using.
TAKE_OVER_INTERVAL = 0.1


class _Committed(msgspec.Struct):
    """The file's content."""

    offset: int
    hash: str


class _Checkpoint:
    """A consumer's committed offset on disk. The file is the truth, since others may have written it meanwhile."""

    def __init__(self, reader: EventReader, name: str, start: int | None, query: Query | None) -> None:
        self.reader = reader
        self.name = name
        self.start = start
        self.query = query_of(query, None)
        self.committed: int | None = None  # for messages only
        check_name("consumer", name)
        self._path = reader.documents.location("consumer", name)
        self._known = b""  # content of the file that is known to belong to this log

    async def commit(self, record: Record) -> None:
        async with await self._lock():
            committed = await self.last_commit()
            end, line_hash = record.end_offset, ""
            if isinstance(record, PartialRecord):
                # The other events of its line must be yielded again: only what is before the line is done.
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
                data = msgspec.json.encode(_Committed(end, line_hash or record.line_hash))
                # If cancelled, this has ended before the lock is released.
                await self.reader.documents.store("consumer", self.name, data)
                self.committed, self._known = end, data

    async def _lock(self) -> asyncio.Lock:
        """The lock that all consumers of this name in this event loop hold while they commit."""
        key = (await self.reader.identity(), self.name, id(asyncio.get_running_loop()))
        return _locks.setdefault(key, asyncio.Lock())

    async def last_commit(self) -> int | None:
        """The offset of the last commit; None if there is none. Raises `CorruptLogError` if it is not in this log."""
        data = await self.reader.documents.load("consumer", self.name)
        if data is None:
            return None
        try:
            place = msgspec.json.decode(data, type=_Committed)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CorruptLogError(
                self._path, 0, f"this is not a consumer's committed offset: {error}; remove the file to start again"
            ) from error
        if data != self._known:
            try:
                found = await self.reader.read_line_hash_before(place.offset)
            except ValueError as error:
                raise CorruptLogError(self._path, place.offset, f"its offset is not in this log: {error}") from error
            if found != place.hash:
                raise CorruptLogError(
                    self._path, place.offset, "its offset is not in this log: a different line ends there"
                )
        self.committed, self._known = place.offset, data
        return place.offset


def unreadable(reader: EventReader, error: OSError) -> str:
    """What to report about a document whose file can't be read. Raises the error if a server can't be reached."""
    if not isinstance(getattr(reader._source, "layout", None), Paths):
        raise error
    return f"it can't be read: {error.strerror}"


async def move_consumer(reader: EventReader, name: str, offset: int) -> None:
    """Makes a consumer continue from an offset, whatever it has committed; nobody may be reading under its name.

    Raises `ValueError` for an offset that is beyond the head or not where a line begins, `OSError`.
    """
    line_hash = await reader.read_line_hash_before(offset)
    if line_hash is None:
        await reader.documents.delete("consumer", name)
    else:
        await reader.documents.store("consumer", name, msgspec.json.encode(_Committed(offset, line_hash)))


class Consumer:
    """An async iterator over the records after the last committed one, and then over each new one.

    Each `async for` begins after the last commit; it ends when the log is closed. Only one at a time runs for a name: a
    second one in the same process is refused, and one in another process waits until the first ends, or its process
    does. Where a log is on a server, a process that can't reach it for a while loses the name to one that waits. It
    waits itself then, and goes on after the last commit; a commit of what it still had is refused with an
    `EventfoldError`. Offsets are bytes in the whole log. With a `query`, it gives only events that it matches; the
    query is not kept on disk, and a commit covers all that stands before it in the log, matched or not.
    """

    def __init__(self, reader: EventReader, name: str, *, start: int | None = 0, query: Query | None = None) -> None:
        self._place = _Checkpoint(reader, name, start, query)
        self._own: _Iteration | None = None

    def __repr__(self) -> str:
        place = self._place
        return f"<Consumer {place.name!r} of {str(place.reader._source.location)!r}, committed up to {place.committed}>"

    @property
    def name(self) -> str:
        """The consumer's name, which is also that of its file."""
        return self._place.name

    def __aiter__(self) -> AsyncIterator[Record]:
        return _Iteration(self._place)

    async def __anext__(self) -> Record:
        if self._own is None:
            self._own = _Iteration(self._place)
        try:
            return await anext(self._own)
        except BaseException:
            # The iteration is over; the next step begins a new one, after the last commit.
            self._own = None
            raise

    async def commit(self, record: Record) -> None:
        """Commits a record and all before it; once this returns, that is on disk.

        If cancelled, the commit may or may not have been made; if it was, a later commit of an older record is refused.

        Args:
            record: A record that the consumer yielded.

        Raises:
            ValueError: The record is before the last committed one, no matter who committed that.
            TypeError: This is not a `Record`.
            CorruptLogError: The committed offset on disk is not in this log.
            EventfoldError: Another process took the consumer's name over while this one could not reach the server.
            OSError: The offset could not be read or written; the previous one remains.
        """
        if not isinstance(record, Record):
            raise TypeError(
                f"commit takes a Record that the consumer yielded, not {type(record).__name__}: {record!r}; "
                "write `async for record in consumer: ...; await consumer.commit(record)`"
            )
        place = self._place
        with _tracing.span(
            "eventfold.consumer_commit",
            log=str(place.reader._source.location),
            consumer=place.name,
            offset=record.end_offset,
        ):
            await place.commit(record)


class _Iteration:
    """One iteration of a consumer, which holds the consumer's name while it runs."""

    def __init__(self, place: _Checkpoint) -> None:
        self._place = place
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
            while self._lock is not None and not self._place.reader.closed and await self._lock.was_lost():
                known = self._place.committed
                committed = await self._take_name()
                # Otherwise nobody has done anything meanwhile that lasts.
                if committed != known:
                    async with aclosing(self._records):  # type: ignore[type-var]
                        self._records = self._records_after(committed)
                    record = await anext(self._records)
            return record
        except BaseException:
            self._end()
            raise

    async def _begin(self) -> AsyncIterator[Record]:
        place = self._place
        key = (await place.reader.identity(), place.name)
        other = _running.get(key)
        if other is not None and other is not self and not other._place.reader.closed:
            raise EventfoldError(f"consumer {place.name!r} is being read elsewhere in this process")
        _running[key] = self
        self._key = key
        try:
            return self._records_after(await self._take_name())
        except BaseException:
            self._end()
            raise

    async def _take_name(self) -> int | None:
        """The offset of the last commit, once this process has the name for itself."""
        if self._lock is not None:
            self._lock.release()
        self._lock = await _lock_name(self._place)
        return await self._place.last_commit()

    def _records_after(self, committed: int | None) -> AsyncIterator[Record]:
        place = self._place
        return place.reader.tail(place.start if committed is None else committed, query=place.query)

    def _end(self) -> None:
        if self._key is not None and _running.get(self._key) is self:
            del _running[self._key]
        if self._lock is not None:
            self._lock.release()


async def _lock_name(place: _Checkpoint) -> DocumentLock | None:
    """The lock of a consumer's name, once no other process has it; None if the engine has no locks.

    Ends the iteration if the log is closed meanwhile.
    """
    reader = place.reader
    if not isinstance(reader.documents, LockingDocuments):
        return None
    waiting = False
    while True:
        try:
            lock = await reader.documents.lock("consumer", place.name)
        except LogClosedError:
            raise StopAsyncIteration from None
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                return None  # nothing can be committed there either
            raise
        if lock is not None:
            reader._scope.release_at_close(lock)
            return lock
        if reader.closed:
            raise StopAsyncIteration
        if not waiting:
            waiting = True
            log_event(
                INFO,
                "consumer.waiting",
                "consumer '%(consumer)s' is waiting because another process reads under its name",
                consumer=place.name,
            )
        await asyncio.sleep(TAKE_OVER_INTERVAL)


_running: weakref.WeakValueDictionary[tuple[str, str], _Iteration] = weakref.WeakValueDictionary()
_locks: weakref.WeakValueDictionary[tuple[str, str, int], asyncio.Lock] = weakref.WeakValueDictionary()
