"""The turn of writers that share a directory: the exclusive flock on `app.jsonl.lock`.

Only the writer that has the turn may append to the active log or replace it. A writer has the turn for microseconds,
never while it syncs an append, and the kernel takes the turn from a process that dies. The file is never renamed or
deleted. It begins with the mark (see `mark`), which says where the log ends and how far it is on disk.

Promises: the mark is read without a system call that could block, even from an event loop; a process that dies while it
writes the mark leaves the previous one; a forked child does not keep its parent's turn; another thread can stop a
thread from waiting for the turn. The mark only saves work, and safety does not depend on it: a writer that opens the
log reads its end from the log itself.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
import threading
import time
import weakref

from .._errors import CorruptLogError, EventfoldError, WriterFailedError
from .._event import Head
from .._logging import WARNING, log_event
from . import operations
from .mark import MARK_SIZE, Mark, decode_mark, encode_mark
from .paths import Layout

FILE_SIZE = 4096
STUCK_AFTER = 5.0
"""Seconds of waiting for the turn after which a warning says who has it."""

_HOLDER = struct.Struct("<Q")
_HOLDER_POSITION = 256


class TurnGivenUpError(EventfoldError):
    """Waiting for the turn was given up, so this writer does not have it."""


class Turn:
    """The turn, as one writer takes it: `with turn:` waits for it, and has it inside the block.

    Only one thread may take it. Any thread may call `durable_head`, `give_up`, `seconds_waiting` and `warn_if_stuck`.
    """

    def __init__(self, layout: Layout) -> None:
        """Opens the file, and creates it if necessary. Raises `OSError`, or `CorruptLogError` if it is not a file."""
        self.path = layout.lock_path
        self._path = os.fspath(self.path)
        self.fd = operations.open_file(self.path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)
        try:
            status = os.fstat(self.fd)
            if not stat.S_ISREG(status.st_mode):
                reason = "this is not a regular file, and can't be locked; remove it while nobody writes"
                raise CorruptLogError(self.path, 0, reason)
        except BaseException:
            os.close(self.fd)
            raise
        self._identity = status.st_dev, status.st_ino
        self._map: mmap.mmap | None = None
        # The bytes that were last read, and the decoded mark: usually, nobody else has changed them since.
        self._decoded: tuple[bytes, tuple[int, Mark] | None] = b"", None
        # The sequence number and the mark while this writer has the turn: nobody else can change them then.
        self._current: tuple[int, Mark] | None = None
        self._holder = _HOLDER.pack(os.getpid())
        self.held = False
        # What this writer itself has synced, even if the mark could not be updated.
        self.synced_head = Head(0, "")
        # The head after this writer's last commit, set once it is durable. This process publishes it, with the lines.
        self.committed_head = Head(0, "")
        self._lock = threading.Lock()
        self._waiting_since: float | None = None
        self._warned_wait: float | None = None
        self._given_up = False
        _open_turns.add(self)

    def __repr__(self) -> str:
        return f"<Turn of {self._path!r}{', held' if self.held else ''}>"

    def __enter__(self) -> Turn:
        self._acquire()
        try:
            self._check_file()
            self._begin()
        except BaseException:
            operations.unlock(self.fd)
            raise
        self.held = True
        return self

    def __exit__(self, *_: object) -> None:
        self.held = False
        operations.unlock(self.fd)

    def _acquire(self) -> None:
        if not self._try_acquire():
            self._wait()

    def _try_acquire(self) -> bool:
        if self._given_up:
            raise TurnGivenUpError(self.given_up_message())
        return operations.lock(self.fd)

    def _wait(self) -> None:
        with self._lock:
            if self._given_up:
                raise TurnGivenUpError(self.given_up_message())
            self._waiting_since = time.monotonic()
        try:
            operations.wait_for_lock(self.fd)
        finally:
            with self._lock:
                self._waiting_since = None
        if self._given_up:
            operations.unlock(self.fd)
            raise TurnGivenUpError(self.given_up_message())

    def _check_file(self) -> None:
        """Checks, with the flock held, that the path still names this file: other writers lock whatever it names."""
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            status = None
        if status is None or (status.st_dev, status.st_ino) != self._identity:
            raise WriterFailedError(
                f"{self.path} was deleted or replaced, so others may be writing at the same time; open the log again"
            )
        if status.st_size < FILE_SIZE:
            # Written, not just extended, so that disk space is allocated: writing to a mapped hole can fail.
            operations.write(self.fd, bytes(FILE_SIZE - status.st_size), status.st_size)

    def _begin(self) -> None:
        """Records which process has the turn, and reads the mark. Needs the flock, and a file of full size."""
        memory = self._mapped()
        operations.write_mapped(memory, self._holder, _HOLDER_POSITION)
        self._current = self._read(memory)

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            # A separate descriptor: a mapping duplicates its descriptor, which would keep the flock while it lives.
            fd = operations.open_file(self.path, os.O_RDWR)
            try:
                self._map = mmap.mmap(fd, FILE_SIZE)
            finally:
                os.close(fd)
        return self._map

    def _is_readable(self) -> bool:
        """Whether the mapping can be accessed: beyond the end of a truncated file, that would raise SIGBUS."""
        try:
            return self._map is not None and self.fd >= 0 and os.fstat(self.fd).st_size >= FILE_SIZE
        except OSError:  # closed by another thread
            return False

    def close(self) -> None:
        """Closes the file, and so ends the turn, unless a forked process has the file open too; idempotent."""
        fd, self.fd = self.fd, -1
        if self._map is not None:
            self._map.close()
        if fd >= 0:
            os.close(fd)

    # The mark

    def read_mark(self) -> Mark | None:
        """The newest intact version of the mark; None if there is none."""
        if self.held:
            found = self._current
        elif not self._is_readable():
            return None
        else:
            assert self._map is not None
            try:
                found = self._read(self._map)
            except ValueError:  # closed by another thread
                return None
        return None if found is None else found[1]

    def _read(self, memory: mmap.mmap) -> tuple[int, Mark] | None:
        data = memory[:MARK_SIZE]
        decoded_data, newest = self._decoded
        if data != decoded_data:
            newest = decode_mark(data)
            self._decoded = data, newest
        return newest

    def write_mark(self, mark: Mark) -> None:
        """Replaces the older version of the mark. Call it in the turn."""
        sequence = 1 if self._current is None else self._current[0] + 1
        position, data = encode_mark(sequence, mark)
        memory = self._mapped()
        # Not a system call: after one, this thread might wait for the interpreter, and all writers for the turn.
        operations.write_mapped(memory, data, position)
        self._current = sequence, mark
        self._decoded = memory[:MARK_SIZE], self._current

    def record_durable(self, head: Head) -> None:
        """Records in the mark that everything up to `head` is on disk, unless it says so already; takes the turn.

        `head` must be this writer's own end: what another one wrote after it may not be on disk yet. This method does
        not check that the path still names this file. Nothing is decided here, and a writer that has opened a deleted
        file notices that in its next turn.
        """
        self.synced_head = head
        if not self._try_acquire():
            mark = self.read_mark()
            if mark is not None and mark.durable.offset >= head.offset:
                return
            self._wait()
        try:
            if self._is_readable():
                self._begin()
                if self._current is not None:
                    _, (written, durable, failed, sync_mode) = self._current
                    if durable.offset < head.offset:
                        self.write_mark(Mark(written, head, failed, sync_mode))
        finally:
            operations.unlock(self.fd)

    def durable_head(self) -> Head | None:
        """The end of what all writers have synced, as far as is known; None once closed."""
        if self.fd < 0:
            return None
        mark = self.read_mark()
        return self.synced_head if mark is None else max(mark.durable, self.synced_head)

    def wake_watchers(self) -> None:
        """Causes a file-system event for processes that watch the directory. Don't call it in the turn."""
        try:
            operations.write(self.fd, b"\0", FILE_SIZE - 1)
        except OSError:
            pass  # without the event, they notice the change at their next regular check

    # Waiting too long

    def give_up(self) -> bool:
        """Stops waiting for the turn, now and in the future; returns whether a thread is waiting at this moment.

        That thread can't be interrupted, and may wait forever: don't wait for it. If it gets the turn after all, it
        ends the turn at once.
        """
        with self._lock:
            self._given_up = True
            return self._waiting_since is not None

    def given_up_message(self) -> str:
        """The message for calls that needed the turn."""
        return f"{self.path}: the turn to write was held by {self._describe_holder()}, and waiting for it was given up"

    def seconds_waiting(self) -> float:
        """For how many seconds a thread has been waiting; 0 if none is."""
        since = self._waiting_since
        return 0.0 if since is None else time.monotonic() - since

    def warn_if_stuck(self) -> None:
        """Logs a warning, once, if a thread has been waiting for longer than `STUCK_AFTER` seconds."""
        since = self._waiting_since
        if since is None or since == self._warned_wait or time.monotonic() - since < STUCK_AFTER:
            return
        self._warned_wait = since
        log_event(
            WARNING,
            "turn.stuck",
            "%(path)s: nobody can append, because %(holder)s has held the turn to write for more than %(seconds).0f "
            "seconds. Is it stopped? Appends continue once it continues or is killed",
            path=self.path,
            holder=self._describe_holder(),
            seconds=STUCK_AFTER,
        )

    def _describe_holder(self) -> str:
        pid = 0
        try:
            if self._is_readable():
                assert self._map is not None
                (pid,) = _HOLDER.unpack_from(self._map[_HOLDER_POSITION : _HOLDER_POSITION + _HOLDER.size])
            else:
                (pid,) = _HOLDER.unpack(os.pread(self.fd, _HOLDER.size, _HOLDER_POSITION))
        except (OSError, ValueError, struct.error):
            pass
        return f"process {pid}" if pid else "another process"


_open_turns: weakref.WeakSet[Turn] = weakref.WeakSet()


def _after_fork() -> None:
    for turn in list(_open_turns):
        turn.close()


# A forked child would keep the turn that its parent had at the fork, even after the parent has died.
os.register_at_fork(after_in_child=_after_fork)
