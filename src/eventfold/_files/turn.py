"""The turn of writers that share a directory: `app.jsonl.lock`, the exclusive flock on it, and the mark inside.

Whoever holds the flock has the turn: nobody else appends, or replaces the active log, meanwhile. It is held for some
microseconds, never during the sync of an append, and the kernel takes it from a process that dies. The file is never
renamed or deleted. Its first bytes are the mark, which says where the log ends and up to where it is on disk.

Promises: the mark is read without a system call that could block, also from an event loop; a process that dies while
it writes the mark leaves the one before; a forked child does not keep the turn of its parent; waiting for the turn can
be given up from another thread. The mark saves work, and safety does not rest on it: whoever opens the log reads its
end from the log itself.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
import threading
import time
import weakref
from typing import Any, NamedTuple

import xxhash

from .._errors import CorruptLogError, EventfoldError, WriterFailedError
from .._event import Head
from .._logging import WARNING, log_event
from . import operations
from .paths import Layout

FILE_SIZE = 4096
STUCK_AFTER = 5.0
"""Seconds of waiting for the turn after which a warning says who holds it."""

_MAGIC = b"EVTMARK\1"
_BODY = struct.Struct("<8sQQQQQBB6x")  # magic, sequence, written and durable (offset, hash), failed, sync mode
_CHECK = struct.Struct("<Q")
_VERSION_SIZE = _BODY.size + _CHECK.size
_VERSION_POSITIONS = (0, 128)
_MARK_END = _VERSION_POSITIONS[1] + _VERSION_SIZE
_HOLDER = struct.Struct("<Q")
_HOLDER_POSITION = 256


class Mark(NamedTuple):
    """Where the log ends, up to where it is on disk, whether a sync has failed since the log was last opened.

    `sync_mode` is a number for the `SyncMode` of all who write.
    """

    written: Head
    durable: Head
    failed: bool = False
    sync_mode: int = 0


class TurnGivenUpError(EventfoldError):
    """The turn was not waited for any longer, and is not held."""


def _encode(sequence: int, mark: Mark) -> bytes:
    (written, written_hash), (durable, durable_hash), failed, sync_mode = mark
    hashes = int(written_hash or "0", 16), int(durable_hash or "0", 16)
    body = _BODY.pack(_MAGIC, sequence, written, hashes[0], durable, hashes[1], failed, sync_mode)
    return body + _CHECK.pack(xxhash.xxh64_intdigest(body))


def _head(offset: int, hash: int) -> Head:
    return Head(offset, f"{hash:016x}" if offset else "")


def _decode(data: bytes) -> tuple[int, Mark] | None:
    """The sequence number and the mark of the newest version that is whole; None where there is none."""
    newest: tuple[Any, ...] | None = None
    for position in _VERSION_POSITIONS:
        fields = _BODY.unpack_from(data, position)
        if fields[0] == _MAGIC and (newest is None or fields[1] > newest[1]):
            body = data[position : position + _BODY.size]
            if _CHECK.unpack_from(data, position + _BODY.size)[0] == xxhash.xxh64_intdigest(body):
                newest = fields
    if newest is None:
        return None
    _, sequence, written, written_hash, durable, durable_hash, failed, sync_mode = newest
    return sequence, Mark(_head(written, written_hash), _head(durable, durable_hash), bool(failed), sync_mode)


class Turn:
    """The turn, as one writer takes it: `with turn:` waits for it, and holds it inside.

    One thread takes it; `durable_head`, `give_up` and `warn_if_stuck` are for any thread.
    """

    def __init__(self, layout: Layout) -> None:
        """Opens the file, which is created if need be. Raises `OSError`, `CorruptLogError` for what is no file."""
        self.path = layout.lock_path
        self._name = os.fspath(self.path)
        self.fd = operations.open_file(self.path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)
        try:
            found = os.fstat(self.fd)
            if not stat.S_ISREG(found.st_mode):
                reason = "this is no regular file, and can't be locked; remove it while nobody writes"
                raise CorruptLogError(self.path, 0, reason)
        except BaseException:
            os.close(self.fd)
            raise
        self._file = found.st_dev, found.st_ino
        self._map: mmap.mmap | None = None
        # What was read last, and what it means: mostly, nobody else has changed it since.
        self._known: tuple[bytes, tuple[int, Mark] | None] = b"", None
        # While the turn is held, only this writer changes the mark: what it is then, with its sequence number.
        self._current: tuple[int, Mark] | None = None
        self._holder = _HOLDER.pack(os.getpid())
        self.held = False
        # What this writer has brought to the disk itself, also where the mark could not be changed to say so.
        self.own_durable = Head(0, "")
        self._state = threading.Lock()
        self._waiting_since: float | None = None
        self._warned_of: float | None = None
        self._given_up = False
        _open_turns.add(self)

    def __repr__(self) -> str:
        return f"<Turn of {self._name!r}{', held' if self.held else ''}>"

    def __enter__(self) -> Turn:
        self._take()
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

    def _take(self) -> None:
        if not self._take_if_free():
            self._wait()

    def _take_if_free(self) -> bool:
        if self._given_up:
            raise TurnGivenUpError(self.why_given_up())
        return operations.lock(self.fd)

    def _wait(self) -> None:
        with self._state:
            if self._given_up:
                raise TurnGivenUpError(self.why_given_up())
            self._waiting_since = time.monotonic()
        try:
            operations.wait_for_lock(self.fd)
        finally:
            with self._state:
                self._waiting_since = None
        if self._given_up:
            operations.unlock(self.fd)
            raise TurnGivenUpError(self.why_given_up())

    def _check_file(self) -> None:
        """Once the flock is held: only the file that has the name says whose turn it is."""
        try:
            found = os.stat(self._name)
        except FileNotFoundError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != self._file:
            raise WriterFailedError(
                f"{self.path} was deleted or replaced, so others may be writing at the same time; open the log again"
            )
        if found.st_size < FILE_SIZE:
            # All of it is written, so that it has its place on the disk: a mapped byte without one can't be changed.
            operations.write(self.fd, bytes(FILE_SIZE - found.st_size), found.st_size)

    def _begin(self) -> None:
        """Once the flock is held, and the file has its size: says who has the turn, and reads the mark."""
        memory = self._mapped()
        operations.write_mapped(memory, self._holder, _HOLDER_POSITION)
        self._current = self._look(memory)

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            # Opened anew: a mapping duplicates its descriptor, which would hold the turn as long as it lives.
            fd = operations.open_file(self.path, os.O_RDWR)
            try:
                self._map = mmap.mmap(fd, FILE_SIZE)
            finally:
                os.close(fd)
        return self._map

    def _is_readable(self) -> bool:
        """Whether the mapping can be touched: behind the end of a file that was cut short, that would be a SIGBUS."""
        try:
            return self._map is not None and self.fd >= 0 and os.fstat(self.fd).st_size >= FILE_SIZE
        except OSError:  # closed by another thread
            return False

    def close(self) -> None:
        """Closes the file; idempotent. The turn goes with it unless a forked process has it open too."""
        fd, self.fd = self.fd, -1
        if self._map is not None:
            self._map.close()
        if fd >= 0:
            os.close(fd)

    # The mark

    def read_mark(self) -> Mark | None:
        """The newest version of the mark that is whole; None where there is none."""
        if self.held:
            found = self._current
        elif not self._is_readable():
            return None
        else:
            assert self._map is not None
            try:
                found = self._look(self._map)
            except ValueError:  # closed by another thread
                return None
        return None if found is None else found[1]

    def _look(self, memory: mmap.mmap) -> tuple[int, Mark] | None:
        data = memory[:_MARK_END]
        known, newest = self._known
        if data != known:
            newest = _decode(data)
            self._known = data, newest
        return newest

    def write_mark(self, mark: Mark) -> None:
        """Replaces the older of the two versions. Only while the turn is held."""
        sequence = 1 if self._current is None else self._current[0] + 1
        memory = self._mapped()
        # No system call, after which this thread may wait for the interpreter, and everybody else for the turn.
        operations.write_mapped(memory, _encode(sequence, mark), _VERSION_POSITIONS[sequence % 2])
        self._current = sequence, mark
        self._known = memory[:_MARK_END], self._current

    def tell_durable(self, head: Head) -> None:
        """Says in the mark that all up to `head` is on the disk, unless it says so already. Takes the turn for that.

        Call it after a turn, with one's own end: a peer's write behind it may not be on the disk yet. Whether the file
        still has its name is not looked at: nothing is decided here, and the mark of a file that nobody can open any
        more is read only by those whose next turn finds that out.
        """
        self.own_durable = head
        if not self._take_if_free():
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
        """The end of what all writers have brought to the disk, as far as is known; None once closed."""
        if self.fd < 0:
            return None
        mark = self.read_mark()
        return self.own_durable if mark is None else max(mark.durable, self.own_durable)

    def wake_watchers(self) -> None:
        """Makes a file-system event for those who watch the directory. Not while the turn is held."""
        try:
            operations.write(self.fd, b"\0", FILE_SIZE - 1)
        except OSError:
            pass  # they look now and then without it

    # Waiting too long

    def give_up(self) -> bool:
        """The turn is waited for no longer, now and later.

        Returns true where a thread stands waiting just now. It gives the turn back once it gets it, which may take for
        ever: do not wait for that thread.
        """
        with self._state:
            self._given_up = True
            return self._waiting_since is not None

    def why_given_up(self) -> str:
        """What to tell those whose calls needed the turn."""
        return f"{self.path}: the turn to write was held by {self._holder_name()}, and is no longer waited for"

    def waited_for(self) -> float:
        """For how many seconds a thread has stood waiting now; 0 where none does."""
        since = self._waiting_since
        return 0.0 if since is None else time.monotonic() - since

    def warn_if_stuck(self) -> None:
        """Logs a warning, once, where the turn has been waited for longer than `STUCK_AFTER` seconds."""
        since = self._waiting_since
        if since is None or since == self._warned_of or time.monotonic() - since < STUCK_AFTER:
            return
        self._warned_of = since
        log_event(
            WARNING,
            "turn.stuck",
            "%(path)s: nobody can append, because %(holder)s has held the turn to write for more than %(seconds).0f "
            "seconds. Is it stopped? Appends go on once it goes on or is killed",
            path=self.path,
            holder=self._holder_name(),
            seconds=STUCK_AFTER,
        )

    def _holder_name(self) -> str:
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


# A forked child would keep the turn that its parent held when it forked, also once the parent is dead.
os.register_at_fork(after_in_child=_after_fork)
