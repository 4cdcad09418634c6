"""Opening and rotating a log that several writers share.

The exclusive lock on the rotation's file, `app.jsonl.next.*`, is the claim on the archive: its holder rotates, or
recovers a rotation whose writer is dead. It is requested only in the turn, and kept without the turn while the archive
is written, so that appends continue.

Promise: an interrupted rotation is undone or completed by the next writer; one under way is left alone.
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
from .shared_log import SharedLog, open_shared_lock
from .turn import Turn

_claims: weakref.WeakSet[Rotation] = weakref.WeakSet()


def open_shared(layout: Layout, turn: Turn, sync_mode: int) -> tuple[SharedLog, Rotation | None]:
    """The active log, recovered, and a rotation of a dead writer that must be completed, if there is one.

    Raises `LogLockedError` if an exclusive writer, or shared ones with a different sync mode, have the log open,
    `CorruptLogError`, `OSError`.
    """
    with turn:
        fd, alone = open_shared_lock(layout)
        left_behind = None
        try:
            recovery.check_events(layout, fd)
            with LogSegments(layout) as segments:
                if segments.damage is not None:
                    raise segments.damage
            if alone:
                # Otherwise a temporary file may belong to a process in another container, whose id means nothing here.
                for directory in (layout.dir, layout.views_dir, layout.consumers_dir):
                    operations.discard_leftovers(directory)
            else:
                _check_sync_mode(layout, fd, turn, sync_mode)
            operations.sync_dir(layout.dir)
            left = layout.next_file()
            if left is not None and (claim := _claim(left)) is not None:
                left_behind = _recover(layout, fd, claim)
                left = None if left_behind is None else left
            if left is not None and left_behind is None:
                # A peer is rotating: the active log is not empty, so the hash before it is not needed.
                return SharedLog(layout, fd, turn, sync_mode, left.base, Head(left.base, "")), None
            before, base = recovery.find_ends(layout, fd, left_behind)
            log = SharedLog(layout, fd, turn, sync_mode, base, before)
            if left_behind is None and base < before.offset:
                left_behind = recovery.finish_copy(layout, log, before)
                log.mark_head()
            return log, _remember(left_behind)
        except BaseException:
            operations.close_locked(fd)
            if left_behind is not None:
                left_behind.close()
            raise


def _check_sync_mode(layout: Layout, fd: int, turn: Turn, sync_mode: int) -> None:
    mark = turn.read_mark()
    if mark is not None and mark.sync_mode != sync_mode:
        raise LogLockedError(
            layout.log_path, operations.lock_holder(fd), "all writers that share a log need the same sync mode"
        )


def _claim(left: NextFile) -> int | None:
    """The rotation's file, locked, if its writer is dead; None if it is alive. Only in the turn."""
    try:
        fd = operations.open_file(left.path, os.O_RDWR)
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


class OtherRotatesError(Exception):
    """Another writer is rotating the log."""


def begin(layout: Layout, log: SharedLog, goal: int) -> Rotation | None:
    """A rotation to continue: a new one, or one that a dead writer left; None if everything before `goal` is archived.

    Raises `OtherRotatesError` if another writer is rotating, and what `SharedLog.check` raises.
    """
    while True:
        with log.turn:
            log.check()
            if log.base >= goal:
                return None
            left = layout.next_file()
            if left is None:
                return _remember(rotation.begin(layout, log))
            claim = _claim(left)
            if claim is None:
                if left.path.exists():
                    raise OtherRotatesError
                continue
        # Without the turn, since this checks everything that was archived, and the claim keeps others away.
        if not _is_named(claim, left):
            operations.close_locked(claim)
            continue
        if (found := _recover(layout, log.fd, claim)) is not None:
            return _remember(found)


def _is_named(fd: int, left: NextFile) -> bool:
    """Whether the file still has the name: it may have been undone, or become the active log, before it was locked."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(left.path))
    except FileNotFoundError:
        return False


def switch(left: Rotation, log: SharedLog) -> int:
    """The rotation's last step, in the turn. Returns the old file's descriptor."""
    with log.turn:
        log.check()
        left.share()
        return left.switch(log)


def _remember(begun: Rotation | None) -> Rotation | None:
    if begun is not None:
        _claims.add(begun)
    return begun


def _after_fork() -> None:
    for begun in list(_claims):
        begun.close()


# A forked child would keep its parent's claim, even once the parent is dead.
os.register_at_fork(after_in_child=_after_fork)
