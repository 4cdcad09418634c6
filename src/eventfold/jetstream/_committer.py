"""Appends to a stream: one message for all waiting appends.

A group without conditions is simply published. A group with conditions is judged by the last known head, and published
on condition that the head is still the end of the stream. If it is not, the group is judged again by the newer head.

A message that is not acknowledged is sent again with the same `Nats-Msg-Id`, by which the server recognises and drops a
duplicate. It is not sent again once the servers may have forgotten the id.

Promise: a group is written exactly once, or `UnknownOutcomeError` says that it may or may not be in the log.
"""

from __future__ import annotations

import asyncio
import errno
import time
import uuid
from collections.abc import Sequence

import msgspec

from .._aio import UncancellableTask, uninterrupted
from .._codec.lines import Lines
from .._engine import Commit
from .._errors import ConditionalAppendError, CorruptLogError, EventfoldError, UnknownOutcomeError
from .._event import Head
from .._judge import Append, any_required, judge, lines_needed_from
from ._codes import ATTEMPT_UNDER_WAY, NO_SPACE, WRONG_LAST_SEQUENCE, error_code
from ._connection import UnansweredError
from ._offsets import MAX_MESSAGE_SIZE, end_of, join_messages, sequence_at
from ._stream import Stream

# Seconds: the delay before each retry is longer by the first value than the previous one, up to the second value.
_RETRY_DELAY_STEP, _MAX_RETRY_DELAY = 0.02, 0.25


class StreamCommitter:
    """A `Committer`. Any number of them may append to one stream, in any process on any host."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._prefix = uuid.uuid4().hex
        self._count = 0
        self._closed = False

    @property
    def max_commit_size(self) -> int:
        """See `Committer.max_commit_size`. It changes with the servers' configuration."""
        return min(self._stream.connection.max_data, MAX_MESSAGE_SIZE)

    @property
    def source(self) -> Stream:
        return self._stream

    @property
    def head(self) -> Head:
        return self._stream.known_head

    async def commit(self, appends: Sequence[Append]) -> Commit:
        """See `Committer.commit`. Raises `OSError` (ENOSPC) if the servers have no space left."""
        return await uninterrupted(UncancellableTask(self._commit(appends), "eventfold commit"))

    async def _commit(self, appends: Sequence[Append]) -> Commit:
        has_conditions = any_required(appends)
        needed = lines_needed_from(appends)
        is_head_current = False
        while True:
            head = self._stream.known_head
            recent = []
            if needed is not None and needed < head.offset:
                try:
                    recent = [lines async for lines in self._stream.blocks(Head(needed, ""), head.offset)]
                except asyncio.CancelledError:
                    continue  # `asyncio.run` cancels the tasks that read when it ends, but not this one
            judgement = judge(appends, head, recent)
            is_refused = has_conditions and any(isinstance(outcome, Exception) for outcome in judgement.outcomes)
            if is_refused and not is_head_current:
                # The known head may be out of date, which must not be a reason to refuse an append.
                await self._stream.head()
                is_head_current = True
                continue
            if not judgement.data:
                return Commit(judgement.outcomes, Lines(self._stream.location, head.offset, b""), head)
            expected = sequence_at(head.offset) - 1 if has_conditions else None
            sequence = await self._publish(judgement.data, expected)
            if sequence is None:
                await self._stream.head()
                is_head_current = True
                continue
            end = judgement.head.offset
            head = self._stream.note_message(sequence, judgement.data)
            outcomes = [_at_end_of_message(outcome, end, head.offset) for outcome in judgement.outcomes]
            return Commit(outcomes, join_messages(self._stream.location, sequence, [judgement.data]), head)

    async def _publish(self, data: bytes, expected: int | None) -> int | None:
        """Publishes a message; returns its sequence, or None if `expected` is not the last sequence."""
        connection = self._stream.connection
        settings = connection.settings
        if len(data) > self.max_commit_size:
            problem = f"an append has {len(data)} bytes; the servers' max_payload allows {self.max_commit_size} bytes"
            raise OSError(errno.EMSGSIZE, problem, connection.location)
        self._count += 1
        identity = f"{self._prefix}.{self._count}"
        headers = {"Nats-Msg-Id": identity, "Nats-Expected-Stream": settings.stream}
        if expected is not None:
            headers["Nats-Expected-Last-Sequence"] = str(expected)
        known_end = self.head.offset
        stopwatch, attempt, sent, problem = _Stopwatch(), 0, False, ""
        while True:
            try:
                await connection.client()  # connects again if necessary, which may take a while
            except (OSError, EventfoldError) as raised:
                if not sent:
                    raise
                raise self._unknown(str(raised)) from raised
            # Checked immediately before sending again, since this process may have been stopped for a while, too.
            if attempt and (stopwatch.seconds >= settings.timeout or connection.given_up):
                problem = f"no acknowledgement for {settings.timeout:g} s ({problem})"
                raise self._unknown(problem) if sent else OSError(errno.ETIMEDOUT, problem, connection.location)
            attempt += 1
            try:
                answer = await connection.request_once(settings.subject, data, headers)
                sequence, error = answer.get("seq"), answer.get("error")
                code = error_code(answer)
                if code in WRONG_LAST_SEQUENCE and expected is not None:
                    if not sent:
                        return None
                    # An earlier attempt may have been written, since a server may check the expected sequence before
                    # it looks for a duplicate. If the message can't be read yet, it is too early to tell.
                    if (message := await self._stream.message(expected + 1)) is not None:
                        return expected + 1 if message.headers.get("Nats-Msg-Id") == identity else None
                elif error and code in NO_SPACE and not sent:
                    raise OSError(errno.ENOSPC, error["description"], connection.location)
                elif error and code != ATTEMPT_UNDER_WAY and code not in NO_SPACE:
                    raise CorruptLogError(connection.location, known_end, error["description"])
                elif sequence:  # a sequence of 0 acknowledges nothing
                    if end_of(sequence) <= known_end:
                        raise CorruptLogError(
                            connection.location,
                            end_of(sequence),
                            f"an event was appended here, but the log ended at {known_end}: the stream was replaced",
                        )
                    return int(sequence)
                problem = error["description"] if error else "it was acknowledged with sequence 0"
                sent = True
            except UnansweredError as unanswered:
                if unanswered.no_space and not sent:
                    raise OSError(errno.ENOSPC, str(unanswered), connection.location) from unanswered
                sent, problem = sent or unanswered.sent, str(unanswered)
            except (OSError, EventfoldError) as raised:
                if not sent:
                    raise
                raise self._unknown(str(raised)) from raised
            await asyncio.sleep(min(_RETRY_DELAY_STEP * attempt, _MAX_RETRY_DELAY))

    def _unknown(self, problem: str) -> UnknownOutcomeError:
        return UnknownOutcomeError(
            f"{self._stream.location}: {problem}: the events may or may not be in the log; read it to find out, or "
            "append them again on a condition"
        )

    def begin_closing(self) -> None:
        """See `ClosingCommitter.begin_closing`."""
        self._stream.connection.begin_closing()

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            await self._stream.aclose()

    def abandon(self) -> None:
        """See `Committer.abandon`."""
        self._stream.abandon()


def _at_end_of_message(outcome: int | Exception, counted: int, end: int) -> int | Exception:
    """An outcome of `judge`, which counted the message's bytes to find out where the message ends."""
    if isinstance(outcome, ConditionalAppendError) and outcome.conflict.actual_offset == counted:
        return ConditionalAppendError(msgspec.structs.replace(outcome.conflict, actual_offset=end))
    return outcome


class _Stopwatch:
    """Measures the time since its creation, including any time for which this process or its host is stopped."""

    def __init__(self) -> None:
        self._start = time.monotonic(), time.time()

    @property
    def seconds(self) -> float:
        # The monotonic clock may not advance while the host sleeps, and the other clock may be set back.
        return max(time.monotonic() - self._start[0], time.time() - self._start[1])
