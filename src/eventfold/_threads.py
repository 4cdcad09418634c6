"""Calls of blocking functions in threads: in a pool, or in a dedicated thread that makes one call after another.

Promise: a caller continues only after its call in a thread has ended, whether the caller is cancelled by asyncio or by
an anyio cancel scope, so that a lock or a descriptor held around the call covers all of it.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Generator
from contextlib import suppress
from contextvars import Context
from queue import Empty, SimpleQueue
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar

from ._aio import outlast

P = ParamSpec("P")
T = TypeVar("T")
_Job: TypeAlias = "tuple[ThreadCall[Any], Callable[..., Any], tuple[Any, ...]]"
_Jobs: TypeAlias = "SimpleQueue[_Job | None]"

# The maximum number of seconds for which `quick_in_thread` holds the event loop. Usually, this is enough for a few
# system calls in a thread, and no user notices it.
PATIENCE = 0.0001


class ThreadCall(Generic[T]):
    """The outcome of a call in a thread. Await it for the result; a cancellation is raised once the call has ended.

    A future would take one more iteration of the event loop: it gets its result in one iteration, and its waiters run
    in the next. Here, the thread makes the loop run the waiters directly.

    `postponed` is a queue and the job that is put into it once the call is awaited.
    """

    __slots__ = ("_outcomes", "_postponed", "_waiters", "loop")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        postponed: tuple[_Jobs, Callable[..., Any], tuple[Any, ...]] | None = None,
    ) -> None:
        self.loop = loop
        self._postponed = postponed
        # Lists, since appending to them and removing from them is atomic: two threads need no lock.
        self._outcomes: list[tuple[Any, BaseException | None]] = []  # the first one counts
        self._waiters: list[_Waiter] = []

    def done(self) -> bool:
        """Whether the call has ended."""
        return bool(self._outcomes)

    def settle(self, result: Any, error: BaseException | None) -> None:
        """Sets the outcome, from any thread. Does nothing if it is set already."""
        self._outcomes.append((result, error))
        while self._waiters:
            try:
                waiter = self._waiters.pop()
            except IndexError:  # its task was cancelled since the check
                return
            try:
                self.loop.call_soon_threadsafe(waiter.wakeup, waiter, context=waiter.context)
            except RuntimeError:  # the loop was closed meanwhile, so nothing waits for the result
                return

    def result(self) -> T:
        """What the call returned, once it is done; raises what the call raised."""
        result: T
        result, error = self._outcomes[0]
        if error is None:
            return result
        try:
            raise error
        finally:
            # The error refers to this frame: with the call in it, which refers to the error, both would be a reference
            # cycle.
            del self, error

    def __await__(self) -> Generator[Any, None, T]:
        try:
            try:
                if not self._outcomes:
                    yield _Waiter(self)
            except asyncio.CancelledError:
                yield from outlast(self, ThreadCall.settled).__await__()
                raise
            return self.result()
        finally:
            del self  # as in `result`

    def settled(self) -> _Waiter:
        """Await it until the call has ended, whatever the outcome. A cancellation is raised at once."""
        return _Waiter(self)

    async def interruptible(self) -> T:
        """The result of a call that changes nothing; a cancellation is raised at once, and the call continues."""
        if not self._outcomes:
            await self.settled()
        return self.result()

    def remove_waiter(self, waiter: _Waiter) -> bool:
        """Removes a waiter; returns whether it had not been run yet."""
        try:
            self._waiters.remove(waiter)
        except ValueError:
            return False
        return True


class _Waiter:
    """What a task awaits while it waits for a call in a thread: as much of a future as `asyncio.Task` requires.

    asyncio recognises such objects by `_asyncio_future_blocking`; see `asyncio.isfuture`.
    """

    __slots__ = ("_asyncio_future_blocking", "_call", "_cancelled", "context", "wakeup")
    wakeup: Callable[[_Waiter], object]
    context: Context | None

    def __init__(self, call: ThreadCall[Any]) -> None:
        self._asyncio_future_blocking = True
        self._call = call
        self._cancelled: tuple[Any, ...] | None = None

    def __iter__(self) -> Generator[Any, None, None]:
        yield self

    __await__ = __iter__

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._call.loop

    def add_done_callback(self, wakeup: Callable[[_Waiter], object], *, context: Context | None = None) -> None:
        """Makes the loop call `wakeup` once the call has ended. Starts the call if it was postponed."""
        self.wakeup, self.context = wakeup, context
        call = self._call
        call._waiters.append(self)
        if call._postponed is not None:
            jobs, function, args = call._postponed
            call._postponed = None
            jobs.put((call, function, args))
        if call._outcomes and call.remove_waiter(self):
            call.loop.call_soon(wakeup, self, context=context)

    def cancel(self, msg: Any = None) -> bool:
        """Makes the task continue with a `CancelledError`, and leaves the call alone."""
        if not self._call.remove_waiter(self):
            return False  # the task is about to continue: it raises the cancellation then
        self._cancelled = () if msg is None else (msg,)
        self._call.loop.call_soon(self.wakeup, self, context=self.context)
        return True

    def result(self) -> None:
        if self._cancelled is not None:
            raise asyncio.CancelledError(*self._cancelled)


def _outcome(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, BaseException | None]:
    try:
        return function(*args), None
    except BaseException as error:
        return None, error


class ThreadPool:
    """Up to `size` threads that make calls, started on demand, which live as long as the process.

    The pool of `concurrent.futures` creates futures that threads can wait for, which takes as long as everything else.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._threads = 0
        self._idle = 0
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[_Job] = SimpleQueue()

    def start(self, job: _Job) -> None:
        """Makes a call in a thread. Raises `OSError` if no thread can be started; the call is not made then."""
        with self._lock:
            if self._idle:
                self._idle -= 1
            elif self._threads < self._size:
                name = f"eventfold {self._threads}"
                start_thread(threading.Thread(target=self._work, name=name, daemon=True))
                self._threads += 1
        self._jobs.put(job)

    def _work(self) -> None:
        while True:
            call, function, args = self._jobs.get()
            outcome = _outcome(function, args)
            # Idle before the outcome is set, since the waiter may then make another call, which this thread can make.
            with self._lock:
                self._idle += 1
            call.settle(*outcome)
            del call, function, args, outcome


_pool: ThreadPool


def _new_pool() -> None:
    global _pool
    # A separate pool, since the application's slow calls may occupy all threads of the loop's default one.
    _pool = ThreadPool(8)


_new_pool()
# A forked child inherits the pool but none of its threads.
os.register_at_fork(after_in_child=_new_pool)


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls a blocking function in a thread. If cancelled, waits for the function to end before it raises."""
    return await start_in_thread(lambda: function(*args, **kwargs))


def start_in_thread(function: Callable[[], T]) -> ThreadCall[T]:
    """Starts a call of a blocking function in a thread. Await it for the result.

    Raises `OSError` if no thread can be started; then the function is not called, not even later.
    """
    call: ThreadCall[T] = ThreadCall(asyncio.get_running_loop())
    _pool.start((call, function, ()))
    return call


async def quick_in_thread(function: Callable[[], T]) -> T:
    """Does what `in_thread` does, for calls that mostly take microseconds, such as a check of a file.

    The way back through the loop takes longer than such a call. So the loop's thread waits for the answer, for up to
    `PATIENCE` seconds. Even a slow disk does not block the loop for longer.
    """
    ended: SimpleQueue[None] = SimpleQueue()

    def call() -> T:
        try:
            return function()
        finally:
            ended.put(None)

    started = start_in_thread(call)
    try:
        with suppress(Empty):
            ended.get(timeout=PATIENCE)
        return await started
    finally:
        del started  # as in `ThreadCall.result`


def start_thread(thread: threading.Thread) -> None:
    """Starts a thread. Raises `OSError` if that is not possible."""
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(
            errno.ENOMEM, f"no thread can be started for file work ({error}): raise the process's limits"
        ) from error


class Thread:
    """A thread that makes one call after another: the shortest way from the loop to the disk and back.

    It keeps nothing alive except its calls. Raises `OSError` if no thread can be started.
    """

    def __init__(self, name: str) -> None:
        self._jobs: _Jobs = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        start_thread(threading.Thread(target=_make_all, args=(self._jobs,), name=name, daemon=True))

    def call(self, function: Callable[..., T], *args: Any) -> ThreadCall[T]:
        """Makes a call in the thread; await it for the result."""
        call: ThreadCall[T] = ThreadCall(self._loop)
        self._jobs.put((call, function, args))
        return call

    def call_when_awaited(self, function: Callable[..., T], *args: Any) -> ThreadCall[T]:
        """Makes a call in the thread, like `call`, but the thread gets it only once it is awaited.

        At that moment, the waiting task is about to release the interpreter's lock. If the thread were woken earlier,
        it would have to wait for the lock, and be woken again.
        """
        return ThreadCall(self._loop, (self._jobs, function, args))

    def end(self) -> None:
        """Ends the thread after the calls that are queued."""
        self._jobs.put(None)


def _make_all(jobs: _Jobs) -> None:
    """The thread's main function."""
    while (job := jobs.get()) is not None:
        call, function, args = job
        call.settle(*_outcome(function, args))
        del job, call, function, args
