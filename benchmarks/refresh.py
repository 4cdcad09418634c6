"""Refreshing a view that is already up to date, or nearly.

All in the writer's process. The figures are microseconds for one refresh, the median within a round; appending the new
events is not included.
"""

from __future__ import annotations

import statistics
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from time import perf_counter

import msgspec

from eventfold import Event, EventLog, SyncMode, View

from ._events import Totals, add, sample_events
from ._harness import Case, Goal, Options, Table

NOTHING_NEW_CALLS = 10_000
SMALL_LOG = 1_000
REFRESHES, NEW_EVENTS = 20, 10
LARGE_STATE_ENTRIES = 10_000
ENTRY = "x" * 1000


class Entries(msgspec.Struct):
    """A state of about 10 MB when encoded."""

    texts: dict[str, str] = {}
    totals: Totals = msgspec.field(default_factory=Totals)


def fill(state: Entries, event: Event) -> Entries:
    """Puts the large texts in once, then counts."""
    if event.type == "filled":
        state.texts.update((str(number), ENTRY) for number in range(LARGE_STATE_ENTRIES))
    else:
        add(state.totals, event)
    return state


class Stateful:
    """The least that something awaited can do."""

    def __init__(self) -> None:
        self._state = 0

    async def refresh(self) -> int:
        return self._state


async def ten_new(log: EventLog, name: str) -> float:
    """Microseconds for a refresh with new events."""
    events = sample_events(NEW_EVENTS)
    times = []
    for _ in range(REFRESHES):
        await log.append_many(events)
        start = perf_counter()
        await log.views[name].refresh(log.reader())
        times.append(perf_counter() - start)
    return statistics.median(times) * 1e6


@asynccontextmanager
async def prepare(options: Options) -> AsyncIterator[list[Table]]:
    """Two logs, one with a small state and one with a state of 10 MB, whose snapshots are there."""
    async with AsyncExitStack() as stack:
        small, large = [
            await stack.enter_async_context(
                EventLog.open(stack.enter_context(options.temporary_dir()), views=[view], sync=SyncMode.OS)
            )
            for view in (View("small", add, Totals), View("large", fill, Entries))
        ]
        for event in sample_events(SMALL_LOG):
            await small.append(event)
        await large.append(Event("filled"))
        for log in (small, large):
            await log.refresh_all()
            for view in log.views.values():
                await view.save(log.reader())
                if view.offset != log.head.offset:
                    raise AssertionError(f"{view!r} was not brought to {log.head}")

        async def least() -> float:
            stateful = Stateful()
            start = perf_counter()
            for _ in range(NOTHING_NEW_CALLS):
                await stateful.refresh()
            return (perf_counter() - start) / NOTHING_NEW_CALLS * 1e6

        async def nothing_new() -> float:
            view, reader = small.views["small"], small.reader()
            await view.refresh(reader)
            start = perf_counter()
            for _ in range(NOTHING_NEW_CALLS):
                await view.refresh(reader)
            return (perf_counter() - start) / NOTHING_NEW_CALLS * 1e6

        async def encode_large() -> float:
            start = perf_counter()
            msgspec.json.encode(large.view("large"))
            return (perf_counter() - start) * 1e6

        yield [
            Table(
                "a view that is up to date",
                "µs",
                False,
                [
                    Case("awaiting a method that does nothing", least),
                    Case("nothing new", nothing_new, Goal(5, at_least=False, of_figure=True)),
                ],
            ),
            Table(
                "ten new events",
                "µs",
                False,
                [
                    Case("small state", lambda: ten_new(small, "small")),
                    Case("state of 10 MB", lambda: ten_new(large, "large"), Goal(1.5, at_least=False)),
                    Case("encoding 10 MB once, nothing written", encode_large),
                ],
            ),
        ]
