"""The active log of one of several writers that share a directory.

Each holds a shared flock on `app.jsonl` as long as it has it open, which keeps exclusive writers out. It looks at the
log, and changes it, only while it has the turn.

Promises: a commit is judged by the true end of the log, and written behind it, whoever wrote it; what a killed process
left half-written is cut by whoever comes next; when a commit returns, all that its answers rest on is on disk.
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
    """A descriptor of `app.jsonl`, created if need be, with a shared flock, and whether nobody else has one.

    Only in one's turn, in which nobody can replace the file. Raises `LogLockedError` where an exclusive writer has it.
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
        """Recovers the log. Call it in one's turn."""
        self.turn = turn
        self._sync_mode = sync_mode
        self._name = os.fspath(layout.log_path)
        super().__init__(layout, fd, base, before)
        self.mark_head()
        _open_logs.add(self)

    def mark_head(self) -> None:
        """Says in the mark that the log ends at `head`, durably. Call it in one's turn."""
        self.turn.own_durable = self.head
        self.turn.write_mark(self._mark(self.head, self.head))

    def _mark(self, written: Head, durable: Head, failed: bool = False) -> Mark:
        return Mark(written, durable, failed, self._sync_mode)

    def close(self) -> None:
        """Closes the file, and so lets the shared lock go; idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _recover(self, before: Head) -> Head:
        end = self._cut_torn()
        mark = self.turn.read_mark()
        if mark is not None and mark.failed:
            self._write_again(mark.durable, end)
        # Also where nothing was cut: what a killed process left may be in the page cache only.
        self.sync()
        return self._head_at(end, before)

    def _write_again(self, durable: Head, end: int) -> None:
        """After a failed sync the kernel takes pages for clean that never got to the disk: makes them dirty again."""
        position = max(durable.offset - self.base, 0)
        while position < end:
            data = os.pread(self.fd, min(_COPY_SIZE, end - position), position)
            if not data:
                raise WriterFailedError(f"{self._name} was cut by somebody else while it was recovered")
            operations.write(self.fd, data, position)
            position += len(data)

    # Only in one's turn

    def check(self) -> None:
        """Brings `head` up to date: follows a rotation of another writer, and cuts what a killed one left.

        Raises `LogLockedError` where an exclusive writer has come in between, and `WriterFailedError` where the log is
        not the one that was written, or where anybody's sync has failed.
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
                    f"{self._name} was changed by somebody else: the log ends at {end}, and it went on to {known}"
                )
            head = self._take_over(before)
        if head.offset < self.head.offset:
            raise WriterFailedError(
                f"{self._name} was changed by somebody else: the log ends at {head.offset}, "
                f"and it went on to {self.head.offset}"
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
        """Whoever wrote last was killed before the mark said so: cuts what it did not finish."""
        size = self._cut_torn()
        self.sync()
        head = self._head_at(size, before)
        self.turn.write_mark(self._mark(head, head))
        return head

    def _follow(self) -> Head:
        """Goes on in the file with which another writer's rotation has replaced this one; the head at its beginning."""
        fd, _ = open_shared_lock(self._layout)
        try:
            # Whoever renamed it may have been killed before that was on disk.
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
        """See `ActiveLog.replaced_by`. All that the new file holds is on disk then."""
        old = super().replaced_by(fd, base)
        self.turn.write_mark(self._mark(self.head, self.head))
        return old

    # Takes the turn itself

    def keep_up(self) -> None:
        """Follows a rotation of another's, if there was one, so that no deleted file is kept open.

        And so that nobody can lock the new file exclusively.
        """
        stat = os.stat(self._name)
        if (stat.st_dev, stat.st_ino) != self._file:
            with self.turn:
                self.check()

    def commit_judged(self, appends: Sequence[Append], always: bool) -> tuple[Head, Judgement]:
        """Appends what holds by the true head; that head, and the judgement.

        With `always`, all of it is on disk when this returns, and so is whatever a refused append was judged by: who
        is refused looks again, and must find it.
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
            # With no turn held: others write meanwhile, and the kernel joins their syncs with this one.
            self._sync(file)
            self._tell_durable()
        if judgement.data:
            self.turn.wake_watchers()
        return before, judgement

    def _tell_durable(self) -> None:
        """After a sync, says so in the mark. Where that fails, what was committed is on disk all the same."""
        try:
            self.turn.tell_durable(self.head)
        except (OSError, EventfoldError) as error:
            log_event(
                DEBUG, "mark.write_failed", "%(turn)s: the mark was not changed: %(error)s", turn=self.turn, error=error
            )

    def sync(self) -> None:
        """See `ActiveLog.sync`. After a failure no other writer goes on either."""
        self._sync(self.fd)

    def _sync(self, fd: int) -> None:
        try:
            operations.sync(fd)
        except OSError as error:
            self._tell_failed()
            raise WriterFailedError(f"{self._name}: a sync failed: {error}") from error

    def _tell_failed(self) -> None:
        """Nobody may build on what could not be brought to the disk."""
        try:
            with nullcontext() if self.turn.held else self.turn:
                mark = self.turn.read_mark() or self._mark(_NOTHING, _NOTHING)
                self.turn.write_mark(mark._replace(failed=True))
        except (OSError, EventfoldError) as error:
            log_event(
                ERROR,
                "mark.failure_not_told",
                "%(turn)s: other writers could not be told of a failed sync: %(error)s",
                turn=self.turn,
                error=error,
            )


_open_logs: weakref.WeakSet[SharedLog] = weakref.WeakSet()


def _after_fork() -> None:
    for log in list(_open_logs):
        log.close()


# A forked child would keep the shared lock of its parent, also once the parent is dead.
os.register_at_fork(after_in_child=_after_fork)
