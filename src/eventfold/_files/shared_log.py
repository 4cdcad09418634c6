"""The active log of one of several writers that share a directory.

Each writer holds a shared flock on `app.jsonl` while it has the file open, which keeps exclusive writers out. It reads
and changes the log only in its turn.

Promises: a commit is judged by the true end of the log, and written there, no matter which process wrote what is before
it; the next writer cuts off what a killed process did not finish; when a commit returns, everything that its results
depend on is on disk.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from contextlib import nullcontext

from .._errors import EventfoldError, LogLockedError, WriterFailedError
from .._event import Head
from .._judge import Append, Judgement, judge, lines_needed_from
from .._logging import DEBUG, ERROR, log_event
from . import operations
from .active import ActiveLog, identity
from .mark import Mark
from .paths import Layout
from .segments import LogSegments
from .turn import Turn

_COPY_SIZE = 1024 * 1024
_START = Head(0, "")


def open_with_shared_lock(layout: Layout) -> tuple[int, bool]:
    """A descriptor of `app.jsonl` with a shared flock, and whether no other process has one; creates a missing file.

    Call it in the turn, so that nobody can replace the file. Raises `LogLockedError` if an exclusive writer has it.
    """
    fd = operations.open_regular(layout.log_path, os.O_RDWR | os.O_CREAT)
    try:
        is_only_writer = operations.lock(fd)
        if not operations.lock_shared(fd):
            raise LogLockedError(layout.log_path, operations.lock_holder(fd))
        if not os.path.samestat(os.fstat(fd), os.stat(layout.log_path)):
            raise WriterFailedError(f"{layout.log_path} was replaced by another program")
    except BaseException:
        operations.close_locked(fd)
        raise
    return fd, is_only_writer


class SharedLog(ActiveLog):
    """The active log of one writer among several. `head` is its end as of this writer's last turn."""

    def __init__(self, layout: Layout, fd: int, turn: Turn, sync_mode: int, base: int, head_at_base: Head) -> None:
        """Recovers the log. Call it in the turn."""
        self.turn = turn
        self._sync_mode = sync_mode
        super().__init__(layout, fd, base, head_at_base)
        self.record_head()
        _open_logs.add(self)

    def record_head(self) -> None:
        """Records in the mark that the log ends durably at `head`. Call it in the turn."""
        self.turn.synced_head = self.head
        self.turn.write_mark(self._new_mark(self.head, self.head))

    def _new_mark(self, written: Head, durable: Head, failed: bool = False) -> Mark:
        return Mark(written, durable, failed, self._sync_mode)

    def close(self) -> None:
        """Closes the file, and so releases the shared lock; idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _recover(self, head_at_base: Head) -> Head:
        end = self._cut_incomplete()
        mark = self.turn.read_mark()
        if mark is not None and mark.failed:
            self._rewrite_unsynced(mark.durable, end)
        # Even if nothing was cut: what a killed process wrote may be in the page cache only.
        self.sync()
        return self._head_at(end, head_at_base)

    def _rewrite_unsynced(self, durable: Head, end: int) -> None:
        """Makes pages dirty again that the kernel considers clean since a failed sync, but that are not on disk."""
        position = max(durable.offset - self.base, 0)
        while position < end:
            data = os.pread(self.fd, min(_COPY_SIZE, end - position), position)
            if not data:
                raise WriterFailedError(f"{self._path} was truncated by another program while it was recovered")
            operations.write(self.fd, data, position)
            position += len(data)

    # Only in the turn

    def ensure_current(self) -> None:
        """Brings `head` up to date: reopens a rotated log, and cuts off what a killed writer did not finish.

        Raises `LogLockedError` if an exclusive writer has locked the log in between, and `WriterFailedError` if another
        program has changed the log, or if the sync of any writer has failed.
        """
        try:
            stat = os.stat(self._path)
        except FileNotFoundError:
            raise WriterFailedError(f"{self._path} was deleted by another program") from None
        size, head_at_base, rotated = stat.st_size, self.head, (stat.st_dev, stat.st_ino) != self._identity
        if rotated:
            head_at_base = self._reopen()
            size = os.fstat(self.fd).st_size
        mark = self.turn.read_mark()
        if mark is not None:
            self._check_mark(mark)
        end = self.base + size
        if mark is not None and mark.written.offset == end:
            head = mark.written
        elif not rotated and self.head.offset == end:
            head = self.head
        else:
            self._check_not_shorter(end, max(self.head.offset, 0 if mark is None else mark.written.offset))
            head = self._cut_unfinished(head_at_base)
        self._check_not_shorter(head.offset, self.head.offset)
        self.head = head

    def _check_not_shorter(self, end: int, known_end: int) -> None:
        if end < known_end:
            raise WriterFailedError(
                f"{self._path} was changed by another program: the log ends at {end}, but it continued to {known_end}"
            )

    def _check_mark(self, mark: Mark) -> None:
        if mark.failed:
            raise WriterFailedError(
                f"{self._path}: a sync failed, in this process or in another one that writes; open the log again"
            )
        if mark.sync_mode != self._sync_mode:
            raise WriterFailedError(f"{self._path}: another process opened the log with a different sync mode")

    def _cut_unfinished(self, head_at_base: Head) -> Head:
        """Cuts off what the last writer did not finish, which was killed before it updated the mark."""
        size = self._cut_incomplete()
        self.sync()
        head = self._head_at(size, head_at_base)
        self.turn.write_mark(self._new_mark(head, head))
        return head

    def _reopen(self) -> Head:
        """Continues in the file that replaced this one in another writer's rotation; returns the head at its base."""
        fd, _ = open_with_shared_lock(self._layout)
        try:
            # The process that renamed it may have been killed before the rename was on disk.
            operations.sync_dir(self._layout.dir)
            with LogSegments(self._layout) as segments:
                if segments.damage is not None:
                    raise segments.damage
                base = segments.base
                head_at_base = _START if segments.archive is None else segments.archive.head
            new_identity = identity(fd)
        except BaseException:
            operations.close_locked(fd)
            raise
        old, self.fd, self.base, self._identity = self.fd, fd, base, new_identity
        operations.close_locked(old)
        return head_at_base

    def switch_to(self, fd: int, base: int) -> int:
        """See `ActiveLog.switch_to`. Everything in the new file must be on disk."""
        old = super().switch_to(fd, base)
        self.turn.write_mark(self._new_mark(self.head, self.head))
        return old

    # Takes the turn itself

    def follow_rotation(self) -> None:
        """Reopens the log if another writer has rotated it, so that no deleted file stays open.

        The shared lock on the new file also keeps exclusive writers out.
        """
        stat = os.stat(self._path)
        if (stat.st_dev, stat.st_ino) != self._identity:
            with self.turn:
                self.ensure_current()

    def commit_judged(self, appends: Sequence[Append], always: bool) -> tuple[Head, Judgement]:
        """Judges appends by the true head, and writes those that are accepted; returns that head and the judgement.

        With `always`, they are on disk when this returns, and so are the lines that caused a refusal: a refused caller
        reads the log again, and must find them.
        """
        with self.turn:
            self.ensure_current()
            previous_head, fd = self.head, self.fd
            needed = lines_needed_from(appends)
            judgement = judge(appends, previous_head, () if needed is None else self.lines(needed))
            if judgement.data:
                self._write(judgement.data, judgement.head)
            mark = self.turn.read_mark()
            durable = _START if mark is None else mark.durable
            if not always:
                durable = max(durable, self.head)
            if mark is None or (mark.written, mark.durable) != (self.head, durable):
                self.turn.write_mark(self._new_mark(self.head, durable))
        if durable.offset < self.head.offset:
            # Outside the turn: other processes write meanwhile, and the kernel combines their syncs with this one.
            self._sync(fd)
            self._record_durable()
        if judgement.data:
            self.unsynced = self.unsynced or not always
            self.turn.committed_head = self.head
            self.turn.wake_watchers()
        return previous_head, judgement

    def _record_durable(self) -> None:
        """Records a sync in the mark. If that fails, what was committed is on disk anyway."""
        try:
            self.turn.record_durable(self.head)
        except (OSError, EventfoldError) as error:
            log_event(
                DEBUG, "mark.write_failed", "%(turn)s: the mark was not changed: %(error)s", turn=self.turn, error=error
            )

    def sync(self) -> None:
        """See `ActiveLog.sync`. After a failure, the other writers stop writing too."""
        self._sync(self.fd)
        self.unsynced = False

    def _sync(self, fd: int) -> None:
        try:
            operations.sync(fd)
        except OSError as error:
            self._record_failure()
            raise WriterFailedError(f"{self._path}: a sync failed: {error}") from error

    def _record_failure(self) -> None:
        """Records in the mark that a sync failed, so that no writer relies on what could not be synced."""
        try:
            with nullcontext() if self.turn.held else self.turn:
                mark = self.turn.read_mark() or self._new_mark(_START, _START)
                self.turn.write_mark(mark._replace(failed=True))
        except (OSError, EventfoldError) as error:
            log_event(
                ERROR,
                "mark.failure_not_told",
                "%(turn)s: other writers could not be informed of a failed sync: %(error)s",
                turn=self.turn,
                error=error,
            )


_open_logs: weakref.WeakSet[SharedLog] = weakref.WeakSet()


def _after_fork() -> None:
    for log in list(_open_logs):
        log.close()


# A forked child would keep its parent's shared lock, even after the parent has died.
os.register_at_fork(after_in_child=_after_fork)
