"""Views rebuilt from the whole log.

The reference is the loop that you would write without eventfold: it decodes each line of the file into a plain
`msgspec.Struct` and passes it to the reducer, with no checks and no offsets, and blocks the event loop throughout. All
figures are events of the log per second, including events that a view doesn't need.
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
                continue  # the result would be the same as with one view
            cases.append(case(work, contender, contender.name, "replay"))
            if contender.name == "eventfold" and work != FIVE:
                cases.append(case(work, contender, REBUILD, "rebuild"))
            if contender.name == "eventfold" and work == FIVE:
                cases.append(case(work, contender, SHARED, "replay_shared"))
            if contender.name in ("raw", "eventfold") and work == ONE:
                cases.append(case(work, contender, f"{contender.name}, typed", "typed"))
    yield Table(
        "replay",
        f"replaying {events:,} events of about {LINE_SIZE} bytes",
        {"rate": "events/s"},
        cases,
        more_is_better=True,
        notes=[
            "eventfold: EventLog.open without snapshots; the time to save those of the views, which are small, counts.",
            "Typed: the events' data are objects of msgspec structs, with eventfold through a Catalog.",
            "A selective view needs a quarter of the events, selected by event_types, a WHERE clause or topics; raw "
            "decodes all.",
            "Each of the five views gets its own event objects; with shares_events=True, events are decoded only once.",
            f"The goal for views that share events is 1.6 times the time of one view, so {1 / 1.6:.3f} times its rate.",
        ],
        setting=written,
    )
