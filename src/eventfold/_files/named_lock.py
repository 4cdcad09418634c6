"""A lock for what one process at a time may do: read under a consumer's name, replace a snapshot.

It is the flock of a file of its own, or of the directory that the snapshots are in: never of a file that is replaced.

Promise: the lock ends with its process, and with the object; a forked child does not keep it.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from . import operations


class NamedLock:
    """An exclusive flock that is held. Get it from `take`."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd
        _held.add(self)

    @classmethod
    def take(cls, path: Path) -> NamedLock | None:
        """The lock of a file; None where another holds it. Creates the file and its directory. Raises `OSError`."""
        operations.make_dir(path.parent)
        return cls._open_and_lock(path, os.O_RDWR | os.O_CREAT)

    @classmethod
    def take_directory(cls, path: Path) -> NamedLock | None:
        """The lock of a directory, which is created if need be; None where another holds it. Raises `OSError`."""
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
        """Never: nobody can take an flock away."""
        return False

    def release(self) -> None:
        """Lets the lock go; idempotent, and never blocks."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


_held: weakref.WeakSet[NamedLock] = weakref.WeakSet()


def _after_fork() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_after_fork)
