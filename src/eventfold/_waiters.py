"""Wakes the tasks of this process that wait for new events of a log: tails, watches and `wait_for_events`.

A writer in this process publishes its durable head here, which wakes them directly. Without a writer, the engine's
watcher runs as long as a task waits.

Promises: readers in the writer's process see only durable events; a log has at most one watcher, and none while no task
waits.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeAlias

from ._codec.lines import Lines
from ._errors import copy_error
from ._event import Head
from ._recent_lines import RecentLines

# How many waits end in one iteration of the event loop. Their tasks run in the next iteration, and other tasks must get
# their turn as well.
_ENDED_AT_ONCE = 50


class Releasable(Protocol):
    """A lock that is held no longer than a log is open."""

    def release(self) -> None: ...


class Scope:
    """The waits that end together when their log is closed.

    `final_head` is the last durable head of the closed writer. Tails yield all events before it and then end.
    """

    def __init__(self) -> None:
        self.closed = False
        self.final_head: Head | None = None
        self._lock = threading.Lock()
        self._waiters: set[Waiter] = set()
        self._locks: weakref.WeakSet[Releasable] = weakref.WeakSet()

    def release_at_close(self, lock: Releasable) -> None:
        """Releases a lock when the scope is closed, or at once if it is closed already."""
        with self._lock:
            if not self.closed:
                self._locks.add(lock)
                return
        lock.release()

    def close(self, final_head: Head | None = None) -> None:
        """Ends all waits, each in its own event loop. Any thread may call it."""
        with self._lock:
            if not self.closed:
                self.closed, self.final_head = True, final_head
            futures = [future for waiter in self._waiters if (future := waiter.pending()) is not None]
            locks = list(self._locks)
        _end_waits(futures, None)
        for lock in locks:
            lock.release()

    @property
    def pending_waits(self) -> int:
        """The number of waits that have not ended."""
        with self._lock:
            return sum(waiter.pending() is not None for waiter in self._waiters)

    def add(self, waiter: Waiter) -> None:
        """Adds a waiter, which must then check `closed` at the beginning of each wait."""
        with self._lock:
            self._waiters.add(waiter)

    def discard(self, waiter: Waiter) -> None:
        with self._lock:
            self._waiters.discard(waiter)


_Future: TypeAlias = "asyncio.Future[Head | None]"


class Waiter:
    """Waits, one after the other, for a head beyond an offset, in one event loop. Get it from `Waiters.waiter`."""

    def __init__(self, waiters: Waiters, scope: Scope) -> None:
        self._waiters = waiters
        self._scope = scope
        self._loop = asyncio.get_running_loop()
        # The offset of the current wait, whether the head was seen there, and the future that ends the wait. Replaced
        # as a whole, since other threads may be reading it.
        self._current: tuple[int, bool, _Future] | None = None

    def head_beyond(self, offset: int, *, seen: bool = False) -> _Future:
        """Begins a wait for a head beyond `offset` (bytes). Await the result: the head, or None if the scope is closed.

        `seen` says that the head was seen at `offset`. Then a head before `offset` ends the wait too: either it is an
        outdated one, or the log was cut. If the watcher can't find the head, the wait raises its error.
        """
        future: _Future = self._loop.create_future()
        self._current = offset, seen, future
        # What was reported before other threads could see this wait did not end it.
        head = self._waiters.known_head
        if self._scope.closed:
            future.set_result(None)
        elif head is not None and head.offset > offset:
            future.set_result(head)
        return future

    def pending(self) -> _Future | None:
        """The future of the current wait; None if there is no wait. Any thread may call it."""
        current = self._current
        return None if current is None or current[2].done() else current[2]

    def pending_for(self, head: Head) -> _Future | None:
        """The future of the current wait if this head ends the wait, otherwise None."""
        current = self._current
        if current is None:
            return None
        offset, seen, future = current
        is_different = offset < head.offset or (seen and offset > head.offset)
        return future if is_different and not future.done() else None


def _end_waits(futures: Iterable[_Future], result: Head | Exception | None) -> None:
    """Ends waits in any event loops, from any thread."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Future]] = {}
    for future in futures:
        by_loop.setdefault(future.get_loop(), []).append(future)
    running_loop = asyncio._get_running_loop()
    for loop, its_futures in by_loop.items():
        if loop is running_loop:
            _end_in_loop(its_futures, result)
            continue
        try:
            loop.call_soon_threadsafe(_end_in_loop, its_futures, result)
        except RuntimeError:  # the loop is closed, so no task waits in it
            pass


def _end_in_loop(futures: list[_Future], result: Head | Exception | None, start: int = 0) -> None:
    """Ends the waits of the running loop, a limited number in each iteration."""
    end = start + _ENDED_AT_ONCE
    for future in futures[start:end]:
        if future.done():
            continue
        if isinstance(result, Exception):
            future.set_exception(copy_error(result))
        else:
            future.set_result(result)
    if end < len(futures):
        futures[end].get_loop().call_soon(_end_in_loop, futures, result, end)


class Watcher(Protocol):
    """Notices when another process has appended, and calls `Waiters.notify`."""

    @property
    def head(self) -> Head | None:
        """The newest head that it has seen; None before the first check."""

    def stop(self) -> None:
        """Stops watching, within a few milliseconds. Any thread may call it."""


class Waiters:
    """All waiters for new events of one log in this process, and the log's last known head.

    `new_watcher` creates the engine's watcher. With `watch_beside_writer`, it runs even if there is a writer in this
    process: for an engine whose logs other processes append to at the same time.
    """

    def __init__(self, new_watcher: Callable[[], Watcher], *, watch_beside_writer: bool = False) -> None:
        self._new_watcher = new_watcher
        self._watch_beside_writer = watch_beside_writer
        self._lock = threading.Lock()
        self._waiters: set[Waiter] = set()
        self._uses_of_watcher = 0
        self._watcher: Watcher | None = None
        self._published: Head | None = None
        self.recent_lines = RecentLines()

    def __repr__(self) -> str:
        return f"<Waiters, {len(self._waiters)} waiting>"

    @property
    def durable_head(self) -> Head | None:
        """The durable head, if a writer in this process publishes it."""
        return self._published

    @property
    def known_head(self) -> Head | None:
        """The newest head that was reported here or seen by the watcher; None before the first one."""
        watcher, durable = self._watcher, self.durable_head
        seen = None if watcher is None else watcher.head
        return seen if durable is None or (seen is not None and durable < seen) else durable

    def _needs_watcher(self) -> bool:
        return self._uses_of_watcher > 0 and (self._published is None or self._watch_beside_writer)

    def after_fork(self) -> None:
        """In a forked child: forgets the writer, the watcher and the waiters, which are the parent's."""
        self._lock = threading.Lock()
        self._waiters, self._uses_of_watcher = set(), 0
        self._watcher = self._published = None
        self.recent_lines = RecentLines()

    def publish(self, head: Head | None, lines: Lines | None = None) -> None:
        """Sets the durable head of this process's writer, and its newest lines; None if the writer is closed."""
        previous, self._published = self._published, head
        if previous is None or head is None:
            # Before notifying: a watcher that checks at this moment must not report what is not durable.
            self.recent_lines.clear()
            self._update_watcher()
        if head is None:
            return
        if not self._waiters:  # usually; a waiter that is added at this moment looks for the head afterwards
            self.recent_lines.replace(previous, head, lines)
            return
        with self._lock:
            futures = self._keep(previous, head, lines)
        _end_waits(futures, head)

    def notify(
        self,
        result: Head | Exception,
        previous: Head | None = None,
        lines: Lines | None = None,
        *,
        watcher: Watcher | None = None,
    ) -> None:
        """Ends the waits that this head ends; an error in place of the head ends all waits. Any thread may call it.

        `lines` are those from the previously known head to this one. A `watcher` passes itself. If it was stopped
        since, its result is ignored: a writer that was opened in this process may not have synced these lines yet.
        """
        with self._lock:
            if watcher is not None and watcher is not self._watcher:
                return
            if isinstance(result, Exception):
                self.recent_lines.clear()
                futures = [future for waiter in self._waiters if (future := waiter.pending()) is not None]
            else:
                futures = self._keep(previous, result, lines)
        if futures:
            _end_waits(futures, result)

    def _keep(self, previous: Head | None, head: Head, lines: Lines | None) -> list[_Future]:
        """Keeps the lines before a new head; returns the waits that the head ends. The caller holds the lock."""
        if not self._waiters:
            self.recent_lines.replace(previous, head, lines)
            return []
        self.recent_lines.add(previous, head, lines)
        return [future for waiter in self._waiters if (future := waiter.pending_for(head)) is not None]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Keeps the watcher running inside the block, so that the appends of other processes are noticed."""
        with self._lock:
            self._uses_of_watcher += 1
        try:
            self._update_watcher()
            yield
        finally:
            with self._lock:
                self._uses_of_watcher -= 1
            self._update_watcher()

    def _update_watcher(self) -> None:
        with self._lock:
            needed = self._needs_watcher()
            if needed and self._watcher is None:
                self._watcher = self._new_watcher()
            elif not needed and self._watcher is not None:
                self._watcher.stop()
                self._watcher = None
                self.recent_lines.clear()

    @contextmanager
    def waiter(self, scope: Scope) -> Iterator[Waiter]:
        """Adds a waiter in the running loop, whose waits end with the scope. Use it within `watched`."""
        waiter = Waiter(self, scope)
        with self._lock:
            self._waiters.add(waiter)
        scope.add(waiter)
        try:
            yield waiter
        finally:
            scope.discard(waiter)
            with self._lock:
                self._waiters.discard(waiter)
