"""Repairing a log in files: what a person may decide about it after `verify` has told what is wrong.

`plan_repairs` looks and changes nothing; `repair` does what was chosen of the plan, and only while everything is still
as the plan says.

Promises: no event is removed unless the offset from which events are lost is named; what is cut off is kept beside the
log; nobody else writes meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import aclosing
from typing import Any, TypeAlias

import msgspec

from ._address import Address, engine_of
from ._aio import in_thread
from ._consumer import _Checkpoint, move_consumer
from ._engine import DocumentKind, LockingDocuments, paths_of
from ._errors import CorruptLogError, EventfoldError
from ._files.cutting import WriterLock, cut, damaged_end
from ._files.paths import Layout
from ._reader import EventReader
from ._verify import Problem, verify
from ._view import View


class CutEnd(msgspec.Struct, frozen=True):
    """Cuts the damaged end off `app.jsonl`, from `offset` (in bytes of the whole log) on.

    `size` is in bytes; they are kept in `kept_in`. `events` counts the valid events among them, which are lost to the
    log: with any, `repair` wants the offset named.
    """

    path: str
    offset: int
    size: int
    events: int
    reason: str

    @property
    def kept_in(self) -> str:
        """The file that gets what is cut off."""
        return f"{self.path}.torn.{self.offset}"

    def __str__(self) -> str:
        lost = f"; {self.events} valid events stand behind the damage and would be lost" if self.events else ""
        return f"cut {self.path} at offset {self.offset} ({self.reason}): {self.size} bytes go to {self.kept_in}{lost}"


class DropSnapshot(msgspec.Struct, frozen=True):
    """Deletes the snapshot of a view, which is then rebuilt from the log."""

    path: str
    name: str
    reason: str

    def __str__(self) -> str:
        return f"delete the snapshot {self.path} ({self.reason}): the view is rebuilt"


class ResetConsumer(msgspec.Struct, frozen=True):
    """Makes a consumer go on from `offset` (in bytes of the whole log)."""

    path: str
    name: str
    offset: int
    reason: str

    def __str__(self) -> str:
        return f"make consumer {self.name} go on from offset {self.offset} ({self.reason})"


Repair: TypeAlias = CutEnd | DropSnapshot | ResetConsumer


class RepairPlan(msgspec.Struct, frozen=True):
    """What can be put right, and the `problems` for which only a backup helps."""

    repairs: tuple[Repair, ...]
    problems: tuple[Problem, ...]


async def plan_repairs(
    dir: Address,
    *,
    views: Iterable[View[Any]] = (),
    progress: Callable[[int, int], object] | None = None,
) -> RepairPlan:
    """Reads a whole log in files, and tells what of it can be repaired. Changes nothing; cancelled, it leaves nothing.

    A damaged end is told alone, since only after it was cut can be told which snapshots and consumers still fit: plan
    again then. A consumer that has come further than the log reaches is to go on from the head; any other one whose
    place does not fit from the start.

    Args:
        dir: The data directory.
        views: Views whose snapshots are compared with a replay of the log.
        progress: Is called again and again with the bytes read and the bytes that there are.

    Returns:
        The repairs, to be given to `repair`, all or some of them.

    Raises:
        EventfoldError: There is no log in that directory, or it is kept by another engine.
        OSError: A file could not be read.
    """
    layout = await _layout_of(dir)
    report = await verify(layout.dir, views=views, progress=progress)
    reader = EventReader(layout.dir)
    snapshots = await _names_by_path(reader, "view")
    consumers = await _names_by_path(reader, "consumer")
    cuts: list[Repair] = []
    others: list[Repair] = []
    left: list[Problem] = []
    for problem in report.problems:
        if problem.path == str(layout.log_path):
            try:
                cuts.append(await in_thread(_cut_end, layout, problem))
            except EventfoldError as error:
                reason = error.reason if isinstance(error, CorruptLogError) else str(error)
                left.append(msgspec.structs.replace(problem, reason=reason))
        elif problem.path in snapshots:
            others.append(DropSnapshot(problem.path, snapshots[problem.path], problem.reason))
        elif problem.path in consumers:
            head = (await reader.head()).offset
            offset = head if problem.offset > head else 0
            others.append(ResetConsumer(problem.path, consumers[problem.path], offset, problem.reason))
        else:
            left.append(problem)
    return RepairPlan(tuple(cuts[:1] or others), tuple(left))


async def repair(dir: Address, repairs: Iterable[Repair], *, lose_events_from: int | None = None) -> None:
    """Does what was chosen of a plan, in order, under the writer's lock.

    Cancelled, it stops after the repair that is under way; those before it are done.

    Args:
        dir: The data directory.
        repairs: What `plan_repairs` gave, or some of it.
        lose_events_from: The offset of a cut behind whose damage valid events stand, which are lost to the log then.

    Raises:
        LogLockedError: The log is open for writing.
        EventfoldError: Valid events would be lost and their offset was not named; a consumer is being read; or the log
            is not as it was when the plan was made. Those repairs before it are done.
        OSError: A file could not be read or written, such as where there is no room to keep what is cut off.
    """
    layout = await _layout_of(dir)
    lock = WriterLock(layout)
    try:
        await in_thread(lock.take)
        for chosen in repairs:
            if isinstance(chosen, CutEnd):
                await _cut(layout, lock, chosen, lose_events_from)
            elif isinstance(chosen, DropSnapshot):
                await EventReader(layout.dir).documents.delete("view", chosen.name)
            else:
                await _reset(EventReader(layout.dir), chosen)
    finally:
        await in_thread(lock.release)


async def _layout_of(dir: Address) -> Layout:
    layout = Layout(paths_of(engine_of(dir).source()).dir)
    if not await in_thread(layout.dir.is_dir):
        raise EventfoldError(f"there is no log in {layout.dir}: name the directory that holds app.jsonl")
    return layout


async def _names_by_path(reader: EventReader, kind: DocumentKind) -> dict[str, str]:
    documents = reader.documents
    return {str(documents.location(kind, name)): name for name in await documents.names(kind)}


def _cut_end(layout: Layout, problem: Problem) -> CutEnd:
    end = damaged_end(layout, CorruptLogError(layout.log_path, problem.offset, problem.reason))
    return CutEnd(problem.path, end.offset, end.size, end.events, problem.reason)


async def _cut(layout: Layout, lock: WriterLock, chosen: CutEnd, lose_events_from: int | None) -> None:
    if chosen.events and lose_events_from != chosen.offset:
        raise EventfoldError(
            f"{chosen.events} valid events stand behind the damage at offset {chosen.offset} of {chosen.path}, and "
            f"would be lost to the log: restore a backup, or name the offset {chosen.offset} to lose them"
        )
    damage = await _first_damage(EventReader(layout.dir))
    end = None if damage is None else await in_thread(damaged_end, layout, damage)
    if end is None or end != (chosen.offset, chosen.size, chosen.events):
        raise _changed(chosen.path)
    await in_thread(cut, layout, lock.fd, end)


async def _first_damage(reader: EventReader) -> CorruptLogError | None:
    """What reading the whole log meets: from anywhere else, the rest of a batch may look sound."""
    try:
        async with aclosing(reader.read_slices()) as slices:
            async for _ in slices:
                pass
    except CorruptLogError as error:
        return error
    return None


async def _reset(reader: EventReader, chosen: ResetConsumer) -> None:
    documents = reader.documents
    assert isinstance(documents, LockingDocuments)
    lock = await documents.lock("consumer", chosen.name)
    if lock is None:
        raise EventfoldError(f"consumer {chosen.name!r} is being read by another process: stop that first")
    try:
        await _Checkpoint(reader, chosen.name, 0, None).last_commit()
    except CorruptLogError:
        await move_consumer(reader, chosen.name, chosen.offset)
    else:
        raise _changed(chosen.path)
    finally:
        lock.release()


def _changed(path: str) -> EventfoldError:
    return EventfoldError(f"{path} is not as it was when the repair was planned: look at it again")
