"""`Index`: where in a log the events with a tag or an id are.

It follows the log: new lines are read in the background, their keys are kept in memory, and some thousands at a time
are added to the file. A lookup waits until everything up to the current head is known.

Promises: an answer has every event up to the offset that it names, and may have events that only share a key with what
was asked for; a file that is damaged, behind, or of another log is repaired or rebuilt, with a warning if it was
damaged; if the file fails, only the fast path fails, and memory stays bounded.
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
from .answers import MAX_CANDIDATES, Answers
from .lookups import Lookups
from .pending import PendingPairs
from .store import OffsetsByKey, Store, StoredOffsets, UnusableIndexError

T = TypeVar("T")

# How many pairs of a key and an offset are kept in memory before they are written.
WRITE_BATCH_SIZE = 50_000
# How many pairs are kept in memory while the file can't be written; with more, the index is given up for a while.
MAX_PENDING = 4 * WRITE_BATCH_SIZE
# How many bytes of the log are still read at closing, so that the next opening need not.
MAX_READ_AT_CLOSE = 16 * 2**20
# Seconds between two checks for new lines while there are no lookups.
POLL_INTERVAL = 0.2
# Seconds before a file that failed is tried again.
RETRY_INTERVAL = 30.0
# How often a lookup is repeated if the file was reopened meanwhile.
_ATTEMPTS = 3


class Index(Answers):
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
        # While the file is given up: the time at which it is tried again.
        self._retry_at = 0.0
        self._warnings: set[str] = set()
        self._stored = self._known = Head(0, "")
        self._pending = PendingPairs()
        self._reading: UncancellableTask[None] | None = None
        self._writing: UncancellableTask[None] | None = None
        self._no_write_before = 0.0
        self._following: asyncio.Task[None] | None = None

    @classmethod
    def open(cls, path: Path, reader: EventReader) -> Index:
        """Starts to open or create the file, in the background. Raises `OSError` if no thread can be started."""
        index = cls(path, reader)
        index._following = asyncio.create_task(index._follow(), name="eventfold index")
        return index

    @property
    def known(self) -> Head:
        """The head up to which the index is complete."""
        return self._known

    # Opening the file, and giving it up

    async def _open(self) -> None:
        """Opens or reopens the file, and rebuilds it if it can't be trusted. A failure gives it up."""
        if self._writing is not None:
            await asyncio.wait([self._writing])
        try:
            try:
                place = await self._open_store()
            except UnusableIndexError as error:
                log_event(
                    WARNING,
                    "index.rejected",
                    "the index %(path)s is rebuilt: %(error)s",
                    path=self._path,
                    error=error,
                )
                await self._in_thread(self._store.drop)
                place = await self._in_thread(self._store.open)
        except (UnusableIndexError, sqlite3.Error, OSError) as error:
            self._give_up(f"can't be used ({error})")
            return
        self._stored = self._known = place
        self._pending = PendingPairs()
        self._no_write_before = 0.0
        self._is_open = True
        self._open_count += 1

    async def _open_store(self) -> Head:
        await self._in_thread(self._store.abandon)
        place = await self._in_thread(self._store.open)
        if place.offset:
            try:
                found = await self._reader.read_line_hash_before(place.offset)
            except (ValueError, CorruptLogError) as error:
                raise UnusableIndexError(f"it is of another log, or of more than there is: {error}") from error
            if found != place.line_hash:
                raise UnusableIndexError(f"it is of another log: the line before offset {place.offset} differs")
        return place

    def _give_up(self, reason: str) -> None:
        """Stops using the file for a while, and forgets what it does not have yet."""
        self._is_open = False
        self._open_count += 1
        self._known, self._pending = self._stored, PendingPairs()
        self._retry_at = monotonic() + RETRY_INTERVAL
        self._warn(f"{reason}, so the log is read instead; it is tried again from time to time")

    def _warn(self, problem: str) -> None:
        """Logs a problem, once until the file can be written again."""
        if problem not in self._warnings:
            self._warnings.add(problem)
            log_event(WARNING, "index.impaired", "the index %(path)s %(problem)s", path=self._path, problem=problem)

    def _is_given_up(self) -> bool:
        return not self._is_open and monotonic() < self._retry_at

    async def _in_thread(self, function: Callable[..., T], *args: object) -> T:
        return await self._thread.call(function, *args)

    # Reading the log

    async def _follow(self) -> None:
        with suppress(LogClosedError):
            while True:
                try:
                    await self._catch_up()
                    if self._is_given_up():
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
        """Reads new lines up to the current head, once for all concurrent callers. Raises what reading raises."""
        head = (await self._reader.head()).offset
        while not self._closing and not self._is_given_up() and not (self._is_open and self._known.offset >= head):
            if self._reading is None:
                self._reading = UncancellableTask(self._read_new_lines(), "eventfold index")
                self._reading.add_done_callback(asyncio.Task.exception)  # The waiters may be gone.
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
                        self._give_up("could not be written for too long")
                        break
                    await pause()
        finally:
            self._reading = None

    def _add(self, lines: Lines) -> None:
        self._pending.add(lines)
        self._known = Head(lines.offset_at(len(lines.data)), last_line_hash(lines.data))

    # Writing the file

    async def _begin_write(self) -> None:
        """Starts to write what is in memory, once the previous write has ended."""
        if self._writing is not None:
            await asyncio.wait([self._writing])
        if self._is_open and self._known != self._stored and monotonic() >= self._no_write_before:
            # They are taken now because the task starts later: by then, the pending pairs may lie beyond this head.
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
            self._warn(f"is opened again: {error}")
        except sqlite3.Error as error:
            self._give_up(f"is damaged ({error})")
        else:
            pending.end_write(written=True)
            self._stored = end
            self._warnings.clear()
        finally:
            self._writing = None

    # Looking up

    async def _find(
        self, wanted: Collection[tuple[int, int]]
    ) -> tuple[int, dict[tuple[int, int], StoredOffsets]] | None:
        """Returns the offsets of each key from an offset on, if any; complete up to the offset that comes first."""
        for _ in range(_ATTEMPTS):
            await self._catch_up()
            if not self._is_open:
                return None
            open_count, known, stored = self._open_count, self._known.offset, self._stored.offset
            # Memory comes first, since pairs that are written meanwhile are then found in the file.
            pending = self._pending.find(wanted)
            try:
                found = await self._lookups.find([pair for pair in wanted if pair[1] < stored])
            except sqlite3.Error as error:
                self._give_up(f"can't be read ({error})")
                return None
            if open_count == self._open_count:
                if pending:
                    found = {**found, **{pair: _joined(found.get(pair), offsets) for pair, offsets in pending.items()}}
                return known, found
        return None

    # Closing

    async def aclose(self) -> None:
        """Writes what is in memory, and closes the file. A failure is logged."""
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
            # A file that was given up may be damaged: it must not get a checksum.
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
            self._thread.end()

    def abandon(self) -> None:
        """Abandons the thread, without waiting for it."""
        if self._following is not None:
            with suppress(RuntimeError):  # The event loop is closed.
                self._following.cancel()
        self._thread.end()


def index_path(source: Source) -> Path:
    """Returns the path of the index in the data directory. Raises `ValueError` for a log that is not in files."""
    try:
        return paths_of(source).dir / "index.sqlite"
    except EventfoldError:
        raise ValueError(
            f"{source.location} is not a directory of files: name a file for the index, such as "
            'index="orders.index.sqlite"'
        ) from None


def _joined(stored: StoredOffsets | None, pending: list[int]) -> StoredOffsets:
    offsets = pending if stored is None else sorted({*stored.offsets, *pending})
    return StoredOffsets(offsets, (stored is None or stored.complete) and len(offsets) <= MAX_CANDIDATES)
