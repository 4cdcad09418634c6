"""`FileIndex`: an index in a file beside the log.

It follows the log: new lines are read in the background, their keys are kept in memory, and some thousands of them at a
time are added to the file. A lookup first waits until all lines up to the current head were read.

Promises: an answer is complete up to the offset that comes with it; a file that is damaged or of another log is
rebuilt, with a warning, and one that ends before the head is completed; if the file can't be used, results stay the
same and only take longer; memory is bounded.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Collection
from contextlib import aclosing, suppress
from pathlib import Path
from time import monotonic
from typing import TypeVar

from .._aio import LoopBreaks, UncancellableTask
from .._codec.lines import Lines, last_line_hash
from .._engine import Source, paths_of
from .._errors import CorruptLogError, EventfoldError, LogClosedError
from .._event import Head
from .._logging import WARNING, log_event
from .._reader import EventReader
from .._threads import Thread
from .index import MAX_CANDIDATES, Index
from .lookups import Lookups
from .pending import PendingPairs
from .store import OffsetsByKey, Store, StoredOffsets, UnusableIndexError

T = TypeVar("T")

# The number of pairs of a key and an offset that are collected in memory and then written.
WRITE_BATCH_SIZE = 50_000
# The maximum number of pairs in memory while the file can't be written. With more, the file is not used for a while.
MAX_PENDING = 4 * WRITE_BATCH_SIZE
# How many bytes of the log are read before closing, so that they need not be read after the next opening.
MAX_READ_AT_CLOSE = 16 * 2**20
# Seconds between two checks for new lines while there are no lookups.
POLL_INTERVAL = 0.2
# Seconds before a file that could not be used is tried again.
RETRY_INTERVAL = 30.0
# How many times a lookup is tried if the file is reopened during it.
_ATTEMPTS = 3


class FileIndex(Index):
    """The index of one log in a file, for one event loop. Open it with `open`; `reader` reads the log."""

    def __init__(self, path: Path, reader: EventReader) -> None:
        super().__init__(reader)
        self._path = path
        self._store = Store(path)
        self._thread = Thread(f"eventfold index {path}")
        self._lookups = Lookups(self._store, self._thread, MAX_CANDIDATES)
        self._is_open = False
        self._open_count = 0
        self._closing = False
        self._retry_at = 0.0  # while the file is not used: the time at which it is tried again
        self._warnings: set[str] = set()
        # The heads up to which the file is complete, and the file and memory together.
        self._stored = self._known = Head(0, "")
        self._pending = PendingPairs()
        self._reading: UncancellableTask[None] | None = None
        self._writing: UncancellableTask[None] | None = None
        self._no_write_before = 0.0
        self._following: asyncio.Task[None] | None = None

    @classmethod
    def open(cls, path: Path, reader: EventReader) -> FileIndex:
        """Starts to open or create the file in the background. Raises `OSError` if no thread can be started."""
        index = cls(path, reader)
        index._following = asyncio.create_task(index._follow(), name="eventfold index")
        return index

    @property
    def known(self) -> Head:
        """The head up to which the index is complete."""
        return self._known

    # Opening the file, and ceasing to use it

    async def _open(self) -> None:
        """Opens or reopens the file, and rebuilds it if it is damaged. After a failure, the file is not used."""
        if self._writing is not None:
            await asyncio.wait([self._writing])
        try:
            try:
                stored = await self._open_store()
            except UnusableIndexError as error:
                log_event(
                    WARNING,
                    "index.rejected",
                    "the index %(path)s is rebuilt: %(error)s",
                    path=self._path,
                    error=error,
                )
                await self._in_thread(self._store.drop)
                stored = await self._in_thread(self._store.open)
        except (UnusableIndexError, sqlite3.Error, OSError) as error:
            self._suspend(f"can't be used ({error})")
            return
        self._stored = self._known = stored
        self._pending = PendingPairs()
        self._no_write_before = 0.0
        self._is_open = True
        self._open_count += 1

    async def _open_store(self) -> Head:
        await self._in_thread(self._store.abandon)
        stored = await self._in_thread(self._store.open)
        if stored.offset:
            try:
                found = await self._reader.read_line_hash_before(stored.offset)
            except (ValueError, CorruptLogError) as error:
                raise UnusableIndexError(f"it does not belong to this log: {error}") from error
            if found != stored.line_hash:
                raise UnusableIndexError(f"it is of another log: the line before offset {stored.offset} differs")
        return stored

    def _suspend(self, reason: str) -> None:
        """Stops using the file for a while, and drops the pairs that it does not have yet."""
        self._is_open = False
        self._open_count += 1
        self._known, self._pending = self._stored, PendingPairs()
        self._retry_at = monotonic() + RETRY_INTERVAL
        self._warn(f"{reason}, so the log is read instead; the index is tried again from time to time")

    def _warn(self, problem: str) -> None:
        """Logs a problem, but not repeatedly until the file can be written again."""
        if problem not in self._warnings:
            self._warnings.add(problem)
            log_event(WARNING, "index.impaired", "the index %(path)s %(problem)s", path=self._path, problem=problem)

    def _is_suspended(self) -> bool:
        return not self._is_open and monotonic() < self._retry_at

    async def _in_thread(self, function: Callable[..., T], *args: object) -> T:
        return await self._thread.call(function, *args)

    # Reading the log

    async def _follow(self) -> None:
        with suppress(LogClosedError):
            while True:
                try:
                    await self._catch_up()
                    if self._is_suspended():
                        await asyncio.sleep(self._retry_at - monotonic())
                        continue
                    await self._reader.wait_for_events(self._known.offset)
                except (CorruptLogError, OSError) as error:
                    log_event(
                        WARNING,
                        "index.follow_failed",
                        "the index %(path)s can't follow the log: %(error)s",
                        path=self._path,
                        error=error,
                    )
                    await asyncio.sleep(RETRY_INTERVAL)
                await asyncio.sleep(POLL_INTERVAL)

    async def _catch_up(self) -> None:
        """Reads the new lines up to the current head; concurrent callers share one read. Raises what reading raises."""
        head = (await self._reader.head()).offset
        while not self._closing and not self._is_suspended() and not (self._is_open and self._known.offset >= head):
            if self._reading is None:
                self._reading = UncancellableTask(self._read_new_lines(), "eventfold index")
                self._reading.add_done_callback(asyncio.Task.exception)  # nothing may be waiting for it
            reading = self._reading
            await asyncio.wait([reading])
            reading.result()

    async def _read_new_lines(self) -> None:
        try:
            if not self._is_open:
                await self._open()
            if not self._is_open:
                return
            async with aclosing(self._reader._lines(self._known, None)) as blocks:
                pause = LoopBreaks()
                async for lines in blocks:
                    if self._closing or not self._is_open:
                        break
                    self._add(lines)
                    if self._pending.count >= WRITE_BATCH_SIZE:
                        await self._begin_write()
                    if self._pending.count >= MAX_PENDING:
                        self._suspend("could not be written for a long time")
                        break
                    await pause()
        finally:
            self._reading = None

    def _add(self, lines: Lines) -> None:
        self._pending.add(lines)
        self._known = Head(lines.offset_at(len(lines.data)), last_line_hash(lines.data))

    # Writing the file

    async def _begin_write(self) -> None:
        """Starts to write the pairs in memory, as soon as the previous write has ended."""
        if self._writing is not None:
            await asyncio.wait([self._writing])
        if self._is_open and self._known != self._stored and monotonic() >= self._no_write_before:
            # Taken before the task starts, since lines beyond this head may be added until then.
            pairs = self._pending.begin_write()
            writing = self._write(self._stored.offset, self._known, pairs, self._pending)
            self._writing = UncancellableTask(writing, "eventfold index writer")

    async def _write(self, start: int, end: Head, pairs: OffsetsByKey, pending: PendingPairs) -> None:
        try:
            await self._thread.call(self._store.add, start, end, pairs)
        except (sqlite3.OperationalError, OSError) as error:
            pending.end_write(written=False)
            self._no_write_before = monotonic() + RETRY_INTERVAL
            self._warn(f"could not be written: {error}")
        except UnusableIndexError as error:
            self._is_open = False
            self._warn(f"must be opened again: {error}")
        except sqlite3.Error as error:
            self._suspend(f"is damaged ({error})")
        else:
            pending.end_write(written=True)
            self._stored = end
            self._warnings.clear()
        finally:
            self._writing = None

    # Looking up keys

    async def _find(
        self, wanted: Collection[tuple[int, int]]
    ) -> tuple[int, dict[tuple[int, int], StoredOffsets]] | None:
        for _ in range(_ATTEMPTS):
            await self._catch_up()
            if not self._is_open:
                return None
            open_count, known, stored = self._open_count, self._known.offset, self._stored.offset
            # Memory is searched before the file, so that pairs that are being written are found in one of them.
            pending = self._pending.find(wanted)
            try:
                found = await self._lookups.find([pair for pair in wanted if pair[1] < stored])
            except sqlite3.Error as error:
                self._suspend(f"can't be read ({error})")
                return None
            if open_count == self._open_count:
                if pending:
                    found = {**found, **{pair: _merged(found.get(pair), offsets) for pair, offsets in pending.items()}}
                return known, found
        return None

    # Closing

    async def aclose(self) -> None:
        """Writes the pairs in memory, and closes the file. A failure is logged."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])
        try:
            if (await self._reader.head()).offset - self._known.offset <= MAX_READ_AT_CLOSE:
                await self._catch_up()
            self._closing = True
            if self._reading is not None:
                await asyncio.wait([self._reading])
            self._no_write_before = 0.0
            await self._begin_write()
            if self._writing is not None:
                await asyncio.wait([self._writing])
            # A file that is not used at the moment may be damaged, so it must not get a checksum.
            await self._in_thread(self._store.close if self._is_open else self._store.abandon)
        except (CorruptLogError, sqlite3.Error, OSError) as error:
            log_event(
                WARNING,
                "index.close_failed",
                "the index %(path)s could not be closed, and will be rebuilt: %(error)s",
                path=self._path,
                error=error,
            )
        finally:
            self._end_thread()

    def abandon(self) -> None:
        """Closes the file without a checksum, without waiting for that."""
        if self._following is not None:
            with suppress(RuntimeError):  # the event loop is closed
                self._following.cancel()
        self._end_thread()

    def _end_thread(self) -> None:
        self._thread.call(self._store.abandon)
        self._thread.end()


def index_path(source: Source) -> Path:
    """The path of the index in the data directory. Raises `ValueError` for a log that is not in files."""
    try:
        return paths_of(source).dir / "index.sqlite"
    except EventfoldError:
        raise ValueError(
            f"{source.location} is not a directory of files: name a file for the index, such as "
            'index="orders.index.sqlite"'
        ) from None


def _merged(stored: StoredOffsets | None, pending: list[int]) -> StoredOffsets:
    offsets = pending if stored is None else sorted({*stored.offsets, *pending})
    return StoredOffsets(offsets, (stored is None or stored.complete) and len(offsets) <= MAX_CANDIDATES)
