"""Repairs a log in files, after a person has decided what to do about the problems that `verify` reports.

`plan_repairs` changes nothing. `repair` carries out chosen repairs of the plan, unless the files have changed since.

Promises: no event is removed unless the caller names the offset from which events are lost; what is cut off is kept in
a file beside the log; no other process writes to the log during a repair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import aclosing
from typing import Any, TypeAlias

import msgspec

from ._address import Address, engine_of
from ._consumer import Checkpoint, move_consumer
from ._documents import DocumentKind, LockingDocuments
from ._engine import paths_of
from ._errors import CorruptLogError, EventfoldError
from ._files.active import WriterLock
from ._files.damaged_end import cut_damaged_end, find_damaged_end
from ._files.paths import Layout
from ._reader import EventReader
from ._threads import in_thread
from ._verify import Problem, verify
from ._view import View


class CutEnd(msgspec.Struct, frozen=True):
    """A repair that cuts off the damaged end of `app.jsonl` and keeps it in the file `kept_in`.

    Attributes:
        path: The path of `app.jsonl`.
        offset: Where to cut, in bytes of the whole log.
        size: The number of bytes to cut off.
        events: The number of valid events among these bytes, which the log loses. If it is not 0, `repair` requires the
            offset in `lose_events_from`.
        reason: What is damaged.
    """

    path: str
    offset: int
    size: int
    events: int
    reason: str

    @property
    def kept_in(self) -> str:
        """The file to which the bytes are moved."""
        return f"{self.path}.torn.{self.offset}"

    def __str__(self) -> str:
        lost = f"; {_valid_events(self.events)} after the damage would be lost" if self.events else ""
        return f"cut {self.path} at offset {self.offset} ({self.reason}): {self.size} bytes go to {self.kept_in}{lost}"


class DropSnapshot(msgspec.Struct, frozen=True):
    """A repair that deletes the snapshot of a view, which is then rebuilt from the log.

    Attributes:
        path: The path of the snapshot.
        name: The name of the view.
        reason: What is wrong with the snapshot.
    """

    path: str
    name: str
    reason: str

    def __str__(self) -> str:
        return f"delete the snapshot {self.path} ({self.reason}): the view is rebuilt"


class ResetConsumer(msgspec.Struct, frozen=True):
    """A repair that makes a consumer continue from a different offset.

    Attributes:
        path: The path of the consumer's file.
        name: The name of the consumer.
        offset: Where the consumer continues, in bytes of the whole log.
        reason: What is wrong with the committed offset.
    """

    path: str
    name: str
    offset: int
    reason: str

    def __str__(self) -> str:
        return f"make consumer {self.name} continue from offset {self.offset} ({self.reason})"


Repair: TypeAlias = CutEnd | DropSnapshot | ResetConsumer


class RepairPlan(msgspec.Struct, frozen=True):
    """The result of `plan_repairs`: the possible `repairs`, and the `problems` that only a backup can solve."""

    repairs: tuple[Repair, ...]
    problems: tuple[Problem, ...]


async def plan_repairs(
    dir: Address,
    *,
    views: Iterable[View[Any]] = (),
    progress: Callable[[int, int], object] | None = None,
) -> RepairPlan:
    """Reads a whole log in files and plans its repairs. Changes nothing; a cancelled call leaves nothing behind.

    If the end of the log is damaged, the plan contains only the cut: plan again after it, since only then is it known
    which snapshots and consumers fit. A consumer whose offset is beyond the end of the log will continue from the head,
    and a consumer whose offset is otherwise wrong from the start.

    Args:
        dir: The data directory.
        views: Views whose snapshots are compared with a replay of the log.
        progress: Called repeatedly with the number of bytes read so far and in total.

    Returns:
        The plan. Pass all or some of its repairs to `repair`.

    Raises:
        EventfoldError: There is no log in that directory, or the log is not kept in files.
        OSError: A file could not be read.
    """
    layout = await _layout_of(dir)
    report = await verify(layout.dir, views=views, progress=progress)
    reader = EventReader(layout.dir)
    snapshots = await _names_by_path(reader, "view")
    consumers = await _names_by_path(reader, "consumer")
    cuts: list[Repair] = []
    others: list[Repair] = []
    unsolved: list[Problem] = []
    for problem in report.problems:
        if problem.path == str(layout.log_path):
            try:
                cuts.append(await in_thread(_cut_end, layout, problem))
            except EventfoldError as error:
                reason = error.reason if isinstance(error, CorruptLogError) else str(error)
                unsolved.append(msgspec.structs.replace(problem, reason=reason))
        elif problem.path in snapshots:
            others.append(DropSnapshot(problem.path, snapshots[problem.path], problem.reason))
        elif problem.path in consumers:
            head = (await reader.head()).offset
            offset = head if problem.offset > head else 0
            others.append(ResetConsumer(problem.path, consumers[problem.path], offset, problem.reason))
        else:
            unsolved.append(problem)
    return RepairPlan(tuple(cuts[:1] or others), tuple(unsolved))


async def repair(dir: Address, repairs: Iterable[Repair], *, lose_events_from: int | None = None) -> None:
    """Carries out repairs in the given order, while it holds the writer's lock.

    If cancelled, it stops after the current repair. Earlier repairs are not undone.

    Args:
        dir: The data directory.
        repairs: All or some of the repairs that `plan_repairs` returned.
        lose_events_from: The offset of a cut that removes valid events, in bytes of the whole log. The log loses them.

    Raises:
        LogLockedError: The log is open for writing.
        EventfoldError: A repair would remove valid events and its offset was not named, a consumer is being read, or
            the log has changed since the plan was made. Earlier repairs are not undone.
        OSError: A file could not be read or written, for example because there is no space to keep what is cut off.
    """
    layout = await _layout_of(dir)
    lock = WriterLock(layout)
    try:
        await in_thread(lock.acquire)
        for chosen in repairs:
            if isinstance(chosen, CutEnd):
                await _cut(layout, lock, chosen, lose_events_from)
            elif isinstance(chosen, DropSnapshot):
                await EventReader(layout.dir)._documents.delete("view", chosen.name)
            else:
                await _reset(EventReader(layout.dir), chosen)
    finally:
        await in_thread(lock.release)


async def _layout_of(dir: Address) -> Layout:
    layout = Layout(paths_of(engine_of(dir).source()).dir)
    if not await in_thread(layout.dir.is_dir):
        raise EventfoldError(f"there is no log in {layout.dir}: use the directory that contains app.jsonl")
    return layout


async def _names_by_path(reader: EventReader, kind: DocumentKind) -> dict[str, str]:
    documents = reader._documents
    return {str(documents.location(kind, name)): name for name in await documents.names(kind)}


def _cut_end(layout: Layout, problem: Problem) -> CutEnd:
    end = find_damaged_end(layout, CorruptLogError(layout.log_path, problem.offset, problem.reason))
    return CutEnd(problem.path, end.offset, end.size, end.events, problem.reason)


async def _cut(layout: Layout, lock: WriterLock, chosen: CutEnd, lose_events_from: int | None) -> None:
    if chosen.events and lose_events_from != chosen.offset:
        raise EventfoldError(
            f"{_valid_events(chosen.events)} after the damage at offset {chosen.offset} of {chosen.path} would be "
            f"lost: restore a backup, or name the offset {chosen.offset} to accept the loss"
        )
    damage = await _first_damage(EventReader(layout.dir))
    end = None if damage is None else await in_thread(find_damaged_end, layout, damage)
    if end is None or end != (chosen.offset, chosen.size, chosen.events):
        raise _changed(chosen.path)
    await in_thread(cut_damaged_end, layout, lock.fd, end)


async def _first_damage(reader: EventReader) -> CorruptLogError | None:
    """The first damage, found by reading the log from its start: elsewhere, the rest of a batch may look valid."""
    try:
        async with aclosing(reader.read_slices()) as slices:
            async for _ in slices:
                pass
    except CorruptLogError as error:
        return error
    return None


async def _reset(reader: EventReader, chosen: ResetConsumer) -> None:
    documents = reader._documents
    assert isinstance(documents, LockingDocuments)
    lock = await documents.lock("consumer", chosen.name)
    if lock is None:
        raise EventfoldError(f"consumer {chosen.name!r} is being read by another process: stop it first")
    try:
        await Checkpoint(reader, chosen.name, 0, None).last_commit()
    except CorruptLogError:
        await move_consumer(reader, chosen.name, chosen.offset)
    else:
        raise _changed(chosen.path)
    finally:
        lock.release()


def _valid_events(count: int) -> str:
    return "1 valid event" if count == 1 else f"{count} valid events"


def _changed(path: str) -> EventfoldError:
    return EventfoldError(f"{path} has changed since the repair was planned: plan again")
