"""Notices what other processes write: one watcher for all that wait on a directory in this process.

File-system events are only hints: what counts is the file, which is looked at every `LOOK_INTERVAL` seconds as well,
since events get lost on network mounts and in containers.

Promise: a directory has at most one watcher, and none while nobody waits or while the writer lives in this process.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .._codec.lines import SLICE_SIZE, Lines, join
from .._errors import CorruptLogError
from .._event import Head
from .._waiters import Waiters
from .paths import Layout
from .segments import LogSegments

logger = logging.getLogger("eventfold")

LOOK_INTERVAL = 0.25
_STEP = 2  # milliseconds between two looks at the hints that came in


def watch(path: Path, **options: Any) -> Iterator[Any]:
    """`watchfiles.watch`, imported only by who watches: it takes as long as all the rest."""
    from watchfiles import watch

    return watch(path, **options)


class Directory(Waiters):
    """One data directory, as this process sees it. Get it from `directory`."""

    def __init__(self, path: str) -> None:
        self._layout = layout = Layout(path)
        this = weakref.ref(self)

        def notify(*news: Any) -> None:
            if (directory := this()) is not None:
                directory.notify(*news)

        def shared_head() -> Head | None:
            return None if (directory := this()) is None else directory._shared_head()

        self._shared_heads: tuple[Callable[[], Head | None], ...] = ()
        super().__init__(lambda: _Watcher(layout, notify, shared_head))

    def __repr__(self) -> str:
        return f"<Directory {str(self._layout.dir)!r}, {len(self._waits)} waiting>"

    @property
    def durable_head(self) -> Head | None:
        """The durable head, where a writer of this process tells it: with shared writers, that of all processes."""
        return self._shared_head() or self._published

    def _shared_head(self) -> Head | None:
        heads = [head for tell in self._shared_heads if (head := tell()) is not None]
        return max(heads, default=None)

    def add_shared_head(self, tell: Callable[[], Head | None]) -> None:
        """A writer of this process shares the log with others, and `tell` says what of all of theirs is durable."""
        self._shared_heads = (*self._shared_heads, tell)
        self._watch_beside_writer = True
        self._update_watcher()

    def remove_shared_head(self, tell: Callable[[], Head | None]) -> None:
        """That writer is gone."""
        self._shared_heads = tuple(other for other in self._shared_heads if other != tell)
        self._watch_beside_writer = bool(self._shared_heads)
        self._update_watcher()

    def after_fork(self) -> None:
        """See `Waiters.after_fork`."""
        super().after_fork()
        self._shared_heads, self._watch_beside_writer = (), False


class _Watcher:
    """A thread that looks at a directory whenever something may have happened in it."""

    def __init__(
        self, layout: Layout, notify: Callable[..., None], shared_head: Callable[[], Head | None] = lambda: None
    ) -> None:
        self._layout = layout
        self._notify = notify
        self._shared_head = shared_head
        self._stop = threading.Event()
        self._seen: tuple[int, int, int] | None = None
        self.head: Head | None = None
        threading.Thread(target=self._run, name=f"eventfold watcher {layout.dir}", daemon=True).start()

    def stop(self) -> None:
        """Lets the thread end, which takes it some milliseconds."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._look()
            try:
                if self._layout.dir.is_dir():
                    self._watch()
            except Exception as error:
                logger.warning("%s can't be watched, and is looked at now and then: %s", self._layout.dir, error)
            self._stop.wait(LOOK_INTERVAL)

    def _watch(self) -> None:
        """Looks on every hint and now and then, as long as the directory is the one that it was."""
        directory = os.stat(self._layout.dir)
        for _ in watch(
            self._layout.dir,
            watch_filter=None,
            debounce=2 * _STEP,
            step=_STEP,
            rust_timeout=int(LOOK_INTERVAL * 1000),
            yield_on_timeout=True,
            stop_event=self._stop,
            recursive=False,
            raise_interrupt=False,
        ):
            self._look()
            try:
                if not os.path.samestat(directory, os.stat(self._layout.dir)):
                    return
            except FileNotFoundError:
                return

    def _look(self) -> None:
        """Tells the head if the active log is another one, or of another size, than at the last look."""
        try:
            if (durable := self._shared_head()) is not None:
                self._look_at_shared(durable)
                return
            try:
                stat = os.stat(self._layout.log_path)
            except FileNotFoundError:
                self._seen = None
                return
            seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if seen != self._seen:
                with LogSegments(self._layout) as parts:
                    known, self.head = self.head, parts.head()
                    # Read once for all who wait for it.
                    lines = None if known is None else _recent_lines(parts, known, self.head)
                self._seen = seen
                self._notify(self.head, known, lines)
        except (OSError, CorruptLogError) as error:
            self._notify(error)

    def _look_at_shared(self, durable: Head) -> None:
        """The same where a writer of this process knows what is durable: what is in the file may not be yet."""
        if durable != self.head:
            known, self.head = self.head, durable
            lines = None
            if known is not None and 0 < durable.offset - known.offset <= SLICE_SIZE:
                with LogSegments(self._layout) as parts:
                    lines = _recent_lines(parts, known, durable)
            self._notify(durable, known, lines)


def _recent_lines(parts: LogSegments, start: Head, end: Head) -> Lines | None:
    """The lines from one head to another; None where they are many, or not those that stood there."""
    if not 0 < end.offset - start.offset <= SLICE_SIZE:
        return None
    try:
        parts.check_line_before(start)
        return join(list(parts.lines(start.offset, end.offset)))
    except (CorruptLogError, ValueError):
        return None


_directories: weakref.WeakValueDictionary[str, Directory] = weakref.WeakValueDictionary()
_directories_lock = threading.Lock()


def directory(path: str | os.PathLike[str]) -> Directory:
    """The one object that stands for a directory in this process, whatever it is called. Looks at the file system."""
    real = os.path.realpath(path)
    with _directories_lock:
        found = _directories.get(real)
        if found is None:
            found = _directories[real] = Directory(real)
        return found


def _after_fork() -> None:
    global _directories_lock
    _directories_lock = threading.Lock()
    for found in list(_directories.values()):
        found.after_fork()


# A forked child has neither the writer nor the watcher that its parent had.
os.register_at_fork(after_in_child=_after_fork)
