"""Restores a backup: it is verified, copied, and only then moved into place.

Everything is copied rather than linked: a writer appends to `app.jsonl` and the archive in place, which would change
the backup too.

The copy is written to a directory inside the target, the only place that is certainly on the same file system, and
moved from there name by name: first what depends on the log, then the base file, which says where `app.jsonl` begins,
then `app.jsonl`, and the archive last. Until the archive is there, the base file keeps everybody from mistaking a part
of the log for all of it.

Promises: neither this nor the restored log changes the backup; a kill at any moment leaves a target that has no event
yet, is refused with a `CorruptLogError`, or is complete.
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

# The directory in the target to which the copy is written first.
UNFINISHED = ".restoring"


async def restore(
    backup: str | os.PathLike[str],
    dir: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], object] | None = None,
) -> Head:
    """Restores a backup with its snapshots and consumers' offsets, so that it can be opened at once.

    The backup is verified first, and never changed. If cancelled, it leaves no log in `dir`, and can be called again.
    The same holds if the process is killed, unless that happens at the last moment: then `dir` contains the log, or
    files that must be removed first.

    Args:
        backup: The directory that `EventLog.backup` wrote.
        dir: The data directory to create; it may exist if it is empty.
        progress: Called repeatedly with the number of bytes verified or copied so far and in total.

    Returns:
        The head of the log.

    Raises:
        CorruptLogError: The log in the backup is damaged; nothing was copied. A snapshot or a consumer's offset that
            does not fit is left out, with a warning.
        EventfoldError: There is no backup, another call is restoring into `dir`, or `dir` is not empty, even if
            something was put there only meanwhile, such as by a program that opened it. It is left as it is.
        OSError: A file could not be read or written.
    """
    source, target = Layout(directory_of(backup)), Layout(directory_of(dir))
    await in_thread(_check, source, target)
    report = await verify(source.dir, progress=progress)
    for problem in report.problems:
        if Path(problem.path).parent not in (source.views_dir, source.consumers_dir):
            raise CorruptLogError(
                problem.path, problem.offset, f"{problem.reason}; restore another backup, or repair it"
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
    """Keeps others from restoring into the same directory; it ends with the process."""

    def __init__(self, target: Layout) -> None:
        self._dir = target.dir
        self._lock: NamedLock | None = None

    def take(self) -> None:
        """Raises `EventfoldError` if another call is restoring there."""
        self._lock = NamedLock.take_directory(self._dir)
        if self._lock is None:
            raise EventfoldError(f"{self._dir} is being restored by another call or process: let it finish")

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()


def _check(source: Layout, target: Layout) -> None:
    if not (source.log_path.exists() or source.archive_path.exists()):
        raise EventfoldError(f"there is no log in {source.dir}: name the directory that holds app.jsonl")
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
    """Removes what an interrupted restore has left: after a power cut, anything may be in its files."""
    _check(source, target)
    if unfinished.dir.exists():
        shutil.rmtree(unfinished.dir)


def _move_into_place(unfinished: Layout, target: Layout) -> None:
    # Somebody may have created a log there meanwhile, and appended to it. A writer that opens the directory creates
    # app.jsonl first and then reads the base file: so either we see app.jsonl below, or the base file makes it fail.
    _check_still_empty(target)
    for directory in (unfinished.views_dir, unfinished.consumers_dir):
        if directory.exists():
            operations.rename(directory, target.dir / directory.name)
    for path in (unfinished.base_path, unfinished.log_path, unfinished.archive_path):
        if path.exists():
            # One after the other, even after a power cut.
            operations.sync_dir(target.dir)
            if path == unfinished.log_path and target.log_path.exists():
                operations.unlink(target.base_path)  # describes a log other than the one that was created
                raise _created_meanwhile(target, target.log_path.name)
            operations.rename(path, target.dir / path.name)
    operations.sync_dir(target.dir)
    try:
        os.rmdir(unfinished.dir)
    except OSError:
        pass  # somebody has put something there; the log is complete anyway
