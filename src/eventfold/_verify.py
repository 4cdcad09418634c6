"""Verifies a log: all data is read once, and every problem is reported with its file and offset.

Promises: nothing is changed; memory is bounded by a few blocks, regardless of the log's size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import aclosing
from datetime import datetime
from typing import Any

import msgspec

from ._address import Address
from ._consumer import Checkpoint, unreadable
from ._engine import Paths
from ._errors import CorruptLogError, ReducerError
from ._event import Head
from ._files.paths import Layout
from ._files.segments import LogSegments
from ._fold import fold_together
from ._reader import EventReader
from ._round_trip import difference
from ._threads import in_thread
from ._view import View
from .snapshot import BadSnapshotError, Snapshot, parse


class Problem(msgspec.Struct, frozen=True):
    """A problem that `verify` found.

    Attributes:
        path: The file, or the location of the document.
        offset: Where the problem is, in bytes of the whole log.
        reason: What is wrong.
    """

    path: str
    offset: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}, offset {self.offset}: {self.reason}"


class VerifyReport(msgspec.Struct, frozen=True):
    """The result of `verify`.

    Attributes:
        location: The data directory, or the address of the log without its password.
        events: The number of events before the first damage in the log.
        size: The total size of the lines before the first damage, in bytes.
        frames: The number of frames in the archive, without the commit records.
        snapshots: The number of snapshots that are stored.
        consumers: The number of consumers that have committed an offset.
        problems: What is wrong.
    """

    location: str
    events: int
    size: int
    frames: int
    snapshots: int
    consumers: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems


async def verify(
    source: Address, *, views: Iterable[View[Any]] = (), progress: Callable[[int, int], object] | None = None
) -> VerifyReport:
    """Reads a whole log, which may be in use, and reports its problems.

    It checks that the archive's frames match their commit records, that every line is an event, that the base file
    matches, and that a line of this log ends at the offset of every snapshot and consumer. Reading the log ends at the
    first damage. A cancelled call leaves nothing behind.

    Args:
        source: The data directory, an address or an engine.
        views: Views whose snapshots are compared with a replay of the log. They may be registered with an open log.
        progress: Called repeatedly with the number of bytes read so far and in total.

    Returns:
        The report. Its `ok` is true if there are no problems.

    Raises:
        OSError: A file could not be read.
    """
    reader = EventReader(source)
    try:
        return await _verify(reader, views, progress)
    finally:
        await reader._source.aclose()


async def _verify(
    reader: EventReader, views: Iterable[View[Any]], progress: Callable[[int, int], object] | None
) -> VerifyReport:
    location = str(reader._source.location)
    problems: list[Problem] = []
    try:
        head: Head | None = await reader.head()
    except CorruptLogError as error:
        head = None
        problems.append(_problem(error))
    events = size = 0
    try:
        async with aclosing(reader.read_slices()) as slices:
            async for slice_ in slices:
                events += len(slice_.events)
                size += len(slice_._lines.data)
                if progress is not None:
                    progress(slice_.end_offset, max(slice_.end_offset, 0 if head is None else head.offset))
    except CorruptLogError as error:
        _add(problems, error)
    paths = getattr(reader._source, "layout", None)
    frames = await in_thread(_frames, Layout(paths.dir)) if isinstance(paths, Paths) else 0
    snapshots = await reader._documents.names("view")
    consumers = await reader._documents.names("consumer")
    if head is not None:  # otherwise, no offset can be looked up in the log
        by_name = {view.name: view for view in views}
        for name in snapshots:
            await _check_snapshot(reader, name, by_name.get(name), problems)
        for name in consumers:
            try:
                await Checkpoint(reader, name, 0, None).last_commit()
            except CorruptLogError as error:
                _add(problems, error)
            except OSError as error:
                where = str(reader._documents.location("consumer", name))
                problems.append(Problem(where, 0, unreadable(reader, error)))
    return VerifyReport(location, events, size, frames, len(snapshots), len(consumers), tuple(problems))


def _problem(error: CorruptLogError) -> Problem:
    return Problem(error.file, error.offset, error.reason)


def _add(problems: list[Problem], error: CorruptLogError) -> None:
    """Adds a problem, unless another check has found it already."""
    if _problem(error) not in problems:
        problems.append(_problem(error))


def _frames(layout: Layout) -> int:
    try:
        with LogSegments(layout) as segments:
            return 0 if segments.archive is None else sum(1 for _ in segments.archive.spans())
    except CorruptLogError:
        return 0


async def _check_snapshot(reader: EventReader, name: str, view: View[Any] | None, problems: list[Problem]) -> None:
    where = str(reader._documents.location("view", name))
    try:
        data = await reader._documents.load("view", name)
    except OSError as error:
        problems.append(Problem(where, 0, unreadable(reader, error)))
        return
    if data is None:
        return  # it was deleted after the names were listed
    position = 0
    try:
        found = parse(data)
        if found.position is None:
            return  # the Rust crate wrote it: its offset is only valid until the next rotation
        position = found.position
        if (await reader.read_line_hash_before(position) or "") != (found.position_hash or ""):
            raise BadSnapshotError("the log before this offset is not the one from which it was made")
        if view is not None and view._snapshot.is_of_this_view(found):
            await _check_state(reader, found, position, view)
    except CorruptLogError as error:
        _add(problems, error)
    except (BadSnapshotError, ValueError, ReducerError) as error:
        problems.append(Problem(where, position, f"{error}; delete the file, so that the view is rebuilt"))


async def _check_state(reader: EventReader, found: Snapshot, position: int, view: View[Any]) -> None:
    stored = view._snapshot.decode(found.state)
    replayed = await state_at(reader, view, position)
    different = difference(replayed, stored)
    if different is not None:
        raise BadSnapshotError(f"its state differs from that of a replay: {different} in the snapshot")


async def state_at(reader: EventReader, view: View[Any], at: int | datetime) -> Any:
    """Folds a view's state as of an offset or a time, from the beginning. The view itself is not changed.

    Raises `ValueError` for an offset that is negative, beyond the head, or not where a line begins, `ReducerError`,
    `CorruptLogError`, `OSError`.
    """
    offset = await offset_at_time(reader, math.ceil(at.timestamp())) if isinstance(at, datetime) else at
    await reader.read_line_hash_before(offset)
    fold = copy.copy(view._fold)
    fold.start(view._new_state(), Head(0, ""))
    for error in await fold_together([fold], reader, Head(offset, "")):
        raise error
    return fold.state


async def offset_at_time(reader: EventReader, time: int) -> int:
    """The offset of the first event whose `ts` (seconds) is `time` or later; that of the head if there is none."""
    head = (await reader.head()).offset
    async with aclosing(reader.read_from(0, until=head)) as records:  # type: ignore[type-var]
        async for record in records:
            if record.event.ts >= time:
                return record.start_offset
    return head
