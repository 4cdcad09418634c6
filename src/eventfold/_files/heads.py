"""Finds the head of a directory's files, and reads them again only when they have changed.

Promise: a cached head is returned only while the active log and the archive are, according to `stat`, the files in
which it was found, and were last changed long enough before for a later change to be visible.
"""

from __future__ import annotations

import os
from pathlib import Path
from time import time_ns
from typing import NamedTuple, TypeAlias

from .._codec.lines import SLICE_SIZE, Lines, join, last_line_hash
from .._errors import CorruptLogError
from .._event import Head, line_hash
from .paths import Layout
from .segments import LogSegments, last_complete_offset, line_before

# Nanoseconds: longer than any tick of a file system's clock. Two changes within one tick leave the same times.
_TICK = 50_000_000

# How much is read of what is known already, in bytes: more than most lines have.
_LOOK_BACK = 1024

_Stat: TypeAlias = tuple[int, int, int, int, int] | None


class _Known(NamedTuple):
    """The head that was found in files of this state, and the offset of the active log's first byte."""

    log: _Stat
    archive: _Stat
    base: int
    head: Head
    settled: bool


class Change(NamedTuple):
    """A head that differs from the previous one, `known`, and the lines between the two if they are few."""

    head: Head
    known: Head | None
    lines: Lines | None


def _stat(path: Path) -> _Stat:
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


class HeadLookup:
    """The head of one directory, as this process last found it. Blocks."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._known: _Known | None = None

    def copy(self) -> HeadLookup:
        """A copy with the same knowledge: its first change is the next one."""
        other = HeadLookup(self._layout)
        other._known = self._known
        return other

    @property
    def known_head(self) -> Head | None:
        """The head that the last lookup found; None before the first one. Does not read the files."""
        return None if self._known is None else self._known.head

    def head(self) -> Head:
        """The current head. Raises `OSError` and `CorruptLogError`."""
        log, archive = self._state()
        known = self._known
        if known is not None and known.settled and known.log == log and known.archive == archive:
            return known.head
        with LogSegments(self._layout) as parts:
            head = parts.head()
            self._remember(log, archive, parts.base, head)
        return head

    def change(self) -> Change | None:
        """The head if the files have changed since the last call; None if not, or if there is no active log."""
        log, archive = self._state()
        known = self._known
        if log is None:
            self._known = None
            return None
        if known is not None and known.log == log and known.archive == archive:
            return None
        if known is not None and known.archive == archive:
            grown = self._grown(known, log)
            if grown is not None:
                self._known = _Known(log, archive, known.base, grown.head, False)
                return grown
        with LogSegments(self._layout) as parts:
            head = parts.head()
            before = None if known is None else known.head
            lines = None if before is None else _lines_between(parts, before, head)
            self._known = _Known(log, archive, parts.base, head, False)
        return Change(head, before, lines)

    def _state(self) -> tuple[_Stat, _Stat]:
        return _stat(self._layout.log_path), _stat(self._layout.archive_path)

    def _remember(self, log: _Stat, archive: _Stat, base: int, head: Head) -> None:
        changed = max(0 if stat is None else max(stat[3:]) for stat in (log, archive))
        settled = changed < time_ns() - _TICK and self._state() == (log, archive)
        self._known = _Known(log, archive, base, head, settled)

    def _grown(self, known: _Known, log: _Stat) -> Change | None:
        """What was added to the same active log; None if anything else has changed."""
        start = known.head.offset - known.base
        if log is None or known.log is None or log[:2] != known.log[:2] or not 0 < log[2] - start <= SLICE_SIZE:
            return None
        try:
            fd = os.open(self._layout.log_path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        # Everything in one call: the end of what is known, for comparison, and what follows it.
        begin = max(0, start - _LOOK_BACK)
        try:
            stat = os.fstat(fd)
            if (stat.st_dev, stat.st_ino) != log[:2]:
                return None
            data = os.pread(fd, log[2] - begin, begin)
            if len(data) != log[2] - begin:
                return None
            if start and _hash_before(fd, data, begin, start) != known.head.line_hash:
                return None
            added = data[start - begin :]
            if b'"batch"' in added or not added.endswith(b"\n"):
                added = added[: max(0, last_complete_offset(fd, log[2]) - start)]
        finally:
            os.close(fd)
        if not added.endswith(b"\n"):
            return None
        head = Head(known.head.offset + len(added), last_line_hash(added))
        return Change(head, known.head, Lines(self._layout.log_path, known.head.offset, added))


def _hash_before(fd: int, data: bytes, begin: int, end: int) -> str:
    """The hash of the line that ends at position `end` of a file; `data` is what is there from `begin` on."""
    line_begin = data.rfind(b"\n", 0, end - begin - 1) + 1
    return line_hash(data[line_begin : end - begin] if line_begin or not begin else line_before(fd, end)[1])


def _lines_between(parts: LogSegments, start: Head, end: Head) -> Lines | None:
    """The lines from one head to another; None if they are many, or if they have changed."""
    if not 0 < end.offset - start.offset <= SLICE_SIZE:
        return None
    try:
        parts.check_line_before(start)
        return join(list(parts.lines(start.offset, end.offset)))
    except (CorruptLogError, ValueError):
        return None
