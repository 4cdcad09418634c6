"""Rotation: the active log's lines move into the archive, and a new active log takes its place.

The steps, and what a crash leaves after each:

1. `begin` creates `app.jsonl.next.<base>.<size>.<archive size>`: nothing has moved, undone on open.
2. `archive` appends the first `size` bytes of the active log to the archive: undone on open as long as no whole record
   was added, else finished, since readers may have counted what a record speaks for.
3. `catch_up` and `switch` copy what came in meanwhile into the new file, which then takes the name `app.jsonl`.

Promises: the two named files together hold everything at every moment; nothing is touched where the files contradict
each other (`CorruptLogError`); a failure leaves a state from which `recover` goes on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import xxhash

from . import _layout
from ._active import ActiveLog, open_locked
from ._archive import FRAME_SIZE, Archive, spans_after, write_frames, write_record
from ._errors import CorruptLogError
from ._event import Head
from ._layout import Layout, NextFile

logger = logging.getLogger("eventfold")
_COPY_SIZE = 1024 * 1024


class Rotation:
    """A rotation that has begun: the first `size` bytes of the active log are on their way into the archive."""

    def __init__(self, layout: Layout, next_file: NextFile, fd: int) -> None:
        self._layout = layout
        self._next = next_file
        self._fd = fd
        self._copied = next_file.size  # how far the active log is archived or in the new file, in its bytes

    def __repr__(self) -> str:
        return f"<Rotation {self._next.path.name}>"

    @property
    def base(self) -> int:
        """The offset (bytes in the whole log) at which the active log begins until the switch."""
        return self._next.base

    def close(self) -> None:
        """Leaves the rotation as it stands, to be recovered."""
        if self._fd >= 0:
            os.close(self._fd)

    def archive(self, active: ActiveLog) -> None:
        """Step 2. Appends may go on meanwhile."""
        path, base = self._layout.archive_path, self._next.base
        if not path.exists():
            # The first archive appears whole, so that there is never an empty one.
            temporary = path.with_name(f".{path.name}.tmp")
            fd = _layout.open_file(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            try:
                try:
                    write_frames(fd, 0, 0, self._chunks(active.fd, 0))
                finally:
                    os.close(fd)
                _layout.rename(temporary, path)
            except BaseException:
                _layout.discard(temporary)
                raise
            _layout.sync_dir(self._layout.dir)
            return
        fd = _layout.open_file(path, os.O_RDWR)
        archive = Archive(path, fd, os.fstat(fd).st_size)
        try:
            done = archive.head.offset - base
            write_frames(fd, archive.end_position, archive.head.offset, self._chunks(active.fd, done))
        finally:
            archive.close()

    def _chunks(self, fd: int, start: int) -> Iterator[bytes]:
        """The whole lines from position `start` on, at most a frame's worth of them or one longer line."""
        size, end = FRAME_SIZE, self._next.size
        while start < end:
            data = os.pread(fd, min(size, end - start), start)
            # A read that had to be made larger is for one line; those after it go into a frame of their own.
            whole = (data.rfind(b"\n") if size == FRAME_SIZE else data.find(b"\n")) + 1
            if whole:
                yield data[:whole]
                start += whole
                size = FRAME_SIZE
            elif len(data) < size:
                raise self._cut_short(start)
            else:
                size *= 2

    def _cut_short(self, position: int) -> CorruptLogError:
        reason = "the file was cut or changed while it was being archived: no line goes on and ends here"
        return CorruptLogError(self._layout.log_path, self._next.base + position, reason)

    def catch_up(self, active: ActiveLog) -> None:
        """Copies what was appended meanwhile, until little is left for `switch`."""
        while (end := active.head.offset - active.base) - self._copied > _COPY_SIZE:
            self._copy(active, end)

    def _copy(self, active: ActiveLog, end: int) -> None:
        while self._copied < end:
            data = os.pread(active.fd, min(_COPY_SIZE, end - self._copied), self._copied)
            if not data:
                raise self._cut_short(self._copied)
            _layout.write(self._fd, data, self._copied - self._next.size)
            self._copied += len(data)

    def switch(self, active: ActiveLog) -> int:
        """Step 3, with commits paused. Returns the old file's descriptor, which is to stay locked for a while."""
        active.check()
        self._copy(active, active.head.offset - active.base)
        _layout.sync(self._fd)
        _layout.rename(self._next.path, self._layout.log_path)
        fd, self._fd = self._fd, -1
        return active.replaced_by(fd, self._next.base + self._next.size)


def begin(layout: Layout, active: ActiveLog) -> Rotation:
    """Step 1, with commits paused."""
    active.check()
    active.sync()
    try:
        archive_size = os.stat(layout.archive_path).st_size
    except FileNotFoundError:
        archive_size = 0
    base, size = active.base, active.head.offset - active.base
    path = layout.next_path(base, size, archive_size)
    fd = _layout.open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        _layout.lock(fd)
        _layout.sync_dir(layout.dir)
    except BaseException:
        os.close(fd)
        raise
    return Rotation(layout, NextFile(path, base, size, archive_size), fd)


def recover(layout: Layout, active_fd: int) -> Rotation | None:
    """What a rotation left that did not get to its end: undone (None), or to be gone on with from step 2.

    Raises `CorruptLogError`, with nothing touched, where the files contradict each other.
    """
    left = layout.next_file()
    if left is None:
        return None
    log_size = os.fstat(active_fd).st_size
    if log_size < left.size:
        raise CorruptLogError(
            layout.log_path, left.base + log_size, f"the file ends here, and {left.path.name} says that it went on"
        )
    if left.size and os.pread(active_fd, 1, left.size - 1) != b"\n":
        raise CorruptLogError(
            layout.log_path, left.base + left.size, f"no line ends here, and {left.path.name} says that one did"
        )
    try:
        archive_fd = _layout.open_file(layout.archive_path, os.O_RDWR)
    except FileNotFoundError:
        if left.archive_size:
            raise CorruptLogError(layout.archive_path, 0, f"the file is gone that {left.path.name} speaks of") from None
        _undo(layout, left)
        return None
    try:
        end = left.archive_size
        if os.fstat(archive_fd).st_size < end:
            raise CorruptLogError(layout.archive_path, left.base, f"the file ends before its {end} bytes")
        for span in spans_after(layout.archive_path, archive_fd, left.archive_size, left.base):
            _check_archived(layout, active_fd, left, span.first_offset, span.end_offset, span.lines_hash)
            end = span.after
        if os.fstat(archive_fd).st_size > end:
            _layout.truncate(archive_fd, end)
        # Also where nothing was cut: what a killed process wrote may be in the page cache only.
        _layout.sync(archive_fd)
    finally:
        os.close(archive_fd)
    if end == left.archive_size:
        _undo(layout, left)
        return None
    fd = _layout.open_file(left.path, os.O_RDWR)
    try:
        _layout.lock(fd)
        _layout.truncate(fd, 0)
    except BaseException:
        os.close(fd)
        raise
    return Rotation(layout, left, fd)


def _undo(layout: Layout, left: NextFile) -> None:
    _layout.unlink(left.path)
    _layout.sync_dir(layout.dir)


def _check_archived(
    layout: Layout, active_fd: int, left: NextFile, first: int, end: int, lines_hash: int | None
) -> None:
    digest = xxhash.xxh64()
    at = first - left.base
    while at < end - left.base <= left.size:
        data = os.pread(active_fd, min(_COPY_SIZE, end - left.base - at), at)
        if not data:
            break
        digest.update(data)
        at += len(data)
    if digest.intdigest() != lines_hash:
        raise CorruptLogError(
            layout.archive_path,
            first,
            f"these lines are not those of {layout.log_path.name}, which were being archived",
        )


def open_log(layout: Layout, lock: bool) -> tuple[ActiveLog, list[int]]:
    """The active log, locked and recovered, with a rotation that was under way undone or finished.

    Also gives the descriptors that are to stay locked for a while. Raises `LogLockedError`, `CorruptLogError`.
    """
    fd = open_locked(layout, lock)
    rotation = None
    try:
        for directory in (layout.dir, layout.views_dir, layout.consumers_dir):
            _layout.discard_leftovers(directory)
        _layout.sync_dir(layout.dir)
        rotation = recover(layout, fd)
        before = _archive_head(layout, rotation is not None)
        base = before.offset if rotation is None else rotation.base
        active = ActiveLog(layout, fd, base, before)
    except BaseException:
        os.close(fd)
        if rotation is not None:
            rotation.close()
        raise
    if rotation is None:
        return active, []
    try:
        old = _finish(rotation, active)
    except BaseException:
        active.close()
        raise
    return active, [] if old is None else [old]


def _finish(rotation: Rotation, active: ActiveLog) -> int | None:
    """Goes on with a recovered rotation; a failure of the disk leaves it for the next one, with a warning."""
    try:
        rotation.archive(active)
        return rotation.switch(active)
    except OSError as error:
        logger.warning("%r could not be finished, and will be tried again: %s", rotation, error)
        return None
    finally:
        rotation.close()


def _archive_head(layout: Layout, under_way: bool) -> Head:
    """The archive's end; frames of the Rust crate get their record, an unfinished one is cut."""
    try:
        fd = _layout.open_file(layout.archive_path, os.O_RDWR)
    except FileNotFoundError:
        return Head(0, "")
    archive = Archive(layout.archive_path, fd, os.fstat(fd).st_size)
    try:
        if archive.damage is not None:
            raise archive.damage
        if not under_way and (damage := archive.cut_short()):
            raise damage
        if not under_way and archive.end_position < archive.size:
            excess = archive.size - archive.end_position
            _layout.truncate(fd, archive.end_position)
            logger.warning("%s: cut %d bytes of an unfinished frame", archive.path, excess)
        # Also where nothing was cut: what a killed process left may be in the page cache only.
        _layout.sync(fd)
        span = archive.unrecorded()
        if span is not None:
            write_record(fd, span)
        return archive.head
    finally:
        archive.close()
