"""Views made anew from the whole log.

The reference is the loop that one would write without eventfold: each line of the file decoded into a plain
`msgspec.Struct` and given to the reducer, with no checks, no offsets, and the event loop held all the while. All
figures are events in the log, per second: the same log for all, whether or not an event is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ._bench import Bench, per_second
from ._child import Contender
from ._events import LINE_SIZE, TYPES, totals
from ._harness import Case, Figures, Goal, Table

REBUILD, TYPED, SHARED = "eventfold, View.rebuild", "eventfold, typed", "eventfold, shares_events"
BARE = "one view, raw"
ONE, FIVE, SELECTIVE = "one view", "five views", "a selective view"
GOALS = {
    (ONE, "eventfold"): (Goal(1.0, to=BARE),),
    (ONE, REBUILD): (Goal(1.0, to=BARE),),
    (ONE, TYPED): (Goal(1.15, to="one view, eventfold"),),
    (FIVE, SHARED): (Goal(1 / 1.6, to="one view, eventfold"),),
    (SELECTIVE, "eventfold"): (Goal(2.0, to=BARE),),
    (SELECTIVE, REBUILD): (Goal(2.0, to=BARE),),
}
WORKS: dict[str, tuple[int, list[str] | None]] = {ONE: (1, None), FIVE: (5, None), SELECTIVE: (1, [TYPES[0]])}


def tables(bench: Bench) -> Iterator[Table]:
    """One log for all rounds, read from the page cache."""
    events = bench.options.events
    dirs: dict[str, Path | None] = {}
    expected = {ONE: totals(events), FIVE: totals(events), SELECTIVE: totals(events, selective=True)}

    @contextmanager
    def written() -> Iterator[None]:
        with bench.new_dir() as parent:
            for contender in contenders:
                dirs[contender.name] = bench.write(contender, parent, events)
            yield

    def case(work: str, contender: Contender, name: str, do: str) -> Case:
        def once() -> Figures | None:
            dir = dirs[contender.name]
            views, types = WORKS[work]
            answer = None if dir is None else contender.ask(do, dir=str(dir), views=views, types=types)
            if answer is not None and (answer["events"], answer["amount"]) != (
                expected[work].events,
                expected[work].amount,
            ):
                raise AssertionError(f"{work}, {name}: folded {answer}, not {expected[work]}")
            return per_second(events, "rate", answer)

        return Case(work, name, once, GOALS.get((work, name), ()))

    contenders = bench.contenders("raw", "eventfold", "sqlite", "eventsourcing")
    cases = []
    for work in WORKS:
        for contender in contenders:
            if work == FIVE and contender.name == "eventsourcing":
                continue  # it has nothing to say that one view does not
            cases.append(case(work, contender, contender.name, "replay"))
            if contender.name == "eventfold" and work != FIVE:
                cases.append(case(work, contender, REBUILD, "rebuild"))
            if contender.name == "eventfold" and work == FIVE:
                cases.append(case(work, contender, SHARED, "replay_shared"))
            if contender.name in ("raw", "eventfold") and work == ONE:
                cases.append(case(work, contender, f"{contender.name}, typed", "typed"))
    yield Table(
        "replay",
        f"{events:,} events of about {LINE_SIZE} bytes",
        {"rate": "events/s"},
        cases,
        more_is_better=True,
        notes=[
            "eventfold: EventLog.open with no snapshot there; saving those of the views, small ones, is included.",
            "Typed: with a Catalog, so that the events' data are objects of msgspec structs; the same for raw.",
            "A selective view wants a quarter of the events: by event_types, by a WHERE, by topics; raw decodes all.",
            "Each of five views gets event objects of its own; with shares_events=True they are decoded once for all.",
            f"The goal for views that share is at most 1.6 times the time of one, so {1 / 1.6:.3f} times its rate.",
        ],
        setting=written,
    )
