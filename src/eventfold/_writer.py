"""`EventWriter`: the exclusive writer of one directory.

An append decides everything synchronously (its line, its place in the queue) and then waits. Whenever the writer's
thread is free, it gets what has queued up, joined into one buffer, to be written and synced in one trip; then the
appends are resolved in order: group commit. Those callbacks (`_go_on`, `_committed`, `_synced`) change the writer's
state without ever waiting in between.

Promises: what `append` returned for is on disk (as far as the sync mode says); appends stand in the log in the order
in which they were called; an append cancelled before its batch was taken is not in the log, one cancelled later is;
after a failure that leaves the file unknown nothing more is accepted.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ._aio import AsyncOpener, Thread, in_thread
from ._codec.encode import encode_line
from ._codec.lines import Lines
from ._errors import EventfoldError, LogClosedError, WriterFailedError, copy_error
from ._event import AppendResult, Event, Head, line_hash
from ._files import operations, recovery
from ._files import rotation as _rotation
from ._files.active import ActiveLog
from ._files.paths import Layout
from ._files.watcher import directory
from ._queue import Answers, AppendQueue, Batch
from ._reader import EventReader
from ._waiters import Scope

logger = logging.getLogger("eventfold")

SYNC_INTERVAL = 1.0
# Seconds for which a rotated file stays locked: somebody may have opened it and be about to lock it.
KEEP_LOCKED = 60.0
# Seconds before a rotation that failed is tried again by itself; each further failure doubles them, up to the last.
RETRY_INTERVAL, LAST_RETRY_INTERVAL = 1.0, 60.0


class LockMode(enum.Enum):
    """How a writer keeps others out: `FLOCK`, an exclusive flock on `app.jsonl`, or `NONE`, not at all."""

    FLOCK = "flock"
    NONE = "none"


class SyncMode(enum.Enum):
    """When an append is on disk: `ALWAYS` before it returns, `EVERY_SECOND` a second later, `OS` when the system likes.

    With the last two, a power cut loses what was not synced yet; a killed process loses nothing.
    """

    ALWAYS = "always"
    EVERY_SECOND = "every_second"
    OS = "os"


class ViewOps(Protocol):
    """What the log asks of anything registered as a view."""

    @property
    def name(self) -> str: ...

    @property
    def offset(self) -> int: ...

    async def refresh(self, reader: EventReader) -> Any: ...

    async def rebuild(self, reader: EventReader) -> Any: ...

    async def save(self, reader: EventReader) -> None: ...


class EventWriter:
    """The writer of one directory. Open it with `EventWriter.open`; it belongs to that event loop and process."""

    def __init__(self, layout: Layout, sync: SyncMode, max_log_size: int, max_event_size: int) -> None:
        self._layout = layout
        self._sync = sync
        self._max_log_size = max_log_size
        self._max_event_size = max_event_size
        self._pid = os.getpid()
        self._loop = asyncio.get_running_loop()
        self._scope = Scope()
        self._queue = AppendQueue(self._wake)
        # Those who are told run first, so that what they append at once is in the next batch.
        self._answers = Answers(self._wake)
        self._busy = True  # whether the thread has a commit or a sync to do
        self._woken = False  # whether `_go_on` is about to be called
        self._unsynced = False
        self._sync_timer: asyncio.TimerHandle | None = None
        self._sync_due = False
        self._failure: EventfoldError | None = None
        self._closing: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._rotating = asyncio.Lock()
        self._rotations: set[asyncio.Task[None]] = set()
        self._no_rotation_before = 0.0
        self._retry_interval = RETRY_INTERVAL
        self._views: Sequence[ViewOps] = ()
        self._old_files: dict[int, asyncio.TimerHandle] = {}
        self._opened = False

    @classmethod
    def open(
        cls,
        dir: str | os.PathLike[str],
        *,
        lock: LockMode = LockMode.FLOCK,
        sync: SyncMode = SyncMode.ALWAYS,
        max_log_size: int = 0,
        max_event_size: int = 16 * 2**20,
    ) -> AsyncOpener[EventWriter]:
        """Opens the directory for writing, which is created if need be. Await it, or use it in `async with`.

        What a crash left unfinished is put right first. `max_log_size` is the size in bytes of `app.jsonl` above which
        it is rotated by itself (0: never), `max_event_size` the most bytes that a line may have.

        Raises `LogLockedError` where another writer has it open, `CorruptLogError` where the files contradict each
        other, `OSError`. Cancelled, it opens nothing.
        """
        _check_size("max_log_size", max_log_size, 0)
        _check_size("max_event_size", max_event_size, 1)
        lock, sync = LockMode(lock), SyncMode(sync)

        async def open_() -> EventWriter:
            writer = cls(Layout(dir), sync, max_log_size, max_event_size)
            await writer._start(lock is LockMode.FLOCK)
            return writer

        return AsyncOpener(open_)

    async def _start(self, lock: bool) -> None:
        opened: list[Any] = []
        try:
            await in_thread(lambda: opened.extend(recovery.open_log(self._layout, lock)))
            place = await in_thread(directory, self._layout.dir)
        except BaseException:
            if opened:
                for fd in opened[1]:
                    os.close(fd)
                opened[0].close()
            raise
        self._active: ActiveLog = opened[0]
        self._place = place
        for fd in opened[1]:
            self._keep_locked(fd)
        self._head: Head = self._active.head
        self._thread = Thread(f"eventfold writer {self._layout.dir}")
        self._opened = True
        self._place.publish(self._head)
        self._busy = False
        self._rotate_if_large()

    def __repr__(self) -> str:
        if self._failure is not None:
            state = "failed"
        elif self._closing is not None:
            state = "closed"
        else:
            state = f"{len(self._queue)} queued"
        return f"<EventWriter of {str(self._layout.dir)!r}, {state}>"

    def __del__(self) -> None:
        if not self._opened or self._pid != os.getpid():
            return
        warnings.warn(f"{self!r} was not closed", ResourceWarning, source=self, stacklevel=2)
        self._release()

    @property
    def dir(self) -> Path:
        """The data directory."""
        return self._layout.dir

    @property
    def log_path(self) -> Path:
        """The active log, `app.jsonl`."""
        return self._layout.log_path

    @property
    def archive_path(self) -> Path:
        """The archive, `archive.jsonl.zst`; it may not exist yet."""
        return self._layout.archive_path

    @property
    def views_dir(self) -> Path:
        """Where the snapshots are; it may not exist yet."""
        return self._layout.views_dir

    @property
    def head(self) -> Head:
        """The durable head: the offset after the last event that was acknowledged, and the hash of its line."""
        return self._head

    def attach(self, views: Iterable[ViewOps]) -> None:
        """From now on saves the snapshots of these views after a rotation of its own accord, and when it is closed."""
        self._views = list(views)

    def reader(self) -> EventReader:
        """A reader of this directory, whose tails and waits end when this writer is closed."""
        return EventReader._of(self._layout, self._place, self._scope)

    async def append(self, event: Event) -> AppendResult:
        """Appends one event.

        Raises `InvalidEventError`, `OSError` where it could not be written (it is not in the log then, and the writer
        goes on), `WriterFailedError`, `LogClosedError`, and `EventfoldError` in a forked child. Cancelled while it
        waits in the queue, the event is not in the log; cancelled later, it is.
        """
        self._check_usable()
        if self._queue.full:
            await self._get_place()
        line = encode_line(event, self._max_event_size)
        return _result(await self._queue.put(line), line)

    async def append_many(self, events: Iterable[Event]) -> list[AppendResult]:
        """Appends several events, all or none of them, also after a crash. Raises as `append` does."""
        self._check_usable()
        if self._queue.full:
            await self._get_place()
        events = list(events)
        if len(events) < 2:
            lines = [encode_line(event, self._max_event_size) for event in events]
        else:
            count = len(events)
            lines = [encode_line(event, self._max_event_size, (i, count)) for i, event in enumerate(events, 1)]
        if not lines:
            return []
        start = await self._queue.put(b"".join(lines))
        results = []
        for line in lines:
            results.append(_result(start, line))
            start += len(line)
        return results

    async def append_if(self, event: Event, expected_offset: int, expected_hash: str) -> AppendResult:
        """Appends one event if the head is the expected one when its turn comes.

        Raises `ConditionalAppendError` if it is not, and nothing is written; else as `append` does.
        """
        self._check_usable()
        if self._queue.full:
            await self._get_place()
        line = encode_line(event, self._max_event_size)
        return _result(await self._queue.put(line, Head(expected_offset, expected_hash or "")), line)

    def _check_usable(self) -> None:
        if self._pid != os.getpid():
            raise EventfoldError(
                f"the writer of {self._layout.dir} belongs to process {self._pid}, which opened it, not to a fork of it"
            )
        if self._closing is not None:
            raise LogClosedError(f"the log in {self._layout.dir} is closed")
        if self._failure is not None:
            raise copy_error(self._failure)

    async def _get_place(self) -> None:
        await self._queue.place()
        if self._failure is not None:
            raise copy_error(self._failure)

    def _wake(self) -> None:
        if not self._woken and not self._busy:
            self._woken = True
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """Gives the thread what is to be done next."""
        self._woken = False
        if self._busy or self._failure is not None:
            return
        ending = self._closing is not None and self._queue.idle
        if self._unsynced and (self._sync_due or ending):
            self._busy, self._unsynced, self._sync_due = True, False, False
            if self._sync_timer is not None:
                self._sync_timer.cancel()
            self._sync_timer = None
            self._thread.begin(self._synced, self._active.sync)
        elif self._queue:
            batch = self._queue.take(self._head)
            if batch.data:
                self._busy = True
                always = self._sync is SyncMode.ALWAYS
                self._thread.begin(partial(self._committed, batch), self._active.commit, batch.data, batch.head, always)
            else:  # nothing but conflicts, and appends that were cancelled
                self._answers.add(batch.appends)
        elif ending and not self._answers and not self._ended.done():
            self._ended.set_result(None)

    def _committed(self, batch: Batch, result: None, error: BaseException | None) -> None:
        """Tells each append of a batch what became of it."""
        self._busy = False
        if isinstance(error, OSError):
            batch.fail(error)
        elif error is not None:
            batch.fail(self._fail(error))
        else:
            self._head = batch.head
            if self._sync is not SyncMode.ALWAYS:
                self._unsynced = True
                if self._sync is SyncMode.EVERY_SECOND and self._sync_timer is None:
                    self._sync_timer = self._loop.call_later(SYNC_INTERVAL, self._sync_is_due)
            lines = Lines(self._layout.log_path, batch.head.offset - len(batch.data), batch.data)
            self._place.publish(batch.head, lines)
            self._answers.add(batch.appends)
            self._rotate_if_large()
        self._wake()

    def _sync_is_due(self) -> None:
        self._sync_due = True
        self._wake()

    def _synced(self, result: None, error: BaseException | None) -> None:
        self._busy = False
        if error is not None:
            self._fail(error)
        self._wake()

    def _fail(self, error: BaseException) -> EventfoldError:
        """After this nothing is accepted any more, and all that wait get the error."""
        if not isinstance(error, EventfoldError):
            cause, error = error, WriterFailedError(f"the writer failed: {error!r}")
            error.__cause__ = cause
        if self._failure is None:
            self._failure = error
            self._queue.take(self._head).fail(error)
            self._queue.give_places(all_of_them=True)
            if not self._ended.done():
                self._ended.set_result(None)
        return error

    async def rotate(self, views: Iterable[ViewOps] = ()) -> None:
        """Moves the whole active log into the archive, and rewrites the snapshots of `views`. Appends go on meanwhile.

        Raises `OSError` where the disk fails, with nothing lost: the next rotation goes on where this one stopped; also
        `CorruptLogError`, and what `append` raises for a writer that can't be used. Cancelled, the rotation goes on.
        """
        self._check_usable()
        await asyncio.shield(self._start_rotation(list(views)))

    def _start_rotation(self, views: Iterable[ViewOps]) -> asyncio.Task[None]:
        task = self._loop.create_task(self._rotate(views), name="eventfold rotation")
        self._rotations.add(task)
        task.add_done_callback(self._rotations.discard)
        return task

    def _rotate_if_large(self) -> None:
        size = self._head.offset - self._active.base
        due = self._max_log_size and size >= self._max_log_size and self._loop.time() >= self._no_rotation_before
        if due and not self._rotations:
            self._start_rotation(self._views).add_done_callback(self._rotated_by_itself)

    def _rotated_by_itself(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is None:
            self._retry_interval = RETRY_INTERVAL
        else:
            self._no_rotation_before = self._loop.time() + self._retry_interval
            self._retry_interval = min(2 * self._retry_interval, LAST_RETRY_INTERVAL)
            logger.warning("%s could not be rotated, and will be later: %s", self.log_path, error)

    async def _rotate(self, views: Iterable[ViewOps]) -> None:
        layout, active = self._layout, self._active
        async with self._rotating:
            try:
                rotation = await in_thread(recovery.recover, layout, active.fd)
                if rotation is not None:
                    await self._finish(rotation)
                if self._head.offset > active.base:
                    await self._finish(await self._thread.call(_rotation.begin, layout, active))
            except WriterFailedError as error:
                self._fail(error)
                raise
            for view in views:
                await view.save(self.reader())

    async def _finish(self, rotation: _rotation.Rotation) -> None:
        active = self._active
        try:
            await in_thread(rotation.archive, active)
            await in_thread(rotation.catch_up, active)
            # In the thread that commits: so no commit comes in between.
            self._keep_locked(await self._thread.call(rotation.switch, active))
        finally:
            rotation.close()

    def _keep_locked(self, fd: int) -> None:
        self._old_files[fd] = self._loop.call_later(KEEP_LOCKED, self._close_old_file, fd)

    def _close_old_file(self, fd: int) -> None:
        del self._old_files[fd]
        os.close(fd)

    async def aclose(self) -> None:
        """Refuses new appends, finishes those that were called, and a rotation, and lets the lock go.

        Raises nothing that an append or a rotation has raised already. Cancelled, the closing goes on. In a forked
        child it only closes the child's descriptors: the log stays the parent's.
        """
        if self._pid != os.getpid():
            self._release()
            return
        if self._closing is None:
            self._closing = self._loop.create_task(self._close(), name="eventfold close")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._wake()
        await self._ended
        if self._rotations:
            await asyncio.wait(list(self._rotations))
        for view in self._views:
            await view.save(self.reader())
        self._scope.close()
        await self._thread.call(self._release)

    def _release(self) -> None:
        if self._opened:
            self._opened = False
            self._place.publish(None)
            if self._pid == os.getpid():
                operations.unlock(self._active.fd)
            for fd, timer in self._old_files.items():
                timer.cancel()
                os.close(fd)
            self._old_files.clear()
            self._active.close()
            self._thread.end()


def _result(start: int, line: bytes) -> AppendResult:
    return AppendResult(start, start + len(line), line_hash(line))


def _check_size(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of {least} or more, in bytes, not {value!r}")
