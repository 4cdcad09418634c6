"""Repairs a log in files, as a person decides after `verify` has reported what is wrong.

`plan_repairs` changes nothing; `repair` carries out the chosen parts of the plan, and only while everything is still as
the plan says.

Promises: no event is removed unless the caller names the offset from which events are lost; what is cut off is kept
beside the log; nobody else writes meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import aclosing
from typing import Any, TypeAlias

import msgspec

from ._address import Address, engine_of
from ._consumer import _Checkpoint, move_consumer
from ._engine import DocumentKind, LockingDocuments, paths_of
from ._errors import CorruptLogError, EventfoldError
from ._files.active import WriterLock
from ._files.damaged_end import cut_damaged_end, find_damaged_end
from ._files.paths import Layout
from ._reader import EventReader
from ._threads import in_thread
from ._verify import Problem, verify
from ._view import View


class CutEnd(msgspec.Struct, frozen=True):
    """Cuts off the damaged end of `app.jsonl` at `offset` (in bytes of the whole log).

    `size` is the number of bytes, which are kept in `kept_in`. `events` counts the valid events among them, which the
    log loses: if there are any, `repair` requires the offset in `lose_events_from`.
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
        lost = f"; {self.events} valid events follow the damage and would be lost" if self.events else ""
        return f"cut {self.path} at offset {self.offset} ({self.reason}): {self.size} bytes go to {self.kept_in}{lost}"


class DropSnapshot(msgspec.Struct, frozen=True):
    """Deletes the snapshot of a view, which is then rebuilt from the log."""

    path: str
    name: str
    reason: str

    def __str__(self) -> str:
        return f"delete the snapshot {self.path} ({self.reason}): the view is rebuilt"


class ResetConsumer(msgspec.Struct, frozen=True):
    """Makes a consumer continue from `offset` (in bytes of the whole log)."""

    path: str
    name: str
    offset: int
    reason: str

    def __str__(self) -> str:
        return f"make consumer {self.name} continue from offset {self.offset} ({self.reason})"


Repair: TypeAlias = CutEnd | DropSnapshot | ResetConsumer


class RepairPlan(msgspec.Struct, frozen=True):
    """The possible `repairs`, and the `problems` that only a backup can fix."""

    repairs: tuple[Repair, ...]
    problems: tuple[Problem, ...]


async def plan_repairs(
    dir: Address,
    *,
    views: Iterable[View[Any]] = (),
    progress: Callable[[int, int], object] | None = None,
) -> RepairPlan:
    """Reads a whole log in files and plans its repairs. Changes nothing, and leaves nothing if cancelled.

    A damaged end is the only repair in its plan, since which snapshots and consumers still fit is known only after the
    cut: plan again then. A consumer whose offset is beyond the end of the log will continue from the head; any other
    one whose offset does not fit, from the start.

    Args:
        dir: The data directory.
        views: Views whose snapshots are compared with a replay of the log.
        progress: Called repeatedly with the number of bytes read so far and in total.

    Returns:
        The plan, all or some of whose repairs can be passed to `repair`.

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
    """Carries out chosen repairs in order, under the writer's lock.

    If cancelled, it stops after the current repair; those before it are done.

    Args:
        dir: The data directory.
        repairs: All or some of the repairs that `plan_repairs` returned.
        lose_events_from: The offset of a cut whose damage is followed by valid events, which the log then loses.

    Raises:
        LogLockedError: The log is open for writing.
        EventfoldError: Valid events would be lost and their offset was not named, a consumer is being read, or the log
            has changed since the plan was made. The repairs before the failed one are done.
        OSError: A file could not be read or written, for example if there is no room to keep what is cut off.
    """
    layout = await _layout_of(dir)
    lock = WriterLock(layout)
    try:
        await in_thread(lock.acquire)
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
    end = find_damaged_end(layout, CorruptLogError(layout.log_path, problem.offset, problem.reason))
    return CutEnd(problem.path, end.offset, end.size, end.events, problem.reason)


async def _cut(layout: Layout, lock: WriterLock, chosen: CutEnd, lose_events_from: int | None) -> None:
    if chosen.events and lose_events_from != chosen.offset:
        raise EventfoldError(
            f"{chosen.events} valid events follow the damage at offset {chosen.offset} of {chosen.path}, and "
            f"would be lost: restore a backup, or name the offset {chosen.offset} to lose them"
        )
    damage = await _first_damage(EventReader(layout.dir))
    end = None if damage is None else await in_thread(find_damaged_end, layout, damage)
    if end is None or end != (chosen.offset, chosen.size, chosen.events):
        raise _changed(chosen.path)
    await in_thread(cut_damaged_end, layout, lock.fd, end)


async def _first_damage(reader: EventReader) -> CorruptLogError | None:
    """Returns the first damage in a read of the whole log: from anywhere else, the rest of a batch may look valid."""
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
        raise EventfoldError(f"consumer {chosen.name!r} is being read by another process: stop it first")
    try:
        await _Checkpoint(reader, chosen.name, 0, None).last_commit()
    except CorruptLogError:
        await move_consumer(reader, chosen.name, chosen.offset)
    else:
        raise _changed(chosen.path)
    finally:
        lock.release()


def _changed(path: str) -> EventfoldError:
    return EventfoldError(f"{path} has changed since the repair was planned: plan again")
