"""Opens and rotates a log that several writers share.

The exclusive lock on the rotation's file, `app.jsonl.next.*`, is the claim on the archive: only its holder may rotate,
or recover a rotation whose writer has died. A writer takes the claim only in the turn, but keeps it without the turn
while it writes the archive, so that appends continue.

Promise: the next writer undoes or completes an interrupted rotation, and leaves one alone that is still under way.
"""

from __future__ import annotations

import os
import weakref

from .._errors import LogLockedError
from .._event import Head
from . import operations, recovery, rotation
from .paths import Layout, NextFile
from .rotation import Rotation
from .segments import LogSegments
from .shared_log import SharedLog, open_with_shared_lock
from .turn import Turn

_rotations: weakref.WeakSet[Rotation] = weakref.WeakSet()


def open_shared(layout: Layout, turn: Turn, sync_mode: int) -> tuple[SharedLog, Rotation | None]:
    """The active log, recovered, and the rotation of a dead writer that must be completed, if there is one.

    Raises `LogLockedError` if an exclusive writer, or a shared one with a different sync mode, has the log open,
    `CorruptLogError`, `OSError`.
    """
    with turn:
        fd, is_only_writer = open_with_shared_lock(layout)
        interrupted = None
        try:
            recovery.check_events(layout, fd)
            with LogSegments(layout) as segments:
                if segments.damage is not None:
                    raise segments.damage
            if is_only_writer:  # otherwise another writer may still need a temporary file
                for directory in (layout.dir, layout.views_dir, layout.consumers_dir):
                    operations.discard_leftovers(directory)
            else:
                _check_sync_mode(layout, fd, turn, sync_mode)
            operations.sync_dir(layout.dir)
            next_file = layout.next_file()
            if next_file is not None:
                claim = _claim(next_file)
                if claim is None:
                    # Another process is rotating. The active log is not empty, so the hash before it is not needed.
                    head_at_base = Head(next_file.base, "")
                    return SharedLog(layout, fd, turn, sync_mode, next_file.base, head_at_base), None
                interrupted = _recover(layout, fd, claim)
            archived, base = recovery.recover_archive(layout, fd, interrupted)
            log = SharedLog(layout, fd, turn, sync_mode, base, archived)
            if interrupted is None and base < archived.offset:
                interrupted = recovery.reconcile_copy(layout, log, archived)
                log.record_head()
            return log, _close_in_child(interrupted)
        except BaseException:
            operations.close_locked(fd)
            if interrupted is not None:
                interrupted.close()
            raise


def _check_sync_mode(layout: Layout, fd: int, turn: Turn, sync_mode: int) -> None:
    mark = turn.read_mark()
    if mark is not None and mark.sync_mode != sync_mode:
        raise LogLockedError(
            layout.log_path, operations.lock_holder(fd), "all writers that share a log need the same sync mode"
        )


def _claim(next_file: NextFile) -> int | None:
    """The rotation's file, locked, if its writer has died; None if it is alive. Call it in the turn."""
    try:
        fd = operations.open_file(next_file.path, os.O_RDWR)
    except FileNotFoundError:  # undone just now
        return None
    try:
        if operations.lock(fd):
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _recover(layout: Layout, active_fd: int, claim: int) -> Rotation | None:
    recovered = None
    try:
        recovered = recovery.recover(layout, active_fd, claim)
    finally:
        if recovered is None:
            operations.close_locked(claim)
    return recovered


class AlreadyRotatingError(Exception):
    """Another writer is rotating the log."""


def begin(layout: Layout, log: SharedLog, goal: int) -> Rotation | None:
    """A rotation to continue: a new one, or that of a dead writer; None if everything before `goal` is archived.

    Raises `AlreadyRotatingError` if another writer is rotating, and what `SharedLog.ensure_current` raises.
    """
    while True:
        with log.turn:
            log.ensure_current()
            if log.base >= goal:
                return None
            next_file = layout.next_file()
            if next_file is None:
                return _close_in_child(rotation.begin(layout, log))
            claim = _claim(next_file)
            if claim is None:
                if next_file.path.exists():
                    raise AlreadyRotatingError
                continue
        # Without the turn: recovery reads everything that was archived, and the claim keeps other processes away.
        if not _is_named(claim, next_file):
            operations.close_locked(claim)
            continue
        if (interrupted := _recover(layout, log.fd, claim)) is not None:
            return _close_in_child(interrupted)


def _is_named(fd: int, next_file: NextFile) -> bool:
    """Whether a locked file still has its name: before that, it may have been removed, or become the active log."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(next_file.path))
    except FileNotFoundError:
        return False


def switch(rotation: Rotation, log: SharedLog) -> int:
    """The rotation's last step, in the turn. Returns the old file's descriptor."""
    with log.turn:
        log.ensure_current()
        rotation.share_lock()
        return rotation.switch(log)


def _close_in_child(rotation: Rotation | None) -> Rotation | None:
    """Makes sure that a forked child closes the rotation, which it would otherwise keep after its parent has died."""
    if rotation is not None:
        _rotations.add(rotation)
    return rotation


def _after_fork() -> None:
    for inherited in list(_rotations):
        inherited.close()


os.register_at_fork(after_in_child=_after_fork)
