"""The writer's queue: appends that wait, in the order in which they were called, and the batches taken from it.

Plain state of one event loop: nothing here is awaited but the wait for a place, and nothing touches a file.

Promises: whoever asks first gets a place first; the lines in the queue are never much more than `QUEUE_SIZE` bytes; a
conditional append is judged by the head as it will be when its turn comes; what was cancelled is not taken.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import msgspec

from ._errors import AppendConflict, ConditionalAppendError, copy_error
from ._event import Head, line_hash

# So many are told in one turn of the loop: whoever waits for an append runs in the next, and others want to run too.
TOLD_AT_ONCE = 500
# Bytes of lines that may wait; whoever comes then waits for a place before its event is encoded.
QUEUE_SIZE = 16 * 2**20


class Append(msgspec.Struct, eq=False, gc=False):
    """One call that waits, with its lines; `expected` is the head that it needs, None for any.

    Its outcome is the offset at which its lines begin, or why they are not in the log.
    """

    data: bytes
    expected: Head | None
    future: asyncio.Future[int]
    outcome: Any = 0


class Batch(NamedTuple):
    """Appends that are written together: their lines, and the head after these."""

    appends: list[Append]
    data: bytes
    head: Head

    def fail(self, error: Exception) -> None:
        """Gives each append the error."""
        for append in self.appends:
            if not append.future.done():
                append.future.set_exception(copy_error(error))


class Answers:
    """Appends whose outcome is known, and those who wait are told, in order and not too many in one turn of the loop.

    `told` is called after each lot. Those who were told run before it is, if the loop calls what it calls in order.
    """

    def __init__(self, told: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._told = told
        self._due: deque[Append] = deque()

    def __len__(self) -> int:
        return len(self._due)

    def add(self, appends: Iterable[Append]) -> None:
        """Tells these after those that are still to be told."""
        under_way = bool(self._due)
        self._due.extend(appends)
        if not under_way:
            self._tell()

    def _tell(self) -> None:
        for _ in range(min(len(self._due), TOLD_AT_ONCE)):
            append = self._due.popleft()
            if append.future.done():  # cancelled meanwhile: nobody waits for the answer
                continue
            if isinstance(append.outcome, Exception):
                append.future.set_exception(append.outcome)
            else:
                append.future.set_result(append.outcome)
        if self._due:
            self._loop.call_soon(self._tell)
        self._told()


class AppendQueue:
    """The appends that wait. `changed` is called when one is added, or leaves without having been added."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = changed
        self._appends: list[Append] = []
        self._size = 0
        self._turns: deque[asyncio.Future[None]] = deque()

    def __len__(self) -> int:
        return len(self._appends)

    def __repr__(self) -> str:
        return f"<AppendQueue of {len(self._appends)}, {len(self._turns)} waiting for a place>"

    @property
    def full(self) -> bool:
        """Whether a newcomer must wait for a `place`: no room, or others came before."""
        return self._size >= QUEUE_SIZE or bool(self._turns)

    @property
    def idle(self) -> bool:
        """Whether nobody is in the queue or waits for a place in it."""
        return not self._appends and not self._turns

    async def place(self) -> None:
        """Waiters for room, behind everybody who came before. Take the place before anything else is awaited."""
        turn = self._loop.create_future()
        self._turns.append(turn)
        try:
            await turn
        finally:
            self._turns.remove(turn)
            # The next is looked at once this one has taken its place.
            self._loop.call_soon(self.give_places)
            self._changed()

    def give_places(self, all_of_them: bool = False) -> None:
        """Lets the first who waits go on if there is room now; it lets the next one."""
        turns = list(self._turns) if all_of_them else list(self._turns)[:1]
        for turn in turns:
            if not turn.done() and (all_of_them or self._size < QUEUE_SIZE):
                turn.set_result(None)

    def put(self, data: bytes, expected: Head | None = None) -> asyncio.Future[int]:
        """Adds an append of whole lines; the future for the offset at which they begin, or its conflict."""
        future: asyncio.Future[int] = self._loop.create_future()
        self._appends.append(Append(data, expected, future))
        self._size += len(data)
        if len(self._appends) == 1:
            self._changed()
        return future

    def pop(self, size: int) -> list[Append]:
        """What nobody has cancelled, up to about so many bytes, but at least one."""
        taken: list[Append] = []
        count = 0
        for count, append in enumerate(self._appends, 1):
            if append.future.done():
                self._size -= len(append.data)
                continue
            if taken and len(append.data) > size:
                count -= 1
                break
            taken.append(append)
            size -= len(append.data)
            self._size -= len(append.data)
        del self._appends[:count]
        self.give_places()
        return taken

    def take(self, head: Head) -> Batch:
        """Everything that nobody has cancelled, to be appended behind `head`; the queue is empty then."""
        taken: list[Append] = []
        pieces: list[bytes] = []
        offset = head.offset
        for append in self._appends:
            if append.future.done():
                continue
            taken.append(append)
            if append.expected is not None:
                now = _head_after(head, pieces, offset)
                if append.expected != now:
                    append.outcome = _conflict(append.expected, now)
                    continue
            append.outcome = offset
            offset += len(append.data)
            pieces.append(append.data)
        self._appends = []
        self._size = 0
        self.give_places()
        return Batch(taken, b"".join(pieces), _head_after(head, pieces, offset))


def _head_after(head: Head, pieces: list[bytes], offset: int) -> Head:
    if not pieces:
        return head
    last = pieces[-1]
    return Head(offset, line_hash(last[last.rfind(b"\n", 0, -1) + 1 :]))


def _conflict(expected: Head, head: Head) -> ConditionalAppendError:
    actual_hash = head.line_hash if expected.offset == head.offset else None
    return ConditionalAppendError(AppendConflict(expected.offset, head.offset, expected.line_hash, actual_hash))
