"""Appends to a stream: one message for everything that waits.

A batch without conditions is published as it is. One with conditions is judged by the last head that was seen, and
published on condition that this is still the stream's last message; otherwise it is judged again, by the newer head.

A publication that is not acknowledged is sent again with the same `Nats-Msg-Id`, which makes the server drop the second
one of two. Promise: a batch is in the stream once, or `UnknownOutcomeError` says that it may or may not be.
"""

from __future__ import annotations

import asyncio
import errno
import uuid
from collections.abc import Sequence

import msgspec
from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError

from .._aio import UncancellableTask, uninterrupted
from .._codec.lines import Lines
from .._engine import Commit
from .._errors import CorruptLogError, EventfoldError, UnknownOutcomeError
from .._event import Head
from .._judge import Append, judge, lines_needed_from
from ._offsets import MAX_MESSAGE_SIZE, join_messages, sequence_at
from ._stream import Stream

_WRONG_LAST_SEQUENCE = 10071
_WRONG_LAST_SEQUENCE_CONSTANT = 10164
_ATTEMPT_UNDER_WAY = 10158  # the first attempt of what is sent again has not been decided yet
_NO_ROOM = {10047, 10023, 10077, 10122}  # storage, resources, limits of the stream or the account
_HEADERS_SIZE = 4096
_FIRST_DELAY, _LAST_DELAY = 0.02, 0.25  # seconds


class StreamCommitter:
    """A `Committer`. Any number of them may append to one stream, in any process on any host."""

    def __init__(self, stream: Stream, max_payload: int) -> None:
        self._stream = stream
        self.batch_size = min(max_payload, MAX_MESSAGE_SIZE) - _HEADERS_SIZE
        self._prefix = uuid.uuid4().hex
        self._count = 0
        self._closed = False

    @property
    def source(self) -> Stream:
        return self._stream

    @property
    def head(self) -> Head:
        return self._stream.known_head

    async def commit(self, appends: Sequence[Append]) -> Commit:
        """See `Committer.commit`. It raises `OSError` (ENOSPC) where the servers have no room."""
        return await uninterrupted(UncancellableTask(self._commit(appends), "eventfold commit"))

    async def _commit(self, appends: Sequence[Append]) -> Commit:
        conditional = any(append.is_judged for append in appends)
        needed = lines_needed_from(appends)
        newest_head_known = False
        while True:
            head = self._stream.known_head
            recent = []
            if needed is not None and needed < head.offset:
                recent = [lines async for lines in self._stream.blocks(Head(needed, ""), head.offset)]
            judgement = judge(appends, head, recent)
            refused = any(isinstance(outcome, Exception) for outcome in judgement.outcomes)
            if refused and not newest_head_known:
                # The conflict may only be with what this process has not seen yet.
                await self._stream.head()
                newest_head_known = True
                continue
            if not judgement.data:
                return Commit(judgement.outcomes, Lines(self._stream.location, head.offset, b""), head)
            expected = sequence_at(head.offset) - 1 if conditional else None
            sequence = await self._publish(judgement.data, expected)
            if sequence is None:
                await self._stream.head()
                newest_head_known = True
                continue
            head = self._stream.saw(sequence, judgement.data)
            return Commit(judgement.outcomes, join_messages(self._stream.location, sequence, [judgement.data]), head)

    async def _publish(self, data: bytes, expected: int | None) -> int | None:
        """The message's sequence; None where `expected` is not the last one."""
        if len(data) > self.batch_size:
            raise OSError(errno.EMSGSIZE, f"a commit of {len(data)} bytes; the servers take {self.batch_size}")
        connection = self._stream.connection
        settings = connection.settings
        client = await connection.client()
        self._count += 1
        identity = f"{self._prefix}.{self._count}"
        headers = {"Nats-Msg-Id": identity, "Nats-Expected-Stream": settings.stream}
        if expected is not None:
            headers["Nats-Expected-Last-Sequence"] = str(expected)
        loop = asyncio.get_running_loop()
        until, attempt = loop.time() + settings.timeout, 0
        while True:
            attempt += 1
            try:
                reply = await client.request(settings.subject, data, timeout=settings.attempt_timeout, headers=headers)
                answer = msgspec.json.decode(reply.data)
                error = answer.get("error")
                if error is None and answer.get("seq"):  # a sequence of 0 acknowledges nothing
                    sequence: int = answer["seq"]
                    return sequence
                problem: object = "it was acknowledged with sequence 0"
                if error is not None:
                    code = error.get("err_code")
                    if code in (_WRONG_LAST_SEQUENCE, _WRONG_LAST_SEQUENCE_CONSTANT):
                        return await self._own_message(expected, identity) if attempt > 1 else None
                    if attempt == 1 and code in _NO_ROOM:
                        raise OSError(errno.ENOSPC, error["description"], connection.location)
                    if error.get("code") != 503 and code != _ATTEMPT_UNDER_WAY and code not in _NO_ROOM:
                        raise self._refusal(error["description"], attempt)
                    problem = error["description"]
            except MaxPayloadError as raised:
                raise OSError(errno.EMSGSIZE, f"a commit of {len(data)} bytes: {raised}") from raised
            except (NatsError, TimeoutError, msgspec.DecodeError) as raised:
                problem = repr(raised)
            if loop.time() >= until:
                raise UnknownOutcomeError(
                    f"{connection.location}: no acknowledgement for {settings.timeout:g} s ({problem}): the events may "
                    "or may not be in the log; read it to find out, or append them again on a condition"
                )
            await asyncio.sleep(min(_FIRST_DELAY * attempt, _LAST_DELAY))

    async def _own_message(self, expected: int | None, identity: str) -> int | None:
        """The sequence of an earlier attempt, if it was written.

        A server may look at the expected sequence before it looks for a duplicate.
        """
        if expected is None:
            return None
        message = await self._stream.connection.message(expected + 1)
        written = message is not None and message.headers.get("Nats-Msg-Id") == identity
        return expected + 1 if written else None

    def _refusal(self, description: str, attempt: int) -> EventfoldError:
        if attempt > 1:
            return UnknownOutcomeError(
                f"{self._stream.location}: {description}; an earlier attempt may have been written"
            )
        return CorruptLogError(self._stream.location, self.head.offset, description)

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            await self._stream.aclose()

    def abandon(self) -> None:
        """Leaves the connection alone: it is the parent's, or its event loop has ended."""
        self._stream.abandon()
