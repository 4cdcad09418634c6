"""Linux: one thread and one inotify instance for all directories that this process watches.

The thread blocks in the kernel until something happens, so it costs next to nothing meanwhile. It outlives the last
directory by a few seconds, so that successive waits do not start one each.

Promise: no descriptor and no thread is left once `KEEP` seconds have passed without a directory; a forked child has its
own instance.
"""

from __future__ import annotations

import os
import select
import struct
import threading
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from .._threads import start_thread

# Seconds for which the thread stays when nothing waits any more.
KEEP = 5.0
# Seconds between two checks without a hint.
TICK = 0.25


# An event: the watch's number, what happened, a cookie, and the length of the name that follows.
_EVENT = struct.Struct("iIII")
# IN_Q_OVERFLOW; and IN_DELETE_SELF, IN_MOVE_SELF or IN_IGNORED, after which the directory is no longer watched.
_OVERFLOW, _GONE = 0x4000, 0x0400 | 0x0800 | 0x8000
_READ_SIZE = 64 * 1024


class Watched(Protocol):
    """Is notified when something may have happened in a directory. All methods are called in the hub's thread."""

    dir: Path
    names: tuple[bytes, ...]
    """The files in the directory that matter."""

    def look(self) -> None:
        """Called on a hint, and when the directory is newly watched."""

    def tick(self) -> bool:
        """Called every `TICK` seconds; returns whether it was time for a check without a hint."""

    def unwatchable(self, error: Exception) -> None:
        """No hints will come from this directory for now, but ticks do."""

    def watch_alone(self, error: Exception) -> None:
        """inotify is not available: no method will be called any more."""


class Hub:
    """Passes the kernel's hints on to those who watch directories."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = False
        self._wake_fd = -1
        self._inotify: Any = None
        self._changes: list[tuple[bool, Watched]] = []

    def add(self, watched: Watched) -> None:
        """Starts watching a directory, which need not exist. Raises `OSError` if that fails."""
        with self._lock:
            if not self._running:
                self._start()
            self._changes.append((True, watched))
            os.eventfd_write(self._wake_fd, 1)

    def remove(self, watched: Watched) -> None:
        """Stops watching, within a few milliseconds."""
        with self._lock:
            if self._running:
                self._changes.append((False, watched))
                os.eventfd_write(self._wake_fd, 1)

    def _start(self) -> None:
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._running = True
        try:
            start_thread(threading.Thread(target=self._run, name="eventfold watcher", daemon=True))
        except BaseException:
            self._end()
            raise

    def _end(self) -> list[tuple[bool, Watched]]:
        """Closes the wake-up descriptor; returns what was still to be done. Call it with the lock held."""
        changes, self._changes = self._changes, []
        self._running = False
        os.close(self._wake_fd)
        return changes

    def _take(self, *, end: bool) -> list[tuple[bool, Watched]] | None:
        """The pending requests; with `end` and no request, ends the hub and returns None."""
        with self._lock:
            if end and not self._changes:
                self._end()
                return None
            changes, self._changes = self._changes, []
            return changes

    def _run(self) -> None:
        directories: dict[Watched, _Watch] = {}
        try:
            from inotify_simple import INotify  # slow to import, and only available on Linux

            inotify = INotify()
        except (ImportError, OSError) as error:
            with self._lock:
                changes = self._end()
            removed = {watched for add, watched in changes if not add}
            for add, watched in changes:
                if add and watched not in removed:
                    watched.watch_alone(error)
            return
        self._inotify = inotify
        with inotify:
            self._dispatch(inotify, directories)

    def _dispatch(self, inotify: Any, directories: dict[Watched, _Watch]) -> None:
        poller = select.poll()
        poller.register(inotify.fileno(), select.POLLIN)
        poller.register(self._wake_fd, select.POLLIN)
        by_number: dict[int, Watched] = {}
        next_tick = idle_since = monotonic()
        while True:
            if directories:
                idle_since = monotonic()
                patience = next_tick - idle_since
            else:
                patience = idle_since + KEEP - monotonic()
            ready = {fd for fd, _ in poller.poll(max(0, patience) * 1000)}
            changes: list[tuple[bool, Watched]] | None = []
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
                changes = self._take(end=False)
            elif not directories and monotonic() >= idle_since + KEEP:
                changes = self._take(end=True)
            if changes is None:
                return
            for add, watched in changes:
                if add:
                    directories[watched] = watch = _Watch(watched)
                    watch.begin(inotify, by_number)
                    watched.look()
                elif (old := directories.pop(watched, None)) is not None:
                    old.end(inotify, by_number)
            if inotify.fileno() in ready:
                for watched in self._hinted(os.read(inotify.fileno(), _READ_SIZE), inotify, directories, by_number):
                    watched.look()
            if monotonic() >= next_tick:
                for watched, watch in list(directories.items()):
                    if watched.tick():
                        watch.renew(inotify, by_number)
                next_tick = monotonic() + TICK

    def _hinted(
        self, data: bytes, inotify: Any, directories: dict[Watched, _Watch], by_number: dict[int, Watched]
    ) -> set[Watched]:
        """The directories whose files may have changed, by the events that the kernel returned."""
        hinted: set[Watched] = set()
        at = 0
        # Read here and not by `inotify_simple`, which takes as long as the rest of a wake-up.
        while at < len(data):
            number, mask, _, size = _EVENT.unpack_from(data, at)
            at += _EVENT.size
            name = data[at : at + size].rstrip(b"\0")
            at += size
            if mask & _OVERFLOW:
                return set(directories)
            watched = by_number.get(number)
            if watched is None:
                continue
            if mask & _GONE:
                directories[watched].renew(inotify, by_number)
                hinted.add(watched)
            elif name in watched.names:
                hinted.add(watched)
        return hinted


class _Watch:
    """The kernel's watch on one directory: the one that has the name now."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._number: int | None = None
        self._identity: tuple[int, int] | None = None

    def begin(self, inotify: Any, by_number: dict[int, Watched]) -> None:
        from inotify_simple import flags

        mask = flags.MODIFY | flags.CREATE | flags.DELETE | flags.MOVED_TO | flags.MOVED_FROM
        try:
            self._number = inotify.add_watch(
                self._watched.dir, mask | flags.DELETE_SELF | flags.MOVE_SELF | flags.ONLYDIR
            )
            stat = os.stat(self._watched.dir)
        except (FileNotFoundError, NotADirectoryError):
            return  # it may come later
        except OSError as error:
            self._watched.unwatchable(error)
            return
        self._identity = stat.st_dev, stat.st_ino
        by_number[self._number] = self._watched

    def end(self, inotify: Any, by_number: dict[int, Watched]) -> None:
        number, self._number, self._identity = self._number, None, None
        if number is None or by_number.get(number) is not self._watched:
            return  # another watch on the same directory has taken its place
        del by_number[number]
        try:
            inotify.rm_watch(number)
        except OSError:
            pass  # the kernel has removed it with its directory

    def renew(self, inotify: Any, by_number: dict[int, Watched]) -> None:
        """Watches again if there was no directory before, or if another one has taken its place."""
        if self._identity is not None:
            try:
                stat = os.stat(self._watched.dir)
                if self._identity == (stat.st_dev, stat.st_ino):
                    return
            except OSError:
                pass
        self.end(inotify, by_number)
        self.begin(inotify, by_number)


hub = Hub()


def _after_fork() -> None:
    global hub
    # The child's copies of the descriptors: closing them does not affect the parent's watches.
    if hub._running:
        os.close(hub._wake_fd)
        if hub._inotify is not None:
            hub._inotify.close()
    hub = Hub()


os.register_at_fork(after_in_child=_after_fork)
