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
from typing import Protocol

from ._codec.lines import SLICE_SIZE, Lines
from ._errors import copy_error
from ._event import Head

# How many waits end in one turn of the loop: their tasks run in the next turn, and other tasks must get to run too.
_ENDED_AT_ONCE = 200


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
        self.waits: set[_Wait] = set()
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
            waits, locks = list(self.waits), list(self._locks)
        _end_everywhere(waits, None)
        for lock in locks:
            lock.release()

    @property
    def waiting(self) -> int:
        """How many waits there are."""
        return len(self.waits)

    def add(self, wait: _Wait) -> None:
        """Registers a wait, which must then check `closed` itself."""
        with self._lock:
            self.waits.add(wait)

    def discard(self, wait: _Wait) -> None:
        with self._lock:
            self.waits.discard(wait)


class _Wait:
    """A wait for a head beyond an offset, in an event loop of any thread."""

    def __init__(self, offset: int, seen: bool) -> None:
        self.offset = offset
        self.seen = seen
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Head | None] = self.loop.create_future()

    def is_news(self, news: Head | Exception) -> bool:
        """Whether this ends the wait."""
        if isinstance(news, Exception):
            return True
        return self.offset < news.offset or (self.seen and self.offset > news.offset)

    def end(self, news: Head | Exception | None) -> None:
        if self.future.done():
            return
        if isinstance(news, Exception):
            self.future.set_exception(copy_error(news))
        else:
            self.future.set_result(news)


def _end_everywhere(waits: Iterable[_Wait], news: Head | Exception | None) -> None:
    """Ends waits in any event loops, from any thread."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Wait]] = {}
    for wait in waits:
        by_loop.setdefault(wait.loop, []).append(wait)
    here = asyncio._get_running_loop()
    for loop, its_waits in by_loop.items():
        if loop is here:
            _end(its_waits, news)
            continue
        try:
            loop.call_soon_threadsafe(_end, its_waits, news)
        except RuntimeError:  # the loop is closed, so nothing is waiting in it
            pass


def _end(waits: list[_Wait], news: Head | Exception | None) -> None:
    """Ends the waits of one loop, in that loop."""
    for wait in waits[:_ENDED_AT_ONCE]:
        wait.end(news)
    if rest := waits[_ENDED_AT_ONCE:]:
        rest[0].loop.call_soon(_end, rest, news)


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
        self._waits: set[_Wait] = set()
        self._interested = 0
        self._watcher: Watcher | None = None
        self._published: Head | None = None
        # The newest lines, if they are few, and the heads before and after them.
        self._newest: tuple[Head, Head, Lines] | None = None

    def __repr__(self) -> str:
        return f"<Waiters, {len(self._waits)} waiting>"

    @property
    def durable_head(self) -> Head | None:
        """The durable head, if a writer in this process publishes it."""
        return self._published

    def _needs_watcher(self) -> bool:
        return self._interested > 0 and (self._published is None or self._watch_beside_writer)

    def after_fork(self) -> None:
        """In a forked child: forgets the writer, the watcher and the waits, which are the parent's."""
        self._lock = threading.Lock()
        self._waits, self._interested = set(), 0
        self._watcher = self._published = self._newest = None

    def newest(self, start: Head, end: Head) -> Lines | None:
        """The lines between two heads, if they are the newest; the hash of the first head may be unknown ("")."""
        if self._newest is None:
            return None
        first, last, lines = self._newest
        same = last == end and first.offset == start.offset and start.line_hash in ("", first.line_hash)
        return lines if same else None

    def publish(self, head: Head | None, lines: Lines | None = None) -> None:
        """Sets the durable head of this process's writer, and its newest lines; None if the writer is gone."""
        known, self._published = self._published, head
        if known is None or head is None:
            # Before notifying: a watcher that checks at this moment must not report what is not durable.
            self._newest = None
            self._update_watcher()
        if head is not None:
            self.notify(head, known, lines)

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
            self._newest = None
            if (
                isinstance(news, Head)
                and known is not None
                and lines is not None
                and 0 < len(lines.data) <= SLICE_SIZE
                # If others append too, there may be something between the known head and these lines.
                and lines.start_offset == known.offset
            ):
                self._newest = known, news, lines
            waits = [wait for wait in self._waits if wait.is_news(news)]
        if waits:
            _end_everywhere(waits, news)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Keeps the watcher running inside the block, so that what others append is noticed."""
        with self._lock:
            self._interested += 1
        self._update_watcher()
        try:
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
                self._watcher = self._newest = None

    async def wait(self, offset: int, scope: Scope, *, seen: bool = False) -> Head | None:
        """Waits for and returns a head beyond `offset` (bytes); None if the scope is closed. Use within `watched`.

        With `seen`, the head once was at `offset`: then a head before it ends the wait too; it may be an older one, or
        mean that somebody cut the log. Raises what kept the watcher from finding the head.
        """
        wait = _Wait(offset, seen)
        with self._lock:
            self._waits.add(wait)
        scope.add(wait)
        try:
            # Whatever was reported before the wait was registered must be checked for.
            watcher = self._watcher
            heads = self.durable_head, None if watcher is None else watcher.head
            head = max((head for head in heads if head is not None), default=None)
            if scope.closed:
                return None
            if head is not None and head.offset > offset:
                return head
            return await wait.future
        finally:
            scope.discard(wait)
            with self._lock:
                self._waits.discard(wait)
