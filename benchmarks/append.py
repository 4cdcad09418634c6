"""Durable appends: what was acknowledged is on disk.

The reference writes the same line with `os.write` and syncs it with `os.fdatasync`, one after the other, which is as
many single durable lines as the disk takes. All other figures are events acknowledged, per second.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Protocol

from eventfold import Event, EventWriter

from ._events import sample_events, sample_lines
from ._harness import Case, Goal, Options, Table

ONE_BY_ONE = 1_000
# Tasks, how many events each of them appends one after the other, and how many times raw that is to be at least.
CONCURRENT = {10: (200, None), 100: (50, None), 1_000: (20, Goal(30)), 10_000: (3, None)}
BATCHES, BATCH_SIZE = 100, 100


class Appender(Protocol):
    """Something that appends to a log in a directory; every call returns when its events are on disk."""

    async def append(self, event: Event) -> object: ...

    async def append_many(self, events: Sequence[Event]) -> object: ...


class Opener(Protocol):
    """Opens an appender in an empty directory."""

    def __call__(self, dir: Path) -> AbstractAsyncContextManager[Appender]: ...


def open_eventfold(dir: Path) -> AbstractAsyncContextManager[Appender]:
    return EventWriter.open(dir)


async def one_by_one(options: Options, opener: Opener) -> float:
    """Events per second, each awaited before the next."""
    events = sample_events(ONE_BY_ONE)
    with options.temporary_dir() as dir:
        async with opener(dir) as log:
            start = perf_counter()
            for event in events:
                await log.append(event)
            return len(events) / (perf_counter() - start)


async def concurrent(options: Options, opener: Opener, tasks: int, events_each: int) -> float:
    """Events per second from `tasks` tasks, each of which appends `events_each` one after the other."""
    events = sample_events(tasks * events_each)

    async def work(log: Appender, mine: Sequence[Event]) -> None:
        for event in mine:
            await log.append(event)

    with options.temporary_dir() as dir:
        async with opener(dir) as log:
            start = perf_counter()
            async with asyncio.TaskGroup() as group:
                for number in range(tasks):
                    group.create_task(work(log, events[number * events_each : (number + 1) * events_each]))
            return len(events) / (perf_counter() - start)


async def batches(options: Options, opener: Opener) -> float:
    """Events per second in batches, each awaited before the next."""
    events = sample_events(BATCHES * BATCH_SIZE)
    with options.temporary_dir() as dir:
        async with opener(dir) as log:
            start = perf_counter()
            for first in range(0, len(events), BATCH_SIZE):
                await log.append_many(events[first : first + BATCH_SIZE])
            return len(events) / (perf_counter() - start)


async def raw(options: Options) -> float:
    """Lines per second, each written and synced before the next."""
    lines = sample_lines(sample_events(ONE_BY_ONE))
    with options.temporary_dir() as dir:
        fd = os.open(dir / "raw.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            start = perf_counter()
            for line in lines:
                os.write(fd, line)
                os.fdatasync(fd)
            return len(lines) / (perf_counter() - start)
        finally:
            os.close(fd)


@asynccontextmanager
async def prepare(options: Options) -> AsyncIterator[list[Table]]:
    """Every round has a new log."""
    cases = [
        Case("raw write+fdatasync", lambda: raw(options)),
        Case("one at a time", lambda: one_by_one(options, open_eventfold), Goal(0.7)),
    ]
    for tasks, (events_each, goal) in CONCURRENT.items():

        async def round_(tasks: int = tasks, events_each: int = events_each) -> float:
            return await concurrent(options, open_eventfold, tasks, events_each)

        cases.append(Case(f"{tasks:,} tasks", round_, goal))
    cases.append(Case(f"append_many of {BATCH_SIZE}", lambda: batches(options, open_eventfold)))
    yield [Table("durable appends", "events/s", True, cases)]
