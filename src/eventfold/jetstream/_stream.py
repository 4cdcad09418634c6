"""A stream, to be read: where it ends, and its lines from an offset on.

Messages are read by direct get, many at a time, from whichever replica answers. A replica may lag behind, so an answer
may be stale: what is missing is asked for again, until it comes or `timeout` is over. A gap is an error.
"""

from __future__ import annotations

import asyncio
import errno
import sys
from collections.abc import AsyncGenerator

import msgspec
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from .._codec.lines import Lines, last_line_hash
from .._errors import CorruptLogError
from .._event import Head
from .._waiters import Waiters
from ._calls import NO_LIMITS, called
from ._connection import Connection, Settings
from ._documents import KeyValueDocuments
from ._follower import Follower
from ._offsets import end_of, join_messages, position_at, sequence_at, start_of

_MESSAGES, _BYTES = 2000, 2 * 2**20  # of one read
_MESSAGES_BACK = 64  # of one read from the end of the log towards its beginning
_RETRY_DELAY = 0.02  # seconds


class Stream:
    """A `Source`. All sources of one stream in an event loop are the same object; see `JetStream.source`."""

    def __init__(self, settings: Settings) -> None:
        self._waiters = Waiters(self._new_follower, watch_beside_writer=True)
        # Those who wait are told what is wrong with the stream: nothing else would end their wait.
        self.connection = Connection(settings, self._waiters.notify)
        self._documents = KeyValueDocuments(self.connection)
        self.connection.after_check = self._documents.check_locks
        self._known: Head | None = None
        self._users = 0

    def __repr__(self) -> str:
        return f"<Stream {self.location}>"

    @property
    def location(self) -> str:
        return self.connection.location

    @property
    def documents(self) -> KeyValueDocuments:
        return self._documents

    @property
    def known_head(self) -> Head:
        """The newest head that was seen in this process. No I/O."""
        return self._known or Head(0, "")

    async def identity(self) -> str:
        return self.location

    async def waiters(self) -> Waiters:
        return self._waiters

    def _new_follower(self) -> Follower:
        return Follower(self)

    def saw(self, sequence: int, data: bytes) -> Head:
        """Takes note of a message, and tells those who wait if it is the newest; the head after it."""
        head = Head(end_of(sequence), last_line_hash(data))
        known = self._known
        if known is not None and head.offset <= known.offset:
            return head
        self._known = head
        follows = known is not None and known.offset == start_of(sequence)
        self._waiters.notify(head, known, join_messages(self.location, sequence, [data]) if follows else None)
        return head

    async def head(self) -> Head:
        loop = asyncio.get_running_loop()
        until = loop.time() + self.connection.settings.timeout
        while True:
            message = await self.connection.last_message()
            end = 0 if message is None else end_of(message.sequence)
            known = self._known
            if known is None or end >= known.offset:
                return Head(0, "") if message is None else self.saw(message.sequence, message.data)
            # A new leader may not have applied yet what the one before acknowledged. If it never does, the stream was
            # deleted and made anew, or a majority of the replicas lost what they had acknowledged.
            await self.connection.check()
            if loop.time() >= until:
                raise CorruptLogError(
                    self.location,
                    end,
                    f"the stream ends here, and it went on to {known.offset}: it was replaced or cut",
                )
            await asyncio.sleep(_RETRY_DELAY)

    async def base(self) -> int:
        return 0

    async def line_hash_before(self, offset: int) -> str:
        position = position_at(offset)
        if not position and offset == self.known_head.offset:
            return self.known_head.line_hash
        message = await self.connection.message(sequence_at(offset) if position else sequence_at(offset) - 1)
        if message is None:
            raise ValueError(f"offset {offset} is beyond the head")
        data = message.data
        if position and (position >= len(data) or data[position - 1 : position] != b"\n"):
            raise ValueError(f"offset {offset} is not where a line begins")
        return last_line_hash(data[:position] if position else data)

    async def block_before(self, offset: int) -> Lines:
        last, position = sequence_at(offset - 1), position_at(offset)
        first = max(1, last - _MESSAGES_BACK + 1)
        messages = await self._read(first, last)
        if len(messages) < last - first + 1:  # they are large: the last one will do
            first, messages = last, await self._read(last, last)
        block = join_messages(self.location, first, messages)
        if position:
            size = len(messages[-1])
            if position > size or messages[-1][position - 1 : position] != b"\n":
                raise ValueError(f"offset {offset} is not where a line ends")
            block = block.part(0, len(block.data) - size + position)
        return block

    async def blocks(self, start: Head, end: int) -> AsyncGenerator[Lines, None]:
        if start.offset and (position_at(start.offset) or start.line_hash):
            found = await self.line_hash_before(start.offset)
            if start.line_hash and found != start.line_hash:
                raise CorruptLogError(self.location, start.offset, "another line ended here before: the stream changed")
        sequence, skip = sequence_at(start.offset), position_at(start.offset)
        # An end within a message: the last message is read whole, and cut.
        last = sys.maxsize if end == sys.maxsize else sequence_at(end - 1)
        ahead = asyncio.ensure_future(self._read(sequence, last))
        try:
            while messages := await ahead:
                first, sequence = sequence, sequence + len(messages)
                if sequence <= last:
                    ahead = asyncio.ensure_future(self._read(sequence, last))
                block = join_messages(self.location, first, messages, skip)
                skip = 0
                if sequence > last and position_at(end):
                    excess = len(messages[-1]) - position_at(end)
                    block = block.part(0, len(block.data) - excess)
                yield block
                if sequence > last:
                    return
        finally:
            if not ahead.done():
                ahead.cancel()
                await asyncio.wait([ahead])

    async def _read(self, sequence: int, last: int) -> list[bytes]:
        """Messages from `sequence` on, at least one if there is one up to `last`."""
        loop = asyncio.get_running_loop()
        timeout = self.connection.settings.timeout
        until = loop.time() + timeout
        while True:
            messages, status = await self._get_batch(sequence, last)
            if messages:
                return messages
            if status == "404" and last == sys.maxsize:
                return []
            if status == "gap":
                await self.connection.check()  # which says why, where the stream was changed
                if await self.connection.message(sequence) is None:
                    raise CorruptLogError(self.location, start_of(sequence), "a message is missing here")
            if loop.time() >= until or self.connection.given_up:
                raise OSError(errno.ETIMEDOUT, f"message {sequence} can't be read for {timeout:g} s: {status}")
            await asyncio.sleep(_RETRY_DELAY)

    async def _get_batch(self, sequence: int, last: int) -> tuple[list[bytes], str]:
        """What one direct get gives, in order, up to a gap; and the status with which it ended."""
        client = await self.connection.client()
        messages: list[bytes] = []
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def receive(message: Msg) -> None:
            if ended.done():
                return
            headers = message.headers or {}
            if "Status" in headers:
                ended.set_result(headers["Status"])
            elif int(headers["Nats-Sequence"]) != sequence + len(messages):
                ended.set_result("gap")
            else:
                messages.append(message.data)

        if not client.is_connected:
            return [], f"there is no connection ({client.last_error!r})"
        try:
            inbox = client.new_inbox()
            subscription = await called(client.subscribe(inbox, cb=receive, **NO_LIMITS))
            try:
                ask = {"seq": sequence, "batch": min(_MESSAGES, last - sequence + 1), "max_bytes": _BYTES}
                subject = f"$JS.API.DIRECT.GET.{self.connection.settings.stream}"
                await called(client.publish(subject, msgspec.json.encode(ask), reply=inbox))
                await asyncio.wait([ended], timeout=self.connection.settings.attempt_timeout)
                return messages, ended.result() if ended.done() else "no answer in time"
            finally:
                await called(subscription.unsubscribe())
        except (NatsError, OSError) as error:
            return messages, repr(error)

    def acquire(self) -> None:
        """Somebody more uses this stream."""
        self._users += 1

    async def aclose(self) -> None:
        """Somebody has done with this stream; the last one closes the connection."""
        self._users -= 1
        if self._users <= 0 and not self.connection.closed:
            await self._documents.aclose()
            self.connection.closed = True
            await self.connection.aclose()
        else:
            self.connection.begin_closing(False)

    def abandon(self) -> None:
        """Forgets the connection without a word to the server."""
        self.connection.closed = True
