"""A directory of plain files as an `Engine`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .._engine import LockMode, SyncMode
from .committer import FileCommitter
from .source import FileSource

if TYPE_CHECKING:
    from .shared_committer import SharedCommitter


class Files:
    """A log in files, with the options with which it is opened for appending.

    `max_log_size` is the size in bytes of `app.jsonl` from which it is rotated automatically (0: never).
    """

    def __init__(
        self,
        dir: str | os.PathLike[str],
        *,
        lock: LockMode = LockMode.FLOCK,
        sync: SyncMode = SyncMode.ALWAYS,
        max_log_size: int = 0,
    ) -> None:
        self._dir = Path(dir)
        self._lock = LockMode(lock)
        self._sync = SyncMode(sync)
        self._max_log_size = max_log_size

    def __repr__(self) -> str:
        return f"Files({str(self._dir)!r})"

    def source(self) -> FileSource:
        """The log, for reading. No I/O."""
        return FileSource(self._dir)

    async def open_committer(
        self, *, lock: LockMode | None = None, sync: SyncMode | None = None, max_log_size: int | None = None
    ) -> FileCommitter | SharedCommitter:
        """Opens the directory for appending; options given here override the engine's own.

        Raises `LogLockedError`, `CorruptLogError`, `OSError`. If cancelled, it opens nothing.
        """
        lock = self._lock if lock is None else lock
        committer: type[FileCommitter | SharedCommitter] = FileCommitter
        if lock is LockMode.SHARED:
            from .shared_committer import SharedCommitter  # only on demand: most programs don't need it

            committer = SharedCommitter
        return await committer.open(
            self.source(),
            lock,
            self._sync if sync is None else sync,
            self._max_log_size if max_log_size is None else max_log_size,
        )
