"""Builds the index of a log ahead of time, and removes it.

Promises: the log is not changed; an index can be built while the log is being written; the file of an index is removed
only while the log is not open for writing, an index in the engine at any time.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

from ._address import Address
from ._aio import UncancellableTask, uninterrupted
from ._engine import EngineKeys, IndexedSource, paths_of
from ._errors import EventfoldError
from ._event import Head
from ._files.active import WriterLock
from ._files.paths import Layout
from ._index import FileIndex, index_path
from ._index.store import Store, UnusableIndexError
from ._reader import EventReader
from ._threads import in_thread

# Seconds between two calls of `progress`.
_INTERVAL = 0.1


async def build_index(
    dir: Address,
    *,
    path: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Head:
    """Builds the index of tags and ids of a log, or brings it up to date, even while the log is being written.

    `EventLog.open(dir, index=True)` also does this, in the background. If cancelled, the part that was written remains,
    and the next call continues from there.

    Args:
        dir: The log: a data directory, an address, or an engine.
        path: The index's file; if not given, `index.sqlite` in the data directory, or the table in PostgreSQL.
        progress: Called repeatedly with the number of bytes of the log read so far and in total.

    Returns:
        The head up to which the index is complete.

    Raises:
        EventfoldError: The file could not be written (a record of the logger `eventfold` says why), or there is no such
            log.
        ValueError: The engine keeps no index, and no `path` was given.
        CorruptLogError: The log is damaged.
        OSError: The log could not be read.
    """
    reader = EventReader(dir)
    if path is None and isinstance(reader._source, IndexedSource):
        return await _extend(reader, reader._source.keys, progress)
    file = index_path(reader._source) if path is None else Path(path)
    head = (await reader.head()).offset
    index = FileIndex.open(file, reader)
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
        indexed = await in_thread(_indexed_head, file)
    except (UnusableIndexError, sqlite3.Error) as error:
        raise EventfoldError(f"the index {file} could not be built: {error}") from error
    if indexed.offset < head:
        raise EventfoldError(f"the index {file} ends at offset {indexed.offset}, but the log ends at {head}")
    return indexed


async def _extend(reader: EventReader, keys: EngineKeys, progress: Callable[[int, int], object] | None) -> Head:
    """Builds the index that the engine keeps."""
    async with aclosing(reader):
        head = await reader.head()
        await keys.extend(head.offset, None if progress is None else lambda done: progress(done, head.offset))
    return head


def _indexed_head(file: Path) -> Head:
    """The head up to which a file is complete, even after a power cut, since the file was closed and thereby synced."""
    store = Store(file)
    head = store.open()
    store.close()
    return head


async def drop_index(dir: Address, *, path: str | os.PathLike[str] | None = None) -> bool:
    """Removes the index of a log. A log in files must not be open for writing.

    If cancelled, the index may or may not be removed.

    Args:
        dir: The log: a data directory, an address, or an engine.
        path: The index's file; if not given, `index.sqlite` in the data directory, or the rows in PostgreSQL.

    Returns:
        Whether there was an index.

    Raises:
        LogLockedError: The log is open for writing, and its index may be in use.
        EventfoldError: There is no log in that directory.
        ValueError: The engine keeps no index, and no `path` was given.
        OSError: The file could not be removed, or the server refused.
    """
    reader = EventReader(dir)
    source = reader._source
    if path is None and isinstance(source, IndexedSource):
        async with aclosing(reader):
            return await source.keys.drop()
    file = index_path(source) if path is None else Path(path)
    lock = WriterLock(Layout(paths_of(source).dir))
    try:
        await in_thread(lock.acquire)
        return await in_thread(_drop, file)
    finally:
        await in_thread(lock.release)


def _drop(file: Path) -> bool:
    existed = file.exists()
    Store(file).drop()
    return existed
