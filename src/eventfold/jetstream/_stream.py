"""Reads a stream: where it ends, and its lines from an offset onwards.

Messages are read by direct get, many at a time, from any replica. A replica may lag behind the leader. So a message
that is missing in the answer is requested again until `timeout`, unless the leader does not have it either: that is an
error.
"""

from __future__ import annotations

import asyncio
import errno
import sys
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from .._codec.lines import Lines, last_line_hash
from .._errors import CorruptLogError
from .._event import Head
from .._waiters import Waiters
from ._api import Message, get_message
from ._calls import NO_LIMITS, run_isolated
from ._connection import Connection
from ._documents import KeyValueDocuments
from ._follower import Follower
from ._offsets import end_of, join_messages, position_at, sequence_at, start_of
from ._settings import Settings

_MESSAGES, _BYTES = 2000, 2 * 2**20  # the maximum number and size of the messages in one read
_MESSAGES_BACK = 64  # the maximum number of messages in one read from the end of the log towards its beginning
_RETRY_DELAY = 0.02  # seconds


class Stream:
    """A `Source`. All sources of one stream in an event loop are the same object; see `JetStream.source`."""

    def __init__(self, settings: Settings) -> None:
        self._waiters = Waiters(self._new_follower, watch_beside_writer=True)
        # If something is wrong with the stream, only this ends the waits.
        self.connection = Connection(settings, on_fault=self._waiters.notify)
        self._documents = KeyValueDocuments(self.connection)
        self.connection.monitor.after_check = self._documents.check_locks
        self._known_head: Head | None = None
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
        """The newest head that this process has seen. No I/O."""
        return self._known_head or Head(0, "")

    async def identity(self) -> str:
        return self.location

    async def waiters(self) -> Waiters:
        return self._waiters

    def _new_follower(self) -> Follower:
        return Follower(self)

    def note_message(self, sequence: int, data: bytes) -> Head:
        """Notifies the waiters if a message is newer than the known head; returns the head after the message."""
        head = Head(end_of(sequence), last_line_hash(data))
        known = self._known_head
        if known is not None and head.offset <= known.offset:
            return head
        self._known_head = head
        is_next = known is not None and known.offset == start_of(sequence)
        self._waiters.notify(head, known, join_messages(self.location, sequence, [data]) if is_next else None)
        return head

    async def message(self, sequence: int) -> Message | None:
        """A message, as the leader has it; None if there is none."""
        return await self._get_message({"seq": sequence})

    async def _get_message(self, which: dict[str, Any]) -> Message | None:
        return await get_message(self.connection.request, self.location, self.connection.settings.stream, which)

    async def _last_message(self) -> Message | None:
        """The stream's last message, as the leader has it; None for an empty stream."""
        message = await self._get_message({"last_by_subj": self.connection.settings.subject})
        if message is None:
            await self.connection.check()  # raises an error if the stream is empty because it was purged
        return message

    async def head(self) -> Head:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.connection.settings.timeout
        while True:
            message = await self._last_message()
            end = 0 if message is None else end_of(message.sequence)
            known = self._known_head
            if known is None or end >= known.offset:
                return Head(0, "") if message is None else self.note_message(message.sequence, message.data)
            # A new leader may not have applied yet what the previous one acknowledged. If it never does, the stream was
            # recreated, or a majority of the replicas has lost what they had acknowledged.
            await self.connection.check()
            if loop.time() >= deadline:
                raise CorruptLogError(
                    self.location,
                    end,
                    f"the stream ends here, but it continued to {known.offset}: it was replaced or cut",
                )
            await asyncio.sleep(_RETRY_DELAY)

    async def base(self) -> int:
        return 0

    async def line_hash_before(self, offset: int) -> str:
        position = position_at(offset)
        if not position and offset == self.known_head.offset:
            return self.known_head.line_hash
        message = await self.message(sequence_at(offset) if position else sequence_at(offset) - 1)
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
        if len(messages) < last - first + 1:  # they are large, so one is enough
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
                raise CorruptLogError(self.location, start.offset, "a different line ended here: the stream changed")
        sequence, skip = sequence_at(start.offset), position_at(start.offset)
        last = sys.maxsize if end == sys.maxsize else sequence_at(end - 1)
        next_messages = asyncio.ensure_future(self._read(sequence, last))
        try:
            while messages := await next_messages:
                first, sequence = sequence, sequence + len(messages)
                if sequence <= last:
                    next_messages = asyncio.ensure_future(self._read(sequence, last))
                block = join_messages(self.location, first, messages, skip)
                skip = 0
                if sequence > last and position_at(end):  # the end is inside the last message
                    excess = len(messages[-1]) - position_at(end)
                    block = block.part(0, len(block.data) - excess)
                yield block
                if sequence > last:
                    return
        finally:
            if not next_messages.done():
                next_messages.cancel()
                await asyncio.wait([next_messages])

    async def _read(self, sequence: int, last: int) -> list[bytes]:
        """Consecutive messages from `sequence` on, at least one unless there is none up to `last`."""
        loop = asyncio.get_running_loop()
        timeout = self.connection.settings.timeout
        deadline = loop.time() + timeout
        while True:
            messages, status = await self._get_batch(sequence, last)
            if messages:
                return messages
            if status == "404" and last == sys.maxsize:
                return []
            if status == "gap":
                await self.connection.check()  # raises the cause if the stream was changed
                if await self.message(sequence) is None:
                    raise CorruptLogError(self.location, start_of(sequence), "a message is missing here")
            if loop.time() >= deadline or self.connection.given_up:
                raise OSError(errno.ETIMEDOUT, f"message {sequence} could not be read for {timeout:g} s: {status}")
            await asyncio.sleep(_RETRY_DELAY)

    async def _get_batch(self, sequence: int, last: int) -> tuple[list[bytes], str]:
        """The messages of one direct get, up to a gap, and the status with which it ended."""
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
            subscription = await run_isolated(client.subscribe(inbox, cb=receive, **NO_LIMITS))
            try:
                wanted = {"seq": sequence, "batch": min(_MESSAGES, last - sequence + 1), "max_bytes": _BYTES}
                subject = f"$JS.API.DIRECT.GET.{self.connection.settings.stream}"
                await run_isolated(client.publish(subject, msgspec.json.encode(wanted), reply=inbox))
                await asyncio.wait([ended], timeout=self.connection.settings.attempt_timeout)
                return messages, ended.result() if ended.done() else "no answer in time"
            finally:
                await run_isolated(subscription.unsubscribe())
        except (NatsError, OSError) as error:
            return messages, repr(error)

    def acquire(self) -> None:
        """Counts one more user of this stream, who must call `aclose`."""
        self._users += 1

    async def aclose(self) -> None:
        """Counts one user fewer; closes the connection after the last one."""
        self._users -= 1
        if self._users <= 0 and not self.connection.closed:
            await self._documents.aclose()
            self.connection.closed = True
            await self.connection.aclose()
        else:
            self.connection.cancel_closing()

    def abandon(self) -> None:
        """See `Committer.abandon`. Does not contact the server."""
        self.connection.closed = True
