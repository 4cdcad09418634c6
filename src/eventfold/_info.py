"""A log at a glance: its head, its sizes, its views and consumers, and its writer.

Promises: nothing is changed; only the first and the last event are decoded; no lock is taken, so no writer is kept out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import aclosing

import msgspec

from ._consumer import Checkpoint, unreadable
from ._engine import Paths
from ._errors import CorruptLogError
from ._event import Head
from ._files import operations
from ._files.frames import Span
from ._files.paths import Layout
from ._files.segments import LogSegments
from ._reader import EventReader
from ._threads import in_thread
from .snapshot import BadSnapshotError, parse

# The lines of app.jsonl are counted up to this size in bytes, which takes a few hundredths of a second.
_COUNTED_SIZE = 64 * 2**20
_READ_SIZE = 2**20


class PlaceInfo(msgspec.Struct, frozen=True):
    """The progress of a view or a consumer, as stored.

    `offset` is in bytes of the whole log, and `lag` is the number of bytes from there to the head. If they are unknown,
    both are None, and `problem` says why.
    """

    name: str
    offset: int | None
    lag: int | None
    problem: str | None = None


class FilesInfo(msgspec.Struct, frozen=True):
    """The part of `LogInfo` that only a log in files has.

    Attributes:
        active_size: The size of `app.jsonl`, in bytes.
        archive_size: The size of the archive, in bytes.
        frames: The number of frames in the archive, without the commit records.
        base: The offset at which `app.jsonl` begins, in bytes of the whole log.
        events: The number of events; None if counting them would take long.
        rotating: Whether a rotation is under way, or was interrupted.
        writer: The id of the process that holds the lock, if the system reports it (on Linux, within the same
            container).
    """

    active_size: int
    archive_size: int
    frames: int
    base: int
    events: int | None
    rotating: bool
    writer: int | None


class LogInfo(msgspec.Struct, frozen=True):
    """The result of `EventLog.info`.

    Attributes:
        location: The data directory, or the address of the log without its password.
        head: The offset after the last event, in bytes of the whole log, and the hash of its line.
        views: The views of which a snapshot is stored.
        consumers: The consumers that have committed an offset.
        files: Sizes and other details; None for a log that is not kept in files.
        bytes_a_day: The average growth from the `ts` of the first event to that of the last; None if it is unknown.
        events_a_day: The average number of events per day over the same time; None if it is unknown.
    """

    location: str
    head: Head
    views: tuple[PlaceInfo, ...]
    consumers: tuple[PlaceInfo, ...]
    files: FilesInfo | None = None
    bytes_a_day: float | None = None
    events_a_day: float | None = None


async def info(reader: EventReader) -> LogInfo:
    """Collects the information about a log.

    Args:
        reader: A reader of the log.

    Raises:
        CorruptLogError: The head is unknown because of damage.
        OSError: The log could not be read.
    """
    head = await reader.head()
    views = [await _view(reader, name, head) for name in await reader._documents.names("view")]
    consumers = [await _consumer(reader, name, head) for name in await reader._documents.names("consumer")]
    paths = getattr(reader._source, "layout", None)
    files = await in_thread(_files, Layout(paths.dir)) if isinstance(paths, Paths) else None
    days = await _days(EventReader._of_source(reader._source, reader._scope))  # without the catalog, which may not fit
    bytes_a_day = head.offset / days if days and files is not None else None
    events_a_day = files.events / days if days and files is not None and files.events is not None else None
    location = str(reader._source.location)
    return LogInfo(location, head, tuple(views), tuple(consumers), files, bytes_a_day, events_a_day)


async def _days(reader: EventReader) -> float | None:
    """The days from the first event to the last; None if there are none, or if the log is damaged there."""
    times = []
    try:
        for records in (reader.read_from(0), reader.read_back()):
            async with aclosing(records):  # type: ignore[type-var]
                async for record in records:
                    times.append(record.event.ts)
                    break
    except CorruptLogError:
        return None
    return (times[1] - times[0]) / 86400 if len(times) == 2 and times[1] > times[0] else None


async def _view(reader: EventReader, name: str, head: Head) -> PlaceInfo:
    try:
        data = await reader._documents.load("view", name)
        found = None if data is None else parse(data)
    except BadSnapshotError as error:
        return PlaceInfo(name, None, None, str(error))
    except OSError as error:
        return PlaceInfo(name, None, None, unreadable(reader, error))
    if found is None or found.position is None:
        return PlaceInfo(name, None, None, "its snapshot has no offset in the whole log; it will be rebuilt")
    return _lag_info(name, found.position, head)


async def _consumer(reader: EventReader, name: str, head: Head) -> PlaceInfo:
    try:
        offset = await Checkpoint(reader, name, 0, None).last_commit()
    except CorruptLogError as error:
        return PlaceInfo(name, None, None, error.reason)
    except OSError as error:
        return PlaceInfo(name, None, None, unreadable(reader, error))
    return _lag_info(name, offset or 0, head)


def _lag_info(name: str, offset: int, head: Head) -> PlaceInfo:
    # An offset beyond `head` is that of a reader that has seen later appends.
    return PlaceInfo(name, offset, max(0, head.offset - offset))


def _files(layout: Layout) -> FilesInfo:
    rotating = layout.next_file() is not None
    with LogSegments(layout) as segments:
        archive_size = 0 if segments.archive is None else segments.archive.size
        spans = [] if segments.archive is None else list(segments.archive.spans())
        events = _count_events(segments, spans)
        writer = None if segments.fd is None else operations.lock_holder(segments.fd)
        return FilesInfo(segments.size, archive_size, len(spans), segments.base, events, rotating, writer)


def _count_events(segments: LogSegments, spans: Sequence[Span]) -> int | None:
    """The number of events; None if counting them would take long, or if it is unknown because of damage."""
    archive = segments.archive
    if segments.size > _COUNTED_SIZE or segments.damage is not None:
        return None
    if archive is not None and (not archive.recorded or archive.head.offset != segments.base):
        return None
    events = sum(span.events for span in spans)
    if segments.fd is not None:
        for start in range(0, segments.size, _READ_SIZE):
            events += os.pread(segments.fd, _READ_SIZE, start).count(b"\n")
    return events
