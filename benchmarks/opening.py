"""The time from opening a log to having a view's state, with and without a snapshot of it.

With a snapshot, the time must not depend on the length of the log. The figures are milliseconds.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ._bench import Bench
from ._child import Contender
from ._harness import Case, Figures, Goal, Table

ARCHIVED = "archived, "
# Opening with a snapshot takes about a millisecond, so a round opens several times and takes the median.
QUICK_ONES = 5


def tables(bench: Bench) -> Iterator[Table]:
    """The same logs for all rounds."""
    sizes = [max(4, bench.options.events // share) for share in (100, 10, 1)]
    contenders = bench.contenders("eventfold", "sqlite")
    dirs: dict[tuple[str, int, str], Path | None] = {}

    @contextmanager
    def written() -> Iterator[None]:
        with bench.new_dir() as parent:
            for contender in contenders:
                for events in sizes:
                    dirs[contender.name, events, ""] = bench.write(contender, parent, events)
            for events in (sizes[0], sizes[-1]):
                archived = parent / f"archived-{events}"
                shutil.copytree(parent / f"lines-{events}", archived)
                bench.contender("eventfold").ask("rotate", dir=str(archived), tasks=0)
                dirs["eventfold", events, ARCHIVED] = archived
            yield

    def case(contender: Contender, events: int, snapshot: bool, kind: str = "") -> Case:
        def once() -> Figures | None:
            dir = dirs[contender.name, events, kind]
            if dir is None:
                return None
            answers = [
                contender.ask("open", dir=str(dir), snapshot=snapshot) for _ in range(QUICK_ONES if snapshot else 1)
            ]
            times = [answer["seconds"] * 1e3 for answer in answers if answer is not None]
            return {"time": statistics.median(times)} if times else None

        work = f"{events:,} events, {kind}{'with' if snapshot else 'without'} a snapshot"
        long = snapshot and contender.name == "eventfold" and events == sizes[-1]
        shortest = f"{sizes[0]:,} events, {kind}with a snapshot, eventfold"
        goals = (Goal(0.6, at_least=False), Goal(1.5, at_least=False, to=shortest)) if long else ()
        return Case(work, contender.name, once, goals)

    cases = [case(contender, events, True) for events in sizes for contender in contenders]
    cases += [case(bench.contender("eventfold"), events, True, ARCHIVED) for events in (sizes[0], sizes[-1])]
    cases += [case(contender, events, False) for events in sizes for contender in contenders]
    yield Table(
        "open",
        "opening with one view",
        {"time": "ms"},
        cases,
        notes=[
            "The goals are that the time with a snapshot is short, and does not grow with the log.",
            f"Without a snapshot, the time to save one counts. With one, a round is the median of {QUICK_ONES} "
            "openings.",
            "eventfold takes the lock, looks for traces of a crash, and syncs the files.",
        ],
        setting=written,
    )
