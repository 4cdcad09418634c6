"""A lock for what only one process at a time may do, such as reading under a consumer's name or replacing a snapshot.

It is the flock of a separate file or of a directory, but never of a file that is replaced.

Promise: the lock ends with its process, and with the object; a forked child does not keep it.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from . import operations


class NamedLock:
    """A held exclusive flock. Get it from `acquire` or `acquire_directory`."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd
        _held.add(self)

    @classmethod
    def acquire(cls, path: Path) -> NamedLock | None:
        """Locks a file, which is created if necessary; None if the lock is taken. Raises `OSError`."""
        operations.make_dir(path.parent)
        return cls._open_and_lock(path, os.O_RDWR | os.O_CREAT)

    @classmethod
    def acquire_directory(cls, path: Path) -> NamedLock | None:
        """Locks a directory, which is created if necessary; None if the lock is taken. Raises `OSError`."""
        operations.make_dir(path)
        return cls._open_and_lock(path, os.O_RDONLY | os.O_DIRECTORY)

    @classmethod
    def _open_and_lock(cls, path: Path, flags: int) -> NamedLock | None:
        fd = operations.open_file(path, flags)
        try:
            if operations.lock(fd):
                return cls(path, fd)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    def __repr__(self) -> str:
        return f"<NamedLock {str(self._path)!r}, {'held' if self._fd >= 0 else 'released'}>"

    def __del__(self) -> None:
        self.release()

    async def was_lost(self) -> bool:
        """Always false: an flock can't be lost."""
        return False

    def release(self) -> None:
        """Releases the lock; idempotent, and never blocks."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


_held: weakref.WeakSet[NamedLock] = weakref.WeakSet()


def _after_fork() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_after_fork)
