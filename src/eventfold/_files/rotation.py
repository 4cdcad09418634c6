"""Rotation: moves the active log's lines into the archive, and replaces the active log with a new one.

The steps, and what the next writer does after a crash in each:

1. `begin` creates `app.jsonl.next.<base>.<size>.<archive size>`. The next writer removes it.
2. `archive` appends the first `size` bytes of the active log to the archive. The next writer undoes it if no whole
   record was added; otherwise it completes the rotation, since readers may already rely on the record.
3. `catch_up` and `switch` copy what was appended meanwhile into the new file, and rename it to `app.jsonl`. The next
   writer completes the rotation.

Promises: at every moment, the active log and the archive together contain everything; if they contradict each other,
nothing is changed (`CorruptLogError`); after any failure, `recover` can continue.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from .._errors import CorruptLogError, LogLockedError
from .._event import line_hash
from .._logging import WARNING, log_event
from . import operations
from .active import ActiveLog
from .archive import Archive
from .base_file import BaseFile, Generation
from .frames import FRAME_SIZE, write_frames
from .line_scan import first_line_hash, line_before
from .paths import Layout, NextFile

COPY_SIZE = 1024 * 1024


class Rotation:
    """A rotation that has begun: the first `size` bytes of the active log are being moved into the archive."""

    def __init__(self, layout: Layout, next_file: NextFile, fd: int) -> None:
        self._layout = layout
        self._next = next_file
        self._fd = fd
        self._copied = next_file.size  # bytes of the active log that are in the archive or in the new file

    def __repr__(self) -> str:
        return f"<Rotation {self._next.path.name}>"

    @property
    def next_file(self) -> NextFile:
        """The file that marks the rotation as under way."""
        return self._next

    @property
    def base(self) -> int:
        """The offset (bytes in the whole log) at which the active log begins until the switch."""
        return self._next.base

    def close(self) -> None:
        """Closes the file, and leaves an unfinished rotation as it is, for `recover`."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def archive(self, active: ActiveLog) -> None:
        """Step 2. Appends may continue meanwhile."""
        path, base = self._layout.archive_path, self._next.base
        if not path.exists():
            # Complete when it gets its name, so that there is never an empty archive.
            with operations.atomically_created(path) as fd:
                write_frames(fd, 0, 0, self._chunks(active.fd, 0))
            # The rename becomes durable when the base file is replaced, before the switch.
            return
        fd = operations.open_regular(path, os.O_RDWR)
        archive = Archive(path, fd, os.fstat(fd).st_size)
        try:
            archived_size = archive.head.offset - base
            write_frames(fd, archive.end_position, archive.head.offset, self._chunks(active.fd, archived_size))
        finally:
            archive.close()

    def _chunks(self, fd: int, start: int) -> Iterator[bytes]:
        """The whole lines from position `start` onwards, in chunks for one frame each."""
        size, end = FRAME_SIZE, self._next.size
        while start < end:
            data = os.pread(fd, min(size, end - start), start)
            # A line longer than `FRAME_SIZE` gets its own frame.
            lines_size = (data.rfind(b"\n") if size == FRAME_SIZE else data.find(b"\n")) + 1
            if lines_size:
                yield data[:lines_size]
                start += lines_size
                size = FRAME_SIZE
            elif len(data) < size:
                raise self._truncated(start)
            else:
                size *= 2

    def _truncated(self, position: int) -> CorruptLogError:
        reason = "the file was truncated or changed while it was being archived: no line ends after this"
        return CorruptLogError(self._layout.log_path, self._next.base + position, reason)

    def catch_up(self, active: ActiveLog) -> None:
        """Copies what was appended meanwhile, until little is left for `switch` to copy."""
        while (end := active.head.offset - active.base) - self._copied > COPY_SIZE:
            self._copy(active, end)

    def _copy(self, active: ActiveLog, end: int) -> None:
        while self._copied < end:
            data = os.pread(active.fd, min(COPY_SIZE, end - self._copied), self._copied)
            if not data:
                raise self._truncated(self._copied)
            operations.write(self._fd, data, self._copied - self._next.size)
            self._copied += len(data)

    def share_lock(self) -> None:
        """Makes the lock on the new file a shared one, for writers that share the directory."""
        if not operations.lock_shared(self._fd):
            raise LogLockedError(self._next.path)

    def switch(self, active: ActiveLog) -> int:
        """Step 3, with commits paused. Returns the old file's descriptor, which has to stay locked for a while."""
        active.ensure_current()
        self._copy(active, active.head.offset - active.base)
        operations.sync(self._fd)
        base = self._next.base + self._next.size
        hash_before = line_hash(line_before(active.fd, self._next.size)[1])
        first_hash = first_line_hash(self._fd) or ""
        BaseFile(self._layout.base_path).write(Generation(base, hash_before, first_hash, bool(first_hash)))
        operations.rename(self._next.path, self._layout.log_path)
        fd, self._fd = self._fd, -1
        return active.switch_to(fd, base)


def begin(layout: Layout, active: ActiveLog) -> Rotation:
    """Step 1, with commits paused."""
    active.ensure_current()
    active.sync()
    try:
        archive_size = os.stat(layout.archive_path).st_size
    except FileNotFoundError:
        archive_size = 0
    return begin_at(layout, active.base, active.head.offset - active.base, archive_size)


def begin_at(layout: Layout, base: int, size: int, archive_size: int) -> Rotation:
    """Begins to move the first `size` bytes of the active log to position `archive_size` of the archive."""
    path = layout.next_path(base, size, archive_size)
    fd = operations.create_file(path)
    try:
        operations.lock(fd)
        operations.sync_dir(layout.dir)
    except BaseException:
        os.close(fd)
        raise
    return Rotation(layout, NextFile(path, base, size, archive_size), fd)


def warn_unfinished(rotation: Rotation, error: OSError) -> None:
    """Warns that a recovered rotation could not be completed because of a disk error."""
    log_event(
        WARNING,
        "rotation.unfinished",
        "%(rotation)s could not be completed, and will be tried again: %(error)s",
        rotation=rotation,
        error=error,
    )
