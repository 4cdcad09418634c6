"""For the writer: the active log, locked, and written at its end.

Promises: the file is the one that `app.jsonl` names, and no other writer has it (flock); once `commit` returns, the
lines are in it, and on disk if requested; if `commit` raises an `OSError`, the file is as it was before. If neither can
be guaranteed, it raises `WriterFailedError`, and the log must be opened again.
"""

from __future__ import annotations

import os

from .._codec.lines import Lines
from .._errors import CorruptLogError, LogLockedError, WriterFailedError
from .._event import Head, line_hash
from .._logging import WARNING, log_event
from . import operations
from .base import BaseFile, Generation
from .paths import Layout
from .segments import LogSegments, last_complete_offset, line_before


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
            # A rotation may have put another file in its place between the opening and the locking.
            if os.path.samestat(os.fstat(fd), os.stat(layout.log_path)):
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            operations.close_locked(fd)
            raise
        operations.close_locked(fd)


def identity(fd: int) -> tuple[int, int]:
    stat = os.fstat(fd)
    return stat.st_dev, stat.st_ino


class ActiveLog:
    """The active log of one writer. Offsets are bytes in the whole log, `base` that of the file's first byte."""

    def __init__(self, layout: Layout, fd: int, base: int, before: Head) -> None:
        self._layout = layout
        self._path = str(layout.log_path)  # a `Path` would be converted to a string at each commit
        self.fd = fd
        self._file = identity(fd)
        self.base = base
        self.head = self._recover(before)

    def __repr__(self) -> str:
        return f"<ActiveLog {str(self._layout.log_path)!r} from {self.base} to {self.head.offset}>"

    def close(self) -> None:
        """Closes the file, and so releases the lock."""
        os.close(self.fd)

    def _recover(self, before: Head) -> Head:
        """Cuts off what a crash left, and syncs the rest; returns the head."""
        end = self._cut_torn()
        # Even if nothing was cut: what a killed process left may be in the page cache only.
        operations.sync(self.fd)
        return self._head_at(end, before)

    def _head_at(self, end: int, before: Head) -> Head:
        """The head at a position of the file where a line ends; `before` is the head at its first byte."""
        return Head(self.base + end, line_hash(line_before(self.fd, end)[1])) if end else before

    def _cut_torn(self) -> int:
        """Cuts off an incomplete line or batch, which was never acknowledged; returns the position of the end."""
        size = os.fstat(self.fd).st_size
        end = last_complete_offset(self.fd, size)
        if end < size:
            path = self._layout.torn_path(self.base + end)
            torn = bytearray()
            while len(torn) < size - end:
                chunk = os.pread(self.fd, size - end - len(torn), end + len(torn))
                if not chunk:
                    raise WriterFailedError(f"{self._layout.log_path} was cut by somebody else while it was recovered")
                torn += chunk
            earlier = path.read_bytes() if path.exists() else b""
            if not earlier.endswith(torn):  # otherwise an earlier recovery has kept them, but got no further
                operations.replace_file(path, earlier + torn)
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

    def restart(self, head: Head) -> None:
        """Empties the file, whose lines are all in the archive, which ends at `head`.

        The sync of its first line covers this; a power cut before that leaves lines that are in the archive.
        """
        operations.truncate(self.fd, 0)
        self.base, self.head = head.offset, head

    def check(self) -> None:
        """Raises `WriterFailedError` if the file was changed by somebody else, or is no longer `app.jsonl`."""
        end = self.head.offset - self.base
        what = "deleted or replaced"
        try:
            stat = os.stat(self._path)
            if (stat.st_dev, stat.st_ino) == self._file:
                if stat.st_size == end:
                    return
                what = f"{stat.st_size} bytes long instead of {end}"
        except FileNotFoundError:
            pass
        raise WriterFailedError(f"{self._layout.log_path} was changed by somebody else: it is {what}")

    def lines(self, start: int) -> list[Lines]:
        """The lines from an offset to the head, most of which are still in the page cache."""
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
                raise WriterFailedError(f"{self._layout.log_path} was cut by somebody else")
            data += chunk
        return bytes(data)

    def commit(self, data: bytes, head: Head, sync: bool) -> None:
        """Appends whole lines, after which the head is `head`; with `sync`, on disk when this returns."""
        self.check()
        first = self.head.offset == self.base
        self._write(data, head)
        if sync and not first:
            self.sync()

    def _write(self, data: bytes, head: Head) -> None:
        """Writes whole lines at the end of the file, after which the head is `head`.

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
                base_file = BaseFile(self._layout.base_path)
                if not end and any(known.written for known in base_file.read() or () if known.base == self.base):
                    # First, or a crash would leave a base file that confirms a line that was cut off. One that only
                    # announces it may stay: on a full disk, the file can't be replaced.
                    base_file.write(Generation(self.base, self.head.line_hash))
                operations.truncate(self.fd, end)
                self.sync()
            except (OSError, CorruptLogError, WriterFailedError) as second:
                raise WriterFailedError(
                    f"{self._layout.log_path}: writing failed and can't be undone: {second}"
                ) from error
            raise
        self.head = head

    def _write_first(self, data: bytes) -> None:
        """Writes the first lines of this generation, which the base file announces before and confirms afterwards."""
        base_file = BaseFile(self._layout.base_path)
        generation = Generation(self.base, self.head.line_hash, line_hash(data[: data.index(b"\n")]))
        base_file.write(generation)
        operations.write(self.fd, data, 0)
        # In every sync mode: the base file must not confirm a line that a power cut then takes away.
        self.sync()
        base_file.write(generation._replace(written=True))

    def sync(self) -> None:
        """Syncs what was committed, or raises `WriterFailedError`."""
        try:
            operations.sync(self.fd)
        except OSError as error:
            # The kernel may have dropped what it could not write, and a second sync would succeed.
            raise WriterFailedError(f"{self._layout.log_path}: a sync failed: {error}") from error

    def replaced_by(self, fd: int, base: int) -> int:
        """Continues in a new file that has taken the name; returns the descriptor of the old one, still locked."""
        old, self.fd, self.base = self.fd, fd, base
        self._file = identity(fd)
        try:
            operations.sync_dir(self._layout.dir)
        except OSError as error:
            os.close(old)
            raise WriterFailedError(f"{self._layout.dir}: a sync failed: {error}") from error
        return old
