"""`EventReader`: reads one log, waits for more of it, and changes nothing.

Promise: a tail misses nothing and repeats nothing, whatever is rotated meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing

import msgspec

from ._address import Address, engine_of
from ._codec.lines import Lines
from ._engine import Source
from ._errors import CorruptLogError, LogClosedError
from ._event import Head, Record
from ._query import Query, query_of
from ._reading import ReadingReader, check_not_negative, check_offset
from ._waiters import Scope


class WaitResult(msgspec.Struct, frozen=True):
    """`new_data` says whether the head moved beyond the awaited offset; `size` is the head's offset."""

    new_data: bool
    size: int

    def __bool__(self) -> bool:
        return self.new_data


class EventReader(ReadingReader):
    """A lightweight reader of one log; any number of them may read, in any process, while a writer continues.

    Creating one does no I/O. The directory need not exist: then the log is empty. Offsets are bytes in the whole log.
    Every method may raise `OSError`, and `CorruptLogError` if the files are damaged. Cancelling any of them leaves
    nothing behind.
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

    async def head_changes(self) -> AsyncGenerator[Head, None]:
        """The current head, and then each newer one, until the log is closed; a slow caller sees only the latest.

        The last one is the writer's last durable head, if the log was open for writing here.
        """
        waiters = await self._source.waiters()
        if self._scope.closed:
            return
        with waiters.watched(), waiters.waiting(self._scope) as waiting:
            head = await self.head()
            while True:
                yield head
                news = await waiting.beyond(head.offset, seen=True)
                if news is None:
                    final = self._final_head(head)
                    if final is not None:
                        yield final
                    return
                head = news if news.offset > head.offset else await self._checked(news, head)

    def _final_head(self, head: Head) -> Head | None:
        """The closed writer's last durable head, if it is beyond this one."""
        final = self._scope.final_head
        return final if final is not None and final.offset > head.offset else None

    async def _checked(self, news: Head, head: Head) -> Head:
        """The current head, after news of one before another that was seen. Raises `CorruptLogError`."""
        if news.offset < head.offset:
            news = await self.head()  # the news may be older than `head`
            if news.offset < head.offset:
                raise CorruptLogError(
                    self._source.location,
                    news.offset,
                    f"the log ends here, but it continued to {head.offset}: somebody cut or replaced it",
                )
        return news

    async def tail(self, offset: int | None = None, *, query: Query | None = None) -> AsyncIterator[Record]:
        """The events from `offset` (None: the current head) and then each new one, until the log is closed.

        With a `query`, only matching events are yielded.

        Raises `ValueError` as `read_from` does, and `CorruptLogError` if the log is no longer the one that was read.
        """
        query = query_of(query, None)
        waiters = await self._source.waiters()
        if self._scope.closed:
            return
        # A thousand tails may wake at once, so each step of this loop counts: what is new is mostly in memory.
        with waiters.watched(), waiters.waiting(self._scope) as waiting:
            head = await self.head()
            place = head if offset is None else Head(offset, "")
            check_offset(place.offset, head)
            ended, plain = False, query is None and self._typing is None
            while True:
                newest = waiters.news.since(place)
                if newest is not None and newest[0].offset >= head.offset:
                    head, lines = newest
                    for record in waiters.news.records(lines) if plain else self._records(lines, query):
                        yield record
                else:
                    async with aclosing(self._slices(place, head, query)) as slices:
                        async for piece in slices:
                            for record in piece.records():
                                yield record
                if ended:
                    return
                place = head
                news = await waiting.beyond(head.offset, seen=True)
                if news is None:
                    final = self._final_head(head)
                    if final is None:
                        return
                    head, ended = final, True
                else:
                    head = news if news.offset > head.offset else await self._checked(news, head)

    def _records(self, lines: Lines, query: Query | None) -> Iterator[Record]:
        for piece in self._decoder(query, exact_offsets=True).feed(lines):
            yield from piece.records()

    @property
    def closed(self) -> bool:
        """Whether its log was closed. A reader that was created on its own belongs to no log."""
        return self._scope.closed

    def end_waits(self) -> None:
        """Ends the tails and waits of this reader, as when its log is closed."""
        self._scope.close()

    async def aclose(self) -> None:
        """Ends its tails and waits, and closes its connections, if the log's engine has any. Idempotent."""
        self._scope.close()
        if self._owns_source:
            await self._source.aclose()

    async def wait_for_events(self, offset: int, timeout: float | None = None) -> WaitResult:
        """Waits until the head is beyond `offset`, or for `timeout` seconds (None: for as long as it takes).

        Raises `LogClosedError` when its log is closed, `ValueError` for a negative offset.
        """
        check_not_negative(offset)
        waiters = await self._source.waiters()
        with waiters.watched(), waiters.waiting(self._scope) as waiting:
            head = await self.head()
            if head.offset <= offset:
                try:
                    async with asyncio.timeout(timeout):
                        news = await waiting.beyond(offset)
                except TimeoutError:
                    head = await self.head()
                else:
                    if news is None:
                        raise LogClosedError("the log was closed while waiting for events")
                    head = news
        return WaitResult(head.offset > offset, head.offset)
