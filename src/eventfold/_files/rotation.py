"""Rotation: the active log's lines move into the archive, and a new active log takes its place.

The steps, and what a crash leaves after each:

1. `begin` creates `app.jsonl.next.<base>.<size>.<archive size>`: nothing has moved, undone on open. 2. `archive`
   appends the first `size` bytes of the active log to the archive: undone on open as long as no whole record was added,
   otherwise completed, since readers may have relied on the record. 3. `catch_up` and `switch` copy what was appended
   meanwhile into the new file, which then takes the name `app.jsonl`.

Promises: at every moment, the two files together contain everything; nothing is touched if the files contradict each
other (`CorruptLogError`); a failure leaves a state from which `recover` continues.
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
from .base import BaseFile, Generation, first_line_hash
from .frames import FRAME_SIZE, write_frames
from .paths import Layout, NextFile
from .segments import line_before

COPY_SIZE = 1024 * 1024


class Rotation:
    """A rotation that has begun: the first `size` bytes of the active log are being moved into the archive."""

    def __init__(self, layout: Layout, next_file: NextFile, fd: int) -> None:
        self._layout = layout
        self._next = next_file
        self._fd = fd
        self._copied = next_file.size  # how many bytes of the active log are in the archive or in the new file

    def __repr__(self) -> str:
        return f"<Rotation {self._next.path.name}>"

    @property
    def next_file(self) -> NextFile:
        """The file that says that the rotation is under way."""
        return self._next

    @property
    def base(self) -> int:
        """The offset (bytes in the whole log) at which the active log begins until the switch."""
        return self._next.base

    def close(self) -> None:
        """Leaves the rotation as it is, to be recovered."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def archive(self, active: ActiveLog) -> None:
        """Step 2. Appends may continue meanwhile."""
        path, base = self._layout.archive_path, self._next.base
        if not path.exists():
            # The first archive appears complete, so that there is never an empty one.
            with operations.atomically_created(path) as fd:
                write_frames(fd, 0, 0, self._chunks(active.fd, 0))
            # Replacing the base file before the switch syncs the directory, and so this name.
            return
        fd = operations.open_regular(path, os.O_RDWR)
        archive = Archive(path, fd, os.fstat(fd).st_size)
        try:
            done = archive.head.offset - base
            write_frames(fd, archive.end_position, archive.head.offset, self._chunks(active.fd, done))
        finally:
            archive.close()

    def _chunks(self, fd: int, start: int) -> Iterator[bytes]:
        """The whole lines from position `start` onwards, in chunks of at most a frame, or of one longer line."""
        size, end = FRAME_SIZE, self._next.size
        while start < end:
            data = os.pread(fd, min(size, end - start), start)
            # A read that had to be enlarged is for a single line; those after it go into the next frame.
            whole = (data.rfind(b"\n") if size == FRAME_SIZE else data.find(b"\n")) + 1
            if whole:
                yield data[:whole]
                start += whole
                size = FRAME_SIZE
            elif len(data) < size:
                raise self._truncated(start)
            else:
                size *= 2

    def _truncated(self, position: int) -> CorruptLogError:
        reason = "the file was cut or changed while it was being archived: no line ends after this"
        return CorruptLogError(self._layout.log_path, self._next.base + position, reason)

    def catch_up(self, active: ActiveLog) -> None:
        """Copies what was appended meanwhile, until little is left for `switch`."""
        while (end := active.head.offset - active.base) - self._copied > COPY_SIZE:
            self._copy(active, end)

    def _copy(self, active: ActiveLog, end: int) -> None:
        while self._copied < end:
            data = os.pread(active.fd, min(COPY_SIZE, end - self._copied), self._copied)
            if not data:
                raise self._truncated(self._copied)
            operations.write(self._fd, data, self._copied - self._next.size)
            self._copied += len(data)

    def share(self) -> None:
        """Turns the lock on the new file into a shared one, for writers that share the directory."""
        if not operations.lock_shared(self._fd):
            raise LogLockedError(self._next.path)

    def switch(self, active: ActiveLog) -> int:
        """Step 3, with commits paused. Returns the old file's descriptor, which has to stay locked for a while."""
        active.check()
        self._copy(active, active.head.offset - active.base)
        operations.sync(self._fd)
        base = self._next.base + self._next.size
        before = line_hash(line_before(active.fd, self._next.size)[1])
        first = first_line_hash(self._fd) or ""
        BaseFile(self._layout.base_path).write(Generation(base, before, first, bool(first)))
        operations.rename(self._next.path, self._layout.log_path)
        fd, self._fd = self._fd, -1
        return active.replaced_by(fd, base)


def begin(layout: Layout, active: ActiveLog) -> Rotation:
    """Step 1, with commits paused."""
    active.check()
    active.sync()
    try:
        archive_size = os.stat(layout.archive_path).st_size
    except FileNotFoundError:
        archive_size = 0
    return begin_at(layout, active.base, active.head.offset - active.base, archive_size)


def begin_at(layout: Layout, base: int, size: int, archive_size: int) -> Rotation:
    """Announces that the first `size` bytes of the active log will be archived, from `archive_size` on."""
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
    """Warns that a recovered rotation could not be completed because of the disk."""
    log_event(
        WARNING,
        "rotation.unfinished",
        "%(rotation)s could not be completed, and will be tried again: %(error)s",
        rotation=rotation,
        error=error,
    )
