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
from contextvars import Context
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Generic, ParamSpec, Protocol, TypeAlias, TypeVar

import anyio

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound="asyncio.Future[Any]")


class _Closable(Protocol):
    async def aclose(self) -> None: ...


C = TypeVar("C", bound=_Closable)
_Job: TypeAlias = "tuple[ThreadCall[Any], Callable[..., Any], tuple[Any, ...]]"

# Seconds for which `quick_in_thread` holds the event loop at most: more than a few system calls and the way to a thread
# take, and too short to be felt.
PATIENCE = 0.0001


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


class ThreadCall(asyncio.Future[T]):
    """The outcome of a call in a thread, which only that thread brings about. Await it with `uninterrupted`.

    `asyncio.wait` and `asyncio.shield` would do for that too, but take as long as the way to the thread and back.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._waiter: asyncio.Future[None] | None = None
        # Where the outcome is put as well, and whether it is still to be told to the loop then.
        self.answers: SimpleQueue[tuple[Any, BaseException | None]] | None = None
        self.is_awaited = True

    async def settled(self) -> None:
        """Returns once the outcome is there. Cancelled, it leaves the call as it is."""
        if self._waiter is not None:  # somebody else waits too
            await asyncio.wait([self])
            return
        self._waiter = self.get_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def settle(self, result: Any, error: BaseException | None) -> None:
        """Tells the outcome; to be called in the loop."""
        if self.done():
            return
        if error is None:
            self.set_result(result)
        elif isinstance(error, StopIteration):  # which a future refuses
            self.set_exception(RuntimeError("a call in a thread raised StopIteration"))
        else:
            self.set_exception(error)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _outcome(job: _Job) -> tuple[Any, BaseException | None]:
    """Makes a call, in a thread: its result, or what it raised."""
    _, function, args = job
    try:
        return function(*args), None
    except BaseException as error:
        return None, error


def _tell(call: ThreadCall[Any], result: Any, error: BaseException | None) -> None:
    if call.answers is not None:
        call.answers.put((result, error))
        if not call.is_awaited:
            return
    try:
        call.get_loop().call_soon_threadsafe(call.settle, result, error)
    except RuntimeError:  # the loop was closed meanwhile: nobody waits for the result
        pass


class ThreadPool:
    """Up to `size` threads that make calls, started when they are needed, which live as long as the process.

    The pool of `concurrent.futures` makes futures that threads can wait for, which takes as long as all the rest.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._threads = 0
        self._idle = 0
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[_Job] = SimpleQueue()

    def start(self, job: _Job) -> None:
        """Has a call made. Raises `OSError` where no thread can be started; the call is not made then."""
        with self._lock:
            if self._idle:
                self._idle -= 1
            elif self._threads < self._size:
                name = f"eventfold {self._threads}"
                _start_thread(threading.Thread(target=self._work, name=name, daemon=True))
                self._threads += 1
        self._jobs.put(job)

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            outcome = _outcome(job)
            # Before it is told: whoever waits for it may have the next call, for which this thread will do.
            with self._lock:
                self._idle += 1
            _tell(job[0], *outcome)
            del job, outcome


_pool: ThreadPool


def _new_pool() -> None:
    global _pool
    # A pool of our own: the loop's default one may be full of somebody's slow calls.
    _pool = ThreadPool(8)


_new_pool()
# A forked child inherits the pool but none of its threads.
os.register_at_fork(after_in_child=_new_pool)


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls a blocking function in a thread. When cancelled, waits for the function's end before it raises."""
    return await uninterrupted(start_in_thread(lambda: function(*args, **kwargs)))


def start_in_thread(function: Callable[[], T]) -> ThreadCall[T]:
    """Begins a call of a blocking function in a thread. Await it with `uninterrupted`.

    Raises `OSError` where no thread can be started; the function is not called then, also not later.
    """
    call: ThreadCall[T] = ThreadCall(asyncio.get_running_loop())
    _pool.start((call, function, ()))
    return call


async def quick_in_thread(function: Callable[[], T]) -> T:
    """The same as `in_thread`, for calls that mostly take microseconds: a look at a file, say.

    The way back through the loop takes longer than such a call. So the loop's thread waits for the answer, for up to
    `PATIENCE` seconds: a disk that is slow holds nobody up for longer.
    """
    call: ThreadCall[T] = ThreadCall(asyncio.get_running_loop())
    call.answers, call.is_awaited = SimpleQueue(), False
    _pool.start((call, function, ()))
    try:
        result, error = call.answers.get(timeout=PATIENCE)
    except Empty:
        call.is_awaited = True
        try:
            # It may have been put just before the thread could see that it is awaited.
            result, error = call.answers.get_nowait()
        except Empty:
            return await uninterrupted(call)
    call.settle(result, error)
    return call.result()


def _start_thread(thread: threading.Thread) -> None:
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(
            errno.ENOMEM, f"no thread can be started for file work ({error}): raise the process's limits"
        ) from error


async def uninterrupted(future: asyncio.Future[T]) -> T:
    """The future's result; a cancellation is raised, but only when the future is done."""
    try:
        if isinstance(asyncio.current_task(), UncancellableTask):
            return await future
        try:
            if not future.done():
                await _settled(future)
        except asyncio.CancelledError:
            await outlast(future, _settled)
            raise
        return future.result()
    finally:
        # An exception that is raised here holds this frame: with the future in it, which holds the exception, whatever
        # the callers' frames hold would be kept until the garbage collector comes along, in any thread.
        del future


async def outlast(future: F, wait: Callable[[F], Awaitable[object]]) -> None:
    """Waits until a future is done, by calling `wait` again and again, however often the caller is cancelled meanwhile.

    For a caller that was cancelled already, and raises that afterwards: what the future raised is not reported.
    """
    # anyio delivers a cancellation in every turn of the loop until its scope is left: the shield stops that.
    with anyio.CancelScope(shield=True):
        while not future.done():
            try:
                await wait(future)
            except asyncio.CancelledError:
                pass  # the caller raises the first one
    if not future.cancelled():
        future.exception()


def _settled(future: asyncio.Future[Any]) -> Coroutine[Any, Any, Any]:
    return future.settled() if isinstance(future, ThreadCall) else asyncio.wait([future])


class Thread:
    """One thread that does one call after the other: the shortest way from the loop to the disk and back.

    It keeps nobody alive but for the calls that it has. Raises `OSError` where no thread can be started.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        _start_thread(threading.Thread(target=_make_all, args=(self._jobs,), name=name, daemon=True))

    def call(self, function: Callable[..., T], *args: Any) -> ThreadCall[T]:
        """Has the call made; for its result, await it with `uninterrupted`."""
        call: ThreadCall[T] = ThreadCall(self._loop)
        self._jobs.put((call, function, args))
        return call

    def end(self) -> None:
        """Lets the thread end after the calls that it has."""
        self._jobs.put(None)


def _make_all(jobs: SimpleQueue[_Job | None]) -> None:
    """What the thread does."""
    while (job := jobs.get()) is not None:
        outcome = _outcome(job)
        _tell(job[0], *outcome)
        del job, outcome
