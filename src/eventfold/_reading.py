"""Reads what is in a log: forwards, backwards, or single lines.

Promises: reading ends at the head as it was when it began, with whole lines and batches; other tasks can run every few
milliseconds.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import aclosing
from pathlib import Path
from time import perf_counter

from ._catalog import Typing
from ._codec.backwards import BackwardsDecoder
from ._codec.decode import Decoder, Slice
from ._codec.lines import Lines
from ._engine import Documents, HasPaths, Paths, Source, SourceOfLines, paths_of
from ._errors import CorruptLogError
from ._event import Head, Record
from ._query import Query, query_of
from ._threads import in_thread

# The maximum number of seconds for which reading holds the event loop before it lets other tasks run.
_HOLD = 0.002
_RECORDS_PER_LOOK_AT_THE_CLOCK = 32
# How many single lines are read in one hop to a thread.
_LINES_AT_ONCE = 16


class ReadingReader(HasPaths):
    """The methods of a reader that read what is there."""

    _source: Source
    # Decodes typed events, if the log has a catalog.
    _typing: Typing | None = None

    @property
    def _paths(self) -> Paths:
        return paths_of(self._source)

    @property
    def documents(self) -> Documents:
        """The documents beside the log."""
        return self._source.documents

    async def identity(self) -> str:
        """A string that identifies the log within this process."""
        return await self._source.identity()

    async def head(self) -> Head:
        """The offset after the last event (in the writer's process, the last durable one), and its line's hash."""
        return await self._source.head()

    async def has_new_events(self, offset: int) -> bool:
        """Whether there are events after `offset`.

        Raises `ValueError` for an offset that is negative or beyond the head.
        """
        head = await self.head()
        check_offset(offset, head)
        return offset < head.offset

    async def active_log_size(self) -> int:
        """The size of `app.jsonl` in bytes; 0 if there is none."""
        return await in_thread(_file_size, paths_of(self._source).log_path)

    async def base(self) -> int:
        """The offset of the first byte of `app.jsonl`; everything before it is in the archive."""
        return await self._source.base()

    async def read_line_hash_before(self, offset: int) -> str | None:
        """The hash of the line that ends at `offset`; None at 0.

        Raises `ValueError` for an offset that is negative, beyond the head, or not where a line begins.
        """
        check_offset(offset, await self.head())
        return await self._source.line_hash_before(offset) if offset else None

    def read_full(self) -> AsyncIterator[Record]:
        """All events up to the current head; see `read_from`."""
        return self.read_from(0)

    async def read_from(
        self, offset: int = 0, *, query: Query | None = None, until: int | None = None
    ) -> AsyncIterator[Record]:
        """The events from `offset`, where a line must begin, up to `until` or the current head, whichever comes first.

        With a `query`, only matching events are yielded. With `until`, an offset where a line must end, nothing that
        ends after it is yielded; a batch that continues beyond it is left out completely.

        Raises `ValueError` for an offset that is negative, beyond the head, or not where a line begins, and for an
        `until` before `offset` or inside a line; `CorruptLogError` at damage, after all events before it.
        """
        end = await self._end(offset)
        if until is not None:
            end = await self._until(offset, until, end)
        async with aclosing(self._slices(Head(offset, ""), end, query_of(query, None))) as slices:
            async for piece in slices:
                records = list(piece.records())
                del piece
                since = perf_counter()
                for start in range(0, len(records), _RECORDS_PER_LOOK_AT_THE_CLOCK):
                    for record in records[start : start + _RECORDS_PER_LOOK_AT_THE_CLOCK]:
                        yield record
                    if perf_counter() - since > _HOLD:
                        await asyncio.sleep(0)
                        since = perf_counter()
                # The next slice takes the memory of this one, which is in the processor's cache.
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

        With a `query`, only matching events are yielded; lines that can't match are checked only for their form.
        `types` is short for a query of these types (empty: no event), and can't be combined with a query. With `after`,
        the hash of the line that ended at `offset` when it was read, a different log in its place raises
        `CorruptLogError`. A slice has `events`, `start_offset`, `end_offset`, and `records()`, which adds offsets to
        the events.
        """
        query = query_of(query, types)
        end = await self._end(offset)
        async with aclosing(self._slices(Head(offset, after), end, query, exact_offsets=False)) as slices:
            async for piece in slices:
                yield piece

    async def read_back(self, offset: int | None = None, *, query: Query | None = None) -> AsyncIterator[Record]:
        """The events before `offset` (None: the current head), where a line must end, newest first.

        It starts at once and takes little memory, however large the log is. With a `query`, only matching events are
        yielded.

        Raises `ValueError` for an offset that is negative, beyond the head, or not where a line ends, and
        `CorruptLogError` at damage, after all events that follow it; also if a batch turns out to be incomplete.
        """
        decoder = self._backwards_decoder(query_of(query, None))
        head = await self.head()
        place = head.offset if offset is None else offset
        check_offset(place, head)
        while place:
            block = await self._source.block_before(place)
            place = block.start_offset
            since = perf_counter()
            for lines in block.chunks_backwards():
                for number, record in enumerate(decoder.feed(lines), 1):
                    yield record
                    if not number % _RECORDS_PER_LOOK_AT_THE_CLOCK and perf_counter() - since > _HOLD:
                        await asyncio.sleep(0)
                        since = perf_counter()
                if perf_counter() - since > _HOLD:
                    await asyncio.sleep(0)
                    since = perf_counter()

    async def events_at(self, offsets: Sequence[int], query: Query | None = None) -> AsyncIterator[list[Record]]:
        """For each offset, where a line before the head must begin, the events of that line that a query matches.

        Raises `ValueError` where no line begins, and `CorruptLogError` at damage.
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
                # It yields a line of a batch without the others, which the other decoder does not.
                yield list(self._backwards_decoder(query).feed(lines))[::-1]

    async def check_range(self, offset: int, until: int | None) -> None:
        """Raises the `ValueError` that `read_from` raises for these offsets."""
        end = await self._end(offset)
        if until is not None:
            await self._until(offset, until, end)
        if offset not in (0, end.offset):
            await self._source.line_hash_before(offset)

    async def _until(self, offset: int, until: int, end: Head) -> Head:
        """The head at which to stop reading: at `until`, or at `end` if that is before it."""
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

    async def _end(self, offset: int) -> Head:
        """The head at which to stop reading from `offset`: the current one, or the damage that hides it."""
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
        newest = (await self._source.waiters()).news.since(start, end)
        if newest is not None:
            # In memory: those who waited for it need not read the disk.
            for piece in self._decoder(query, exact_offsets=exact_offsets).feed(newest[1]):
                yield piece
            return
        decoder = self._decoder(query, exact_offsets=exact_offsets)
        async with aclosing(self._source.blocks(start, end.offset)) as blocks:
            since = perf_counter()
            async for block in blocks:
                for lines in block.chunks():
                    for piece in decoder.feed(lines):
                        yield piece
                        del piece
                    if perf_counter() - since > _HOLD:
                        await asyncio.sleep(0)
                        since = perf_counter()

    def _decoder(self, query: Query | None, *, exact_offsets: bool) -> Decoder:
        """A decoder of this log's lines."""
        if self._typing is not None:
            return self._typing.decoder(query, exact_offsets=exact_offsets)
        return Decoder(query, exact_offsets=exact_offsets)

    def _backwards_decoder(self, query: Query | None) -> BackwardsDecoder:
        """The same, for reading backwards."""
        return BackwardsDecoder(query) if self._typing is None else self._typing.backwards_decoder(query)

    async def _lines(self, start: Head, end: int | None) -> AsyncGenerator[Lines, None]:
        """The lines from a head, whose hash may be unknown (""), to an offset (None: the current head), undecoded."""
        last = await self._end(start.offset) if end is None else Head(end, "")
        if start.offset == last.offset:
            return
        newest = (await self._source.waiters()).news.since(start, last)
        if newest is not None:
            yield newest[1]
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
        # Those before the damage must be yielded first.
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
