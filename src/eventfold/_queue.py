"""The writer's queue: the appends that wait to be committed, in the order in which they were called.

The queue belongs to one event loop and does no I/O. Only waiting for room in it is asynchronous.

Promises: appends get room first come, first served; the lines in the queue are never much more than `QUEUE_SIZE` bytes;
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

# How many bytes of lines the queue holds. With more, new appends wait for room before their events are encoded.
QUEUE_SIZE = 16 * 2**20


class AppendQueue:
    """The appends that wait for the log at `location`.

    `changed` is called when an append is added to an empty queue, and when one stops waiting for room.
    """

    def __init__(self, changed: Callable[[], None], location: str = "") -> None:
        self._location = location
        self._loop = asyncio.get_running_loop()
        self._changed = changed
        self._appends: deque[Append] = deque()
        self._size = 0
        # The appends that wait for room. They are admitted one at a time: there may be no room for the next one once
        # the lines of the previous one are in the queue.
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._admitting = False
        self._waiting_count = 0  # includes an append that was admitted, but has not run yet

    def __len__(self) -> int:
        return len(self._appends)

    def __repr__(self) -> str:
        return f"<AppendQueue of {len(self._appends)}, {self._waiting_count} waiting for room>"

    @property
    def full(self) -> bool:
        """Whether a new append must `wait_for_room`: the queue is full, or other appends wait already."""
        return self._size >= QUEUE_SIZE or self._waiting_count > 0

    @property
    def idle(self) -> bool:
        """Whether the queue is empty and no append waits for room."""
        return not self._appends and not self._waiting_count

    @property
    def waiting(self) -> int:
        """How many appends wait for room."""
        return self._waiting_count

    async def wait_for_room(self) -> None:
        """Waits until there is room, and all appends that waited before have been added.

        The caller must add its append before it awaits anything else.
        """
        admission = self._loop.create_future()
        self._waiting.append(admission)
        self._waiting_count += 1
        try:
            await admission
        finally:
            self._waiting_count -= 1
            if not admission.cancel() and not admission.cancelled():  # it was admitted
                self._loop.call_soon(self._admit_next)
            self._changed()

    def _admit_next(self) -> None:
        self._admitting = False
        self._admit()

    def _admit(self) -> None:
        """Admits the first append that waits, if there is room and no other append is being admitted."""
        while self._waiting and not self._admitting and self._size < QUEUE_SIZE:
            admission = self._waiting.popleft()
            if not admission.done():  # otherwise it was cancelled
                self._admitting = True
                admission.set_result(None)

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
            if self._waiting:
                self._admit()
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
        self._admit()
        return taken


def resolve(append: Append, outcome: int | BaseException, offset_at: Callable[[int], int]) -> None:
    """Sets the results of an append, or its error.

    `outcome` is the position of its first line in what was committed, and `offset_at` returns the offset of a position.
    """
    future = append.future
    if future.done():  # cancelled meanwhile: nothing waits for them
        return
    if not isinstance(outcome, int):
        # A copy, since an error that is raised in several tasks would collect all their tracebacks.
        future.set_exception(copy_error(outcome))
    elif append.lines is None:
        data = append.data
        # The hash is that of `line_hash`, without another call.
        future.set_result(AppendResult(offset_at(outcome), offset_at(outcome + len(data)), xxh64_hexdigest(data[:-1])))
    else:
        offsets = list(map(offset_at, accumulate(map(len, append.lines), initial=outcome)))
        hashes = [xxh64_hexdigest(line[:-1]) for line in append.lines]
        future.set_result(list(map(AppendResult, offsets, offsets[1:], hashes)))
