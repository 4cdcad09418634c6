"""The writer's queue: waiting appends, in the order in which they were called.

Plain state of one event loop: nothing here is awaited except a place in the queue, and nothing touches a file.

Promises: places are given first come, first served; the lines in the queue are never much more than `QUEUE_SIZE` bytes;
cancelled appends are not taken; each step costs the same however many appends wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from xxhash import xxh64_hexdigest

from . import _tracing
from ._errors import copy_error
from ._event import AppendResult
from ._judge import Append, Requirements

# How many bytes of lines may wait; further appends wait for a place before their events are encoded.
QUEUE_SIZE = 16 * 2**20


class AppendQueue:
    """The appends that wait for the log at `location`.

    `changed` is called when one is added, or leaves without having been added.
    """

    def __init__(self, changed: Callable[[], None], location: str = "") -> None:
        self._location = location
        self._loop = asyncio.get_running_loop()
        self._changed = changed
        self._appends: deque[Append] = deque()
        self._size = 0
        self._turns: deque[asyncio.Future[None]] = deque()
        # How many wait for a place, including the one that was given a place and has not run yet.
        self._waiting = 0
        self._given = False

    def __len__(self) -> int:
        return len(self._appends)

    def __repr__(self) -> str:
        return f"<AppendQueue of {len(self._appends)}, {self._waiting} waiting for a place>"

    @property
    def full(self) -> bool:
        """Whether a new append must wait for a `place`: there is no room, or others came before."""
        return self._size >= QUEUE_SIZE or self._waiting > 0

    @property
    def idle(self) -> bool:
        """Whether nothing is in the queue or waits for a place in it."""
        return not self._appends and not self._waiting

    @property
    def waiting(self) -> int:
        """How many appends wait for a place."""
        return self._waiting

    async def place(self) -> None:
        """Waits for room, after everything that came before. Take the place before awaiting anything else."""
        turn = self._loop.create_future()
        self._turns.append(turn)
        self._waiting += 1
        try:
            await turn
        finally:
            self._waiting -= 1
            if not turn.cancel() and not turn.cancelled():
                # The next one is considered once this one has taken its place.
                self._loop.call_soon(self._next_turn)
            self._changed()

    def _next_turn(self) -> None:
        self._given = False
        self._give_place()

    def _give_place(self) -> None:
        """Lets the first waiting append continue if there is room; that one lets the next."""
        while self._turns and not self._given and self._size < QUEUE_SIZE:
            turn = self._turns.popleft()
            if not turn.done():  # otherwise it was cancelled
                self._given = True
                turn.set_result(None)

    def put(
        self, data: bytes, requirements: Requirements | None = None, lines: Sequence[bytes] | None = None
    ) -> asyncio.Future[Any]:
        """Adds an append of whole lines; returns its future."""
        future: asyncio.Future[Any] = self._loop.create_future()
        append = Append(data, future, requirements, lines)
        if _tracing.tracer is not None:
            append.span = _tracing.start("eventfold.append", log=self._location, events=append.events, bytes=len(data))
            _tracing.end_with(append.span, future)
        appends = self._appends
        appends.append(append)
        self._size += len(data)
        if len(appends) == 1:
            self._changed()
        return future

    def take(self, size: int) -> list[Append]:
        """Takes appends that were not cancelled, up to about `size` bytes, but at least one if there is one."""
        if self._size <= size:
            taken = [append for append in self._appends if not append.future.done()]
            self._appends.clear()
            self._size = 0
            self._give_place()
            return taken
        taken = []
        while self._appends:
            append = self._appends[0]
            if not append.future.done():
                if taken and len(append.data) > size:
                    break
                taken.append(append)
                size -= len(append.data)
            self._appends.popleft()
            self._size -= len(append.data)
        self._give_place()
        return taken


def resolve(append: Append, outcome: int | BaseException, offset_at: Callable[[int], int]) -> None:
    """Sets the results of an append, or its error.

    `outcome` is the position of its first line in what was committed, and `offset_at` returns the offset of a position.
    """
    future = append.future
    if future.done():  # cancelled meanwhile: nothing waits for them
        return
    if isinstance(outcome, BaseException):
        # A copy, since an error that is raised in several tasks would collect all their tracebacks.
        future.set_exception(copy_error(outcome))
        return
    # Hashes as `line_hash` calculates them, without a call for each line.
    if append.lines is None:
        data = append.data
        future.set_result(AppendResult(offset_at(outcome), offset_at(outcome + len(data)), xxh64_hexdigest(data[:-1])))
        return
    offsets = list(map(offset_at, accumulate(map(len, append.lines), initial=outcome)))
    hashes = [xxh64_hexdigest(line[:-1]) for line in append.lines]
    future.set_result(list(map(AppendResult, offsets, offsets[1:], hashes)))
