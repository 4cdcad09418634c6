"""Finds and cuts off a damaged end of the active log. No recovery does so on its own: a person must decide it.

Promises: what is cut off is saved durably before anything is changed; a crash leaves the log either unchanged or cut,
and the same cut can be repeated without saving anything twice.
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
from .base_file import BaseFile, Generation
from .line_scan import complete_size, first_line
from .paths import Layout
from .segments import LogSegments

_CHUNK_SIZE = 4 * 2**20
# The upper limit for `max_event_size`: anything longer without a newline is not an event.
_MAX_LINE_SIZE = 2**30


class DamagedEnd(NamedTuple):
    """The last `size` bytes of the active log, which begin at `offset` (bytes in the whole log).

    `events` counts the whole lines in it that are events.
    """

    offset: int
    size: int
    events: int


def find_damaged_end(layout: Layout, damage: CorruptLogError) -> DamagedEnd:
    """The end that must be cut off so that the log ends before the damage, which a reader has found.

    Raises `damage` if it is not in the active log, and `EventfoldError` if cutting would not repair it.
    """
    with LogSegments(layout) as segments:
        base, archive = segments.base, segments.archive
        next_file = layout.next_file()
        if segments.fd is None or damage.path != layout.log_path or (archive is not None and archive.damage):
            raise damage
        if segments.damage is not None and not _only_first_line_differs(layout, segments.fd, base):
            raise damage
        start = damage.offset - base
        if start < 0 or (archive is not None and damage.offset < archive.head.offset):
            raise EventfoldError(
                f"{damage}; the archive has these lines too, so cutting them here would repair nothing"
            )
        if next_file is not None and damage.offset < next_file.base + next_file.size:
            raise EventfoldError(
                f"{damage}; an interrupted rotation was moving this line into the archive, so it can't be cut "
                "any more: restore a backup"
            )
        size = segments.size
        if start >= size:
            raise damage  # something is missing
        # If the damage is in a batch, the whole batch must be cut off.
        start = complete_size(segments.fd, start)
        return DamagedEnd(base + start, size - start, _count_events(segments.fd, start, size))


def _only_first_line_differs(layout: Layout, fd: int, base: int) -> bool:
    """Whether the base file lists where the active log begins, but its first line is damaged."""
    generations = BaseFile(layout.base_path).read()
    if generations is None or all(generation.base != base for generation in generations):
        return False
    first = first_line(fd)
    return first is not None and not is_event(first)


def _count_events(fd: int, start: int, end: int) -> int:
    """The number of whole lines between two positions of a file that are events."""
    events = 0
    rest: list[bytes] = []  # of a line whose end has not been read yet
    for chunk in _chunks(fd, start, end):
        *lines, begun = chunk.split(b"\n")
        if lines:
            lines[0] = b"".join([*rest, lines[0]])
            events += sum(map(is_event, lines))
            rest = []
        rest.append(begun)
        if sum(map(len, rest)) > _MAX_LINE_SIZE:
            rest = [b"\0"]  # makes the rest of this line no event either
    return events


def cut_damaged_end(layout: Layout, fd: int, end: DamagedEnd) -> Path:
    """Cuts off the end of the active log, whose locked descriptor is `fd`; returns the file with the bytes cut off.

    Raises `OSError`; then nothing has been cut off, or the same cut can be repeated.
    """
    size = os.fstat(fd).st_size
    position = size - end.size
    saved = layout.torn_path(end.offset)
    _save(saved, fd, position, size)
    hash_before = None if position else _remove_base_file(layout)
    operations.truncate(fd, position)
    operations.sync(fd)
    if hash_before is not None:
        BaseFile(layout.base_path).write(Generation(end.offset, hash_before))
    return saved


def _remove_base_file(layout: Layout) -> str:
    """Removes the base file, since it lists a line that will be cut off; returns the hash of the line before.

    Without the file, the end of the archive says where the active log begins, whether or not it has a line.
    """
    with LogSegments(layout) as segments:
        hash_before = "" if segments.archive is None else segments.archive.head.line_hash
    if layout.base_path.exists():
        operations.unlink(layout.base_path)
        operations.sync_dir(layout.dir)
    return hash_before


def _save(path: Path, fd: int, start: int, end: int) -> None:
    """Appends the bytes between two positions to another file, durably, unless it already ends with them."""
    try:
        saved = operations.open_to_read(path)
    except FileNotFoundError:
        _create(path, _chunks(fd, start, end))
    else:
        try:
            size = os.fstat(saved).st_size
            if not _has_at(saved, size - (end - start), fd, start, end):
                _create(path, chain(_chunks(saved, 0, size), _chunks(fd, start, end)))
        finally:
            os.close(saved)
    # Even if nothing was written: what a killed process wrote may be in the page cache only.
    operations.sync_dir(path.parent)


def _create(path: Path, content: Iterable[bytes]) -> None:
    with operations.atomically_created(path) as fd:
        position = 0
        for chunk in content:
            operations.write(fd, chunk, position)
            position += len(chunk)
        operations.sync(fd)


def _has_at(fd: int, position: int, other: int, start: int, end: int) -> bool:
    """Whether a file has, at a position, the same bytes as the other file between two positions."""
    if position < 0:
        return False
    for chunk in _chunks(other, start, end):
        if os.pread(fd, len(chunk), position) != chunk:
            return False
        position += len(chunk)
    return True


def _chunks(fd: int, start: int, end: int) -> Iterator[bytes]:
    """The bytes between two positions of a file, in chunks. Raises `OSError` if the file is shorter."""
    while start < end:
        chunk = os.pread(fd, min(_CHUNK_SIZE, end - start), start)
        if not chunk:
            raise OSError(errno.EIO, "the file was truncated while it was being read")
        yield chunk
        start += len(chunk)
