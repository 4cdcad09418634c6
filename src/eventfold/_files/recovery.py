"""Opens a log for writing, and undoes or completes what a crash left unfinished.

Promise: if the files contradict each other, nothing is changed (`CorruptLogError`).
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
from .base_file import BaseFile, Generation, find_base
from .frames import Span, spans_after, write_record
from .line_scan import first_line_hash, last_line_end, line_before
from .paths import Layout, NextFile
from .rotation import COPY_SIZE, Rotation, begin_at, warn_unfinished
from .segments import LogSegments, check_archived

CHECKED_LINES = 3
"""How many of the last lines are checked; one of them must be an event."""


def recover(layout: Layout, active_fd: int, locked: int | None = None) -> Rotation | None:
    """Undoes an interrupted rotation and returns None, or returns it so that it can be continued from step 2.

    `locked` is a descriptor of the rotation's file that is already locked; a returned rotation owns it.

    Raises `CorruptLogError`, with nothing changed, if the files contradict each other.
    """
    next_file = layout.next_file()
    if next_file is None:
        return None
    name = next_file.path.name
    log_size = os.fstat(active_fd).st_size
    if log_size < next_file.size:
        raise CorruptLogError(
            layout.log_path, next_file.base + log_size, f"the file ends here, but {name} says that it continues"
        )
    if next_file.size and os.pread(active_fd, 1, next_file.size - 1) != b"\n":
        raise CorruptLogError(
            layout.log_path, next_file.base + next_file.size, f"no line ends here, but {name} says that one does"
        )
    try:
        archive_fd = operations.open_regular(layout.archive_path, os.O_RDWR)
    except FileNotFoundError:
        if next_file.archive_size:
            raise CorruptLogError(layout.archive_path, 0, f"the file that {name} refers to is missing") from None
        _undo(layout, next_file)
        return None
    try:
        end = next_file.archive_size
        if os.fstat(archive_fd).st_size < end:
            raise CorruptLogError(layout.archive_path, next_file.base, f"the file ends before its {end} bytes")
        for span in spans_after(layout.archive_path, archive_fd, next_file.archive_size, next_file.base):
            _check_span(layout, active_fd, next_file, span)
            end = span.after
        if os.fstat(archive_fd).st_size > end:
            operations.truncate(archive_fd, end)
        # Even if nothing was cut: what a killed process wrote may be in the page cache only.
        operations.sync(archive_fd)
    finally:
        os.close(archive_fd)
    if end == next_file.archive_size:
        _undo(layout, next_file)
        return None
    fd = operations.open_regular(next_file.path, os.O_RDWR | os.O_NOFOLLOW) if locked is None else locked
    try:
        if locked is None:
            operations.lock(fd)
        operations.truncate(fd, 0)
    except BaseException:
        if locked is None:
            os.close(fd)
        raise
    return Rotation(layout, next_file, fd)


def _undo(layout: Layout, next_file: NextFile) -> None:
    operations.unlink(next_file.path)
    operations.sync_dir(layout.dir)


def _check_span(layout: Layout, active_fd: int, next_file: NextFile, span: Span) -> None:
    """Raises `CorruptLogError` if a span of the archive does not have the lines of the active log at its offsets."""
    digest = xxhash.xxh64()
    position, end = span.first_offset - next_file.base, span.end_offset - next_file.base
    while position < end <= next_file.size:
        data = os.pread(active_fd, min(COPY_SIZE, end - position), position)
        if not data:
            break
        digest.update(data)
        position += len(data)
    if digest.intdigest() != span.lines_hash:
        raise CorruptLogError(
            layout.archive_path,
            span.first_offset,
            f"these lines are not those of {layout.log_path.name}, which were being archived",
        )


def open_log(layout: Layout, lock: bool) -> tuple[ActiveLog, list[int]]:
    """Opens, locks and recovers the active log, and undoes or completes an interrupted rotation.

    Also returns the descriptors that have to stay locked for a while. Raises `LogLockedError`, `CorruptLogError`.
    """
    fd = open_locked(layout, lock)
    rotation = None
    try:
        check_events(layout, fd)
        with LogSegments(layout) as segments:
            if segments.damage is not None:
                raise segments.damage
        operations.sync_dir(layout.dir)
        if segments.next_file is not None:
            rotation = recover(layout, fd)
        archived, base = recover_archive(layout, fd, rotation)
        active = ActiveLog(layout, fd, base, archived)
        if rotation is None and base < archived.offset:
            rotation = reconcile_copy(layout, active, archived)
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
    """Raises `CorruptLogError` if none of the last lines is an event."""
    position = last_line_end(fd, 0, os.fstat(fd).st_size)
    if not position:
        return
    for _ in range(CHECKED_LINES):
        position, text = line_before(fd, position)
        if not text.strip() or is_event(text):
            return
        if not position:
            break
    reason = (
        "the last lines of the file are not events, so nothing was changed: if they are the damaged end of a log, cut "
        "them off with `eventfold repair`; if the file is not a log, choose another directory"
    )
    with LogSegments(layout) as segments:
        raise CorruptLogError(layout.log_path, segments.base + position, reason)


def _finish(rotation: Rotation, active: ActiveLog) -> int | None:
    """Completes a recovered rotation. After a disk error, logs a warning and leaves it to the next rotation."""
    try:
        rotation.archive(active)
        return rotation.switch(active)
    except OSError as error:
        warn_unfinished(rotation, error)
        return None
    finally:
        rotation.close()


def recover_archive(layout: Layout, active_fd: int, rotation: Rotation | None) -> tuple[Head, int]:
    """Cuts off an unfinished frame, adds a record to frames of the Rust crate, and creates a missing base file.

    Returns the head at the end of the archive, and the offset at which the active log begins.
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
                else:
                    # The Rust crate can't read an empty archive. If a crash undoes this, the next writer repeats it.
                    operations.unlink(archive.path)
                log_event(
                    WARNING,
                    "recovery.archive_cut",
                    "%(path)s: cut %(size)d bytes of an unfinished frame",
                    path=archive.path,
                    size=excess,
                )
            # Even if nothing was cut: what a killed process wrote may be in the page cache only.
            operations.sync(archive.fd)
        head = Head(0, "") if archive is None else archive.head
        if base is None:
            base = head.offset if rotation is None else rotation.base
            hash_before = "" if archive is None or not base else line_hash(archive.line_before(base))
            first_hash = first_line_hash(active_fd) or ""
            try:
                BaseFile(layout.base_path).write(Generation(base, hash_before, first_hash))
            except OSError as error:
                log_event(
                    WARNING,
                    "base_file.write_failed",
                    "%(path)s could not be written; the next rotation will write it: %(error)s",
                    path=layout.base_path,
                    error=error,
                )
                return head, base
        # Not before: a missing record shows that the Rust crate may have rotated without updating the base file.
        if archive is not None and (span := archive.unrecorded_span()) is not None:
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


def reconcile_copy(layout: Layout, active: ActiveLog, archived: Head) -> Rotation | None:
    """Removes, from the active log of a copied directory, the lines that the archive has too.

    Such a copy arises if the active log is copied before a rotation, and the archive after it. Returns a rotation to be
    continued if the active log has other lines as well.
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
    active.clear(archived)
    return None
