"""Those who wait for news of one log in this process: the durable head of its writer, and one watcher for all waits.

Where the writer lives in this process it publishes its head here and so wakes the waiters itself. Otherwise the
engine's watcher runs while somebody waits.

Promises: readers in the writer's process are told of durable events only; a log has at most one watcher, and none while
nobody waits.
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

# So many waits end in one turn of the loop: those who waited run in the next, and others want to run too.
_ENDED_AT_ONCE = 200


class Releasable(Protocol):
    """Something that is held as long as a log is open."""

    def release(self) -> None: ...


class Scope:
    """The waits that end together, because the log that they belong to is closed.

    `final_head` is the last durable head of the writer that was closed: tails give what stands before it, then end.
    """

    def __init__(self) -> None:
        self.closed = False
        self.final_head: Head | None = None
        self._lock = threading.Lock()
        self.waits: set[_Wait] = set()
        self._locks: weakref.WeakSet[Releasable] = weakref.WeakSet()

    def release_at_close(self, lock: Releasable) -> None:
        """Has a lock released when the scope is closed; at once if it is."""
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
        """How many wait now."""
        return len(self.waits)

    def add(self, wait: _Wait) -> None:
        """Registers a wait, which must then look at `closed` itself."""
        with self._lock:
            self.waits.add(wait)

    def discard(self, wait: _Wait) -> None:
        with self._lock:
            self.waits.discard(wait)


class _Wait:
    """Somebody who waits for a head beyond an offset, in an event loop of any thread."""

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
    """Ends waits of any event loops, from any thread."""
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
        except RuntimeError:  # the loop is closed: nobody waits any more
            pass


def _end(waits: list[_Wait], news: Head | Exception | None) -> None:
    """Ends the waits of one loop, in that loop."""
    for wait in waits[:_ENDED_AT_ONCE]:
        wait.end(news)
    if rest := waits[_ENDED_AT_ONCE:]:
        rest[0].loop.call_soon(_end, rest, news)


class Watcher(Protocol):
    """What notices that others have appended, and calls `Waiters.notify`."""

    @property
    def head(self) -> Head | None:
        """The newest head that it has seen; None before the first look."""

    def stop(self) -> None:
        """Ends the watching; it may go on for some milliseconds. Any thread may call it."""


class Waiters:
    """All that wait for news of one log in this process, and the head that is known of it.

    `new_watcher` makes the engine's watcher, which is there while somebody waits.

    With `watch_beside_writer`, also while a writer lives in this process: on an engine to which others append as well.
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
        """The durable head, where a writer of this process tells it."""
        return self._published

    def _needs_watcher(self) -> bool:
        return self._interested > 0 and (self._published is None or self._watch_beside_writer)

    def after_fork(self) -> None:
        """In a forked child: forgets the writer, the watcher and the waits, which are the parent's."""
        self._lock = threading.Lock()
        self._waits, self._interested = set(), 0
        self._watcher = self._published = self._newest = None

    def newest(self, start: Head, end: Head) -> Lines | None:
        """The lines between two heads, if they are what came in last; the hash of the first may be unknown ("")."""
        if self._newest is None:
            return None
        first, last, lines = self._newest
        same = last == end and first.offset == start.offset and start.line_hash in ("", first.line_hash)
        return lines if same else None

    def publish(self, head: Head | None, lines: Lines | None = None) -> None:
        """The writer of this process says what is durable now, and what it wrote last; None says that it is gone."""
        known, self._published = self._published, head
        if known is None or head is None:
            # Before anybody is told: a watcher that looks just now must not tell what is not durable.
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
        """Ends the waits that this head, or this failure to find it, is news for. Any thread may call it.

        `lines` are those from the head that was `known` before up to this one. A `watcher` names itself: what it saw
        does not count if it was stopped meanwhile, since a writer that has begun here may not have synced that yet.
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
                # Where others append too, something may stand between what was known and these lines.
                and lines.start_offset == known.offset
            ):
                self._newest = known, news, lines
            waits = [wait for wait in self._waits if wait.is_news(news)]
        if waits:
            _end_everywhere(waits, news)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around all that waits: what others append is noticed meanwhile."""
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
        """The head, once it lies beyond `offset` (bytes); None once the scope is closed. Call it inside `watched`.

        With `seen`, the head once was at `offset`: then also one that lies before it, which may be an older one, or
        mean that somebody cut the log. Raises what kept the watcher from finding the head.
        """
        wait = _Wait(offset, seen)
        with self._lock:
            self._waits.add(wait)
        scope.add(wait)
        try:
            # Whatever was told before the wait was known must be asked for.
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
