"""Notices what other processes write, for everything that waits on a directory in this process.

On Linux, one thread waits for the kernel's hints about all directories (`inotify`); elsewhere, and if that fails, each
directory has a thread that uses `watchfiles`. Hints may be lost on network mounts and in containers, so the file itself
is also checked regularly: every second, and every `LOOK_INTERVAL` seconds once a hint was missed, until one comes.

Promise: a directory has at most one watcher, and none while nothing waits or while the writer lives in this process.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from .._codec.lines import SLICE_SIZE, Lines, join
from .._errors import CorruptLogError
from .._event import Head
from .._logging import DEBUG, WARNING, log_event
from .._threads import start_thread
from .._waiters import Waiters
from . import inotify
from .heads import HeadLookup
from .paths import Layout
from .segments import LogSegments

LOOK_INTERVAL = inotify.TICK
# By what factor checks are rarer while hints come.
_RARER = 4
# Seconds for which checks may fail (no descriptor left, a mount that does not answer) before the waits fail too.
PATIENCE = 5.0
_STEP = 2  # milliseconds between two checks for hints
USES_INOTIFY = sys.platform == "linux"

# The directories that could not be watched, about which a warning was logged.
_warned: set[Path] = set()


def watch(path: Path, **options: Any) -> Iterator[Any]:
    """`watchfiles.watch`, imported on demand: that takes as long as everything else."""
    from watchfiles import watch

    return watch(path, **options)


class SharedWriter(Protocol):
    """A writer of this process that shares the log with others."""

    announced: Head
    """The end of its own last commit, which it publishes itself."""

    def durable_head(self) -> Head | None:
        """What of everybody's appends is durable; None once it is closed."""


class Directory(Waiters):
    """One data directory, as this process sees it. Get it from `directory`."""

    def __init__(self, path: str) -> None:
        self._layout = layout = Layout(path)
        self.lookup = HeadLookup(layout)
        lookup, this = self.lookup, weakref.ref(self)

        def notify(*news: Any, watcher: FileWatcher) -> None:
            if (directory := this()) is not None:
                directory.notify(*news, watcher=watcher)

        self._shared_writers: tuple[SharedWriter, ...] = ()
        super().__init__(lambda: FileWatcher(layout, lookup.copy(), notify, this))

    def __repr__(self) -> str:
        return f"<Directory {str(self._layout.dir)!r}, {len(self._waiters)} waiting>"

    @property
    def durable_head(self) -> Head | None:
        """The durable head, if a writer in this process publishes it; with shared writers, that of all processes."""
        return self.shared_head() or self._published if self._shared_writers else self._published

    @property
    def published_head(self) -> Head | None:
        """The head that a writer of this process published last; None without a writer."""
        return self._published

    def shared_head(self) -> Head | None:
        """The durable head of all writers, if a writer of this process shares the log with others."""
        heads = [head for writer in self._shared_writers if (head := writer.durable_head()) is not None]
        return max(heads, default=None)

    def is_announced(self, head: Head) -> bool:
        """Whether a writer of this process that shares the log will publish this head next."""
        return any(writer.announced == head for writer in self._shared_writers)

    def add_shared_writer(self, writer: SharedWriter) -> None:
        """Registers a writer of this process that shares the log with others."""
        self._shared_writers = (*self._shared_writers, writer)
        self._watch_beside_writer = True
        self._update_watcher()

    def remove_shared_writer(self, writer: SharedWriter) -> None:
        """Removes that writer."""
        self._shared_writers = tuple(other for other in self._shared_writers if other is not writer)
        self._watch_beside_writer = bool(self._shared_writers)
        self._update_watcher()

    def after_fork(self) -> None:
        """See `Waiters.after_fork`."""
        super().after_fork()
        self._shared_writers, self._watch_beside_writer = (), False


class FileWatcher:
    """Checks a directory whenever something may have happened in it, and reports the head if it has changed."""

    def __init__(
        self,
        layout: Layout,
        lookup: HeadLookup,
        notify: Callable[..., None],
        directory: Callable[[], Directory | None] = lambda: None,
    ) -> None:
        self._layout = layout
        self._directory = directory
        self.dir = layout.dir
        # Shared writers touch the lock file once what they wrote is durable.
        self.names: tuple[bytes, ...] = (os.fsencode(layout.log_path.name), os.fsencode(layout.lock_path.name))
        self.head: Head | None = None
        self._lookup = lookup
        self._notify = notify
        self._stopped = threading.Event()
        self._failing_since: float | None = None
        self._hints_come = True
        self._ticks = 0
        if not USES_INOTIFY:
            self._start_thread()
            return
        try:
            inotify.hub.add(self)
        except OSError as error:
            self.watch_alone(error)

    def stop(self) -> None:
        """Stops watching; a check that is under way may take a few more milliseconds."""
        self._stopped.set()
        if USES_INOTIFY:
            inotify.hub.remove(self)

    def look(self) -> None:
        """Checks the files after a hint."""
        if self._look(hinted=True):
            self._hints_come = True

    def tick(self) -> bool:
        """Checks the files, but only now and then while hints come."""
        self._ticks += 1
        if self._hints_come and self._failing_since is None and self._ticks % _RARER:
            return False
        if self._look_without_hint():
            self._hints_come = False
        return True

    def _look_without_hint(self) -> bool:
        return self._look()

    def unwatchable(self, error: Exception) -> None:
        """Logs a warning, once for each directory."""
        self._hints_come = False
        if self.dir not in _warned:
            _warned.add(self.dir)
            log_event(
                WARNING,
                "watcher.unavailable",
                "%(path)s can't be watched, and is checked every %(seconds)s s instead: %(error)s",
                path=self.dir,
                seconds=LOOK_INTERVAL,
                error=error,
            )

    def watch_alone(self, error: Exception) -> None:
        """Continues without inotify."""
        log_event(
            DEBUG, "watcher.no_inotify", "inotify can't be used for %(path)s: %(error)s", path=self.dir, error=error
        )
        self._start_thread()

    def _start_thread(self) -> None:
        start_thread(threading.Thread(target=self._run, name=f"eventfold watcher {self.dir}", daemon=True))

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._look()
            try:
                if self.dir.is_dir():
                    self._watch()
            except Exception as error:
                self.unwatchable(error)
            self._stopped.wait(LOOK_INTERVAL)

    def _watch(self) -> None:
        """Checks on every hint and regularly, as long as the directory is the same one."""
        directory = os.stat(self.dir)
        for _ in watch(
            self.dir,
            watch_filter=None,
            debounce=2 * _STEP,
            step=_STEP,
            rust_timeout=int(LOOK_INTERVAL * 1000),
            yield_on_timeout=True,
            stop_event=self._stopped,
            recursive=False,
            raise_interrupt=False,
        ):
            self._look()
            try:
                if not os.path.samestat(directory, os.stat(self.dir)):
                    return
            except FileNotFoundError:
                return

    def _look(self, *, hinted: bool = False) -> bool:
        """Reports the head if it has changed since the last check, or the error if it was not found for a while."""
        if self._stopped.is_set():
            return False
        try:
            directory = self._directory()
            if directory is not None and (durable := directory.shared_head()) is not None:
                return self._look_at_shared(directory, durable, hinted)
            change = self._lookup.change()
        except CorruptLogError as error:
            self._notify(error, watcher=self)
            return False
        except OSError as error:
            # Most of these pass: too many open files, say. The waits end only if one lasts.
            now = monotonic()
            self._failing_since = self._failing_since or now
            if now - self._failing_since >= PATIENCE:
                self._notify(error, watcher=self)
            return False
        self._failing_since = None
        if change is None:
            if self.head is None and (head := self._lookup.known_head) is not None:
                # The first check. The lookup knew this head before the watcher started, but the waiters may not.
                self.head = head
                self._notify(head, watcher=self)
            return False
        self.head = change.head
        self._notify(change.head, change.known, change.lines, watcher=self)
        return True

    def _look_at_shared(self, directory: Directory, durable: Head, hinted: bool) -> bool:
        """The same if a writer of this process knows what is durable: what is in the file may not be yet."""
        if durable == self.head:
            return False
        published = directory.published_head
        if published is not None and published >= durable:
            self.head = durable
            return hinted
        if hinted and directory.is_announced(durable):
            # The writer has the lines in memory. If it never publishes them, the next check without a hint does.
            return True
        known, self.head = max((head for head in (self.head, published) if head is not None), default=None), durable
        lines = None
        if known is not None and 0 < durable.offset - known.offset <= SLICE_SIZE:
            with LogSegments(self._layout) as segments:
                lines = _lines_between(segments, known, durable)
        self._notify(durable, known, lines, watcher=self)
        return True


def _lines_between(segments: LogSegments, start: Head, end: Head) -> Lines | None:
    """The lines from one head to another; None if they have changed."""
    try:
        segments.check_line_before(start)
        return join(list(segments.lines(start.offset, end.offset)))
    except (CorruptLogError, ValueError):
        return None


_directories: weakref.WeakValueDictionary[str, Directory] = weakref.WeakValueDictionary()
_directories_lock = threading.Lock()


def directory(path: str | os.PathLike[str]) -> Directory:
    """The one object for a directory in this process, under whatever name. Accesses the file system."""
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


# A forked child has neither the writer nor the watcher of its parent.
os.register_at_fork(after_in_child=_after_fork)
