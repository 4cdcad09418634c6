"""`EventReader`: reads one log, waits for new events, and changes nothing.

Promise: a tail misses no event and repeats none, even if the log is rotated at the same time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing

import msgspec

from ._address import Address, engine_of
from ._base_reader import BaseReader, check_not_negative, check_offset
from ._codec.lines import Lines
from ._engine import Source
from ._errors import CorruptLogError, LogClosedError
from ._event import Head, Record
from ._query import Query, query_of
from ._waiters import Scope


class WaitResult(msgspec.Struct, frozen=True):
    """The result of `wait_for_events`, which is true if there is new data.

    `new_data` says whether the head is beyond the given offset; `size` is the offset of the head, in bytes of the whole
    log.
    """

    new_data: bool
    size: int

    def __bool__(self) -> bool:
        return self.new_data


class EventReader(BaseReader):
    """A lightweight reader of one log. Any number of them may read, in any process, while a writer appends.

    Creating a reader does no I/O. If the directory does not exist, the log is empty. Offsets are bytes in the whole
    log. Every method may raise `OSError`, and `CorruptLogError` if the files are damaged. A cancelled method leaves
    nothing behind.

    Args:
        dir: The log: a data directory, an address such as `postgresql://host/db`, or an engine.

    Raises:
        ValueError: No engine has this kind of address.
        EventfoldError: The packages that the engine needs are not installed.
    """

    def __init__(self, dir: Address) -> None:
        self._source: Source = engine_of(dir).source()
        self._scope = Scope()
        self._owns_source = True

    def __repr__(self) -> str:
        return f"<EventReader of {str(self._source.location)!r}>"

    @classmethod
    def _of_source(cls, source: Source, scope: Scope) -> EventReader:
        """A reader whose tails and waits end with `scope`."""
        reader = cls.__new__(cls)
        reader._source, reader._scope, reader._owns_source = source, scope, False
        return reader

    async def _head_changes(self) -> AsyncGenerator[Head, None]:
        """The current head, and then each newer one, until the log is closed. A slow caller sees only the latest head.

        If the log was open for writing in this process, the last head is the writer's last durable head.
        """
        waiters = await self._source.waiters()
        if self._scope.closed:
            return
        with waiters.watched(), waiters.waiter(self._scope) as waiter:
            head = await self.head()
            while True:
                yield head
                new_head = await waiter.head_beyond(head.offset, seen=True)
                if new_head is None:
                    final = self._final_head(head)
                    if final is not None:
                        yield final
                    return
                head = new_head if new_head.offset > head.offset else await self._checked(new_head, head)

    def _final_head(self, head: Head) -> Head | None:
        """The closed writer's last durable head, if it is beyond the given head."""
        final = self._scope.final_head
        return final if final is not None and final.offset > head.offset else None

    async def _checked(self, reported: Head, head: Head) -> Head:
        """The reported head, or a newer one if that is outdated. Raises `CorruptLogError` if the log was cut."""
        if reported.offset < head.offset:
            reported = await self.head()  # the reported head may be an outdated one
            if reported.offset < head.offset:
                raise CorruptLogError(
                    self._source.location,
                    reported.offset,
                    f"the log ends here, but it continued to {head.offset}: it was cut or replaced",
                )
        return reported

    async def tail(self, offset: int | None = None, *, query: Query | None = None) -> AsyncIterator[Record]:
        """The events from `offset` and then each new one, until the log is closed.

        Args:
            offset: Where to begin, in bytes of the whole log; a line must begin there. None for the current head.
            query: Which events to yield; None for all.

        Raises:
            ValueError: The offset is negative, beyond the head, or not where a line begins.
            CorruptLogError: The log is damaged, or is no longer the one that was read.
        """
        query = query_of(query, None)
        waiters = await self._source.waiters()
        if self._scope.closed:
            return
        # A thousand tails may wake at once, so each step of this loop counts. Usually, the new lines are in memory.
        with waiters.watched(), waiters.waiter(self._scope) as waiter:
            head = await self.head()
            start = head if offset is None else Head(offset, "")
            check_offset(start.offset, head)
            ended, plain = False, query is None and self._typed_decoding is None
            while True:
                recent = waiters.recent_lines.since(start)
                if recent is not None and recent[0].offset >= head.offset:
                    head, lines = recent
                    for record in waiters.recent_lines.records(lines) if plain else self._records(lines, query):
                        yield record
                else:
                    async with aclosing(self._slices(start, head, query)) as slices:
                        async for slice_ in slices:
                            for record in slice_.records():
                                yield record
                if ended:
                    return
                start = head
                new_head = await waiter.head_beyond(head.offset, seen=True)
                if new_head is None:
                    final = self._final_head(head)
                    if final is None:
                        return
                    head, ended = final, True
                else:
                    head = new_head if new_head.offset > head.offset else await self._checked(new_head, head)

    def _records(self, lines: Lines, query: Query | None) -> Iterator[Record]:
        for slice_ in self._decoder(query, exact_offsets=True).feed(lines):
            yield from slice_.records()

    @property
    def _closed(self) -> bool:
        """Whether the log to which this reader belongs, or the reader itself, was closed."""
        return self._scope.closed

    def end_waits(self) -> None:
        """Ends the tails and waits of this reader in the same way as closing its log does."""
        self._scope.close()

    async def aclose(self) -> None:
        """Ends the tails and waits of this reader, and closes its connections to a server, if any. Idempotent."""
        self._scope.close()
        if self._owns_source:
            await self._source.aclose()

    async def wait_for_events(self, offset: int, timeout: float | None = None) -> WaitResult:
        """Waits until the head is beyond `offset`.

        Args:
            offset: In bytes of the whole log.
            timeout: In seconds; None to wait without a limit.

        Returns:
            Whether the head is beyond the offset, which is also the truth value, and the offset of the head.

        Raises:
            LogClosedError: The log was closed.
            ValueError: The offset is negative.
        """
        check_not_negative(offset)
        waiters = await self._source.waiters()
        with waiters.watched(), waiters.waiter(self._scope) as waiter:
            head = await self.head()
            if head.offset <= offset:
                try:
                    async with asyncio.timeout(timeout):
                        new_head = await waiter.head_beyond(offset)
                except TimeoutError:
                    head = await self.head()
                else:
                    if new_head is None:
                        raise LogClosedError("the log was closed while waiting for events")
                    head = new_head
        return WaitResult(head.offset > offset, head.offset)
