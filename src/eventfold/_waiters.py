"""Those who wait for news of one log in this process: the durable head of its writer, and one watcher for all waits.

Where the writer lives in this process it publishes its head here and so wakes the waiters itself. Otherwise the
engine's watcher runs while somebody waits.

Promises: readers in the writer's process are told of durable events only; a log has at most one watcher, and none while
nobody waits.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from ._codec.lines import SLICE_SIZE, Lines
from ._errors import copy_error
from ._event import Head

# So many waits end in one turn of the loop: those who waited run in the next, and others want to run too.
_ENDED_AT_ONCE = 200


class Scope:
    """The waits that end together, because the log that they belong to is closed."""

    def __init__(self) -> None:
        self.closed = False
        self.waits: set[_Wait] = set()

    def close(self) -> None:
        """Ends all waits. Call it in their event loop."""
        self.closed = True
        for wait in self.waits:
            wait.end(None)


class _Wait:
    """Somebody who waits for a head beyond an offset, in an event loop of any thread."""

    def __init__(self, offset: int, seen: bool) -> None:
        self.offset = offset
        self.seen = seen
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Head | None] = self.loop.create_future()

    def end(self, news: Head | Exception | None) -> None:
        if self.future.done():
            return
        if isinstance(news, Exception):
            self.future.set_exception(copy_error(news))
        else:
            self.future.set_result(news)


def _end(waits: list[_Wait], news: Head | Exception) -> None:
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
        self._newest = None
        if head is not None:
            self.notify(head, known, lines)
        if known is None or head is None:
            self._update_watcher()

    def notify(self, news: Head | Exception, known: Head | None = None, lines: Lines | None = None) -> None:
        """Ends the waits that this head, or this failure to find it, is news for. Any thread may call it.

        `lines` are those from the head that was `known` before up to this one.
        """
        self._newest = None
        few = lines is not None and 0 < len(lines.data) <= SLICE_SIZE
        # They begin elsewhere where others have appended in between.
        if few and isinstance(news, Head) and known is not None and lines and known.offset == lines.start_offset:
            self._newest = known, news, lines
        if not self._waits:
            return
        due: dict[asyncio.AbstractEventLoop, list[_Wait]] = {}
        with self._lock:
            for wait in self._waits:
                if (
                    isinstance(news, Exception)
                    or wait.offset < news.offset
                    or (wait.seen and wait.offset > news.offset)
                ):
                    due.setdefault(wait.loop, []).append(wait)
        here = asyncio._get_running_loop()
        for loop, waits in due.items():
            if loop is here:
                _end(waits, news)
                continue
            try:
                loop.call_soon_threadsafe(_end, waits, news)
            except RuntimeError:  # the loop is closed: nobody waits any more
                pass

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
        scope.waits.add(wait)
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
            scope.waits.discard(wait)
            with self._lock:
                self._waits.discard(wait)
