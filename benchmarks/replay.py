"""Views made anew from the whole log.

The reference is the loop that one would write without eventfold: each line of the file decoded into a plain
`msgspec.Struct` and given to the reducer, with no checks, no offsets, and the event loop held all the while. All
figures are events in the log, per second: the same log for all, whether or not an event is looked at.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter

import msgspec

from eventfold import EventLog, EventReader, View

from ._events import TYPES, PlainEvent, Totals, add, sample_events, sample_lines, write_log
from ._harness import Case, Goal, Options, Table

FIVE = 5


def add_wanted(state: Totals, event: PlainEvent) -> Totals:
    """The reducer for a quarter of the events, where it sees all of them."""
    return add(state, event) if event.type == TYPES[0] else state


@asynccontextmanager
async def prepare(options: Options) -> AsyncIterator[list[Table]]:
    """One log for all rounds, read from the page cache."""
    with options.temporary_dir() as dir:
        await write_log(dir, options.events)
        reader = EventReader(dir)
        size = sum(map(len, sample_lines(sample_events(1000)))) / 1000

        def checked(state: Totals, share: int, start: float) -> float:
            elapsed = perf_counter() - start
            if state.events != options.events // share:
                raise AssertionError(f"{state.events} events were folded, of {options.events // share}")
            return options.events / elapsed

        async def bare(reducer: Callable[[Totals, PlainEvent], Totals], share: int) -> float:
            start = perf_counter()
            decoder = msgspec.json.Decoder(PlainEvent)
            state = Totals()
            with open(dir / "app.jsonl", "rb") as file:
                for line in file:
                    state = reducer(state, decoder.decode(line))
            return checked(state, share, start)

        async def rebuild() -> float:
            view = View("totals", add, Totals)
            start = perf_counter()
            return checked(await view.rebuild(reader), 1, start)

        async def rebuild_selected() -> float:
            view = View("totals", add, Totals, event_types=[TYPES[0]])
            start = perf_counter()
            return checked(await view.rebuild(reader), len(TYPES), start)

        async def refresh_together(count: int) -> float:
            for snapshot in Path(reader.views_dir).glob("*"):
                snapshot.unlink()
            views = [View(f"totals-{number}", add, Totals) for number in range(count)]
            start = perf_counter()
            async with EventLog.open(dir, views=views):
                return min(checked(view.state, 1, start) for view in views)

        quarter = "bare loop, reducer takes a quarter"
        one = "EventLog.open, 1 view"
        yield [
            Table(
                f"{options.events:,} events of about {size:.0f} bytes",
                "events/s",
                True,
                [
                    Case("bare loop", lambda: bare(add, 1)),
                    Case(quarter, lambda: bare(add_wanted, len(TYPES))),
                    Case("View.rebuild", rebuild, Goal(1.0)),
                    Case("View.rebuild, event_types with a quarter", rebuild_selected, Goal(2.0)),
                    Case(one, lambda: refresh_together(1)),
                    Case(f"EventLog.open, {FIVE} views", lambda: refresh_together(FIVE), Goal(1 / 1.6), reference=one),
                ],
                [
                    "Saving the snapshots (small ones, synced) is included; no snapshot is there before.",
                    f"The goal for {FIVE} views is at most 1.6 times the time of one.",
                ],
            )
        ]
