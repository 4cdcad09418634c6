"""The work of eventfold during which the event loop is watched, each for about the requested time."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter

from benchmarks._events import TYPES, Totals, add, sample_fields
from benchmarks._probe import Watched, watch_loop
from eventfold import Event, EventLog, EventReader, EventWriter, View

from ._eventfold_states import Entries, fill, large_log, sample_events
from ._eventfold_tails import append_timed, tailing
from ._serve import Answer, Unsupported

LARGE = 10_000_000
Again = Callable[[], Awaitable[object]]


async def repeat(again: Again, seconds: float) -> Watched:
    async with watch_loop() as watched:
        until = perf_counter() + seconds
        while perf_counter() < until:
            await again()
    return watched


async def from_tasks(log: EventWriter, tasks: int, until: float) -> None:
    """Appends from tasks, each one event after the other."""
    event = Event(**sample_fields(1))

    async def work() -> None:
        while perf_counter() < until:
            await log.append(event)

    await asyncio.gather(*(work() for _ in range(tasks)))


async def append_tasks(dir: str, seconds: float) -> Watched:
    async with EventWriter.open(Path(dir, "new")) as log:
        appending = asyncio.create_task(from_tasks(log, 1_000, perf_counter() + seconds))
        # A thousand tasks that all start in one iteration of the loop block it, whatever they do.
        await asyncio.sleep(min(0.2, seconds / 4))
        async with watch_loop() as watched:
            await appending
    return watched


async def append_batches(dir: str, seconds: float) -> Watched:
    events = sample_events(100)
    async with EventWriter.open(Path(dir, "new")) as log:
        return await repeat(lambda: log.append_many(events), seconds)


async def replay(dir: str, seconds: float, views: int = 1, types: list[str] | None = None) -> Watched:
    async def again() -> None:
        shutil.rmtree(Path(dir, "views"), ignore_errors=True)
        registered = [View(f"totals-{number}", add, Totals, event_types=types) for number in range(views)]
        async with EventLog.open(dir, views=registered):
            pass

    return await repeat(again, seconds)


async def replay_five(dir: str, seconds: float) -> Watched:
    return await replay(dir, seconds, views=5)


async def replay_selective(dir: str, seconds: float) -> Watched:
    return await replay(dir, seconds, types=[TYPES[0]])


async def read(dir: str, seconds: float) -> Watched:
    async def again() -> None:
        async for _ in EventReader(dir).read_full():
            pass

    return await repeat(again, seconds)


async def rotated(dir: str) -> Path:
    """A rotated copy of the log."""
    copy = Path(dir, "rotated")
    if not copy.exists():
        copy.mkdir()
        shutil.copyfile(Path(dir, "app.jsonl"), copy / "app.jsonl")
        async with EventWriter.open(copy) as log:
            await log.rotate()
    return copy


async def replay_archive(dir: str, seconds: float) -> Watched:
    return await replay(str(await rotated(dir)), seconds)


async def rotate(dir: str, seconds: float) -> Watched:
    """Rotates the same log repeatedly while 100 tasks append."""
    copies: list[Path] = []
    async with watch_loop() as watched:
        until = perf_counter() + seconds
        while perf_counter() < until:
            copy = Path(dir, f"copy-{len(copies)}")
            copies.append(copy)
            copy.mkdir()
            await asyncio.to_thread(shutil.copyfile, Path(dir, "app.jsonl"), copy / "app.jsonl")
            async with EventWriter.open(copy) as log:
                rotation = asyncio.create_task(log.rotate())
                while not rotation.done():
                    await from_tasks(log, 100, perf_counter() + 0.05)
    for copy in copies:
        shutil.rmtree(copy)
    return watched


async def refresh_large(dir: str, seconds: float) -> Watched:
    events = sample_events(10)
    async with large_log(Path(dir, "new"), LARGE) as log:

        async def again() -> None:
            await log.append_many(events)
            await log.refresh_all()

        return await repeat(again, seconds)


async def save_large(dir: str, seconds: float) -> Watched:
    async with large_log(Path(dir, "new"), LARGE) as log:

        async def again() -> None:
            await log.append(Event(**sample_fields(1)))
            await log.refresh_all()
            await log.views["large"].save(log.reader())

        return await repeat(again, seconds)


async def open_large(dir: str, seconds: float) -> Watched:
    async with large_log(Path(dir, "new"), LARGE):
        pass

    async def again() -> None:
        async with EventLog.open(Path(dir, "new"), views=[View("large", fill, Entries)]):
            pass

    return await repeat(again, seconds)


async def rotate_large(dir: str, seconds: float) -> Watched:
    """Each rotation rewrites the snapshot."""
    async with large_log(Path(dir, "new"), LARGE) as log:

        async def again() -> None:
            await log.append(Event(**sample_fields(1)))
            await log.rotate()

        return await repeat(again, seconds)


async def close_large(dir: str, seconds: float) -> Watched:
    """Each close saves a state with one more event."""
    async with large_log(Path(dir, "new"), LARGE):
        pass

    async def again() -> None:
        async with EventLog.open(Path(dir, "new"), views=[View("large", fill, Entries)]) as log:
            await log.append(Event(**sample_fields(1)))
            await log.refresh_all()

    return await repeat(again, seconds)


async def tails(dir: str, seconds: float) -> Watched:
    async with EventWriter.open(Path(dir, "new")) as log, tailing([log.reader()] * 1_000) as deliveries:

        async def again() -> None:
            await append_timed(log, 0)
            await deliveries.next()

        return await repeat(again, seconds)


WORKS = {
    "appends from 1,000 tasks": append_tasks,
    "append_many of 100": append_batches,
    "opening, one view, no snapshot": replay,
    "opening, five views, no snapshot": replay_five,
    "opening, a selective view, no snapshot": replay_selective,
    "opening, one view, all in the archive": replay_archive,
    "read_full": read,
    "rotations while 100 tasks append": rotate,
    "ten new events, state of 10 MB": refresh_large,
    "saving a state of 10 MB": save_large,
    "opening, snapshot of 10 MB": open_large,
    "rotating, state of 10 MB": rotate_large,
    "opening and closing, state of 10 MB": close_large,
    "appends to 1,000 tails": tails,
}


async def hold(dir: str, what: str, seconds: float) -> Answer:
    if what not in WORKS:
        raise Unsupported
    watched = await WORKS[what](dir, seconds)
    shutil.rmtree(Path(dir, "new"), ignore_errors=True)
    return watched.answer()
