"""Decides which appends of a batch hold, by the head as it is when their turn comes.

An engine calls this at the one moment at which nothing can come in between: with the turn, the row lock or the expected
sequence in its hand. Pure: no I/O.

Promise: each append is judged as if all before it in the batch were in the log already.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from ._errors import AppendConflict, ConditionalAppendError
from ._event import AppendResult, Head, line_hash


class Append(msgspec.Struct, eq=False, gc=False):
    """One call that waits to be committed: its whole lines, and the condition under which they may be written.

    `expected` is the head that it needs, None for any.
    """

    data: bytes
    future: asyncio.Future[list[AppendResult]]
    expected: Head | None = None


class Judgement(NamedTuple):
    """`outcomes` has the position in `data` of each append's first line, or why it may not be written."""

    outcomes: list[int | Exception]
    data: bytes
    head: Head


def judge(appends: Sequence[Append], head: Head) -> Judgement:
    """Judges the appends in order, the first by `head`. The resulting head assumes offsets that count bytes."""
    outcomes: list[int | Exception] = []
    accepted: list[bytes] = []
    position = 0
    for append in appends:
        if append.expected is not None:
            now = _head_after(head, accepted, position)
            if append.expected != now:
                outcomes.append(_conflict(append.expected, now))
                continue
        outcomes.append(position)
        position += len(append.data)
        accepted.append(append.data)
    return Judgement(outcomes, b"".join(accepted), _head_after(head, accepted, position))


def _head_after(head: Head, accepted: list[bytes], size: int) -> Head:
    if not accepted:
        return head
    last = accepted[-1]
    return Head(head.offset + size, line_hash(last[last.rfind(b"\n", 0, -1) + 1 :]))


def _conflict(expected: Head, head: Head) -> ConditionalAppendError:
    actual_hash = head.line_hash if expected.offset == head.offset else None
    return ConditionalAppendError(AppendConflict(expected.offset, head.offset, expected.line_hash, actual_hash))
