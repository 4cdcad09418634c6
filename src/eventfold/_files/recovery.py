"""Opening a log for writing: what a crash left is undone or finished before anything is appended.

Promise: nothing is touched where the files contradict each other (`CorruptLogError`).
"""

from __future__ import annotations

import os

import xxhash

from .._codec.decode import is_event
from .._errors import CorruptLogError
from .._event import Head, line_hash
from .._logging import WARNING, log_event
from . import operations
from .active import ActiveLog, open_locked
from .archive import Archive
from .base import BaseFile, Generation, find_base, first_line_hash
from .frames import spans_after, write_record
from .paths import Layout, NextFile
from .rotation import COPY_SIZE, Rotation, begin_at, warn_unfinished
from .segments import LogSegments, check_archived, last_line_end, line_before

LOOKED_AT = 3  # last lines, of which one must be an event


def recover(layout: Layout, active_fd: int, locked: int | None = None) -> Rotation | None:
    """What a rotation left that did not get to its end: undone (None), or to be gone on with from step 2.

    `locked` is a descriptor of the rotation's file whose lock is held already; a rotation that is given owns it.

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
        archive_fd = operations.open_regular(layout.archive_path, os.O_RDWR)
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
            operations.truncate(archive_fd, end)
        # Also where nothing was cut: what a killed process wrote may be in the page cache only.
        operations.sync(archive_fd)
    finally:
        os.close(archive_fd)
    if end == left.archive_size:
        _undo(layout, left)
        return None
    fd = operations.open_regular(left.path, os.O_RDWR | os.O_NOFOLLOW) if locked is None else locked
    try:
        if locked is None:
            operations.lock(fd)
        operations.truncate(fd, 0)
    except BaseException:
        if locked is None:
            os.close(fd)
        raise
    return Rotation(layout, left, fd)


def _undo(layout: Layout, left: NextFile) -> None:
    operations.unlink(left.path)
    operations.sync_dir(layout.dir)


def _check_archived(
    layout: Layout, active_fd: int, left: NextFile, first: int, end: int, lines_hash: int | None
) -> None:
    digest = xxhash.xxh64()
    at = first - left.base
    while at < end - left.base <= left.size:
        data = os.pread(active_fd, min(COPY_SIZE, end - left.base - at), at)
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
        check_events(layout, fd)
        with LogSegments(layout) as segments:
            if segments.damage is not None:
                raise segments.damage
        operations.sync_dir(layout.dir)
        if segments.under_way is not None:
            rotation = recover(layout, fd)
        before, base = find_ends(layout, fd, rotation)
        active = ActiveLog(layout, fd, base, before)
        if rotation is None and base < before.offset:
            rotation = finish_copy(layout, active, before)
    except BaseException:
        operations.close_locked(fd)
        if rotation is not None:
            rotation.close()
        raise
    if rotation is None:
        return active, []
    try:
        old = _finish(rotation, active)
    except BaseException:
        operations.unlock(active.fd)
        active.close()
        raise
    return active, [] if old is None else [old]


def check_events(layout: Layout, fd: int) -> None:
    """Raises `CorruptLogError`, with nothing touched, where none of the last lines is an event."""
    at = last_line_end(fd, 0, os.fstat(fd).st_size)
    if not at:
        return
    for _ in range(LOOKED_AT):
        at, text = line_before(fd, at)
        if not text.strip() or is_event(text):
            return
        if not at:
            break
    reason = (
        "the last lines of the file are no events, so it is no log of eventfold; "
        "nothing was touched: choose another directory, or move the file away"
    )
    raise CorruptLogError(layout.log_path, at, reason)


def _finish(rotation: Rotation, active: ActiveLog) -> int | None:
    """Goes on with a recovered rotation; a failure of the disk leaves it for the next one, with a warning."""
    try:
        rotation.archive(active)
        return rotation.switch(active)
    except OSError as error:
        warn_unfinished(rotation, error)
        return None
    finally:
        rotation.close()


def find_ends(layout: Layout, active_fd: int, rotation: Rotation | None) -> tuple[Head, int]:
    """The archive's end, and where the active log begins, which the base file says from now on.

    Frames of the Rust crate get their record, an unfinished one is cut.
    """
    archive = _open_archive(layout)
    try:
        if archive is not None:
            if archive.damage is not None:
                raise archive.damage
            if rotation is None and (damage := archive.missing_record()):
                raise damage
        base = find_base(layout, active_fd, archive, None if rotation is None else rotation.next_file)
        if archive is not None:
            if rotation is None and archive.end_position < archive.size:
                excess = archive.size - archive.end_position
                if archive.end_position:
                    operations.truncate(archive.fd, archive.end_position)
                else:  # the Rust crate can't read an empty archive; should this get lost, it is removed again
                    operations.unlink(archive.path)
                log_event(
                    WARNING,
                    "recovery.archive_cut",
                    "%(path)s: cut %(size)d bytes of an unfinished frame",
                    path=archive.path,
                    size=excess,
                )
            # Also where nothing was cut: what a killed process left may be in the page cache only.
            operations.sync(archive.fd)
        head = Head(0, "") if archive is None else archive.head
        if base is None:
            base = head.offset if rotation is None else rotation.base
            before = "" if archive is None or not base else line_hash(archive.line_before(base))
            first = first_line_hash(active_fd) or ""
            try:
                BaseFile(layout.base_path).write(Generation(base, before, first))
            except OSError as error:
                log_event(
                    WARNING,
                    "base_file.write_failed",
                    "%(path)s could not be written, and will be with the next rotation: %(error)s",
                    path=layout.base_path,
                    error=error,
                )
                return head, base
        # Only now: without a record, the Rust crate may have moved the archive's end behind the base file's back.
        if archive is not None and (span := archive.unrecorded()) is not None:
            write_record(archive.fd, span)
        return head, base
    finally:
        if archive is not None:
            archive.close()


def _open_archive(layout: Layout) -> Archive | None:
    try:
        fd = operations.open_regular(layout.archive_path, os.O_RDWR)
    except FileNotFoundError:
        return None
    return Archive(layout.archive_path, fd, os.fstat(fd).st_size)


def finish_copy(layout: Layout, active: ActiveLog, archived: Head) -> Rotation | None:
    """Goes on with a copy of which the archive was copied after a rotation, and the active log before its end.

    The lines that both have are left to the archive.
    """
    archive = _open_archive(layout)
    assert archive is not None
    try:
        check_archived(layout, archive, active.fd, active.base)
        position = archive.position_of(active.base)
    finally:
        archive.close()
    if active.head.offset > archived.offset:
        return begin_at(layout, active.base, archived.offset - active.base, position)
    BaseFile(layout.base_path).write(Generation(archived.offset, archived.line_hash))
    active.restart(archived)
    return None
