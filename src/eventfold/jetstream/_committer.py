"""Appends to a stream: one message for all waiting appends.

A batch without conditions is published as it is. One with conditions is judged by the last head that was seen, and
published on condition that this is still the stream's last message; otherwise it is judged again, by the newer head.

A publication that is not acknowledged is sent again with the same `Nats-Msg-Id`, which makes the server drop the second
one of two. It is not sent again once the servers may have forgotten that. Promise: a batch is in the stream once, or
`UnknownOutcomeError` says that it may or may not be.
"""

from __future__ import annotations

import asyncio
import errno
import time
import uuid
from collections.abc import Sequence

from .._aio import UncancellableTask, uninterrupted
from .._codec.lines import Lines
from .._engine import Commit
from .._errors import CorruptLogError, EventfoldError, UnknownOutcomeError
from .._event import Head
from .._judge import Append, any_required, judge, lines_needed_from
from ._codes import ATTEMPT_UNDER_WAY, NO_ROOM, WRONG_LAST_SEQUENCE, error_code
from ._connection import UnansweredError
from ._offsets import MAX_MESSAGE_SIZE, end_of, join_messages, sequence_at
from ._stream import Stream

_FIRST_DELAY, _LAST_DELAY = 0.02, 0.25  # seconds


class StreamCommitter:
    """A `Committer`. Any number of them may append to one stream, in any process on any host."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._prefix = uuid.uuid4().hex
        self._count = 0
        self._closed = False

    @property
    def batch_size(self) -> int:
        """In bytes; servers with a new configuration may take more or less than before."""
        return min(self._stream.connection.max_data, MAX_MESSAGE_SIZE)

    @property
    def source(self) -> Stream:
        return self._stream

    @property
    def head(self) -> Head:
        return self._stream.known_head

    async def commit(self, appends: Sequence[Append]) -> Commit:
        """See `Committer.commit`. Raises `OSError` (ENOSPC) if the servers have no room."""
        return await uninterrupted(UncancellableTask(self._commit(appends), "eventfold commit"))

    async def _commit(self, appends: Sequence[Append]) -> Commit:
        conditional = any_required(appends)
        needed = lines_needed_from(appends) if conditional else None
        newest_head_known = False
        while True:
            head = self._stream.known_head
            recent = []
            if needed is not None and needed < head.offset:
                try:
                    recent = [lines async for lines in self._stream.blocks(Head(needed, ""), head.offset)]
                except asyncio.CancelledError:
                    continue  # the end of `asyncio.run` cancels the tasks that read; this one goes on
            judgement = judge(appends, head, recent)
            refused = conditional and any(isinstance(outcome, Exception) for outcome in judgement.outcomes)
            if refused and not newest_head_known:
                # The conflict may be due to something that this process has not seen yet.
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
        """Publishes a message; returns its sequence, None if `expected` is not the last one."""
        connection = self._stream.connection
        settings = connection.settings
        if len(data) > self.batch_size:
            problem = f"an append of {len(data)} bytes; by their max_payload, the servers take {self.batch_size} bytes"
            raise OSError(errno.EMSGSIZE, problem, connection.location)
        self._count += 1
        identity = f"{self._prefix}.{self._count}"
        headers = {"Nats-Msg-Id": identity, "Nats-Expected-Stream": settings.stream}
        if expected is not None:
            headers["Nats-Expected-Last-Sequence"] = str(expected)
        known = self.head.offset
        begun, attempt, sent = _Clock(), 0, False
        while True:
            attempt += 1
            try:
                answer = await connection.ask(settings.subject, data, headers)
                sequence, error = answer.get("seq"), answer.get("error")
                code = error_code(answer)
                if code in WRONG_LAST_SEQUENCE and expected is not None:
                    if not sent:
                        return None
                    # An earlier attempt may have been written: a server may look at the expected sequence before it
                    # looks for a duplicate. It may also know of a message that can't be read yet.
                    if (message := await connection.message(expected + 1)) is not None:
                        return expected + 1 if message.headers.get("Nats-Msg-Id") == identity else None
                elif error and code in NO_ROOM and not sent:
                    raise OSError(errno.ENOSPC, error["description"], connection.location)
                elif error and code != ATTEMPT_UNDER_WAY and code not in NO_ROOM:
                    raise CorruptLogError(connection.location, known, error["description"])
                elif sequence:  # one of 0 acknowledges nothing
                    if end_of(sequence) <= known:
                        raise CorruptLogError(
                            connection.location,
                            end_of(sequence),
                            f"an event was appended here, but the log continued to {known}: the stream was replaced",
                        )
                    return int(sequence)
                problem = error["description"] if error else "it was acknowledged with sequence 0"
                sent = True
            except UnansweredError as unanswered:
                sent, problem = sent or unanswered.sent, str(unanswered)
            except (OSError, EventfoldError) as raised:
                if not sent:
                    raise
                raise self._unknown(str(raised)) from raised
            # The time is looked at right before it is sent again: this process may be stopped for a while anywhere.
            await asyncio.sleep(min(_FIRST_DELAY * attempt, _LAST_DELAY))
            if begun.seconds >= settings.timeout or connection.given_up:
                problem = f"no acknowledgement for {settings.timeout:g} s ({problem})"
                raise self._unknown(problem) if sent else OSError(errno.ETIMEDOUT, problem, connection.location)

    def _unknown(self, problem: str) -> UnknownOutcomeError:
        return UnknownOutcomeError(
            f"{self._stream.location}: {problem}: the events may or may not be in the log; read it to find out, or "
            "append them again on a condition"
        )

    def begin_closing(self) -> None:
        """See `ClosingCommitter`: what waits for servers that don't answer is to fail."""
        self._stream.connection.begin_closing()

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            await self._stream.aclose()

    def abandon(self) -> None:
        """Leaves the connection alone: it is the parent's, or its event loop has ended."""
        self._stream.abandon()


class _Clock:
    """Measures the time since it was created, even while this process or its host is stopped."""

    def __init__(self) -> None:
        self._begun = time.monotonic(), time.time()

    @property
    def seconds(self) -> float:
        # The monotonic clock may stand still while the host sleeps; the other one may be set back.
        return max(time.monotonic() - self._begun[0], time.time() - self._begun[1])
