"""`Index`: where in a log the events with a tag or an id stand.

It is written behind the log: new lines are read in the background, their keys kept in memory, and some thousand of them
at a time added to the file. Whoever asks waits until everything up to the head of now is known.

Promises: an answer has every event up to the offset that it names, and may have events that only share a key with
what was asked for; a file that is damaged, behind, or of another log is mended or made again, with a warning where
it was damaged; a failure of the file makes nothing fail but the short way.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from time import monotonic, perf_counter
from typing import NamedTuple, TypeVar

from .._aio import Thread, UncancellableTask, uninterrupted
from .._codec.keys import keys_of
from .._codec.lines import Lines, last_line_hash
from .._engine import Source, paths_of
from .._errors import CorruptLogError, EventfoldError, LogClosedError
from .._event import AppendResult, Head, Record
from .._logging import WARNING, log_event
from .._query import Query
from .._reader import EventReader
from .store import Found, Store, UnusableIndexError, key_of_id, key_of_tag

T = TypeVar("T")

# Pairs of a key and an offset that are kept in memory before they are written.
WRITTEN_AT_ONCE = 50_000
# Bytes of the log that are still read when it is closed, so that the next who opens it need not.
READ_AT_CLOSING = 16 * 2**20
# Seconds between two looks at what is new while nobody asks.
INTERVAL = 0.2
# Seconds before what could not be written is tried again.
RETRY_INTERVAL = 30.0
# Places to look at one by one; where a tag has more of them, reading the log is not slower.
MOST_PLACES = 1000
# Seconds for which reading keys holds the event loop at most.
_HOLD = 0.002


class _Question(NamedTuple):
    wanted: Sequence[tuple[int, int]]
    answer: asyncio.Future[list[Found]]


class Index:
    """The index of one log, for one event loop. Open it with `open`; `reader` reads the log."""

    def __init__(self, path: Path, reader: EventReader) -> None:
        self._path = path
        self._reader = reader
        self._store = Store(path)
        self._thread = Thread(f"eventfold index {path}")
        self._usable = True
        self._closing = False
        # Whether the file must be opened again before it is used; counts how often it was opened.
        self._broken = False
        self._generation = 0
        self._reading: UncancellableTask[None] | None = None
        self._stored = self._known = Head(0, "")
        # Offsets by key: what is not in the file yet, and what is being written to it.
        self._recent: dict[int, list[int]] = {}
        self._count = 0
        self._under_way: dict[int, list[int]] = {}
        self._writing: UncancellableTask[None] | None = None
        self._no_writing_before = 0.0
        self._questions: list[_Question] = []
        self._asking: UncancellableTask[None] | None = None
        self._following: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, path: Path, reader: EventReader) -> Index:
        """Opens the file, or makes it. A failure is logged. Raises `OSError` where no thread can be started."""
        index = cls(path, reader)
        try:
            await index._open()
        except BaseException:
            index.abandon()
            raise
        index._following = asyncio.create_task(index._follow(), name="eventfold index")
        return index

    async def _open(self) -> None:
        try:
            place = await self._call(self._store.open)
            if place.offset:
                try:
                    found = await self._reader.read_line_hash_before(place.offset)
                except (ValueError, CorruptLogError) as error:
                    raise UnusableIndexError(f"it is of another log, or of more than there is: {error}") from error
                if found != place.line_hash:
                    raise UnusableIndexError(f"it is of another log: the line before offset {place.offset} differs")
        except UnusableIndexError as error:
            log_event(
                WARNING, "index.rejected", "the index %(path)s is made again: %(error)s", path=self._path, error=error
            )
            try:
                await self._call(self._store.drop)
                place = await self._call(self._store.open)
            except (UnusableIndexError, sqlite3.Error, OSError) as second:
                self._give_up(second)
                return
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)
            return
        self._stored = self._known = place
        self._recent, self._under_way, self._count = {}, {}, 0
        self._no_writing_before = 0.0
        self._generation += 1

    def _give_up(self, error: Exception) -> None:
        self._usable = False
        log_event(
            WARNING,
            "index.unusable",
            "the index %(path)s can't be used, so that the log is read instead: %(error)s",
            path=self._path,
            error=error,
        )

    async def _call(self, function: Callable[..., T], *args: object) -> T:
        return await uninterrupted(self._thread.call(function, *args))

    # Reading the log

    async def _follow(self) -> None:
        with suppress(LogClosedError):
            while self._usable:
                try:
                    await self._catch_up()
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
                await asyncio.sleep(INTERVAL)

    async def _catch_up(self) -> None:
        """Reads what is new up to the head of now, together with all who ask meanwhile. Raises what reading raises."""
        head = (await self._reader.head()).offset
        while self._usable and not self._closing and (self._broken or self._known.offset < head):
            if self._reading is None:
                self._reading = UncancellableTask(self._read_news(), "eventfold index")
                self._reading.add_done_callback(asyncio.Task.exception)  # whoever waited may be gone
            reading = self._reading
            await asyncio.wait([reading])
            reading.result()

    async def _read_news(self) -> None:
        try:
            if self._broken:
                self._broken = False
                await self._call(self._store.close)
                await self._open()
            async with aclosing(self._reader._lines(self._known, None)) as blocks:
                since = perf_counter()
                async for lines in blocks:
                    if self._closing:
                        break
                    self._add(lines)
                    if self._count >= WRITTEN_AT_ONCE:
                        await self._write_soon()
                    if perf_counter() - since > _HOLD:
                        await asyncio.sleep(0)
                        since = perf_counter()
        finally:
            self._reading = None

    def _add(self, lines: Lines) -> None:
        recent = self._recent
        for offset, keys in keys_of(lines):
            for key in {*map(key_of_tag, keys.tags), *(() if keys.id is None else (key_of_id(keys.id),))}:
                recent.setdefault(key, []).append(offset)
                self._count += 1
        self._known = Head(lines.offset_at(len(lines.data)), last_line_hash(lines.data))

    # Writing the file

    async def _write_soon(self) -> None:
        """Begins to write what is in memory, once what was begun before is written."""
        if self._writing is not None:
            await asyncio.wait([self._writing])
        if self._writing is None and monotonic() >= self._no_writing_before:
            self._writing = UncancellableTask(self._write(), "eventfold index writer")

    async def _write(self) -> None:
        start, end = self._stored.offset, self._known
        self._under_way, self._recent, self._count = self._recent, {}, 0
        pairs = [(key, offset) for key, offsets in self._under_way.items() for offset in offsets]
        try:
            await self._thread.call(self._store.add, start, end, pairs)
            self._stored = end
        except (UnusableIndexError, sqlite3.Error, OSError) as error:
            # Kept in memory: until the file is opened again, or can be written to again.
            for key, offsets in self._recent.items():
                self._under_way.setdefault(key, []).extend(offsets)
            self._recent, self._count = self._under_way, self._count + len(pairs)
            self._no_writing_before = monotonic() + RETRY_INTERVAL
            self._broken = not isinstance(error, sqlite3.OperationalError | OSError)
            log_event(
                WARNING,
                "index.write_failed",
                "the index %(path)s could not be written: %(error)s",
                path=self._path,
                error=error,
            )
        finally:
            self._under_way = {}
            self._writing = None

    # Answers

    async def places(self, questions: Sequence[tuple[Query, int]]) -> tuple[int, list[list[int] | None]]:
        """For queries and offsets: where events at or behind the offset stand that the query may match.

        That is complete up to the offset that is returned first. None for a query to which the index has no answer: one
        of its items has no tags, or too many events have them, or the file failed. Raises what reading raises.
        """
        wanted = list({(tag, start) for query, start in questions for item in query.items for tag in item.tags})
        answer = await self._find([(key_of_tag(tag), start) for tag, start in wanted])
        if answer is None:
            return 0, [None] * len(questions)
        known, found = answer
        by_tag = dict(zip(wanted, found, strict=True))
        return known, [_places(query, start, by_tag) for query, start in questions]

    async def first_match(self, query: Query, places: Iterable[int]) -> int | None:
        """The first of these places at which an event stands that the query matches."""
        async with aclosing(self._reader.events_at(list(places), query)) as found:  # type: ignore[type-var]
            async for records in found:
                for record in records:
                    return record.start_offset
        return None

    async def results_of(self, ids: Iterable[str]) -> tuple[int, dict[str, AppendResult]]:
        """Where the first event with each id is, as far as there is one up to the offset that is returned first."""
        ids = list(ids)
        answer = await self._find([(key_of_id(id), 0) for id in ids])
        if answer is None:
            return await self._read_ids(set(ids))
        known, found = answer
        results: dict[str, AppendResult] = {}
        for id, places in zip(ids, found, strict=True):
            for offset in places.offsets:
                record = await self.record_at(offset)
                if record is not None and record.event.id == id:
                    results[id] = _result(record)
                    break
            else:
                if not places.complete:
                    return await self._read_ids(set(ids))
        return known, results

    async def _read_ids(self, ids: set[str]) -> tuple[int, dict[str, AppendResult]]:
        """The same, from the whole log."""
        known = (await self._reader.head()).offset
        results: dict[str, AppendResult] = {}
        async for record in self._reader.read_from(0, until=known):
            if record.event.id in ids:
                results.setdefault(record.event.id, _result(record))
        return known, results

    async def record_at(self, offset: int) -> Record | None:
        """The event whose line begins at an offset."""
        async with aclosing(self._reader.events_at([offset])) as found:  # type: ignore[type-var]
            async for records in found:
                return records[0] if records else None
        return None

    async def _find(self, wanted: Sequence[tuple[int, int]]) -> tuple[int, list[Found]] | None:
        """The offsets of each key from an offset on; complete up to the offset that is returned first."""
        for _ in range(3):
            await self._catch_up()
            if not self._usable:
                return None
            generation, known = self._generation, self._known.offset
            # Memory first: what is written meanwhile is found in the file.
            recent = [self._in_memory(key, start) for key, start in wanted]
            try:
                stored = await self._ask(wanted)
            except sqlite3.Error as error:
                if isinstance(error, sqlite3.OperationalError):
                    log_event(
                        WARNING,
                        "index.read_failed",
                        "the index %(path)s can't be read, so that the log is read: %(error)s",
                        path=self._path,
                        error=error,
                    )
                    return None
                self._broken = True
            else:
                if generation == self._generation:
                    return known, [
                        Found(sorted({*found.offsets, *offsets}), found.complete)
                        for found, offsets in zip(stored, recent, strict=True)
                    ]
        return None

    def _in_memory(self, key: int, start: int) -> list[int]:
        offsets = (*self._under_way.get(key, ()), *self._recent.get(key, ()))
        return [offset for offset in offsets if offset >= start]

    async def _ask(self, wanted: Sequence[tuple[int, int]]) -> list[Found]:
        """What the file has. All who ask meanwhile are answered by one trip to the thread."""
        question = _Question(wanted, asyncio.get_running_loop().create_future())
        self._questions.append(question)
        if self._asking is None:
            self._asking = UncancellableTask(self._answer(), "eventfold index reader")
        return await question.answer

    async def _answer(self) -> None:
        while questions := self._questions:
            self._questions = []
            wanted = [pair for question in questions for pair in question.wanted]
            try:
                found = iter(await self._thread.call(self._store.find, wanted, MOST_PLACES))
            except Exception as error:
                for question in questions:
                    if not question.answer.done():
                        question.answer.set_exception(error)
                continue
            for question in questions:
                answer = [next(found) for _ in question.wanted]
                if not question.answer.done():
                    question.answer.set_result(answer)
        self._asking = None

    # Closing

    async def aclose(self) -> None:
        """Writes what is in memory, and closes the file. A failure is logged."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])
        try:
            if self._usable:
                if (await self._reader.head()).offset - self._known.offset <= READ_AT_CLOSING:
                    await self._catch_up()
                self._closing = True
                if self._reading is not None:
                    await asyncio.wait([self._reading])
                self._no_writing_before = 0.0
                await self._write_soon()
                if self._writing is not None:
                    await asyncio.wait([self._writing])
            await self._call(self._store.close)
        except (CorruptLogError, sqlite3.Error, OSError) as error:
            log_event(
                WARNING,
                "index.close_failed",
                "the index %(path)s could not be closed, and will be made again: %(error)s",
                path=self._path,
                error=error,
            )
        finally:
            self._thread.end()

    def abandon(self) -> None:
        """Lets go of the thread, without waiting for it."""
        if self._following is not None:
            with suppress(RuntimeError):  # its event loop is closed
                self._following.cancel()
        self._thread.end()


def index_path(source: Source) -> Path:
    """The index in the data directory. Raises `ValueError` for a log that is not in files."""
    try:
        return paths_of(source).dir / "index.sqlite"
    except EventfoldError:
        raise ValueError(
            f"{source.location} is not a directory of files: name the file that is to hold the index, such as "
            'index="orders.index.sqlite"'
        ) from None


def _places(query: Query, start: int, found: Mapping[tuple[str, int], Found]) -> list[int] | None:
    places: set[int] = set()
    for item in query.items:
        complete = [offsets for tag in item.tags for offsets, is_complete in [found[tag, start]] if is_complete]
        if not complete:
            return None
        places |= set(complete[0]).intersection(*complete[1:])
    return sorted(places)


def _result(record: Record) -> AppendResult:
    return AppendResult(record.start_offset, record.end_offset, record.line_hash, duplicate=True)
