"""Two small pieces of asyncio that the other modules share: opening, and the hop to a thread.

Promise: what `in_thread` has begun is over when it returns or raises, also when its caller is cancelled, so that a
lock held around it covers the file work.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, ParamSpec, Protocol, TypeAlias, TypeVar
from weakref import ref

P = ParamSpec("P")
T = TypeVar("T")


class _Closable(Protocol):
    async def aclose(self) -> None: ...


C = TypeVar("C", bound=_Closable)
_Done: TypeAlias = Callable[[Any, BaseException | None], None]
_Calls: TypeAlias = SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...]] | None]


class AsyncOpener(Generic[C]):
    """What an `open` returns: await it for the object, or enter it to have the object closed at the end."""

    def __init__(self, open_: Callable[[], Awaitable[C]]) -> None:
        self._open = open_

    def __await__(self) -> Generator[Any, None, C]:
        return self._open().__await__()

    async def __aenter__(self) -> C:
        self._opened = await self._open()
        return self._opened

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._opened.aclose()


_pool: ThreadPoolExecutor


def _new_pool() -> None:
    global _pool
    # A pool of our own: the loop's default one may be full of somebody's slow calls.
    _pool = ThreadPoolExecutor(max_workers=8, thread_name_prefix="eventfold")


_new_pool()
# A forked child inherits the pool but none of its threads.
os.register_at_fork(after_in_child=_new_pool)


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls a blocking function in a thread. When cancelled, waits for the function's end before it raises."""
    return await uninterrupted(start_in_thread(lambda: function(*args, **kwargs)))


def start_in_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Begins a call of a blocking function in a thread. Await it with `uninterrupted`."""
    return asyncio.get_running_loop().run_in_executor(_pool, function)


async def uninterrupted(future: asyncio.Future[T]) -> T:
    """The future's result; a cancellation is raised, but only when the future is done."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not future.cancelled():
            future.exception()
        raise cancelled
    return future.result()


class Thread:
    """One thread that does one call after the other: the shortest way from the loop to the disk and back.

    What is to be done with an outcome is kept on the loop's side, so that a call under way keeps nobody alive.
    """

    def __init__(self, name: str) -> None:
        self._calls: _Calls = SimpleQueue()
        self._done: deque[_Done] = deque()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=_make, args=(self._calls, self._loop, ref(self)), name=name, daemon=True).start()

    def call(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """A future for the call's result. Cancelling it does not keep the call from being made."""
        future: asyncio.Future[T] = self._loop.create_future()
        self.begin(partial(_settle, future), function, *args)
        return future

    def begin(self, done: _Done, function: Callable[..., Any], *args: Any) -> None:
        """Has the call made, after which the loop calls `done` with its result and None, or None and its error."""
        self._done.append(done)
        self._calls.put((function, args))

    def end(self) -> None:
        """Lets the thread end after the calls that it has."""
        self._calls.put(None)

    def _finish(self, result: Any, error: BaseException | None) -> None:
        self._done.popleft()(result, error)


def _make(calls: _Calls, loop: asyncio.AbstractEventLoop, thread: ref[Thread]) -> None:
    """What the thread does."""
    while (call := calls.get()) is not None:
        function, args = call
        try:
            result, error = function(*args), None
        except BaseException as raised:
            result, error = None, raised
        try:
            loop.call_soon_threadsafe(_finish, thread, result, error)
        except RuntimeError:  # the loop was closed meanwhile: nobody waits for the result
            pass
        del call, function, args, result, error


def _finish(thread: ref[Thread], result: Any, error: BaseException | None) -> None:
    if (alive := thread()) is not None:
        alive._finish(result, error)


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
