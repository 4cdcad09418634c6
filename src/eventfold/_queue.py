"""The writer's queue: appends that wait, in the order in which they were called.

Plain state of one event loop: nothing here is awaited but the wait for a place, and nothing touches a file.

Promises: whoever asks first gets a place first; the lines in the queue are never much more than `QUEUE_SIZE` bytes;
what was cancelled is not taken; each step costs the same however many wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, overload

from . import _tracing
from ._errors import copy_error
from ._event import AppendResult, Head, line_hash
from ._judge import Append, Condition, UniqueIds

# Bytes of lines that may wait; whoever comes then waits for a place before its event is encoded.
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
        # How many wait for a place, with the one that was given one and has not run yet.
        self._waiting = 0
        self._given = False

    def __len__(self) -> int:
        return len(self._appends)

    def __repr__(self) -> str:
        return f"<AppendQueue of {len(self._appends)}, {self._waiting} waiting for a place>"

    @property
    def full(self) -> bool:
        """Whether a newcomer must wait for a `place`: no room, or others came before."""
        return self._size >= QUEUE_SIZE or self._waiting > 0

    @property
    def idle(self) -> bool:
        """Whether nobody is in the queue or waits for a place in it."""
        return not self._appends and not self._waiting

    @property
    def waiting(self) -> int:
        """How many wait for a place."""
        return self._waiting

    async def place(self) -> None:
        """Waits for room, behind everybody who came before. Take the place before anything else is awaited."""
        turn = self._loop.create_future()
        self._turns.append(turn)
        self._waiting += 1
        try:
            await turn
        finally:
            self._waiting -= 1
            if not turn.cancel() and not turn.cancelled():
                # The next is looked at once this one has taken its place.
                self._loop.call_soon(self._next_turn)
            self._changed()

    def _next_turn(self) -> None:
        self._given = False
        self._give_place()

    def _give_place(self) -> None:
        """Lets the first who waits go on if there is room; it lets the next one."""
        while self._turns and not self._given and self._size < QUEUE_SIZE:
            turn = self._turns.popleft()
            if not turn.done():  # else it was cancelled
                self._given = True
                turn.set_result(None)

    @overload
    def put(
        self, data: bytes, expected: Head | None = None, *, unique: UniqueIds | None = None
    ) -> asyncio.Future[AppendResult]: ...

    @overload
    def put(
        self, data: bytes, *, condition: Condition | None = None, count: int, unique: UniqueIds | None = None
    ) -> asyncio.Future[list[AppendResult]]: ...

    def put(
        self,
        data: bytes,
        expected: Head | None = None,
        condition: Condition | None = None,
        count: int | None = None,
        unique: UniqueIds | None = None,
    ) -> asyncio.Future[Any]:
        """Adds an append of `count` whole lines; the future for the list of where they are in the log.

        Without `count` it is one line, and the future is for where that one is.
        """
        future: asyncio.Future[Any] = self._loop.create_future()
        append = Append(data, future, expected, condition, count, unique)
        if _tracing.tracer is not None:
            append.span = _tracing.start("eventfold.append", log=self._location, events=append.events, bytes=len(data))
            _tracing.end_with(append.span, future)
        self._appends.append(append)
        self._size += len(data)
        if len(self._appends) == 1:
            self._changed()
        return future

    def take(self, size: int) -> list[Append]:
        """What nobody has cancelled, up to about so many bytes, but at least one append if there is one."""
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
    """Gives an append its results, or why it has none.

    `outcome` is the position of its first line in what was committed, and `offset_at` gives the offset of a position.
    """
    future = append.future
    if future.done():  # cancelled meanwhile: nobody waits for them
        return
    if isinstance(outcome, BaseException):
        # A copy, since an error that is raised in several tasks gathers all their tracebacks.
        future.set_exception(copy_error(outcome))
        return
    data, start = append.data, offset_at(outcome)
    if append.count is None:
        future.set_result(AppendResult(start, offset_at(outcome + len(data)), line_hash(data)))
        return
    results = []
    for line in data.splitlines(keepends=True):  # a line of JSON has no other line break in it
        outcome += len(line)
        end = offset_at(outcome)
        results.append(AppendResult(start, end, line_hash(line)))
        start = end
    future.set_result(results)
