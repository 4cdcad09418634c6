"""Restores a backup: it is verified, copied, and then moved to the target directory.

Files are copied, not linked, because a writer appends to `app.jsonl` and the archive in place and would change the
backup too.

The copy is written to a directory inside the target, which is certainly on the same file system. From there, the files
are moved one by one: first the snapshots and consumers, then the base file, which says where `app.jsonl` begins, then
`app.jsonl`, and the archive last. As long as the archive is missing, the base file keeps `app.jsonl` from being taken
for the whole log.

Promises: neither restoring nor the restored log changes the backup; a kill at any moment leaves a target that contains
no event, is refused with a `CorruptLogError`, or is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ._address import directory_of
from ._backup import backup as copy_to
from ._errors import CorruptLogError, EventfoldError
from ._event import Head
from ._files import operations
from ._files.named_lock import NamedLock
from ._files.paths import Layout
from ._logging import WARNING, log_event
from ._reader import EventReader
from ._threads import in_thread
from ._verify import verify

# The directory in the target to which the copy is written.
UNFINISHED = ".restoring"


async def restore(
    backup: str | os.PathLike[str],
    dir: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], object] | None = None,
) -> Head:
    """Restores a backup with its snapshots and consumers' offsets to a directory that can be opened as a log.

    The backup is verified first, and never changed. If cancelled, there is no log in `dir`, and you can call it again.
    The same is true after a kill, except in the final step: then `dir` may contain the log, or files that must be
    removed before the next call.

    Args:
        backup: The directory that `EventLog.backup` wrote.
        dir: The data directory, which is created; it may exist if it is empty.
        progress: Called repeatedly with the number of bytes verified or copied so far and in total.

    Returns:
        The head of the restored log. A snapshot or a consumer's offset that does not fit is left out, with a warning.

    Raises:
        CorruptLogError: The log in the backup is damaged. Nothing was copied.
        EventfoldError: There is no backup, another call is restoring to `dir`, or `dir` is not empty, perhaps because a
            program opened it during the call. The files in `dir` are not changed.
        OSError: A file could not be read or written.
    """
    source, target = Layout(directory_of(backup)), Layout(directory_of(dir))
    await in_thread(_check, source, target)
    report = await verify(source.dir, progress=progress)
    for problem in report.problems:
        if Path(problem.path).parent not in (source.views_dir, source.consumers_dir):
            raise CorruptLogError(
                problem.path, problem.offset, f"{problem.reason}; restore another backup, or repair this one"
            )
        log_event(
            WARNING,
            "restore.left_out",
            "did not restore %(path)s, offset %(offset)d: %(reason)s",
            path=problem.path,
            offset=problem.offset,
            reason=problem.reason,
        )
    unfinished = Layout(target.dir / UNFINISHED)
    claim = _Claim(target)
    try:
        await in_thread(claim.take)
        await in_thread(_begin, source, target, unfinished)
        head = await copy_to(EventReader(source.dir), unfinished.dir, progress)
        await in_thread(_move_into_place, unfinished, target)
    finally:
        claim.release()
    return head


class _Claim:
    """A lock against other calls that restore to the same directory. It is released when the process ends."""

    def __init__(self, target: Layout) -> None:
        self._dir = target.dir
        self._lock: NamedLock | None = None

    def take(self) -> None:
        """Raises `EventfoldError` if another call is restoring there."""
        self._lock = NamedLock.acquire_directory(self._dir)
        if self._lock is None:
            raise EventfoldError(f"{self._dir} is being restored by another call or process: let it finish")

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()


def _check(source: Layout, target: Layout) -> None:
    if not (source.log_path.exists() or source.archive_path.exists()):
        raise EventfoldError(f"there is no log in {source.dir}: use the directory that contains app.jsonl")
    try:
        found = set(os.listdir(target.dir)) - {UNFINISHED}
    except FileNotFoundError:
        return
    if found:
        raise EventfoldError(
            f"{target.dir} is not empty: it contains {min(found)!r}; move that away, or choose another directory"
        )


def _check_still_empty(target: Layout) -> None:
    found = set(os.listdir(target.dir)) - {UNFINISHED}
    if found:
        raise _created_meanwhile(target, min(found))


def _created_meanwhile(target: Layout, name: str) -> EventfoldError:
    return EventfoldError(
        f"{name!r} was put into {target.dir} while the backup was being restored there: stop the program that opens "
        "this directory, move its content away, and restore again"
    )


def _begin(source: Layout, target: Layout, unfinished: Layout) -> None:
    """Removes the unfinished copy of an interrupted call, since a power cut may have damaged it."""
    _check(source, target)
    if unfinished.dir.exists():
        shutil.rmtree(unfinished.dir)


def _move_into_place(unfinished: Layout, target: Layout) -> None:
    # Another program may have created a log in the target and appended to it. A writer that opens a directory first
    # creates app.jsonl and then reads the base file. So either app.jsonl is seen below, or that writer fails.
    _check_still_empty(target)
    for directory in (unfinished.views_dir, unfinished.consumers_dir):
        if directory.exists():
            operations.rename(directory, target.dir / directory.name)
    for path in (unfinished.base_path, unfinished.log_path, unfinished.archive_path):
        if path.exists():
            # Synced before each step, so that a power cut does not change their order.
            operations.sync_dir(target.dir)
            if path == unfinished.log_path and target.log_path.exists():
                operations.unlink(target.base_path)  # describes a log other than the one that was created
                raise _created_meanwhile(target, target.log_path.name)
            operations.rename(path, target.dir / path.name)
    operations.sync_dir(target.dir)
    try:
        os.rmdir(unfinished.dir)
    except OSError:
        pass  # another program has put a file there; the log is complete all the same
