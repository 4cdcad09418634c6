"""The waiters for news of one log in this process: the writer's durable head, and one watcher for all waits.

A writer in this process publishes its head here, and so wakes the waiters itself. Otherwise the engine's watcher runs
while anything waits.

Promises: readers in the writer's process see only durable events; a log has at most one watcher, and none while nothing
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
from ._news import News

# How many waits end in one turn of the loop: their tasks run in the next turn, and other tasks must get to run too.
_ENDED_AT_ONCE = 50


class Releasable(Protocol):
    """Something that is held while a log is open."""

    def release(self) -> None: ...


class Scope:
    """The waits that end together, because the log that they belong to is closed.

    `final_head` is the last durable head of the closed writer: tails yield what is before it, then end.
    """

    def __init__(self) -> None:
        self.closed = False
        self.final_head: Head | None = None
        self._lock = threading.Lock()
        self._waits: set[Waiting] = set()
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
            futures = [future for wait in self._waits if (future := wait.pending()) is not None]
            locks = list(self._locks)
        _end_everywhere(futures, None)
        for lock in locks:
            lock.release()

    @property
    def waiting(self) -> int:
        """How many waits there are."""
        with self._lock:
            return sum(wait.pending() is not None for wait in self._waits)

    def add(self, wait: Waiting) -> None:
        """Registers waits, each of which must then check `closed` itself."""
        with self._lock:
            self._waits.add(wait)

    def discard(self, wait: Waiting) -> None:
        with self._lock:
            self._waits.discard(wait)


_Future: TypeAlias = "asyncio.Future[Head | None]"


class Waiting:
    """One wait after the other for a head beyond an offset, in one event loop. Get it from `Waiters.waiting`."""

    def __init__(self, waiters: Waiters, scope: Scope) -> None:
        self._waiters = waiters
        self._scope = scope
        self._loop = asyncio.get_running_loop()
        # The offset of the current wait, whether the head once was there, and what ends it. Replaced as a whole, since
        # other threads look at it.
        self._current: tuple[int, bool, _Future] | None = None

    def beyond(self, offset: int, *, seen: bool = False) -> _Future:
        """Await it for a head beyond `offset` (bytes); None if the scope is closed.

        With `seen`, the head once was at `offset`: then a head before it ends the wait too; it may be an older one, or
        mean that somebody cut the log. Raises what kept the watcher from finding the head.
        """
        future: _Future = self._loop.create_future()
        self._current = offset, seen, future
        # Whatever was reported before this wait could be seen must be checked for.
        head = self._waiters.known_head
        if self._scope.closed:
            future.set_result(None)
        elif head is not None and head.offset > offset:
            future.set_result(head)
        return future

    def pending(self) -> _Future | None:
        """What the current wait waits for; None if nothing does. Any thread may call it."""
        current = self._current
        return None if current is None or current[2].done() else current[2]

    def pending_for(self, head: Head) -> _Future | None:
        """The same, if this head ends the wait."""
        current = self._current
        if current is None:
            return None
        offset, seen, future = current
        is_news = offset < head.offset or (seen and offset > head.offset)
        return future if is_news and not future.done() else None


def _end_everywhere(futures: Iterable[_Future], news: Head | Exception | None) -> None:
    """Ends waits in any event loops, from any thread."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Future]] = {}
    for future in futures:
        by_loop.setdefault(future.get_loop(), []).append(future)
    here = asyncio._get_running_loop()
    for loop, its_futures in by_loop.items():
        if loop is here:
            _end(its_futures, news)
            continue
        try:
            loop.call_soon_threadsafe(_end, its_futures, news)
        except RuntimeError:  # the loop is closed, so nothing is waiting in it
            pass


def _end(futures: list[_Future], news: Head | Exception | None, begin: int = 0) -> None:
    """Ends the waits of one loop, in that loop, some in each turn."""
    end = begin + _ENDED_AT_ONCE
    for future in futures[begin:end]:
        if future.done():
            continue
        if isinstance(news, Exception):
            future.set_exception(copy_error(news))
        else:
            future.set_result(news)
    if end < len(futures):
        futures[end].get_loop().call_soon(_end, futures, news, end)


class Watcher(Protocol):
    """Notices that others have appended, and calls `Waiters.notify`."""

    @property
    def head(self) -> Head | None:
        """The newest head that it has seen; None before the first check."""

    def stop(self) -> None:
        """Stops watching, within a few milliseconds. Any thread may call it."""


class Waiters:
    """All waits for news of one log in this process, and the log's last known head.

    `new_watcher` creates the engine's watcher, which runs while anything waits. With `watch_beside_writer`, also while
    a writer lives in this process: on an engine to which others append as well.
    """

    def __init__(self, new_watcher: Callable[[], Watcher], *, watch_beside_writer: bool = False) -> None:
        self._new_watcher = new_watcher
        self._watch_beside_writer = watch_beside_writer
        self._lock = threading.Lock()
        self._waits: set[Waiting] = set()
        self._interested = 0
        self._watcher: Watcher | None = None
        self._published: Head | None = None
        self.news = News()

    def __repr__(self) -> str:
        return f"<Waiters, {len(self._waits)} waiting>"

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
        return self._interested > 0 and (self._published is None or self._watch_beside_writer)

    def after_fork(self) -> None:
        """In a forked child: forgets the writer, the watcher and the waits, which are the parent's."""
        self._lock = threading.Lock()
        self._waits, self._interested = set(), 0
        self._watcher = self._published = None
        self.news = News()

    def publish(self, head: Head | None, lines: Lines | None = None) -> None:
        """Sets the durable head of this process's writer, and its newest lines; None if the writer is gone."""
        known, self._published = self._published, head
        if known is None or head is None:
            # Before notifying: a watcher that checks at this moment must not report what is not durable.
            self.news.clear()
            self._update_watcher()
        if head is not None:
            with self._lock:
                futures = self._add_news(head, known, lines)
            if futures:
                _end_everywhere(futures, head)

    def notify(
        self,
        news: Head | Exception,
        known: Head | None = None,
        lines: Lines | None = None,
        *,
        watcher: Watcher | None = None,
    ) -> None:
        """Ends the waits for which this head, or this failure to find it, is news. Any thread may call it.

        `lines` are those from the previously `known` head up to this one. A `watcher` passes itself: what it saw is
        ignored if it was stopped meanwhile, since a writer that started in this process may not have synced it yet.
        """
        with self._lock:
            if watcher is not None and watcher is not self._watcher:
                return
            if isinstance(news, Exception):
                self.news.clear()
                futures = [future for wait in self._waits if (future := wait.pending()) is not None]
            else:
                futures = self._add_news(news, known, lines)
        if futures:
            _end_everywhere(futures, news)

    def _add_news(self, head: Head, known: Head | None, lines: Lines | None) -> list[_Future]:
        """What waits for this head. Call it with the lock."""
        if not self._waits:
            self.news.replace(known, head, lines)
            return []
        self.news.add(known, head, lines)
        return [future for wait in self._waits if (future := wait.pending_for(head)) is not None]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Keeps the watcher running inside the block, so that what others append is noticed."""
        with self._lock:
            self._interested += 1
        try:
            self._update_watcher()
            yield
        finally:
            with self._lock:
                self._interested -= 1
            self._update_watcher()

    def _update_watcher(self) -> None:
        with self._lock:
            needed = self._needs_watcher()
            if needed and self._watcher is None:
                self._watcher = self._new_watcher()
            elif not needed and self._watcher is not None:
                self._watcher.stop()
                self._watcher = None
                self.news.clear()

    @contextmanager
    def waiting(self, scope: Scope) -> Iterator[Waiting]:
        """For waits in the running loop, which end with the scope. Use it within `watched`."""
        waiting = Waiting(self, scope)
        with self._lock:
            self._waits.add(waiting)
        scope.add(waiting)
        try:
            yield waiting
        finally:
            scope.discard(waiting)
            with self._lock:
                self._waits.discard(waiting)
