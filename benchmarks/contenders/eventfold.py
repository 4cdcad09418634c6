"""eventfold, used as its documentation says: defaults everywhere, so every append is on disk before it returns."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import count as numbers
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec

from benchmarks._events import TYPES, Order, Totals, add, add_typed, sample_fields
from benchmarks._probe import growth
from eventfold import Catalog, ConditionalAppendError, Event, EventLog, EventReader, EventWriter, SyncMode, View, verify
from eventfold._files import operations
from eventfold.cli._select import last, selection

from . import _eventfold_decisions, _eventfold_growth, _eventfold_hold, _eventfold_tails, _eventfold_together
from ._eventfold_states import Entries, fill, large_log, sample_events
from ._serve import Answer, percentiles, serve, time_appends, time_conditional
from .raw import write_lines

REFRESHES = 20
CALLS = 10_000
# Seconds after which a file is no longer regarded as being written.
AT_REST = 0.06
# Seconds of appends before a rotation, for comparison: per byte that is rotated, and at least.
USUAL, SOME = 1 / 64_000_000, 0.2


def new_view(name: str = "totals", types: list[str] | None = None, shares_events: bool = False) -> View[Totals]:
    return View(name, add, Totals, event_types=types, shares_events=shares_events)


def catalog() -> Catalog:
    catalog = Catalog()
    for type in TYPES:
        catalog.event(type)(msgspec.defstruct("Order", [], bases=(Order,), frozen=True, gc=False))
    return catalog


def drop_snapshots(dir: str) -> None:
    shutil.rmtree(Path(dir, "views"), ignore_errors=True)


def folded(seconds: float, state: Totals) -> Answer:
    return {"seconds": seconds, **msgspec.structs.asdict(state)}


class Eventfold:
    say: Any

    async def append(self, dir: str, tasks: int, count: int, batch: int) -> Answer:
        return await time_appends(EventWriter.open(dir), sample_events(tasks * count * batch), tasks, batch)

    async def append_if(self, dir: str, tasks: int, count: int) -> Answer:
        async with EventWriter.open(dir) as log:

            async def attempt() -> bool:
                try:
                    await log.append_if(Event(**sample_fields(log.head.offset)), *log.head)
                except ConditionalAppendError:
                    return False
                return True

            return await time_conditional(attempt, tasks, count)

    async def append_together(self, **fields: Any) -> Answer:
        return await _eventfold_together.append(self.say, **fields)

    async def write(self, dir: str, events: int, distinct: int | None, batch: int = 1) -> Answer:
        """Writes lines like those of single appends without eventfold, and checks that the first one is the same."""
        write_lines(Path(dir), events, distinct, batch)
        async with EventWriter.open(Path(dir, "checked"), sync=SyncMode.OS) as writer:
            await writer.append_many(sample_events(min(batch, events)))
            lines = writer.log_path.read_bytes()
        shutil.rmtree(Path(dir, "checked"))
        with open(Path(dir, "app.jsonl"), "rb") as file:
            if file.read(len(lines)) != lines:
                raise AssertionError("the writer's lines are not those that are read here")
        return {}

    async def read(self, dir: str, how: str) -> Answer:
        """Reads records and folds each in a loop; `how` is a name of `benchmarks.reading`."""
        reader, state = EventReader(dir), Totals()
        begun = perf_counter()
        if how == "read_full":
            async for record in reader.read_full():
                state = add(state, record.event)
        else:
            async for piece in reader.read_slices():
                for record in piece.records():
                    state = add(state, record.event)
        return folded(perf_counter() - begun, state)

    async def replay(self, dir: str, views: int, types: list[str] | None) -> Answer:
        """`EventLog.open` without snapshots, including the time to save those of the views, which are small."""
        return await self._replay(dir, [new_view(f"totals-{number}", types) for number in range(views)])

    async def replay_shared(self, dir: str, views: int, types: list[str] | None) -> Answer:
        """Replays with views that share the events."""
        return await self._replay(dir, [new_view(f"totals-{number}", types, True) for number in range(views)])

    async def _replay(self, dir: str, registered: list[View[Totals]]) -> Answer:
        drop_snapshots(dir)
        begun = perf_counter()
        async with EventLog.open(dir, views=registered):
            return folded(perf_counter() - begun, registered[-1].state)

    async def rebuild(self, dir: str, views: int, types: list[str] | None) -> Answer:
        """`View.rebuild`, without a writer."""
        drop_snapshots(dir)
        view = new_view(types=types)
        begun = perf_counter()
        await view.rebuild(EventReader(dir))
        return folded(perf_counter() - begun, view.state)

    async def last(self, dir: str, count: int) -> Answer:
        """Reads the last events, as `eventfold cat --last` does."""
        begun = perf_counter()
        found = await last(EventReader(dir), count, 0, None, selection())
        seconds = perf_counter() - begun
        if len(found) != count:
            raise AssertionError(f"{len(found)} events, not {count}")
        return {"seconds": seconds}

    async def verify(self, dir: str, views: int, types: list[str] | None) -> Answer:
        """Verifies a log without snapshots."""
        drop_snapshots(dir)
        begun = perf_counter()
        report = await verify(dir)
        seconds = perf_counter() - begun
        if not report.ok:
            raise AssertionError(report.problems)
        return {"seconds": seconds, "events": report.events}

    async def typed(self, dir: str, views: int, types: list[str] | None) -> Answer:
        """Replays with objects as the events' data."""
        drop_snapshots(dir)
        view = View("totals", add_typed, Totals)
        begun = perf_counter()
        async with EventLog.open(dir, views=[view], catalog=catalog()):
            return folded(perf_counter() - begun, view.state)

    async def open(self, dir: str, snapshot: bool) -> Answer:
        if not snapshot:
            drop_snapshots(dir)
        elif not Path(dir, "views").exists():
            async with EventLog.open(dir, views=[new_view()]):
                pass
        begun = perf_counter()
        async with EventLog.open(dir, views=[new_view()]):
            return {"seconds": perf_counter() - begun}

    async def refresh(self, dir: str, new: int, bytes: int) -> Answer:
        async with large_log(dir, bytes) as log:
            view, reader = log.views["large"], log.reader()
            if not new:
                with counted_writes() as written:
                    begun = perf_counter()
                    for _ in range(CALLS):
                        await view.refresh(reader)
                    return {"seconds": (perf_counter() - begun) / CALLS, "written": sum(written) / CALLS}
            events, seconds, total = sample_events(new), [], 0
            for _ in range(REFRESHES):
                await log.append_many(events)
                with counted_writes() as written:
                    begun = perf_counter()
                    await view.refresh(reader)
                    seconds.append(perf_counter() - begun)
                total += sum(written)
            if view.offset != log.head.offset:
                raise AssertionError(f"{view!r} was not brought to {log.head}")
        return {"seconds": percentiles(seconds)["p50"], "written": total / REFRESHES}

    async def refresh_alone(self, dir: str, bytes: int) -> Answer:
        """Refreshes with a reader without a writer in its process, after the files have been at rest for a while."""
        async with large_log(dir, bytes):
            pass
        await asyncio.sleep(AT_REST)
        reader, view, seconds = EventReader(dir), View("large", fill, Entries), []
        await view.refresh(reader)
        with counted_writes() as written:
            for _ in range(CALLS // 10):
                begun = perf_counter()
                await view.refresh(reader)
                seconds.append(perf_counter() - begun)
        return {"seconds": percentiles(seconds)["p50"], "written": sum(written) / len(seconds)}

    async def tail(self, dir: str, tails: int, count: int) -> Answer:
        return await _eventfold_tails.tail(dir, tails, count)

    async def listen(self, dir: str, tails: int, count: int, shared: bool = False) -> Answer:
        return await _eventfold_tails.listen(dir, tails, count, shared, lambda: self.say({"ready": True}))

    async def send(self, dir: str, count: int, interval: float, shared: bool = False) -> Answer:
        return await _eventfold_tails.send(dir, count, interval, shared)

    async def idle(self, dir: str, logs: int, seconds: float) -> Answer:
        return await _eventfold_tails.idle(dir, logs, seconds)

    async def rotate(self, dir: str, tasks: int) -> Answer:
        size = Path(dir, "app.jsonl").stat().st_size
        async with EventWriter.open(dir) as log, appending(log, tasks) as waits:
            if tasks:
                await asyncio.sleep(max(SOME, USUAL * size))
            begun = perf_counter()
            await log.rotate()
            ended = perf_counter()
        answer: Answer = {"seconds": ended - begun, "bytes": size}
        if tasks:
            answer["usual"] = percentiles([end - start for start, end in waits if end <= begun])
            answer["during"] = percentiles([end - start for start, end in waits if end > begun and start < ended])
        return answer

    async def peak(self, dir: str, what: str) -> Answer:
        if what == "replay":
            drop_snapshots(dir)
            with growth() as peak:
                await new_view().rebuild(EventReader(dir))
            return {"bytes": peak()}
        async with EventWriter.open(dir) as log:
            with growth() as peak:
                await log.rotate()
        return {"bytes": peak()}

    async def append_tagged(
        self, dir: str, tasks: int, count: int, start: int, conditional: bool, index: bool | None
    ) -> Answer:
        return await _eventfold_decisions.append(dir, tasks, count, start, conditional, bool(index))

    async def write_tagged(self, dir: str, events: int, tags: int) -> Answer:
        return _eventfold_decisions.write(dir, events, tags)

    async def index(self, dir: str) -> Answer:
        return await _eventfold_decisions.build(dir)

    async def read_tagged(self, dir: str, tags: list[int], index: bool | None) -> Answer:
        return await _eventfold_decisions.read(dir, tags, bool(index))

    async def grow(self, dir: str, what: str, times: int) -> Answer:
        return await _eventfold_growth.grow(dir, what, times)

    async def hold(self, dir: str, what: str, seconds: float) -> Answer:
        return await _eventfold_hold.hold(dir, what, seconds)


@contextmanager
def counted_writes() -> Iterator[list[int]]:
    """Yields a list that collects the sizes of eventfold's writes to files while the block runs."""
    written: list[int] = []
    write = operations.write

    def count(fd: int, data: bytes, position: int) -> None:
        written.append(len(data))
        write(fd, data, position)

    operations.write = count
    try:
        yield written
    finally:
        operations.write = write


@asynccontextmanager
async def appending(log: EventWriter, tasks: int) -> AsyncIterator[list[tuple[float, float]]]:
    """Appends from tasks while the block runs; yields a list of when each append began and ended."""
    waits: list[tuple[float, float]] = []
    number, going = numbers(), True

    async def work() -> None:
        while going:
            event = Event(**sample_fields(next(number)))
            begun = perf_counter()
            await log.append(event)
            waits.append((begun, perf_counter()))

    async with asyncio.TaskGroup() as group:
        for _ in range(tasks):
            group.create_task(work())
        yield waits
        going = False


if __name__ == "__main__":
    serve(Eventfold())
