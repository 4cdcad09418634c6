"""Opens the parts of a writer: the engine's committer and, if requested, an index.

Promise: if opening fails or is cancelled, nothing stays open.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ._address import Address, engine_of
from ._aio import UncancellableTask, uninterrupted
from ._engine import Committer, IndexedSource, IndexingCommitter, LockMode, SyncMode
from ._index import EngineIndex, FileIndex, Index, index_path
from ._reader import EventReader
from ._waiters import Scope, Waiters

# The upper limit for `max_event_size`, in bytes: the system reads and writes no more than 2 GiB in one call.
MAX_EVENT_SIZE = 2**30


@dataclass(frozen=True)
class WriterParts:
    """The parts of a writer. The tails and waits in `scope` end when the writer is closed."""

    committer: Committer
    waiters: Waiters
    scope: Scope
    index: Index | None


def parts_opener(
    dir: Address,
    lock: LockMode,
    sync: SyncMode,
    max_log_size: int,
    max_event_size: int,
    index: bool | str | os.PathLike[str],
    unique_ids: bool,
) -> Callable[[], Coroutine[Any, Any, WriterParts]]:
    """Checks the options of `EventLog.open` and returns a function that opens the parts. Raises `ValueError`."""
    _check_size("max_log_size", max_log_size, 0)
    _check_size("max_event_size", max_event_size, 1, MAX_EVENT_SIZE)
    options = {"lock": LockMode(lock), "sync": SyncMode(sync), "max_log_size": max_log_size}
    defaults = {"lock": LockMode.FLOCK, "sync": SyncMode.ALWAYS, "max_log_size": 0}
    if unique_ids and not index:
        raise ValueError("unique_ids=True needs the index: open the log with index=True too")
    engine = engine_of(dir)
    # Defaults are not passed on, since other engines do not have these options.
    given = {name: value for name, value in options.items() if value != defaults[name]}

    async def open_() -> WriterParts:
        committer = await engine.open_committer(**given)
        try:
            waiters, scope = await committer.source.waiters(), Scope()
            opened_index = _open_index(committer, scope, index) if index else None
            return WriterParts(committer, waiters, scope, opened_index)
        except BaseException:
            await uninterrupted(UncancellableTask(committer.aclose(), "eventfold close"))
            raise

    return open_


def _open_index(committer: Committer, scope: Scope, index: Literal[True] | str | os.PathLike[str]) -> Index:
    """Starts to open the index in the background: the engine's own index or a file."""
    source = committer.source
    reader = EventReader._of_source(source, scope)
    if index is True and isinstance(committer, IndexingCommitter) and isinstance(source, IndexedSource):
        committer.begin_indexing()
        return EngineIndex.open(source.keys, reader)
    return FileIndex.open(index_path(source) if index is True else Path(index), reader)


def _check_size(name: str, value: int, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"{name} must be an integer of {limits}, in bytes, not {value!r}")
