"""Linux: one thread and one inotify instance for all directories that this process watches.

The thread blocks in the kernel until something happens, so it costs almost nothing meanwhile. It stays for a few
seconds after the last directory was removed, so that successive waits do not each start a thread.

Promise: no descriptor and no thread is left once `IDLE_TIMEOUT` seconds have passed without a directory; a forked child
has its own instance.
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

# Seconds for which the thread stays while no directory is watched.
IDLE_TIMEOUT = 5.0
# Seconds between two calls of `DirectoryListener.on_tick`.
TICK_INTERVAL = 0.25


# An event: the watch descriptor, what happened, a cookie, and the length of the name that follows.
_EVENT = struct.Struct("iIII")
# IN_Q_OVERFLOW; and IN_DELETE_SELF, IN_MOVE_SELF or IN_IGNORED, after which the directory is no longer watched.
_OVERFLOW, _UNWATCHED = 0x4000, 0x0400 | 0x0800 | 0x8000
_READ_SIZE = 64 * 1024


class DirectoryListener(Protocol):
    """Is called when something may have happened in a directory, always in the hub's thread."""

    dir: Path
    names: tuple[bytes, ...]
    """The files in the directory that matter."""

    def on_hint(self) -> None:
        """One of the files may have changed. Also called when watching the directory begins."""

    def on_tick(self) -> bool:
        """`TICK_INTERVAL` seconds have passed; returns whether it has checked the files."""

    def on_unwatchable(self, error: Exception) -> None:
        """No hints will come from this directory for now, but ticks will."""

    def on_unavailable(self, error: Exception) -> None:
        """inotify is not available, so the hub will not call the listener again."""


class Hub:
    """Passes the kernel's hints on to the listeners of the directories."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = False
        self._wake_fd = -1
        self._inotify: Any = None
        self._requests: list[tuple[bool, DirectoryListener]] = []  # whether to add or to remove a listener

    def add(self, listener: DirectoryListener) -> None:
        """Starts watching a directory, which need not exist. Raises `OSError` if that fails."""
        with self._lock:
            if not self._running:
                self._start()
            self._requests.append((True, listener))
            os.eventfd_write(self._wake_fd, 1)

    def remove(self, listener: DirectoryListener) -> None:
        """Stops watching, within a few milliseconds."""
        with self._lock:
            if self._running:
                self._requests.append((False, listener))
                os.eventfd_write(self._wake_fd, 1)

    def _start(self) -> None:
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._running = True
        try:
            start_thread(threading.Thread(target=self._run, name="eventfold watcher", daemon=True))
        except BaseException:
            self._end()
            raise

    def _end(self) -> list[tuple[bool, DirectoryListener]]:
        """Closes the wake-up descriptor; returns the pending requests. Call it with the lock held."""
        requests, self._requests = self._requests, []
        self._running = False
        os.close(self._wake_fd)
        return requests

    def _take_requests(self, *, end_if_none: bool) -> list[tuple[bool, DirectoryListener]] | None:
        """The pending requests; with `end_if_none` and no request, ends the hub and returns None."""
        with self._lock:
            if end_if_none and not self._requests:
                self._end()
                return None
            requests, self._requests = self._requests, []
            return requests

    def _run(self) -> None:
        try:
            from inotify_simple import INotify  # slow to import, and only available on Linux

            inotify = INotify()
        except (ImportError, OSError) as error:
            with self._lock:
                requests = self._end()
            removed = {listener for add, listener in requests if not add}
            for add, listener in requests:
                if add and listener not in removed:
                    listener.on_unavailable(error)
            return
        self._inotify = inotify
        with inotify:
            self._dispatch(inotify)

    def _dispatch(self, inotify: Any) -> None:
        poller = select.poll()
        poller.register(inotify.fileno(), select.POLLIN)
        poller.register(self._wake_fd, select.POLLIN)
        watches: dict[DirectoryListener, _Watch] = {}
        by_descriptor: dict[int, DirectoryListener] = {}
        next_tick = idle_since = monotonic()
        while True:
            if watches:
                idle_since = monotonic()
                timeout = next_tick - idle_since
            else:
                timeout = idle_since + IDLE_TIMEOUT - monotonic()
            ready = {fd for fd, _ in poller.poll(max(0, timeout) * 1000)}
            requests: list[tuple[bool, DirectoryListener]] | None = []
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
                requests = self._take_requests(end_if_none=False)
            elif not watches and monotonic() >= idle_since + IDLE_TIMEOUT:
                requests = self._take_requests(end_if_none=True)
            if requests is None:
                return
            for add, listener in requests:
                if add:
                    watches[listener] = watch = _Watch(listener)
                    watch.begin(inotify, by_descriptor)
                    listener.on_hint()
                elif (removed := watches.pop(listener, None)) is not None:
                    removed.end(inotify, by_descriptor)
            if inotify.fileno() in ready:
                for listener in self._hinted(os.read(inotify.fileno(), _READ_SIZE), inotify, watches, by_descriptor):
                    listener.on_hint()
            if monotonic() >= next_tick:
                for listener, watch in list(watches.items()):
                    if listener.on_tick():
                        watch.renew(inotify, by_descriptor)
                next_tick = monotonic() + TICK_INTERVAL

    def _hinted(
        self,
        data: bytes,
        inotify: Any,
        watches: dict[DirectoryListener, _Watch],
        by_descriptor: dict[int, DirectoryListener],
    ) -> set[DirectoryListener]:
        """The listeners whose files may have changed, according to the events that the kernel returned."""
        hinted: set[DirectoryListener] = set()
        position = 0
        # Parsed here and not by `inotify_simple`, which takes as long as the rest of a wake-up.
        while position < len(data):
            descriptor, mask, _, size = _EVENT.unpack_from(data, position)
            position += _EVENT.size
            name = data[position : position + size].rstrip(b"\0")
            position += size
            if mask & _OVERFLOW:
                return set(watches)
            listener = by_descriptor.get(descriptor)
            if listener is None:
                continue
            if mask & _UNWATCHED:
                watches[listener].renew(inotify, by_descriptor)
                hinted.add(listener)
            elif name in listener.names:
                hinted.add(listener)
        return hinted


class _Watch:
    """The kernel's watch on the directory that a listener's path names at present."""

    def __init__(self, listener: DirectoryListener) -> None:
        self._listener = listener
        self._descriptor: int | None = None
        self._identity: tuple[int, int] | None = None

    def begin(self, inotify: Any, by_descriptor: dict[int, DirectoryListener]) -> None:
        from inotify_simple import flags

        mask = flags.MODIFY | flags.CREATE | flags.DELETE | flags.MOVED_TO | flags.MOVED_FROM
        try:
            self._descriptor = inotify.add_watch(
                self._listener.dir, mask | flags.DELETE_SELF | flags.MOVE_SELF | flags.ONLYDIR
            )
            stat = os.stat(self._listener.dir)
        except (FileNotFoundError, NotADirectoryError):
            return  # it may be created later
        except OSError as error:
            self._listener.on_unwatchable(error)
            return
        self._identity = stat.st_dev, stat.st_ino
        by_descriptor[self._descriptor] = self._listener

    def end(self, inotify: Any, by_descriptor: dict[int, DirectoryListener]) -> None:
        descriptor, self._descriptor, self._identity = self._descriptor, None, None
        if descriptor is None or by_descriptor.get(descriptor) is not self._listener:
            return  # another watch on the same directory has replaced it
        del by_descriptor[descriptor]
        try:
            inotify.rm_watch(descriptor)
        except OSError:
            pass  # the kernel has removed it with its directory

    def renew(self, inotify: Any, by_descriptor: dict[int, DirectoryListener]) -> None:
        """Watches again if there was no directory before, or if the path names a different one now."""
        if self._identity is not None:
            try:
                stat = os.stat(self._listener.dir)
                if self._identity == (stat.st_dev, stat.st_ino):
                    return
            except OSError:
                pass
        self.end(inotify, by_descriptor)
        self.begin(inotify, by_descriptor)


hub = Hub()


def _after_fork() -> None:
    global hub
    # These are the child's copies of the descriptors: closing them does not affect the parent's watches.
    if hub._running:
        os.close(hub._wake_fd)
        if hub._inotify is not None:
            hub._inotify.close()
    hub = Hub()


os.register_at_fork(after_in_child=_after_fork)
