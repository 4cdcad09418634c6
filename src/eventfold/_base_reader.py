"""Reads the existing events of a log: forwards, backwards, or single lines.

Promises: reading ends at the head as it was when reading began; no part of a batch is yielded without the rest of it;
other tasks can run every few milliseconds.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import aclosing
from pathlib import Path
from time import perf_counter

from ._aio import HOLD
from ._catalog import TypedDecoding
from ._codec.backwards import BackwardsDecoder
from ._codec.decode import Decoder, Slice
from ._codec.lines import Lines
from ._engine import Documents, HasPaths, Paths, Source, SourceOfLines, paths_of
from ._errors import CorruptLogError
from ._event import Head, Record
from ._query import Query, query_of
from ._threads import in_thread

_RECORDS_PER_CLOCK_CHECK = 32
# How many single lines are read in one call to a thread.
_LINES_AT_ONCE = 16


class BaseReader(HasPaths):
    """The methods of a reader that read existing events."""

    _source: Source
    # For typed events, if the log has a catalog.
    _typed_decoding: TypedDecoding | None = None

    @property
    def _paths(self) -> Paths:
        return paths_of(self._source)

    @property
    def _documents(self) -> Documents:
        """The documents beside the log."""
        return self._source.documents

    async def _identity(self) -> str:
        """A string that identifies the log within this process."""
        return await self._source.identity()

    async def head(self) -> Head:
        """The offset after the last event, and the hash of its line. In the writer's process, the durable head."""
        return await self._source.head()

    async def has_new_events(self, offset: int) -> bool:
        """Whether there are events at or after `offset` (bytes in the whole log).

        Raises:
            ValueError: The offset is negative or beyond the head.
        """
        head = await self.head()
        check_offset(offset, head)
        return offset < head.offset

    async def active_log_size(self) -> int:
        """The size of `app.jsonl` in bytes; 0 if the file does not exist.

        Raises:
            EventfoldError: The log is not kept in files.
        """
        return await in_thread(_file_size, paths_of(self._source).log_path)

    async def _base(self) -> int:
        """The offset of the first byte of `app.jsonl`, in bytes of the whole log; all events before it are archived.

        It is 0 for a log that is not kept in files.
        """
        return await self._source.base()

    async def read_line_hash_before(self, offset: int) -> str | None:
        """The hash of the line that ends at `offset` (bytes in the whole log); None at 0.

        Raises:
            ValueError: The offset is negative, beyond the head, or no line ends there.
        """
        check_offset(offset, await self.head())
        return await self._source.line_hash_before(offset) if offset else None

    def read_full(self) -> AsyncIterator[Record]:
        """All events up to the head as it is when reading begins: see `read_from`."""
        return self.read_from(0)

    async def read_from(
        self, offset: int = 0, *, query: Query | None = None, until: int | None = None
    ) -> AsyncIterator[Record]:
        """The events from `offset` up to the head as it is when reading begins.

        Args:
            offset: Where to begin, in bytes of the whole log; a line must begin there.
            query: Which events to yield; None for all.
            until: Where to end, in bytes of the whole log; a line must end there. If it is None or beyond the head,
                reading ends at the head. A batch that continues beyond it is left out completely.

        Raises:
            ValueError: The offset is negative, beyond the head, or not where a line begins; `until` is before it, or
                inside a line.
            CorruptLogError: The log is damaged; raised after all events before the damage.
        """
        end = await self._end_of_reading(offset)
        if until is not None:
            end = await self._limited(offset, until, end)
        async with aclosing(self._slices(Head(offset, ""), end, query_of(query, None))) as slices:
            async for slice_ in slices:
                records = list(slice_.records())
                del slice_
                since = perf_counter()
                for start in range(0, len(records), _RECORDS_PER_CLOCK_CHECK):
                    for record in records[start : start + _RECORDS_PER_CLOCK_CHECK]:
                        yield record
                    if perf_counter() - since > HOLD:
                        await asyncio.sleep(0)
                        since = perf_counter()
                # Freed now, so that the next slice reuses this memory, which is in the processor's cache.
                del records

    async def read_slices(
        self,
        offset: int = 0,
        *,
        query: Query | None = None,
        types: Collection[str] | None = None,
        after: str = "",
    ) -> AsyncGenerator[Slice, None]:
        """The same events as `read_from`, a few hundred at a time and several times as fast.

        A slice has `events`, `start_offset`, `end_offset`, and `records()`, which returns the events with their
        offsets.

        Args:
            offset: Where to begin, in bytes of the whole log; a line must begin there.
            query: Which events to yield; None for all. Of the lines that can't match, only the form is checked.
            types: Short for a query of these types (empty: no event); can't be combined with a query.
            after: The hash of the line that ends at `offset`, if it is known from an earlier read. If a different line
                ends there now, `CorruptLogError` is raised.

        Raises:
            ValueError: The offset is negative, beyond the head, or not where a line begins.
            CorruptLogError: The log is damaged; raised after all events before the damage.
        """
        query = query_of(query, types)
        end = await self._end_of_reading(offset)
        async with aclosing(self._slices(Head(offset, after), end, query, exact_offsets=False)) as slices:
            async for slice_ in slices:
                yield slice_

    async def read_back(self, offset: int | None = None, *, query: Query | None = None) -> AsyncIterator[Record]:
        """The events before `offset`, newest first.

        It starts at once and takes little memory, however large the log is.

        Args:
            offset: Where to begin, in bytes of the whole log; a line must end there. None for the current head.
            query: Which events to yield; None for all.

        Raises:
            ValueError: The offset is negative, beyond the head, or not where a line ends.
            CorruptLogError: The log is damaged, or a batch is incomplete; raised after all events that follow it.
        """
        decoder = self._backwards_decoder(query_of(query, None))
        head = await self.head()
        start = head.offset if offset is None else offset
        check_offset(start, head)
        while start:
            block = await self._source.block_before(start)
            start = block.start_offset
            since = perf_counter()
            for lines in block.chunks_backwards():
                for number, record in enumerate(decoder.feed(lines), 1):
                    yield record
                    if not number % _RECORDS_PER_CLOCK_CHECK and perf_counter() - since > HOLD:
                        await asyncio.sleep(0)
                        since = perf_counter()
                if perf_counter() - since > HOLD:
                    await asyncio.sleep(0)
                    since = perf_counter()

    async def _events_at(self, offsets: Sequence[int], query: Query | None = None) -> AsyncIterator[list[Record]]:
        """For each offset, the events of the line that begins there, as far as a query matches them.

        The offsets must be below the head. Raises `ValueError` for an offset where no line begins, and
        `CorruptLogError` at damage.
        """
        source = self._source
        if not isinstance(source, SourceOfLines):
            for offset in offsets:
                async with aclosing(self.read_from(offset, query=query)) as records:  # type: ignore[type-var]
                    found = []
                    async for record in records:
                        if record.start_offset != offset:
                            break
                        found.append(record)
                yield found
            return
        for start in range(0, len(offsets), _LINES_AT_ONCE):
            async for lines in _lines_at(source, offsets[start : start + _LINES_AT_ONCE]):
                # Unlike `Decoder`, this one yields a line of a batch without the other lines of that batch.
                yield list(self._backwards_decoder(query).feed(lines))[::-1]

    async def _check_range(self, offset: int, until: int | None) -> None:
        """Raises the `ValueError` that `read_from` raises for these offsets."""
        end = await self._end_of_reading(offset)
        if until is not None:
            await self._limited(offset, until, end)
        if offset not in (0, end.offset):
            await self._source.line_hash_before(offset)

    async def _limited(self, offset: int, until: int, end: Head) -> Head:
        """Where to stop reading from `offset`: at `until`, or at `end` if that comes first."""
        check_not_negative(until)
        if until < offset:
            raise ValueError(f"until is {until}, which is before offset {offset}, where reading begins")
        if until >= end.offset:
            return end
        if until > offset:
            try:
                await self._source.line_hash_before(until)
            except ValueError as error:
                raise ValueError(f"until is {until}, but no line ends there") from error
        return Head(until, "")

    async def _end_of_reading(self, offset: int) -> Head:
        """Where to stop reading from `offset`: at the current head.

        If damage hides the head, no limit is set: reading ends at the damage.
        """
        try:
            head = await self.head()
        except CorruptLogError:
            check_not_negative(offset)
            return Head(sys.maxsize, "")
        check_offset(offset, head)
        return head

    async def _slices(
        self, start: Head, end: Head, query: Query | None = None, *, exact_offsets: bool = True
    ) -> AsyncGenerator[Slice, None]:
        """The slices between two heads; the hash of the first may be unknown ("")."""
        if start.offset == end.offset:
            return
        recent = await self._recent(start, end)
        if recent is not None:
            for slice_ in self._decoder(query, exact_offsets=exact_offsets).feed(recent):
                yield slice_
            return
        decoder = self._decoder(query, exact_offsets=exact_offsets)
        async with aclosing(self._source.blocks(start, end.offset)) as blocks:
            since = perf_counter()
            async for block in blocks:
                for lines in block.chunks():
                    for slice_ in decoder.feed(lines):
                        yield slice_
                        del slice_
                    if perf_counter() - since > HOLD:
                        await asyncio.sleep(0)
                        since = perf_counter()

    async def _recent(self, start: Head, end: Head) -> Lines | None:
        """The lines between two heads, if they are in memory; the hash of the first may be unknown ("")."""
        recent = (await self._source.waiters()).recent_lines.since(start, end)
        return None if recent is None else recent[1]

    def _decoder(self, query: Query | None, *, exact_offsets: bool) -> Decoder:
        """A decoder of this log's lines."""
        typed = self._typed_decoding
        if typed is not None:
            return typed.decoder(query, exact_offsets=exact_offsets)
        return Decoder(query, exact_offsets=exact_offsets)

    def _backwards_decoder(self, query: Query | None) -> BackwardsDecoder:
        """A decoder of this log's lines, for reading backwards."""
        typed = self._typed_decoding
        return BackwardsDecoder(query) if typed is None else typed.backwards_decoder(query)

    async def _lines(self, start: Head, end: int | None) -> AsyncGenerator[Lines, None]:
        """The undecoded lines from `start`, whose hash may be unknown (""), to `end` (None: the current head)."""
        last = await self._end_of_reading(start.offset) if end is None else Head(end, "")
        if start.offset == last.offset:
            return
        recent = await self._recent(start, last)
        if recent is not None:
            yield recent
            return
        async with aclosing(self._source.blocks(start, last.offset)) as blocks:
            async for block in blocks:
                for lines in block.chunks():
                    yield lines


def check_not_negative(offset: int) -> None:
    if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
        raise ValueError(f"an offset must be an integer of 0 or more, not {offset!r}")


async def _lines_at(source: SourceOfLines, offsets: Sequence[int]) -> AsyncIterator[Lines]:
    try:
        found = await source.lines_at(offsets)
    except (CorruptLogError, ValueError):
        # Read one by one, since the lines before the damage must be yielded first.
        for offset in offsets:
            [lines] = await source.lines_at([offset])
            yield lines
        return
    for lines in found:
        yield lines


def check_offset(offset: int, head: Head) -> None:
    check_not_negative(offset)
    if offset > head.offset:
        raise ValueError(f"offset {offset} is beyond the head at {head.offset}")


def _file_size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
