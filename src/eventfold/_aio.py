"""The asyncio helpers that the other modules share: opening, and tasks and waits that finish what they began.

Promise: with `uninterrupted`, a caller continues only after what it began has ended, whether the caller is cancelled by
asyncio or by an anyio cancel scope.
"""

from __future__ import annotations

import asyncio
import sys
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context
from time import perf_counter
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import anyio

T = TypeVar("T")


class _Closable(Protocol):
    async def aclose(self) -> None: ...


C = TypeVar("C", bound=_Closable)


class _Endable(Protocol):
    def done(self) -> bool: ...


F = TypeVar("F", bound=_Endable)

_ANYIO_BACKEND = "anyio._backends._asyncio"

# The maximum number of seconds for which work in steps holds the event loop before it lets other tasks run.
HOLD = 0.002

# Seconds after which a task that was cancelled, and has not ended, is cancelled again.
_CANCEL_INTERVAL = 0.1


def _shield() -> AbstractContextManager[object]:
    """Keeps a cancelled anyio scope from interrupting the block again and again.

    There can only be such a scope if anyio's backend has been imported. Otherwise, the import, which would hold the
    event loop for 20 ms, is not necessary.
    """
    return anyio.CancelScope(shield=True) if _ANYIO_BACKEND in sys.modules else nullcontext()


class AsyncOpener(Generic[C]):
    """What an `open` returns: await it for the object, or use it in `async with`, which closes it at the end."""

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
        # A cancelled anyio scope would interrupt the closing repeatedly.
        with _shield():
            await self._opened.aclose()


class UncancellableTask(asyncio.Task[T]):
    """A task that finishes what it began: cancelling it does nothing.

    `asyncio.run` cancels every task at its end, and so do the shutdown recipes of many programs, while other tasks
    still wait for what this one does. Use it only for work that ends on its own. It starts in the next iteration of
    the loop, even if tasks are eager.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T], name: str) -> None:
        # An empty context, so that it keeps nothing alive of the task that happened to start it.
        super().__init__(coroutine, loop=asyncio.get_running_loop(), name=name, context=Context())

    def cancel(self, msg: Any = None) -> bool:
        """Does nothing."""
        return False


@types.coroutine
def next_iteration() -> Generator[None, None, None]:
    """Await it to let all other ready tasks run: `asyncio.sleep(0)` without the checks in `sleep`."""
    yield


class LoopBreaks:
    """Lets other tasks run during long work on the event loop: after each step, await a call of the object."""

    def __init__(self) -> None:
        self._since = perf_counter()

    async def __call__(self) -> None:
        """Lets other tasks run if the work has held the loop for `HOLD` seconds."""
        if perf_counter() - self._since > HOLD:
            await asyncio.sleep(0)
            self._since = perf_counter()


async def uninterrupted(future: asyncio.Future[T]) -> T:
    """The future's result; a cancellation is raised only once the future is done."""
    try:
        try:
            if not future.done():
                await asyncio.wait([future])
        except asyncio.CancelledError:
            await outlast(future, lambda future: asyncio.wait([future]))
            raise
        return future.result()
    finally:
        # An exception that is raised here refers to this frame: with the future in it, which refers to the exception,
        # everything in the callers' frames would be kept until the garbage collector runs, in any thread.
        del future


async def outlast(future: F, wait: Callable[[F], Awaitable[object]]) -> None:
    """Waits until a future is done, by calling `wait` repeatedly, however often the caller is cancelled meanwhile.

    For a caller that was cancelled and raises the cancellation afterwards: the future's own error is not reported.
    """
    # anyio delivers a cancellation in every iteration of the loop until its scope is left: the shield stops that.
    with _shield():
        while not future.done():
            try:
                await wait(future)
            except asyncio.CancelledError:
                pass  # the caller raises the first one
    if isinstance(future, asyncio.Future) and not future.cancelled():
        future.exception()


async def cancel_until_done(task: asyncio.Future[Any]) -> None:
    """Cancels a task until it has ended, however often the caller is cancelled meanwhile.

    For tasks that run code of libraries, which may swallow a cancellation. The task's own error is not reported.
    """
    await outlast(task, _cancel)


async def _cancel(task: asyncio.Future[Any]) -> None:
    task.cancel()
    await asyncio.wait([task], timeout=_CANCEL_INTERVAL)
