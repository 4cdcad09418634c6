"""Small pieces of asyncio that the other modules share: opening, the hop to a thread, and tasks that finish.

Promise: what a thread has begun is over before its caller goes on, whether that caller is cancelled by asyncio or by
an anyio cancel scope, so that a lock or a descriptor held around the call covers all of it.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, ParamSpec, Protocol, TypeAlias, TypeVar

import anyio

P = ParamSpec("P")
T = TypeVar("T")


class _Closable(Protocol):
    async def aclose(self) -> None: ...


C = TypeVar("C", bound=_Closable)
_Call: TypeAlias = tuple[asyncio.Future[Any], Callable[..., Any], tuple[Any, ...]]


class AsyncOpener(Generic[C]):
    """What an `open` returns: await it for the object, or enter it to have the object closed at the end."""

    def __init__(self, open_: Callable[[], Awaitable[C]]) -> None:
        self._open = open_

    def __await__(self) -> Generator[Any, None, C]:
        return self._open().__await__()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"nothing is open yet, so there is no {name!r}: write `await ...open(...)` or `async with ...open(...) as`"
        )

    async def __aenter__(self) -> C:
        self._opened = await self._open()
        return self._opened

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A cancelled anyio scope would cut the closing short again and again.
        with anyio.CancelScope(shield=True):
            await self._opened.aclose()


class UncancellableTask(asyncio.Task[T]):
    """A task that finishes what it began: cancelling it does nothing.

    `asyncio.run` cancels every task at its end, and so do the shutdown recipes of many programs, while other tasks
    still wait for what this one does. Only for work that ends on its own. It starts in the next turn of the loop, also
    where tasks are eager.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T], name: str) -> None:
        # An empty context, so that it keeps alive nothing of whoever happened to start it.
        super().__init__(coroutine, loop=asyncio.get_running_loop(), name=name, context=Context())

    def cancel(self, msg: Any = None) -> bool:
        """Does nothing."""
        return False


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
    """Begins a call of a blocking function in a thread. Await it with `uninterrupted`.

    Raises `OSError` where no thread can be started; the function is not called then, also not later.
    """
    future: futures.Future[T] = futures.Future()
    try:
        _pool.submit(_call, future, function)
    except RuntimeError as error:
        # The pool queues a call before it starts a thread for it: another of its threads may take it, or have it.
        if future.cancel():
            raise _no_thread(error) from error
    return asyncio.wrap_future(future)


def _call(future: futures.Future[T], function: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def _no_thread(error: RuntimeError) -> OSError:
    return OSError(errno.ENOMEM, f"no thread can be started for file work ({error}): raise the process's limits")


async def uninterrupted(future: asyncio.Future[T]) -> T:
    """The future's result; a cancellation is raised, but only when the future is done."""
    try:
        if isinstance(asyncio.current_task(), UncancellableTask):
            return await future
        try:
            if not future.done():
                await asyncio.wait([future])
        except asyncio.CancelledError:
            # anyio delivers a cancellation in every turn of the loop until its scope is left: the shield stops that.
            with anyio.CancelScope(shield=True):
                while not future.done():
                    try:
                        await asyncio.wait([future])
                    except asyncio.CancelledError:
                        pass  # the first one is raised below
            if not future.cancelled():
                future.exception()
            raise
        return future.result()
    finally:
        # An exception that is raised here holds this frame: with the future in it, which holds the exception, whatever
        # the callers' frames hold would be kept until the garbage collector comes along, in any thread.
        del future


class Thread:
    """One thread that does one call after the other: the shortest way from the loop to the disk and back.

    It keeps nobody alive but for the calls that it has. Raises `OSError` where no thread can be started.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        thread = threading.Thread(target=_make, args=(self._calls, self._loop), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise _no_thread(error) from error

    def call(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Has the call made; the future for its result, to be awaited with `uninterrupted`."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._calls.put((future, function, args))
        return future

    def end(self) -> None:
        """Lets the thread end after the calls that it has."""
        self._calls.put(None)


def _make(calls: SimpleQueue[_Call | None], loop: asyncio.AbstractEventLoop) -> None:
    """What the thread does."""
    while (call := calls.get()) is not None:
        future, function, args = call
        try:
            result, error = function(*args), None
        except BaseException as raised:
            result, error = None, raised
        try:
            loop.call_soon_threadsafe(_settle, future, result, error)
        except RuntimeError:  # the loop was closed meanwhile: nobody waits for the result
            pass
        del call, future, function, args, result, error


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, StopIteration):  # which a future refuses
        future.set_exception(RuntimeError("a call in a thread raised StopIteration"))
    else:
        future.set_exception(error)
