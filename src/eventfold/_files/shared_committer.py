"""A directory of plain files as the `Committer` of one of several processes that share it.

It differs from the exclusive committer in three ways: a commit is judged in the thread, in the turn; another process
may rotate the log; and a process may be stopped (SIGSTOP, a frozen container) while it has the turn. The turn can't be
taken away from such a process, but waiting for it ends if an opening is cancelled, or if the log is closed.

Promises: what `Committer.commit` promises holds for the commits of all processes together; a log that another process
has rotated is reopened within about a second, even if nothing is appended; while the turn is stuck, a warning says who
has it, and the log can be closed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, TypeVar
from weakref import ref

import anyio

from .._codec.lines import Lines
from .._engine import Commit, LockMode, SyncMode
from .._errors import LogClosedError, LogLockedError, WriterFailedError, copy_error
from .._event import Head
from .._judge import Append, Judgement
from .._threads import Thread, ThreadCall
from . import operations, shared_rotation
from .committer import KEEP_LOCKED, KEPT_FILES, SYNC_INTERVAL, FileCommitter
from .rotation import Rotation, warn_unfinished
from .shared_log import SharedLog
from .source import FileSource
from .turn import STUCK_AFTER, Turn
from .watcher import directory_at

T = TypeVar("T")

# Seconds between two checks of whether another process has rotated the log.
ROTATION_CHECK_INTERVAL = 1.0
# Seconds between two checks of whether another process is still rotating.
ROTATION_POLL_INTERVAL = 0.05
# Seconds between two checks, during closing, of whether the turn is stuck.
STUCK_POLL_INTERVAL = 0.1
_SYNC_MODES = list(SyncMode)


class SharedCommitter(FileCommitter):
    """The committer of one of several processes. Get it from `open`; it belongs to that event loop and process."""

    active: SharedLog

    def __init__(self, source: FileSource, thread: Thread, sync: SyncMode, max_log_size: int) -> None:
        super().__init__(source, thread, sync, max_log_size)
        self._turn: Turn | None = None
        self._gave_up = False
        self._closing = False
        self._calls: set[ThreadCall[Any]] = set()
        self._rotation_check_timer: asyncio.TimerHandle | None = None
        self._no_rotation_before = 0.0

    @classmethod
    async def open(cls, source: FileSource, lock: LockMode, sync: SyncMode, max_log_size: int) -> SharedCommitter:
        """Opens the directory, after repairing what a crash left unfinished.

        Raises `LogLockedError` if an exclusive writer, or a shared one with a different sync mode, has the log open,
        `CorruptLogError`, `OSError`. If cancelled, it opens nothing, even while the turn is stuck.
        """
        committer = cls(source, Thread(f"eventfold writer {source.layout.dir}"), sync, max_log_size)
        opening = committer._thread.call(committer._open, True)
        try:
            while not opening.done():
                with anyio.move_on_after(STUCK_AFTER):
                    await opening.settled()
                committer._warn_if_stuck()
            opening.result()
        except BaseException:
            released = committer._thread.call(committer._release)
            if not committer._stop_waiting():
                await released
            raise
        committer._close_old_files_later()
        committer._schedule_rotation_check()
        return committer

    def _open(self, lock: bool) -> None:
        self.source.directory = directory_at(self._layout.dir)
        operations.make_dir(self._layout.dir)
        turn = self._turn = Turn(self._layout)
        try:
            if self._gave_up:
                turn.give_up()
            self.active, self._rotation = shared_rotation.open_shared(
                self._layout, turn, _SYNC_MODES.index(self._sync_mode)
            )
        except BaseException:
            turn.close()
            raise
        self._opened = True
        self.source.directory.add_shared_writer(turn)
        if self._rotation is not None:
            self._complete_interrupted(self._rotation)

    def _complete_interrupted(self, interrupted: Rotation) -> None:
        try:
            interrupted.archive(self.active)
            self._switch()
        except OSError as error:
            warn_unfinished(interrupted, error)
        finally:
            self._leave_rotation()

    def __repr__(self) -> str:
        return f"<SharedCommitter of {str(self._layout.dir)!r}>"

    async def _call(self, function: Callable[..., T], *args: object) -> T:
        if self._closed:
            raise LogClosedError(f"the log in {self._layout.dir} is closed")
        start = self._thread.call if self._gave_up else self._thread.call_when_awaited
        call = start(function, *args)
        self._calls.add(call)
        if self._gave_up:
            self._fail_calls()
        try:
            return await call
        finally:
            self._calls.discard(call)

    @property
    def head(self) -> Head:
        """The end of what all writers have synced, as far as the mark says. No I/O."""
        durable = None if self._turn is None else self._turn.durable_head()
        return self.active.head if durable is None else durable

    async def commit(self, appends: Sequence[Append]) -> Commit:
        """See `Committer.commit`."""
        previous_head, judgement = await self._call(self._unless_failed, self._commit_in_turn, appends)
        if judgement.data and self._sync_mode is SyncMode.EVERY_SECOND and self._sync_timer is None:
            self._sync_timer = self._loop.call_later(SYNC_INTERVAL, self._sync_soon)
        lines = Lines(self._layout.log_path, previous_head.offset, judgement.data)
        return Commit(judgement.outcomes, lines, judgement.head)

    def _commit_in_turn(self, appends: Sequence[Append]) -> tuple[Head, Judgement]:
        try:
            return self.active.commit_judged(appends, self._sync_mode is SyncMode.ALWAYS)
        except LogLockedError as error:
            # An exclusive writer locked the new active log after a rotation, before any shared one had opened it.
            # This is not a failure: once that writer closes the log, appending works again.
            head = self.active.head
            return head, Judgement([copy_error(error) for _ in appends], b"", head)

    # Rotations of other processes

    def _schedule_rotation_check(self) -> None:
        this = ref(self)

        def check() -> None:
            if (committer := this()) is not None and not committer._closed:
                committer._check_for_rotation()
                committer._schedule_rotation_check()

        self._rotation_check_timer = self._loop.call_later(ROTATION_CHECK_INTERVAL, check)

    def _check_for_rotation(self) -> None:
        self._warn_if_stuck()
        if not self._calls:  # otherwise the thread is busy with a call that notices a rotation anyway
            self._thread.call(self._unless_failed_in_background, self._follow_rotation)

    def _follow_rotation(self) -> None:
        try:
            self.active.follow_rotation()
        except LogLockedError:
            pass  # the next commit raises it

    # A turn that is stuck

    def _warn_if_stuck(self) -> None:
        if self._turn is not None:
            self._turn.warn_if_stuck()

    def _stop_waiting(self) -> bool:
        """Stops waiting for the turn; returns whether the thread is blocked, and so must not be waited for."""
        self._gave_up = True
        return self._turn is not None and self._turn.give_up()

    def begin_closing(self) -> None:
        """See `ClosingCommitter.begin_closing`."""
        self._closing = True
        self._give_up_if_stuck()

    def _give_up_if_stuck(self) -> None:
        if not self._opened or self._gave_up or self._turn is None:
            return
        if self._turn.seconds_waiting() < STUCK_AFTER:
            self._loop.call_later(STUCK_POLL_INTERVAL, self._give_up_if_stuck)
            return
        self._turn.warn_if_stuck()
        if self._stop_waiting():
            self._fail_calls()

    def _fail_calls(self) -> None:
        """Fails the calls that wait for the thread, which may be blocked forever."""
        why = f"the log in {self._layout.dir} is closed" if self._turn is None else self._turn.given_up_message()
        for call in self._calls:
            call.settle(None, WriterFailedError(why))

    # Rotation

    @property
    def rotation_is_due(self) -> bool:
        """Whether the active log has `max_log_size` bytes or more, and no other process was rotating it just now."""
        return super().rotation_is_due and monotonic() >= self._no_rotation_before

    async def rotate(self, *, if_due: bool = False) -> None:
        """See `RotatingCommitter.rotate`. Unless `if_due`, waits while another process is rotating."""
        # After another rotation, an automatic one is not worthwhile for the few lines that were appended since.
        goal = self.active.base + 1 if if_due else self.head.offset
        async with self._rotating:
            try:
                while not self._closing:
                    if not await self._call(self._unless_failed, self._begin_shared_rotation, goal):
                        if if_due:
                            self._no_rotation_before = monotonic() + ROTATION_POLL_INTERVAL
                            break
                        await asyncio.sleep(ROTATION_POLL_INTERVAL)
                    elif self._rotation is None:
                        break
                    else:
                        await self._finish_rotation()
            finally:
                await self._call(self._leave_rotation)

    def _begin_shared_rotation(self, goal: int) -> bool:
        """Begins a rotation; false if another process is rotating."""
        try:
            self._rotation = shared_rotation.begin(self._layout, self.active, goal)
        except shared_rotation.AlreadyRotatingError:
            return False
        return True

    def _switch(self) -> None:
        assert self._rotation is not None
        self._old_files.append((shared_rotation.switch(self._rotation, self.active), monotonic() + KEEP_LOCKED))
        self._rotation = None
        if len(self._old_files) > KEPT_FILES:
            os.close(self._old_files.popleft()[0])

    # Closing

    async def aclose(self) -> None:
        """See `Committer.aclose`. Gives up waiting for a stuck turn; files are then closed once the turn is free."""
        self.begin_closing()
        async with self._rotating:
            if self._closed:
                return
            for timer in (self._sync_timer, self._old_files_timer, self._rotation_check_timer):
                if timer is not None:
                    timer.cancel()
            closing = self._thread.call(self._close)
            self._closed = True
            self._calls.add(closing)
            if self._gave_up:
                self._fail_calls()
            try:
                await closing
            except WriterFailedError:
                # If waiting was given up, the waiting calls have failed, and only unsynced appends are at risk.
                if self.active.unsynced or not self._gave_up:
                    raise

    def _release(self) -> None:
        if self._opened and self.source.directory is not None and self._turn is not None:
            self.source.directory.remove_shared_writer(self._turn)
        super()._release()
        if self._turn is not None:
            self._turn.close()
