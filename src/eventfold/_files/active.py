"""The active log of a writer: `app.jsonl`, locked, to whose end lines are appended.

Promises: the open file is the one that `app.jsonl` names, and no other writer has locked it; once `commit` returns, the
lines are in the file, and on disk if requested; if `commit` raises an `OSError`, the file is as it was before. If this
can't be guaranteed, `commit` raises `WriterFailedError`, and the log must be opened again.
"""

from __future__ import annotations

import os

from .._codec.lines import Lines
from .._errors import CorruptLogError, EventfoldError, LogLockedError, WriterFailedError
from .._event import Head, line_hash
from .._logging import WARNING, log_event
from . import operations
from .base_file import BaseFile, Generation
from .line_scan import complete_size, line_before
from .paths import Layout
from .segments import LogSegments


def open_locked(layout: Layout, lock: bool) -> int:
    """A descriptor of the current `app.jsonl`, created if necessary and, with `lock`, locked.

    Raises `LogLockedError` if another writer holds the lock.
    """
    operations.make_dir(layout.dir)
    while True:
        fd = operations.open_regular(layout.log_path, os.O_RDWR | os.O_CREAT)
        try:
            if lock and not operations.lock(fd):
                raise LogLockedError(layout.log_path, operations.lock_holder(fd))
            # A rotation may have replaced the file after it was opened and before it was locked.
            if os.path.samestat(os.fstat(fd), os.stat(layout.log_path)):
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            operations.close_locked(fd)
            raise
        operations.close_locked(fd)


def identity(fd: int) -> tuple[int, int]:
    """What distinguishes an open file from all others."""
    stat = os.fstat(fd)
    return stat.st_dev, stat.st_ino


class WriterLock:
    """The writer's lock of a directory that has an `app.jsonl`; recovers nothing. The methods block."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._fd = -1

    def acquire(self) -> None:
        """Raises `LogLockedError` if a writer has the log open, `EventfoldError` if there is no active log."""
        if not self._layout.log_path.exists():
            raise EventfoldError(f"there is no {self._layout.log_path}, so there is nothing to change")
        self._fd = open_locked(self._layout, True)

    @property
    def fd(self) -> int:
        """The locked descriptor of the active log."""
        return self._fd

    def release(self) -> None:
        """Releases the lock; idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            operations.close_locked(fd)


class ActiveLog:
    """The active log of one writer. Offsets are bytes in the whole log; `base` is the offset of the file's first byte.

    `head_at_base` is the head before the file's first line.
    """

    def __init__(self, layout: Layout, fd: int, base: int, head_at_base: Head) -> None:
        self._layout = layout
        self._path = str(layout.log_path)  # a `Path` would be converted to a string at each commit
        self.fd = fd
        self._identity = identity(fd)
        self.base = base
        self.unsynced = False  # whether something acknowledged may not be on disk
        self.head = self._recover(head_at_base)

    def __repr__(self) -> str:
        return f"<ActiveLog {str(self._layout.log_path)!r} from {self.base} to {self.head.offset}>"

    def close(self) -> None:
        """Closes the file, and so releases the lock."""
        os.close(self.fd)

    def _recover(self, head_at_base: Head) -> Head:
        """Cuts off what a crash left unfinished, and syncs the rest; returns the head."""
        end = self._cut_incomplete()
        # Even if nothing was cut: what a killed process wrote may be in the page cache only.
        operations.sync(self.fd)
        return self._head_at(end, head_at_base)

    def _head_at(self, end: int, head_at_base: Head) -> Head:
        """The head at a position of the file where a line ends."""
        return Head(self.base + end, line_hash(line_before(self.fd, end)[1])) if end else head_at_base

    def _cut_incomplete(self) -> int:
        """Cuts off an incomplete line or batch, which was never acknowledged; returns the new size of the file."""
        size = os.fstat(self.fd).st_size
        end = complete_size(self.fd, size)
        if end < size:
            path = self._layout.torn_path(self.base + end)
            torn = bytearray()
            while len(torn) < size - end:
                chunk = os.pread(self.fd, size - end - len(torn), end + len(torn))
                if not chunk:
                    raise WriterFailedError(f"{self._path} was truncated by another program while it was recovered")
                torn += chunk
            saved = path.read_bytes() if path.exists() else b""
            if not saved.endswith(torn):  # otherwise an earlier recovery saved them, and was then interrupted
                operations.replace_file(path, saved + torn)
            operations.truncate(self.fd, end)
            log_event(
                WARNING,
                "recovery.tail_cut",
                "%(path)s: cut %(size)d bytes of an unfinished write at offset %(offset)d and kept them in %(kept_in)s",
                path=self._layout.log_path,
                size=size - end,
                offset=self.base + end,
                kept_in=path.name,
            )
        return end

    def clear(self, head: Head) -> None:
        """Empties the file, all of whose lines are in the archive, which ends at `head`.

        The sync of the next first line makes this durable. After a power cut before that, the lines that come back are
        still those that the archive has.
        """
        operations.truncate(self.fd, 0)
        self.base, self.head = head.offset, head

    def ensure_current(self) -> None:
        """Raises `WriterFailedError` if `app.jsonl` is another file than this one, or if it does not end at `head`."""
        end = self.head.offset - self.base
        problem = "deleted or replaced"
        try:
            stat = os.stat(self._path)
            if (stat.st_dev, stat.st_ino) == self._identity:
                if stat.st_size == end:
                    return
                problem = f"{stat.st_size} bytes long instead of {end}"
        except FileNotFoundError:
            pass
        raise WriterFailedError(f"{self._path} was changed by another program: it is {problem}")

    def lines(self, start: int) -> list[Lines]:
        """The lines from an offset to the head. Fast for the newest lines, which are still in the page cache."""
        end = self.head.offset
        if start >= end:
            return []
        if start < self.base:
            with LogSegments(self._layout) as segments:
                return list(segments.lines(start, end))
        return [Lines(self._layout.log_path, start, self._read(start, end))]

    def _read(self, start: int, end: int) -> bytes:
        data = bytearray()
        while len(data) < end - start:
            chunk = os.pread(self.fd, end - start - len(data), start - self.base + len(data))
            if not chunk:
                raise WriterFailedError(f"{self._path} was truncated by another program")
            data += chunk
        return bytes(data)

    def commit(self, data: bytes, head: Head, sync: bool) -> None:
        """Appends whole lines, which end at `head`; with `sync`, they are on disk when this returns."""
        self.ensure_current()
        is_synced = self.head.offset == self.base  # the first lines always are
        self._write(data, head)
        if not sync:
            self.unsynced = True
        elif not is_synced:
            self.sync()

    def _write(self, data: bytes, head: Head) -> None:
        """Writes whole lines, which end at `head`, at the end of the file.

        Raises `OSError` if the write failed and was undone, `WriterFailedError` if it could not be undone.
        """
        end = self.head.offset - self.base
        try:
            if end:
                operations.write(self.fd, data, end)
            else:
                self._write_first(data)
        except WriterFailedError:
            raise
        except BaseException as error:
            try:
                if not end:
                    self._withdraw_confirmation()
                operations.truncate(self.fd, end)
                self.sync()
            except (OSError, CorruptLogError, WriterFailedError) as second:
                raise WriterFailedError(f"{self._path}: writing failed and can't be undone: {second}") from error
            raise
        self.head = head

    def _write_first(self, data: bytes) -> None:
        """Writes the first lines of the file; the base file lists the first one before, and confirms it afterwards."""
        base_file = BaseFile(self._layout.base_path)
        generation = Generation(self.base, self.head.line_hash, line_hash(data[: data.index(b"\n")]))
        base_file.write(generation)
        operations.write(self.fd, data, 0)
        # In every sync mode: the base file must not confirm a line that is then lost in a power cut.
        self.sync()
        base_file.write(generation._replace(written=True))

    def _withdraw_confirmation(self) -> None:
        """Makes the base file only announce the first line again, if it confirms the line already."""
        base_file = BaseFile(self._layout.base_path)
        for listed in base_file.read() or ():
            if listed.base == self.base and listed.written:
                # Before the line is cut off, or a crash would leave a base file that confirms a missing line. Until
                # then, the file has the line, so the base file must still list it.
                base_file.write(listed._replace(written=False))

    def sync(self) -> None:
        """Syncs what was committed. Raises `WriterFailedError`."""
        try:
            operations.sync(self.fd)
        except OSError as error:
            # The kernel may have dropped what it could not write, and would then report success for a second sync.
            raise WriterFailedError(f"{self._path}: a sync failed: {error}") from error
        self.unsynced = False

    def switch_to(self, fd: int, base: int) -> int:
        """Continues in the file that has replaced this one; returns the descriptor of the old file, still locked."""
        old, self.fd, self.base = self.fd, fd, base
        self._identity = identity(fd)
        try:
            operations.sync_dir(self._layout.dir)
        except OSError as error:
            os.close(old)
            raise WriterFailedError(f"{self._layout.dir}: a sync failed: {error}") from error
        return old
