"""Making a log of a backup: the backup is verified, copied, and only then put into its place.

Everything is copied, nothing linked: a writer appends to `app.jsonl` and to the archive in place, and would change the
backup with them.

The copy is made in a directory of its own inside the target, since that is the only place which is surely on the same
file system, and moved from there name by name: first what depends on the log, then the base file, which says where
`app.jsonl` begins, then `app.jsonl`, the archive last. Until that one is there, the base file keeps everybody from
taking a part of the log for all of it.

Promises: the backup is not changed, nor will it be by the restored log; a kill at any moment leaves a target that holds
no event yet, is refused with a `CorruptLogError`, or is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ._aio import in_thread
from ._backup import backup as copy_to
from ._errors import CorruptLogError, EventfoldError
from ._event import Head
from ._files import operations
from ._files.named_lock import NamedLock
from ._files.paths import Layout
from ._logging import WARNING, log_event
from ._reader import EventReader
from ._verify import verify

# Where the copy is made, in the target.
UNFINISHED = ".restoring"


async def restore(
    backup: str | os.PathLike[str],
    dir: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], object] | None = None,
) -> Head:
    """Makes a log of a backup, with its snapshots and its consumers' offsets; it can be opened at once.

    The backup is read and verified first, and stays as it is. Cancelled, it leaves no log in `dir`, and can be called
    again. So it is if it was killed, unless that was in its last moment: then `dir` holds the log, or what is to be
    removed first.

    Args:
        backup: The directory that `EventLog.backup` wrote.
        dir: The data directory that is to be: not there yet, or empty.
        progress: Is called again and again with the bytes verified or copied, and the bytes that there are.

    Returns:
        The head of the log.

    Raises:
        CorruptLogError: The log in the backup is damaged; nothing was copied. A snapshot or a consumer's offset that
            does not fit is left out, with a warning.
        EventfoldError: There is no backup, another call restores into `dir`, or that holds something; also if that was
            put there meanwhile, such as by a program that opened it. It is left as it is.
        OSError: A file could not be read or written.
    """
    source, target = Layout(backup), Layout(dir)
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
            "not restored: %(path)s, offset %(offset)d: %(reason)s",
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
        await in_thread(_put_in_place, unfinished, target)
    finally:
        claim.release()
    return head


class _Claim:
    """What keeps others from restoring into the same directory; it ends with the process."""

    def __init__(self, target: Layout) -> None:
        self._dir = target.dir
        self._lock: NamedLock | None = None

    def take(self) -> None:
        """Raises `EventfoldError` where another one restores there."""
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
            f"{target.dir} is not empty, and holds {min(found)!r}: move what is there away, or choose another directory"
        )


def _check_still_empty(target: Layout) -> None:
    found = set(os.listdir(target.dir)) - {UNFINISHED}
    if found:
        raise _begun_meanwhile(target, min(found))


def _begun_meanwhile(target: Layout, name: str) -> EventfoldError:
    return EventfoldError(
        f"{name!r} was put into {target.dir} while the backup was being restored there: stop the program that opens "
        "this directory, move what is there away, and restore again"
    )


def _begin(source: Layout, target: Layout, unfinished: Layout) -> None:
    """Removes what a restoring has left that was broken off: after a power cut, anything may be in its files."""
    _check(source, target)
    if unfinished.dir.exists():
        shutil.rmtree(unfinished.dir)


def _put_in_place(unfinished: Layout, target: Layout) -> None:
    # Somebody may have begun a log there meanwhile, and appended to it. Whoever opens the directory makes app.jsonl
    # first and looks at the base file then: so either we see app.jsonl below, or it is refused because of the base.
    _check_still_empty(target)
    for directory in (unfinished.views_dir, unfinished.consumers_dir):
        if directory.exists():
            operations.rename(directory, target.dir / directory.name)
    for path in (unfinished.base_path, unfinished.log_path, unfinished.archive_path):
        if path.exists():
            # One after the other, also after a power cut.
            operations.sync_dir(target.dir)
            if path == unfinished.log_path and target.log_path.exists():
                operations.unlink(target.base_path)  # speaks of another log than the one that was begun
                raise _begun_meanwhile(target, target.log_path.name)
            operations.rename(path, target.dir / path.name)
    operations.sync_dir(target.dir)
    try:
        os.rmdir(unfinished.dir)
    except OSError:
        pass  # somebody has put something there; the log is complete all the same
