"""A directory of plain files as a `Committer`: one thread that writes, syncs and switches files.

Everything that changes the active log is done in that thread, one call after another, and what a call opens is stored
here before the call returns. So a cancellation on the event loop's side abandons nothing.

Promises: once a sync has failed, or the file is not the one that was written, nothing more is written or synced, in
whatever order calls had queued up; the lock is released however the closing ends.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import TypeVar

from .._codec.lines import Lines
from .._engine import Commit, LockMode, SyncMode
from .._errors import LogClosedError, WriterFailedError, copy_error
from .._event import Head
from .._judge import Append, accept_all, any_required, judge, lines_needed_from
from .._threads import Thread, in_thread
from . import operations, recovery, rotation
from .paths import Layout
from .source import FileSource
from .watcher import directory_at

T = TypeVar("T")

# Seconds after which a commit is synced with `SyncMode.EVERY_SECOND`.
SYNC_INTERVAL = 1.0
# Seconds after opening at which temporary files that crashes left are looked for: done at once, this would delay other
# work, such as loading the views' snapshots.
LEFTOVERS_AFTER = 0.5
# Seconds for which a rotated file stays locked: somebody may have opened it and be about to lock it. Small logs may be
# rotated many times meanwhile: then only the last few files stay open.
KEEP_LOCKED, KEPT_FILES = 60.0, 4


class FileCommitter:
    """The exclusive committer of one directory. Get it from `open`; it belongs to that event loop and process."""

    max_commit_size = 64 * 2**20

    def __init__(self, source: FileSource, thread: Thread, sync: SyncMode, max_log_size: int) -> None:
        self.source = source
        self._thread = thread
        self._layout = source.layout
        self._sync_mode = sync
        self._max_log_size = max_log_size
        self._pid = os.getpid()
        self._loop = asyncio.get_running_loop()
        self._rotating = asyncio.Lock()
        self._sync_timer: asyncio.TimerHandle | None = None
        self._old_files_timer: asyncio.TimerHandle | None = None
        self._discarding: asyncio.TimerHandle | None = None
        self._closed = False
        # The following are changed only by calls in the thread, never by two at a time.
        self._opened = False
        self._rotation: rotation.Rotation | None = None
        self._old_files: deque[tuple[int, float]] = deque()  # descriptors, and until when they are kept
        self._failure: WriterFailedError | None = None

    @classmethod
    async def open(cls, source: FileSource, lock: LockMode, sync: SyncMode, max_log_size: int) -> FileCommitter:
        """Opens the directory, after repairing what a crash left unfinished.

        Raises `LogLockedError`, `CorruptLogError`, `OSError`. If cancelled, it opens nothing.
        """
        committer = cls(source, Thread(f"eventfold writer {source.layout.dir}"), sync, max_log_size)
        try:
            await committer._call(committer._open, lock is not LockMode.NONE)
        except BaseException:
            await committer._call(committer._release)
            raise
        committer._close_old_files_later()
        committer._discarding = committer._loop.call_later(
            LEFTOVERS_AFTER, committer._thread.call, _discard_leftovers, committer._layout
        )
        return committer

    def _open(self, lock: bool) -> None:
        self.source.directory = directory_at(self._layout.dir)
        self.active, old_files = recovery.open_log(self._layout, lock)
        self._opened = True
        self._old_files.extend((fd, monotonic() + KEEP_LOCKED) for fd in old_files)

    def __repr__(self) -> str:
        return f"<FileCommitter of {str(self._layout.dir)!r}>"

    def __del__(self) -> None:
        self.abandon()

    def _call(self, function: Callable[..., T], *args: object) -> Awaitable[T]:
        """Calls a function in the thread. Await the result; even if that is cancelled, the call has ended then."""
        if self._closed:
            raise LogClosedError(f"the log in {self._layout.dir} is closed")
        return self._thread.call_when_awaited(function, *args)

    @property
    def head(self) -> Head:
        """The offset after the last line that was committed, and its hash."""
        return self.active.head

    async def commit(self, appends: Sequence[Append]) -> Commit:
        """See `Committer.commit`."""
        before = self.active.head
        if any_required(appends):
            needed = lines_needed_from(appends)
            recent = () if needed is None or needed >= before.offset else await self._call(self.active.lines, needed)
            judgement = judge(appends, before, recent)
        else:
            judgement = accept_all(appends, before)
        if judgement.data:
            always = self._sync_mode is SyncMode.ALWAYS
            await self._call(self._unless_failed, self.active.commit, judgement.data, judgement.head, always)
            if self._sync_mode is SyncMode.EVERY_SECOND and self._sync_timer is None:
                self._sync_timer = self._loop.call_later(SYNC_INTERVAL, self._sync_soon)
        return Commit(judgement.outcomes, Lines(self._layout.log_path, before.offset, judgement.data), judgement.head)

    def _unless_failed(self, function: Callable[..., T], *args: object) -> T:
        """Calls, in the thread, a function that changes the active log; after a failure, nothing is called any more."""
        if self._failure is not None:
            raise copy_error(self._failure)
        try:
            return function(*args)
        except OSError:
            raise
        except WriterFailedError as error:
            self._failure = error.with_traceback(None)
        except BaseException as error:
            self._failure = WriterFailedError(f"{self._layout.log_path}: the writer failed: {error!r}")
            self._failure.__cause__ = error
        raise copy_error(self._failure)

    def _unless_failed_in_background(self, function: Callable[[], object]) -> None:
        """Like `_unless_failed`, for a call that no task awaits."""
        if self._failure is None:
            try:
                self._unless_failed(function)
            except (OSError, WriterFailedError):
                pass  # the next commit raises it, or else closing does

    def _sync_soon(self) -> None:
        self._sync_timer = None
        self._thread.call(self._unless_failed_in_background, self._sync)

    def _sync(self) -> None:
        if self.active.unsynced:
            self.active.sync()

    # Rotation

    @property
    def rotation_is_due(self) -> bool:
        """Whether the active log has `max_log_size` bytes or more."""
        return 0 < self._max_log_size <= self.active.head.offset - self.active.base

    async def rotate(self, *, if_due: bool = False) -> None:
        """See `RotatingCommitter.rotate`. If cancelled, it ends after the current step."""
        async with self._rotating:
            try:
                await in_thread(self._recover)
                if self._rotation is not None:
                    await self._finish_rotation()
                if self.active.head.offset > self.active.base:
                    await self._call(self._unless_failed, self._begin_rotation)
                    await self._finish_rotation()
            finally:
                await self._call(self._leave_rotation)

    async def _finish_rotation(self) -> None:
        assert self._rotation is not None
        await in_thread(self._rotation.archive, self.active)
        await in_thread(self._rotation.catch_up, self.active)
        # In the thread that commits, so that no commit comes in between.
        await self._call(self._unless_failed, self._switch)
        self._close_old_files_later()

    def _recover(self) -> None:
        self._rotation = recovery.recover(self._layout, self.active.fd)

    def _begin_rotation(self) -> None:
        self._rotation = rotation.begin(self._layout, self.active)

    def _switch(self) -> None:
        assert self._rotation is not None
        self._old_files.append((self._rotation.switch(self.active), monotonic() + KEEP_LOCKED))
        self._rotation = None
        if len(self._old_files) > KEPT_FILES:
            os.close(self._old_files.popleft()[0])

    def _leave_rotation(self) -> None:
        """Leaves an unfinished rotation as it is, to be recovered."""
        if self._rotation is not None:
            self._rotation.close()
            self._rotation = None

    def _close_old_files_later(self) -> None:
        if self._old_files and self._old_files_timer is None and not self._closed:
            self._old_files_timer = self._loop.call_later(KEEP_LOCKED, self._close_old_files_soon)

    def _close_old_files_soon(self) -> None:
        self._old_files_timer = None
        self._thread.call(self._close_old_files)
        self._close_old_files_later()

    def _close_old_files(self) -> None:
        while self._old_files and self._old_files[0][1] <= monotonic():
            os.close(self._old_files.popleft()[0])

    # Closing

    async def aclose(self) -> None:
        """See `Committer.aclose`."""
        async with self._rotating:
            if self._closed:
                return
            for timer in (self._sync_timer, self._old_files_timer):
                if timer is not None:
                    timer.cancel()
            if self._discarding is not None and self._discarding.when() > self._loop.time():
                self._discarding.cancel()
                self._thread.call(_discard_leftovers, self._layout)
            closing = self._thread.call(self._close)
            self._closed = True
            await closing

    def _close(self) -> None:
        try:
            if self._failure is None:
                self._unless_failed(self._sync)
            elif self.active.unsynced:
                raise copy_error(self._failure)
        finally:
            self._release()

    def abandon(self) -> None:
        """See `Committer.abandon`."""
        self._release()

    def _release(self) -> None:
        """Releases the lock and closes all files, once; in a forked child, only the child's descriptors."""
        if self._opened:
            self._opened = False
            if self._pid == os.getpid():
                operations.unlock(self.active.fd)
            while self._old_files:
                os.close(self._old_files.popleft()[0])
            self._leave_rotation()
            self.active.close()
        self._thread.end()


def _discard_leftovers(layout: Layout) -> None:
    for path in (layout.dir, layout.views_dir, layout.consumers_dir):
        operations.discard_leftovers(path)
