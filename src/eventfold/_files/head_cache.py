"""Finds the head of a directory's files, and reads the files again only after they have changed.

Promise: a cached head is returned only if, according to `stat`, the active log and the archive are still the files in
which it was found, and if their last change was so long before that a later one would be visible.
"""

from __future__ import annotations

import os
from pathlib import Path
from time import time_ns
from typing import NamedTuple, TypeAlias

from .._codec.decode import may_be_in_batch
from .._codec.lines import SLICE_SIZE, Lines, join, last_line_hash
from .._errors import CorruptLogError
from .._event import Head, line_hash
from .line_scan import complete_size, line_before
from .paths import Layout
from .segments import LogSegments

# Nanoseconds: more than the resolution of any file system's clock. Two changes within it leave the same times.
_CLOCK_RESOLUTION = 50_000_000

# How many bytes before the cached head are read again, to compare its line: more than most lines have.
_LOOK_BACK = 1024

_Stat: TypeAlias = tuple[int, int, int, int, int] | None


class _CachedHead(NamedTuple):
    """The head that was found in files with these `stat` results, and the offset of the active log's first byte.

    `settled` says whether any later change would be visible in the results.
    """

    log: _Stat
    archive: _Stat
    base: int
    head: Head
    settled: bool


class Change(NamedTuple):
    """A new head, the previous one if it is known, and the lines between them if there are only a few."""

    head: Head
    previous: Head | None
    lines: Lines | None


def _stat(path: Path) -> _Stat:
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


class HeadCache:
    """The head of one directory, as it was last found. The methods block."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._cached: _CachedHead | None = None

    def copy(self) -> HeadCache:
        """An independent cache with the same content."""
        other = HeadCache(self._layout)
        other._cached = self._cached
        return other

    @property
    def cached_head(self) -> Head | None:
        """The head that was found last; None if none was. Does not read the files."""
        return None if self._cached is None else self._cached.head

    def head(self) -> Head:
        """The current head. Raises `OSError` and `CorruptLogError`."""
        log, archive = self._stats()
        cached = self._cached
        if cached is not None and cached.settled and cached.log == log and cached.archive == archive:
            return cached.head
        with LogSegments(self._layout) as segments:
            head = segments.head()
            self._store(log, archive, segments.base, head)
        return head

    def poll(self) -> Change | None:
        """The head if the files have changed since the last call; None if not, or if there is no active log."""
        log, archive = self._stats()
        cached = self._cached
        if log is None:
            self._cached = None
            return None
        if cached is not None and cached.log == log and cached.archive == archive:
            return None
        if cached is not None and cached.archive == archive:
            change = self._appended(cached, log)
            if change is not None:
                self._cached = _CachedHead(log, archive, cached.base, change.head, False)
                return change
        with LogSegments(self._layout) as segments:
            head = segments.head()
            previous = None if cached is None else cached.head
            lines = None if previous is None else lines_between(segments, previous, head)
            self._cached = _CachedHead(log, archive, segments.base, head, False)
        return Change(head, previous, lines)

    def _stats(self) -> tuple[_Stat, _Stat]:
        return _stat(self._layout.log_path), _stat(self._layout.archive_path)

    def _store(self, log: _Stat, archive: _Stat, base: int, head: Head) -> None:
        changed = max(0 if stat is None else max(stat[3:]) for stat in (log, archive))
        settled = changed < time_ns() - _CLOCK_RESOLUTION and self._stats() == (log, archive)
        self._cached = _CachedHead(log, archive, base, head, settled)

    def _appended(self, cached: _CachedHead, log: _Stat) -> Change | None:
        """What was appended to the same active log; None after any other change, or if it is more than a few lines."""
        start = cached.head.offset - cached.base
        if log is None or cached.log is None or log[:2] != cached.log[:2] or not 0 < log[2] - start <= SLICE_SIZE:
            return None
        try:
            fd = os.open(self._layout.log_path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        # One call reads the end of what is cached, for comparison, and everything after it.
        begin = max(0, start - _LOOK_BACK)
        try:
            stat = os.fstat(fd)
            if (stat.st_dev, stat.st_ino) != log[:2]:
                return None
            data = os.pread(fd, log[2] - begin, begin)
            if len(data) != log[2] - begin:
                return None
            if start and _hash_before(fd, data, begin, start) != cached.head.line_hash:
                return None
            added = data[start - begin :]
            if may_be_in_batch(added) or not added.endswith(b"\n"):
                added = added[: max(0, complete_size(fd, log[2]) - start)]
        finally:
            os.close(fd)
        if not added.endswith(b"\n"):
            return None
        head = Head(cached.head.offset + len(added), last_line_hash(added))
        return Change(head, cached.head, Lines(self._layout.log_path, cached.head.offset, added))


def _hash_before(fd: int, data: bytes, begin: int, end: int) -> str:
    """The hash of the line that ends at position `end` of a file; `data` is the file's content from `begin` onwards."""
    line_begin = data.rfind(b"\n", 0, end - begin - 1) + 1
    return line_hash(data[line_begin : end - begin] if line_begin or not begin else line_before(fd, end)[1])


def lines_between(segments: LogSegments, start: Head, end: Head) -> Lines | None:
    """The lines from one head to another; None if there are more than a few, or if the log was replaced."""
    if not 0 < end.offset - start.offset <= SLICE_SIZE:
        return None
    try:
        segments.check_line_before(start)
        return join(list(segments.lines(start.offset, end.offset)))
    except (CorruptLogError, ValueError):
        return None
