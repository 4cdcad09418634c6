"""Small appends that go straight to a committer."""

from __future__ import annotations

import asyncio

from eventfold import Event, Head
from eventfold._codec.encode import encode_line
from eventfold._engine import Commit
from eventfold._judge import Append, Requirements
from eventfold.jetstream._committer import StreamCommitter
from eventfold.jetstream._stream import Stream


def line(n: int, size: int = 0) -> bytes:
    return encode_line(Event("counted", {"n": n, "filling": "x" * size}, ts=n), 2**24)


def pending(n: int, expected: Head | None = None, size: int = 0) -> Append:
    required = None if expected is None else Requirements(expected)
    return Append(line(n, size), asyncio.get_running_loop().create_future(), required)


async def append(committer: StreamCommitter, *numbers: int) -> Commit:
    """Commits an event for each number, all together."""
    return await committer.commit([pending(n) for n in numbers])


async def read(stream: Stream, start: Head = Head(0, ""), end: int | None = None) -> bytes:  # noqa: B008
    """Returns the lines from one offset to another (None: to the head)."""
    end = (await stream.head()).offset if end is None else end
    return b"".join([block.data async for block in stream.blocks(start, end)]) if end > start.offset else b""
