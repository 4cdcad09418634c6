"""Notices what other processes write, for everything in this process that waits for changes of a directory.

On Linux, one thread waits for the kernel's hints about all directories (`inotify`). Elsewhere, and if inotify is not
available, each directory has a thread that uses `watchfiles`. Hints may be lost on network mounts and in containers, so
the files are also checked regularly: every second, or every `CHECK_INTERVAL` seconds after such a check has found a
change without a hint, until a hint comes.

Promise: a directory has at most one watcher, and none while nothing waits or while its writer lives in this process.
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

from .._codec.lines import SLICE_SIZE
from .._errors import CorruptLogError
from .._event import Head
from .._logging import DEBUG, WARNING, log_event
from .._threads import start_thread
from .._waiters import Waiters
from . import inotify
from .head_cache import HeadCache, lines_between
from .paths import Layout
from .segments import LogSegments

CHECK_INTERVAL = inotify.TICK_INTERVAL
# While hints come, the files are checked only once in this number of ticks.
_TICKS_PER_CHECK = 4
# Seconds for which checks may fail (no descriptor left, a mount that does not answer) before the waits fail too.
FAILURE_TIMEOUT = 5.0
_STEP = 2  # milliseconds between two polls of `watchfiles`
USES_INOTIFY = sys.platform == "linux"

# The directories that could not be watched, and for which a warning has been logged.
_warned: set[Path] = set()


def watch(path: Path, **options: Any) -> Iterator[Any]:
    """`watchfiles.watch`, imported on demand: the import takes as long as that of all of eventfold."""
    from watchfiles import watch

    return watch(path, **options)


class SharedWriter(Protocol):
    """A writer of this process that shares the log with others."""

    committed_head: Head
    """The head after its own last commit, which it publishes itself."""

    def durable_head(self) -> Head | None:
        """The end of what all writers have made durable; None once it is closed."""


class Directory(Waiters):
    """One data directory, as this process sees it. Get it from `directory_at`."""

    def __init__(self, path: str) -> None:
        self._layout = layout = Layout(path)
        self.head_cache = HeadCache(layout)
        head_cache, this = self.head_cache, weakref.ref(self)

        def notify(*news: Any, watcher: FileWatcher) -> None:
            if (directory := this()) is not None:
                directory.notify(*news, watcher=watcher)

        self._shared_writers: tuple[SharedWriter, ...] = ()
        super().__init__(lambda: FileWatcher(layout, head_cache.copy(), notify, this))

    def __repr__(self) -> str:
        return f"<Directory {str(self._layout.dir)!r}, {len(self._waiters)} waiting>"

    @property
    def durable_head(self) -> Head | None:
        """The durable head, if a writer in this process knows it; with shared writers, that of all processes."""
        return self.shared_head() or self._published if self._shared_writers else self._published

    @property
    def published_head(self) -> Head | None:
        """The head that a writer of this process published last; None without a writer."""
        return self._published

    def shared_head(self) -> Head | None:
        """The durable head of all writers, if a writer of this process shares the log with others."""
        heads = [head for writer in self._shared_writers if (head := writer.durable_head()) is not None]
        return max(heads, default=None)

    def will_be_published(self, head: Head) -> bool:
        """Whether a writer of this process that shares the log is about to publish this head."""
        return any(writer.committed_head == head for writer in self._shared_writers)

    def add_shared_writer(self, writer: SharedWriter) -> None:
        """Registers a writer of this process that shares the log with others."""
        self._shared_writers = (*self._shared_writers, writer)
        self._watch_beside_writer = True
        self._update_watcher()

    def remove_shared_writer(self, writer: SharedWriter) -> None:
        """Removes a registered writer."""
        self._shared_writers = tuple(other for other in self._shared_writers if other is not writer)
        self._watch_beside_writer = bool(self._shared_writers)
        self._update_watcher()

    def after_fork(self) -> None:
        """See `Waiters.after_fork`."""
        super().after_fork()
        self._shared_writers, self._watch_beside_writer = (), False


class FileWatcher:
    """Checks a directory's files whenever they may have changed, and reports the head if it is a new one."""

    def __init__(
        self,
        layout: Layout,
        head_cache: HeadCache,
        notify: Callable[..., None],
        directory: Callable[[], Directory | None] = lambda: None,
    ) -> None:
        self._layout = layout
        self._directory = directory
        self.dir = layout.dir
        # Shared writers write to the lock file once their commit is durable.
        self.names: tuple[bytes, ...] = (os.fsencode(layout.log_path.name), os.fsencode(layout.lock_path.name))
        self.head: Head | None = None
        self._head_cache = head_cache
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
            self.on_unavailable(error)

    def stop(self) -> None:
        """Stops watching; a check that is under way may take a few more milliseconds."""
        self._stopped.set()
        if USES_INOTIFY:
            inotify.hub.remove(self)

    def on_hint(self) -> None:
        """Checks the files."""
        if self._check(hinted=True):
            self._hints_come = True

    def on_tick(self) -> bool:
        """Checks the files; while hints come, only at one tick in several."""
        self._ticks += 1
        if self._hints_come and self._failing_since is None and self._ticks % _TICKS_PER_CHECK:
            return False
        if self._check_without_hint():
            self._hints_come = False
        return True

    def _check_without_hint(self) -> bool:
        return self._check()

    def on_unwatchable(self, error: Exception) -> None:
        """Logs a warning, once for each directory."""
        self._hints_come = False
        if self.dir not in _warned:
            _warned.add(self.dir)
            log_event(
                WARNING,
                "watcher.unavailable",
                "%(path)s can't be watched, and is checked every %(seconds)s s instead: %(error)s",
                path=self.dir,
                seconds=CHECK_INTERVAL,
                error=error,
            )

    def on_unavailable(self, error: Exception) -> None:
        """Continues without inotify."""
        log_event(
            DEBUG, "watcher.no_inotify", "inotify can't be used for %(path)s: %(error)s", path=self.dir, error=error
        )
        self._start_thread()

    def _start_thread(self) -> None:
        start_thread(threading.Thread(target=self._run, name=f"eventfold watcher {self.dir}", daemon=True))

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._check()
            try:
                if self.dir.is_dir():
                    self._watch()
            except Exception as error:
                self.on_unwatchable(error)
            self._stopped.wait(CHECK_INTERVAL)

    def _watch(self) -> None:
        """Checks the files on every hint and regularly, as long as the path names the same directory."""
        directory = os.stat(self.dir)
        for _ in watch(
            self.dir,
            watch_filter=None,
            debounce=2 * _STEP,
            step=_STEP,
            rust_timeout=int(CHECK_INTERVAL * 1000),
            yield_on_timeout=True,
            stop_event=self._stopped,
            recursive=False,
            raise_interrupt=False,
        ):
            self._check()
            try:
                if not os.path.samestat(directory, os.stat(self.dir)):
                    return
            except FileNotFoundError:
                return

    def _check(self, *, hinted: bool = False) -> bool:
        """Reports the head if it has changed, or an error that lasts; returns whether there was a change to report."""
        if self._stopped.is_set():
            return False
        try:
            directory = self._directory()
            if directory is not None and (durable := directory.shared_head()) is not None:
                return self._check_shared(directory, durable, hinted)
            change = self._head_cache.poll()
        except CorruptLogError as error:
            self._notify(error, watcher=self)
            return False
        except OSError as error:
            # Most errors are temporary, such as too many open files. Only one that lasts ends the waits.
            now = monotonic()
            self._failing_since = self._failing_since or now
            if now - self._failing_since >= FAILURE_TIMEOUT:
                self._notify(error, watcher=self)
            return False
        self._failing_since = None
        if change is None:
            if self.head is None and (head := self._head_cache.cached_head) is not None:
                # The first check. The cache had this head before the watcher started, but the waiters may not know it.
                self.head = head
                self._notify(head, watcher=self)
            return False
        self.head = change.head
        self._notify(change.head, change.previous, change.lines, watcher=self)
        return True

    def _check_shared(self, directory: Directory, durable: Head, hinted: bool) -> bool:
        """Like `_check`, beside a shared writer of this process: the file may contain more than what is durable."""
        if durable == self.head:
            return False
        published = directory.published_head
        if published is not None and published >= durable:
            self.head = durable
            return hinted
        if hinted and directory.will_be_published(durable):
            # The writer has the lines in memory. If it does not publish them, the next check without a hint does.
            return True
        previous = max((head for head in (self.head, published) if head is not None), default=None)
        self.head = durable
        lines = None
        if previous is not None and 0 < durable.offset - previous.offset <= SLICE_SIZE:
            with LogSegments(self._layout) as segments:
                lines = lines_between(segments, previous, durable)
        self._notify(durable, previous, lines, watcher=self)
        return True


_directories: weakref.WeakValueDictionary[str, Directory] = weakref.WeakValueDictionary()
_directories_lock = threading.Lock()


def directory_at(path: str | os.PathLike[str]) -> Directory:
    """The one object of this process for a directory, whatever path names it. Accesses the file system."""
    real_path = os.path.realpath(path)
    with _directories_lock:
        found = _directories.get(real_path)
        if found is None:
            found = _directories[real_path] = Directory(real_path)
        return found


def _after_fork() -> None:
    global _directories_lock
    _directories_lock = threading.Lock()
    for directory in list(_directories.values()):
        directory.after_fork()


# A forked child has neither its parent's writer nor its parent's watcher.
os.register_at_fork(after_in_child=_after_fork)
