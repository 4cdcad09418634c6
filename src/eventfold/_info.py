"""What there is to know about a log at a glance: its head, its sizes, who reads it, who writes it.

Promise: nothing is changed and no event is decoded; it takes no lock, so that it never keeps a writer out.
"""

from __future__ import annotations

import os

import msgspec

from ._aio import in_thread
from ._consumer import _Checkpoint
from ._engine import Paths
from ._errors import CorruptLogError
from ._event import Head
from ._files import operations
from ._files.paths import Layout
from ._files.segments import LogSegments
from ._reader import EventReader
from .snapshot import BadSnapshotError, parse

# Up to this size of app.jsonl (bytes) its lines are counted, which takes some hundredths of a second.
_COUNTED_SIZE = 64 * 2**20
_READ_SIZE = 2**20


class PlaceInfo(msgspec.Struct, frozen=True):
    """How far a stored view or a consumer has come.

    `offset` is in bytes of the whole log, `lag` the number of bytes from there to the head; both are None where
    `problem` says why they can't be told.
    """

    name: str
    offset: int | None
    lag: int | None
    problem: str | None = None


class FilesInfo(msgspec.Struct, frozen=True):
    """What only a log in files has. Sizes are in bytes.

    `base` is the offset at which `app.jsonl` begins. `events` is None where counting them would take long.
    `rotating` tells whether a rotation is under way, or was broken off. `writer` is the process that holds the lock, as
    far as the system tells (on Linux, within the same container).
    """

    active_size: int
    archive_size: int
    base: int
    events: int | None
    rotating: bool
    writer: int | None


class LogInfo(msgspec.Struct, frozen=True):
    """A log at a glance. `files` is None for a log that is not kept in files."""

    location: str
    head: Head
    views: tuple[PlaceInfo, ...]
    consumers: tuple[PlaceInfo, ...]
    files: FilesInfo | None = None


async def info(reader: EventReader) -> LogInfo:
    """A log at a glance.

    Args:
        reader: A reader of the log.

    Raises:
        CorruptLogError: The head can't be told.
        OSError: The log could not be read.
    """
    head = await reader.head()
    views = [await _view(reader, name, head) for name in await reader.documents.names("view")]
    consumers = [await _consumer(reader, name, head) for name in await reader.documents.names("consumer")]
    paths = getattr(reader._source, "layout", None)
    files = await in_thread(_files, Layout(paths.dir)) if isinstance(paths, Paths) else None
    return LogInfo(str(reader._source.location), head, tuple(views), tuple(consumers), files)


async def _view(reader: EventReader, name: str, head: Head) -> PlaceInfo:
    data = await reader.documents.load("view", name)
    try:
        found = None if data is None else parse(data)
    except BadSnapshotError as error:
        return PlaceInfo(name, None, None, str(error))
    if found is None or found.position is None:
        return PlaceInfo(name, None, None, "it does not tell where in the log it stands; it will be rebuilt")
    return _place(name, found.position, head)


async def _consumer(reader: EventReader, name: str, head: Head) -> PlaceInfo:
    try:
        offset = await _Checkpoint(reader, name, 0, None).last_commit()
    except CorruptLogError as error:
        return PlaceInfo(name, None, None, error.reason)
    return _place(name, offset or 0, head)


def _place(name: str, offset: int, head: Head) -> PlaceInfo:
    # Whoever is ahead has read what came after `head` was looked up.
    return PlaceInfo(name, offset, max(0, head.offset - offset))


def _files(layout: Layout) -> FilesInfo:
    rotating = layout.next_file() is not None
    with LogSegments(layout) as segments:
        archive_size = 0 if segments.archive is None else segments.archive.size
        events = _count(segments)
        writer = None if segments.fd is None else operations.lock_holder(segments.fd)
        return FilesInfo(segments.size, archive_size, segments.base, events, rotating, writer)


def _count(segments: LogSegments) -> int | None:
    archive = segments.archive
    if segments.size > _COUNTED_SIZE or segments.damage is not None:
        return None
    if archive is not None and (not archive.recorded or archive.head.offset != segments.base):
        return None
    events = 0
    if archive is not None:
        events = sum(span.events for span in archive.spans())
    if segments.fd is not None:
        for start in range(0, segments.size, _READ_SIZE):
            events += os.pread(segments.fd, _READ_SIZE, start).count(b"\n")
    return events
