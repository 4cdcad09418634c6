"""Cuts off a damaged end of the active log, which no recovery decides on its own, but a person may.

Promises: what is cut is kept durably before anything is changed; a crash at any moment leaves the log as it was or cut,
and then the same cut can be repeated without keeping anything twice.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from .._codec.decode import is_event
from .._errors import CorruptLogError, EventfoldError
from . import operations
from .active import open_locked
from .base import BaseFile, Generation
from .paths import Layout
from .segments import LogSegments, last_complete_offset

_CHUNK_SIZE = 4 * 2**20
# No commit has more bytes, so anything longer without a newline is not an event.
_LONGEST_LINE = 64 * 2**20


class End(NamedTuple):
    """The end of the active log from `offset` (bytes in the whole log) onwards.

    `size` is in bytes; `events` counts the whole lines in it that are events.
    """

    offset: int
    size: int
    events: int


class WriterLock:
    """The writer's lock of a directory that has an `app.jsonl`, without recovering anything. Methods block."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._fd = -1

    def take(self) -> None:
        """Raises `LogLockedError` if a writer has the log open, `EventfoldError` if there is no active log."""
        if not self._layout.log_path.exists():
            raise EventfoldError(f"there is no {self._layout.log_path}, so there is nothing to change")
        self._fd = open_locked(self._layout, True)

    @property
    def fd(self) -> int:
        """The locked descriptor of the active log."""
        return self._fd

    def release(self) -> None:
        """Releases the lock; idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            operations.close_locked(fd)


def damaged_end(layout: Layout, damage: CorruptLogError) -> End:
    """What must be cut so that the log ends before damage that reading has found.

    Raises the damage again if it is not in the active log, `EventfoldError` if cutting would not repair it.
    """
    with LogSegments(layout) as segments:
        base, archive = segments.base, segments.archive
        under_way = layout.next_file()
        if segments.fd is None or damage.path != layout.log_path or (archive is not None and archive.damage):
            raise damage
        if segments.damage is not None and not _only_first_line_differs(layout, segments.fd, base):
            raise damage
        start = damage.offset - base
        if start < 0 or (archive is not None and damage.offset < archive.head.offset):
            raise EventfoldError(
                f"{damage}; the archive has these lines too, so cutting them here would repair nothing"
            )
        if under_way is not None and damage.offset < under_way.base + under_way.size:
            raise EventfoldError(
                f"{damage}; an interrupted rotation was moving this line into the archive, so it can't be cut "
                "any more: restore a backup"
            )
        size = segments.size
        if start >= size:
            raise damage  # something is missing
        # A batch may have begun before the damage, whose end is lost with it.
        start = last_complete_offset(segments.fd, start)
        return End(base + start, size - start, _count_events(segments.fd, start, size))


def _only_first_line_differs(layout: Layout, fd: int, base: int) -> bool:
    """Whether the base file knows where the active log begins, but not its first line, which is damaged."""
    generations = BaseFile(layout.base_path).read()
    if generations is None or all(generation.base != base for generation in generations):
        return False
    first = os.pread(fd, _LONGEST_LINE, 0)
    end = first.find(b"\n")
    return end >= 0 and not is_event(first[:end])


def _count_events(fd: int, start: int, end: int) -> int:
    """The number of whole lines between two positions of a file that are events."""
    events, rest = 0, b""
    for chunk in _chunks(fd, start, end):
        *lines, rest = (rest + chunk).split(b"\n")
        events += sum(map(is_event, lines))
        if len(rest) > _LONGEST_LINE:
            rest = b"\0"  # so that whatever follows on this line is not an event either
    return events


def cut(layout: Layout, fd: int, end: End) -> Path:
    """Cuts off this end of the active log, given its locked descriptor; returns where the bytes are kept.

    Raises `OSError`; then nothing has been cut, or the same cut can be repeated.
    """
    size = os.fstat(fd).st_size
    position = size - end.size
    kept = layout.torn_path(end.offset)
    _keep(kept, fd, position, size)
    before = None if position else _forget_first_line(layout)
    operations.truncate(fd, position)
    operations.sync(fd)
    if before is not None:
        BaseFile(layout.base_path).write(Generation(end.offset, before))
    return kept


def _forget_first_line(layout: Layout) -> str:
    """Removes the base file, which lists a line that will be cut; returns the hash of the line before that one.

    Without it, the archive's end says where the active log begins, whether or not the line is still there.
    """
    with LogSegments(layout) as segments:
        before = "" if segments.archive is None else segments.archive.head.line_hash
    if layout.base_path.exists():
        operations.unlink(layout.base_path)
        operations.sync_dir(layout.dir)
    return before


def _keep(path: Path, fd: int, start: int, end: int) -> None:
    """Appends the bytes between two positions to another file, durably, unless that file ends with them already."""
    try:
        earlier = operations.open_to_read(path)
    except FileNotFoundError:
        _write_new(path, _chunks(fd, start, end))
    else:
        try:
            size = os.fstat(earlier).st_size
            if not _is_same(earlier, size - (end - start), fd, start, end):
                _write_new(path, chain(_chunks(earlier, 0, size), _chunks(fd, start, end)))
        finally:
            os.close(earlier)
    # Even if nothing was written: what a killed process wrote may be in the page cache only.
    operations.sync_dir(path.parent)


def _write_new(path: Path, content: Iterable[bytes]) -> None:
    with operations.atomically_created(path) as fd:
        position = 0
        for chunk in content:
            operations.write(fd, chunk, position)
            position += len(chunk)
        operations.sync(fd)


def _is_same(one: int, one_start: int, other: int, start: int, end: int) -> bool:
    """Whether one file has at a position what the other has between two positions."""
    if one_start < 0:
        return False
    for chunk in _chunks(other, start, end):
        if os.pread(one, len(chunk), one_start) != chunk:
            return False
        one_start += len(chunk)
    return True


def _chunks(fd: int, start: int, end: int) -> Iterator[bytes]:
    """The bytes between two positions of a file, in chunks. Raises `OSError` if the file ends before."""
    while start < end:
        chunk = os.pread(fd, min(_CHUNK_SIZE, end - start), start)
        if not chunk:
            raise OSError(errno.EIO, "the file was cut while it was being read")
        yield chunk
        start += len(chunk)
