"""`EventWriter`: appends to one log, on any engine.

An append first encodes its event and adds the line to the queue, synchronously. Then it waits for the commit of its
group.

Promises: once `append` returns, the event is in the log, as durable as the engine says; appends are in the log in the
order in which they were called; an append cancelled before its group was taken is not in the log, one cancelled later
is; after a failure that leaves the log in an unknown state, nothing more is accepted.
"""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Awaitable, Iterable, Sequence
from contextlib import AsyncExitStack

from ._address import Address
from ._aio import AsyncOpener, UncancellableTask
from ._codec.encode import encode_batch, encode_line
from ._condition_reads import ConditionReads
from ._engine import ClosingCommitter, Commit, HasPaths, LockMode, Paths, RotatingCommitter, SyncMode, paths_of
from ._errors import ConditionalAppendError, EventfoldError, LogClosedError, WriterFailedError, copy_error
from ._event import AppendResult, Event, Head
from ._group_commit import GroupCommit
from ._index_checks import IndexChecks, NotIndexedError, ids_of
from ._judge import Condition, Requirements, UniqueIds
from ._open_writer import WriterParts, parts_opener
from ._query import Query
from ._reader import EventReader
from ._rotator import Rotator, ViewOps
from ._threads import in_thread


class EventWriter(HasPaths):
    """The writer of one log. Open it with `EventWriter.open`; it belongs to that event loop and process."""

    def __init__(self, parts: WriterParts, max_event_size: int, unique_ids: bool) -> None:
        self._committer = committer = parts.committer
        self._waiters, self._scope, self._index = parts.waiters, parts.scope, parts.index
        self._source = committer.source
        self._max_event_size = max_event_size
        self._unique_ids = unique_ids
        self._pid = os.getpid()
        self._loop = asyncio.get_running_loop()
        self._commits = GroupCommit(committer, self._on_commit)
        self._queue = self._commits.queue
        if self._index is not None:
            self._commits.checks = IndexChecks(self._index)
        self._condition_reads = ConditionReads(self.reader())
        self._closing: UncancellableTask[None] | None = None
        # None for an engine that has nothing to rotate.
        self._rotator: Rotator | None = None
        if isinstance(committer, RotatingCommitter):
            self._rotator = Rotator(committer, self._source.location, self.reader, self._commits.fail)
        self._views: Sequence[ViewOps] = ()
        self._head = committer.head
        self._opened = True
        self._waiters.publish(self._head)
        if self._rotator is not None:
            self._rotator.rotate_if_due(self._views)

    @classmethod
    def open(
        cls,
        dir: Address,
        *,
        lock: LockMode = LockMode.FLOCK,
        sync: SyncMode = SyncMode.ALWAYS,
        max_log_size: int = 0,
        max_event_size: int = 16 * 2**20,
    ) -> AsyncOpener[EventWriter]:
        """Opens a log for appending. Await it, or use it in `async with`. If cancelled, it opens nothing.

        What a crash left unfinished is repaired first. A directory is created if necessary.

        Args:
            dir: The log: a directory, an address such as `postgresql://host/db`, or an engine.
            lock: How other writers are kept out. For files only.
            sync: When an append is on disk. For files only.
            max_log_size: The size in bytes of `app.jsonl` from which it is rotated automatically; 0 for never. For
                files only.
            max_event_size: The maximum size of a line in bytes, at most 1 GiB.

        Raises:
            LogLockedError: Another writer has it open.
            CorruptLogError: The files contradict each other.
            OSError: The log can't be created, read or written.
            EventfoldError: The packages that the engine needs are not installed.
            ValueError: An argument is wrong, or the engine does not have an option.
        """
        return cls._open(dir, lock, sync, max_log_size, max_event_size, index=False, unique_ids=False)

    @classmethod
    def _open(
        cls,
        dir: Address,
        lock: LockMode,
        sync: SyncMode,
        max_log_size: int,
        max_event_size: int,
        *,
        index: bool | str | os.PathLike[str],
        unique_ids: bool,
    ) -> AsyncOpener[EventWriter]:
        """Does what `open` does, with the options that only `EventLog.open` has."""
        open_parts = parts_opener(dir, lock, sync, max_log_size, max_event_size, index, unique_ids)

        async def open_() -> EventWriter:
            return cls(await open_parts(), max_event_size, unique_ids)

        return AsyncOpener(open_)

    def __repr__(self) -> str:
        if self._commits.failure is not None:
            state = "failed"
        elif self._closing is not None:
            state = "closed"
        else:
            state = f"{len(self._queue)} queued"
        return f"<EventWriter of {str(self._source.location)!r}, {state}>"

    def __del__(self) -> None:
        if getattr(self, "_opened", False) and self._pid == os.getpid():
            self._waiters.publish(None)
            if self._index is not None:
                self._index.abandon()
            self._committer.abandon()
            warnings.warn(f"{self!r} was not closed", ResourceWarning, source=self, stacklevel=2)

    @property
    def _paths(self) -> Paths:
        return paths_of(self._source)

    @property
    def head(self) -> Head:
        """The durable head: the offset after the last acknowledged event, and the hash of its line.

        With `LockMode.SHARED`, any process may have appended it. Once closed, the last one that was seen.
        """
        if self._opened:
            self._head = self._waiters.durable_head or self._head
        return self._head

    def _attach(self, views: Iterable[ViewOps]) -> None:
        """From now on, saves the snapshots of these views after an automatic rotation, and when it is closed."""
        self._views = list(views)

    def reader(self) -> EventReader:
        """A reader of this log, whose tails and waits end when this writer is closed."""
        return EventReader._of_source(self._source, self._scope)

    # Appending

    async def append(self, event: Event) -> AppendResult:
        """Appends one event. When this returns, the event is as durable as the sync mode promises.

        If cancelled while waiting in the queue, the event is not in the log; if cancelled later, it is.

        Args:
            event: The event.

        Returns:
            Where the event is in the log.

        Raises:
            InvalidEventError: The event can't be written as a line that reads back the same.
            OSError: It could not be written: it is not in the log, and the writer continues.
            UnknownOutcomeError: It may or may not be in the log, and the writer continues.
            WriterFailedError: It may or may not be in the log, which must be opened again.
            LogClosedError: The writer was closed.
            EventfoldError: It was called in a forked child, or in an event loop other than the writer's.
        """
        return await self._put(event)

    def _put(self, event: Event) -> Awaitable[AppendResult]:
        """Adds one event to the queue, at once if there is room. The caller must await the result immediately.

        Raises what `append` raises. It is not a coroutine function, since that would make an append a tenth slower.
        """
        self._check_usable()
        queue = self._queue
        if queue.full:
            return self._put_when_there_is_room(event)
        line = encode_line(event, self._max_event_size)
        return queue.put(line, self._requirements((event,)) if self._unique_ids else None)

    async def _put_when_there_is_room(self, event: Event) -> AppendResult:
        await self._commits.wait_for_room()
        line = encode_line(event, self._max_event_size)
        placed: AppendResult = await self._queue.put(line, self._requirements((event,)))
        return placed

    async def append_many(self, events: Iterable[Event]) -> list[AppendResult]:
        """Appends several events, all of them or none, even after a crash or a cancellation.

        Args:
            events: The events, in order.

        Returns:
            One result for each event.

        Raises:
            EventfoldError: As for `append`.
            OSError: As for `append`.
        """
        self._check_usable()
        if self._queue.full:
            await self._commits.wait_for_room()
        events = list(events)
        lines = encode_batch(events, self._max_event_size)
        requirements = self._requirements(events)
        return await self._queue.put(b"".join(lines), requirements, lines) if lines else []

    async def append_if(self, event: Event, expected_offset: int, expected_hash: str) -> AppendResult:
        """Appends one event if the head is the expected one when its turn comes. Cancelling it is as for `append`.

        Args:
            event: The event.
            expected_offset: The offset at which the log must end, in bytes of the whole log.
            expected_hash: The hash of the line before it; "" for an empty log.

        Returns:
            Where the event is in the log.

        Raises:
            ConditionalAppendError: The head is a different one. Nothing was written.
            ValueError: The offset is negative, or an argument has the wrong type.
            EventfoldError: As for `append`.
            OSError: As for `append`.
        """
        self._check_usable()
        expected = _check_expected(expected_offset, expected_hash)
        if self._queue.full:
            await self._commits.wait_for_room()
        line = encode_line(event, self._max_event_size)
        placed: AppendResult = await self._queue.put(line, self._requirements((event,), expected))
        return placed

    async def append_unless(self, events: Iterable[Event], query: Query, *, after: int = 0) -> list[AppendResult]:
        """Appends events, all of them or none, unless an event at or after an offset matches a query.

        The condition is checked when the append's turn comes, against everything before it in the log or in the queue.
        If cancelled while waiting in the queue, nothing is appended.

        Args:
            events: The events, in order; without any, the condition is still checked.
            query: Which events prevent the append.
            after: The offset from which events count, in bytes of the whole log: the end of what the decision was based
                on.

        Returns:
            One result for each event.

        Raises:
            ConditionalAppendError: An event matches; `conflict.offset` says where it is. Nothing was written.
            TypeError: The query is not a `Query`.
            ValueError: The offset is negative, beyond the head, or not where a line begins.
            CorruptLogError: The log is damaged.
            EventfoldError: As for `append`.
            OSError: As for `append`, or the log could not be read.
        """
        self._check_usable()
        if not isinstance(query, Query):
            raise TypeError(f"query must be a Query, not {query!r}")
        events = list(events)
        lines = encode_batch(events, self._max_event_size)
        condition = Condition(query, after, None, events)
        requirements = Requirements(None, condition, self._unique(events))
        indexed = self._index is not None and query._has_tags
        if indexed and after and after != self.head.offset:
            await self.reader().read_line_hash_before(after)  # raises `ValueError` if no line begins there
        while True:
            if not indexed:
                try:
                    condition.checked = await self._condition_reads.read(query, after)
                except ConditionalAppendError:
                    # A repeated append must not conflict with itself.
                    checks = self._commits.checks
                    found = None if checks is None else await checks.results_of(requirements.unique, len(lines))
                    if found is None:
                        raise
                    return found
            if self._queue.full:
                await self._commits.wait_for_room()
            try:
                placed: list[AppendResult] = await self._queue.put(b"".join(lines), requirements, lines)
                return placed
            except NotIndexedError:
                self._check_usable()
                indexed = False

    def _requirements(self, events: Sequence[Event], expected: Head | None = None) -> Requirements | None:
        """What an append without a query requires of the log."""
        unique = self._unique(events)
        return None if expected is None and unique is None else Requirements(expected, None, unique)

    def _unique(self, events: Sequence[Event]) -> UniqueIds | None:
        return ids_of(events) if self._unique_ids else None

    def _check_usable(self) -> None:
        if self._loop is not asyncio._get_running_loop():  # in a forked child, none is running
            if self._pid != os.getpid():
                raise EventfoldError(
                    f"the writer of {self._source.location} belongs to process {self._pid}, which opened it, not to a "
                    "fork of it: open the log after the fork"
                )
            raise EventfoldError(
                f"the writer of {self._source.location} belongs to the event loop that opened it, not to this one: "
                "call it there, with asyncio.run_coroutine_threadsafe(log.append(event), loop) from another thread"
            )
        if self._closing is not None:
            raise LogClosedError(f"the log in {self._source.location} is closed")
        if self._commits.failure is not None:
            self._commits.check()

    def _on_commit(self, commit: Commit) -> None:
        self._head = commit.head  # for `head` while the log is being closed
        self._waiters.publish(commit.head, commit.lines)
        if self._rotator is not None:
            self._rotator.rotate_if_due(self._views)

    # Rotation

    async def rotate(self, views: Iterable[ViewOps] = ()) -> None:
        """Moves the whole active log into the archive, while appends continue. If cancelled, the rotation continues.

        Args:
            views: The views whose snapshots are rewritten afterwards.

        Raises:
            OSError: A file could not be read or written. Nothing is lost, and the next rotation continues where this
                one stopped.
            CorruptLogError: The files contradict each other.
            EventfoldError: The log is not in files, or the writer can't be used: see `append`.
        """
        self._check_usable()
        if self._rotator is None:
            raise EventfoldError(f"{self._source.location} can't be rotated: only a log in files can")
        try:
            await self._rotator.rotate(views)
        except WriterFailedError:
            self._commits.note_raised()
            raise

    # Closing

    async def aclose(self) -> None:
        """Refuses new appends, finishes pending ones and a rotation, and releases the lock. Idempotent.

        The lock is released whatever else fails. An error that an append or a rotation has raised is not raised again.
        If cancelled, closing continues. In a forked child, it only closes the child's descriptors: the log stays the
        parent's.

        Raises:
            WriterFailedError: What was acknowledged before it was durable could not be made durable.
            OSError: A snapshot could not be saved.
            EventfoldError: It was called in an event loop other than the writer's.
        """
        if self._pid != os.getpid():
            self._abandon()
            return
        if self._loop.is_closed():
            await in_thread(self._abandon)
            return
        if self._loop is not asyncio._get_running_loop():
            raise EventfoldError(
                f"the writer of {self._source.location} belongs to the event loop that opened it: close it there"
            )
        if self._closing is None:
            self._closing = UncancellableTask(self._close(), "eventfold close")
        await asyncio.wait([self._closing])
        if (error := self._closing.exception()) is not None:
            raise copy_error(error)

    async def _close(self) -> None:
        # The callbacks run in reverse order, each of them even if another one raises.
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._close_committer)
            # Before the lock is released: afterwards, it could erase the head that the next writer has published.
            stack.callback(self._waiters.publish, None)
            stack.callback(self._end_reading)
            if self._index is not None:
                stack.push_async_callback(self._index.aclose)
            for view in self._views:
                stack.push_async_callback(view.save, self.reader())
            self._head, self._opened = self.head, False
            if isinstance(self._committer, ClosingCommitter):
                self._committer.begin_closing()
            await self._commits.drain()
            if self._rotator is not None:
                await self._rotator.drain()

    async def _close_committer(self) -> None:
        try:
            await self._committer.aclose()
        except WriterFailedError as error:
            # The committer can't know whether a call has raised it: the call may have been cancelled.
            if not self._commits.has_raised(error):
                raise

    def _end_reading(self) -> None:
        # Tails yield what was acknowledged before they end.
        self._scope.close(self.head)

    def _abandon(self) -> None:
        if self._opened:
            self._opened = False
            if self._pid == os.getpid():
                self._waiters.publish(None)
            if self._index is not None:
                self._index.abandon()
            self._committer.abandon()


def _check_expected(offset: int, line_hash: str | None) -> Head:
    if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
        raise ValueError(f"expected_offset must be an integer of 0 or more, not {offset!r}")
    if not isinstance(line_hash, str | None):
        raise ValueError(f"expected_hash must be the hash of a line, or empty, not {line_hash!r}")
    return Head(offset, line_hash or "")
