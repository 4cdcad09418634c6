"""Builds the index of a log in files ahead of time, and removes it.

Promises: neither changes the log; an index can be built while the log is being written, and is removed only while
nobody is writing.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

from ._aio import UncancellableTask, in_thread, uninterrupted
from ._engine import paths_of
from ._errors import EventfoldError
from ._event import Head
from ._files.cutting import WriterLock
from ._files.paths import Layout
from ._index import Index, index_path
from ._index.store import Store, UnusableIndexError
from ._reader import EventReader

# Seconds between two calls of `progress`.
_INTERVAL = 0.1


async def build_index(
    dir: str | os.PathLike[str],
    *,
    path: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Head:
    """Builds the index of tags and ids of a log in files or brings it up to date, even while the log is being written.

    `EventLog.open(dir, index=True)` does so too, in the background. If cancelled, it keeps what it has written, and the
    next call continues from there.

    Args:
        dir: The data directory.
        path: The index's file; `index.sqlite` in the data directory if not given.
        progress: Called repeatedly with the number of bytes of the log read so far and in total.

    Returns:
        The head up to which the index is complete.

    Raises:
        EventfoldError: The file could not be written; the program's log (logger `eventfold`) says why.
        CorruptLogError: The log is damaged.
        OSError: The log could not be read.
    """
    reader = EventReader(dir)
    file = index_path(reader._source) if path is None else Path(path)
    head = (await reader.head()).offset
    index = Index.open(file, reader)
    try:
        building = asyncio.ensure_future(index.candidates((), ()))
        try:
            while not building.done():
                await asyncio.wait([building], timeout=_INTERVAL)
                if progress is not None:
                    progress(index.known.offset, max(head, index.known.offset))
            building.result()
        finally:
            building.cancel()
    finally:
        await uninterrupted(UncancellableTask(index.aclose(), "eventfold close"))
    try:
        place = await in_thread(_place_of, file)
    except (UnusableIndexError, sqlite3.Error) as error:
        raise EventfoldError(f"the index {file} could not be built: {error}") from error
    if place.offset < head:
        raise EventfoldError(f"the index {file} ends at offset {place.offset}, but the log ends at {head}")
    return place


def _place_of(file: Path) -> Head:
    """The head up to which a file is complete. It was closed, so it is complete even after a power cut."""
    store = Store(file)
    place = store.open()
    store.close()
    return place


async def drop_index(dir: str | os.PathLike[str], *, path: str | os.PathLike[str] | None = None) -> bool:
    """Removes the index of a log in files, which nobody may have open for writing.

    Args:
        dir: The data directory.
        path: The index's file; `index.sqlite` in the data directory if not given.

    Returns:
        Whether there was one.

    Raises:
        LogLockedError: The log is open for writing, and its index may be in use.
        EventfoldError: There is no log in that directory.
        OSError: The file could not be removed.
    """
    source = EventReader(dir)._source
    file = index_path(source) if path is None else Path(path)
    lock = WriterLock(Layout(paths_of(source).dir))
    try:
        await in_thread(lock.take)
        return await in_thread(_drop, file)
    finally:
        await in_thread(lock.release)


def _drop(file: Path) -> bool:
    there = file.exists()
    Store(file).drop()
    return there
