"""The active log of one of several writers that share a directory.

Each holds a shared flock on `app.jsonl` as long as it has the file open, which keeps exclusive writers out. It reads
and changes the log only while it has the turn.

Promises: a commit is judged by the true end of the log, and written after it, whoever wrote that; what a killed process
left half-written is cut off by the next writer; when a commit returns, everything on which its answers are based is on
disk.
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
from .paths import Layout
from .segments import LogSegments
from .turn import Mark, Turn

_COPY_SIZE = 1024 * 1024
_NOTHING = Head(0, "")


def open_shared_lock(layout: Layout) -> tuple[int, bool]:
    """A descriptor of `app.jsonl`, created if necessary, with a shared flock, and whether nobody else has one.

    Call it in the turn, so that nobody can replace the file. Raises `LogLockedError` if an exclusive writer has it.
    """
    fd = operations.open_regular(layout.log_path, os.O_RDWR | os.O_CREAT)
    try:
        alone = operations.lock(fd)
        if not operations.lock_shared(fd):
            raise LogLockedError(layout.log_path, operations.lock_holder(fd))
        if not os.path.samestat(os.fstat(fd), os.stat(layout.log_path)):
            raise WriterFailedError(f"{layout.log_path} was replaced by a program that does not take turns")
    except BaseException:
        operations.close_locked(fd)
        raise
    return fd, alone


class SharedLog(ActiveLog):
    """The active log of one writer among several. `head` is its end as of this writer's last turn."""

    def __init__(self, layout: Layout, fd: int, turn: Turn, sync_mode: int, base: int, before: Head) -> None:
        """Recovers the log. Call it in the turn."""
        self.turn = turn
        self._sync_mode = sync_mode
        self._name = os.fspath(layout.log_path)
        super().__init__(layout, fd, base, before)
        self.mark_head()
        _open_logs.add(self)

    def mark_head(self) -> None:
        """Records in the mark that the log ends durably at `head`. Call it in the turn."""
        self.turn.own_durable = self.head
        self.turn.write_mark(self._mark(self.head, self.head))

    def _mark(self, written: Head, durable: Head, failed: bool = False) -> Mark:
        return Mark(written, durable, failed, self._sync_mode)

    def close(self) -> None:
        """Closes the file, and so releases the shared lock; idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _recover(self, before: Head) -> Head:
        end = self._cut_torn()
        mark = self.turn.read_mark()
        if mark is not None and mark.failed:
            self._write_again(mark.durable, end)
        # Even if nothing was cut: what a killed process left may be in the page cache only.
        self.sync()
        return self._head_at(end, before)

    def _write_again(self, durable: Head, end: int) -> None:
        """After a failed sync, the kernel considers pages clean that never reached the disk: makes them dirty again."""
        position = max(durable.offset - self.base, 0)
        while position < end:
            data = os.pread(self.fd, min(_COPY_SIZE, end - position), position)
            if not data:
                raise WriterFailedError(f"{self._name} was cut by somebody else while it was recovered")
            operations.write(self.fd, data, position)
            position += len(data)

    # Only in the turn

    def check(self) -> None:
        """Brings `head` up to date: follows a rotation of another writer, and cuts what a killed one left.

        Raises `LogLockedError` if an exclusive writer has come in between, and `WriterFailedError` if the log is not
        the one that was written, or if any process's sync has failed.
        """
        try:
            stat = os.stat(self._name)
        except FileNotFoundError:
            raise WriterFailedError(f"{self._name} was deleted by somebody else") from None
        size, before, followed = stat.st_size, self.head, (stat.st_dev, stat.st_ino) != self._file
        if followed:
            before = self._follow()
            size = os.fstat(self.fd).st_size
        mark = self.turn.read_mark()
        if mark is not None:
            self._check_mark(mark)
        end = self.base + size
        if mark is not None and mark.written.offset == end:
            head = mark.written
        elif not followed and self.head.offset == end:
            head = self.head
        else:
            known = max(self.head.offset, 0 if mark is None else mark.written.offset)
            if end < known:
                raise WriterFailedError(
                    f"{self._name} was changed by somebody else: the log ends at {end}, but it continued to {known}"
                )
            head = self._take_over(before)
        if head.offset < self.head.offset:
            raise WriterFailedError(
                f"{self._name} was changed by somebody else: the log ends at {head.offset}, "
                f"but it continued to {self.head.offset}"
            )
        self.head = head

    def _check_mark(self, mark: Mark) -> None:
        if mark.failed:
            raise WriterFailedError(
                f"{self._name}: a sync failed, in this process or in another one that writes; open the log again"
            )
        if mark.sync_mode != self._sync_mode:
            raise WriterFailedError(f"{self._name}: another process opened the log with another sync mode")

    def _take_over(self, before: Head) -> Head:
        """The last writer was killed before updating the mark: cuts off what it did not finish."""
        size = self._cut_torn()
        self.sync()
        head = self._head_at(size, before)
        self.turn.write_mark(self._mark(head, head))
        return head

    def _follow(self) -> Head:
        """Continues in the file with which another writer's rotation has replaced this one; returns the head at its
        start.
        """
        fd, _ = open_shared_lock(self._layout)
        try:
            # The process that renamed it may have been killed before that was on disk.
            operations.sync_dir(self._layout.dir)
            with LogSegments(self._layout) as segments:
                if segments.damage is not None:
                    raise segments.damage
                base = segments.base
                before = _NOTHING if segments.archive is None else segments.archive.head
            file = identity(fd)
        except BaseException:
            operations.close_locked(fd)
            raise
        old, self.fd, self.base, self._file = self.fd, fd, base, file
        operations.close_locked(old)
        return before

    def replaced_by(self, fd: int, base: int) -> int:
        """See `ActiveLog.replaced_by`. Everything in the new file is on disk then."""
        old = super().replaced_by(fd, base)
        self.turn.write_mark(self._mark(self.head, self.head))
        return old

    # Takes the turn itself

    def keep_up(self) -> None:
        """Follows another writer's rotation, if there was one, so that no deleted file is kept open.

        That also keeps anybody from locking the new file exclusively.
        """
        stat = os.stat(self._name)
        if (stat.st_dev, stat.st_ino) != self._file:
            with self.turn:
                self.check()

    def commit_judged(self, appends: Sequence[Append], always: bool) -> tuple[Head, Judgement]:
        """Appends what is accepted by the true head; returns that head, and the judgement.

        With `always`, all of it is on disk when this returns, and so is whatever caused a refusal: a refused caller
        reads the log again, and must find it.
        """
        with self.turn:
            self.check()
            before, file = self.head, self.fd
            needed = lines_needed_from(appends)
            judgement = judge(appends, before, () if needed is None else self.lines(needed))
            if judgement.data:
                self._write(judgement.data, judgement.head)
            mark = self.turn.read_mark()
            durable = _NOTHING if mark is None else mark.durable
            if not always:
                durable = max(durable, self.head)
            if mark is None or (mark.written, mark.durable) != (self.head, durable):
                self.turn.write_mark(self._mark(self.head, durable))
        if durable.offset < self.head.offset:
            # Without the turn: others write meanwhile, and the kernel combines their syncs with this one.
            self._sync(file)
            self._tell_durable()
        if judgement.data:
            self.turn.announced = self.head
            self.turn.wake_watchers()
        return before, judgement

    def _tell_durable(self) -> None:
        """After a sync, records it in the mark. If that fails, what was committed is on disk anyway."""
        try:
            self.turn.tell_durable(self.head)
        except (OSError, EventfoldError) as error:
            log_event(
                DEBUG, "mark.write_failed", "%(turn)s: the mark was not changed: %(error)s", turn=self.turn, error=error
            )

    def sync(self) -> None:
        """See `ActiveLog.sync`. After a failure, no other writer continues either."""
        self._sync(self.fd)

    def _sync(self, fd: int) -> None:
        try:
            operations.sync(fd)
        except OSError as error:
            self._tell_failed()
            raise WriterFailedError(f"{self._name}: a sync failed: {error}") from error

    def _tell_failed(self) -> None:
        """Tells all writers that a sync failed: nobody may rely on what could not be synced."""
        try:
            with nullcontext() if self.turn.held else self.turn:
                mark = self.turn.read_mark() or self._mark(_NOTHING, _NOTHING)
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


# A forked child would keep its parent's shared lock, even once the parent is dead.
os.register_at_fork(after_in_child=_after_fork)
