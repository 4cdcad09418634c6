"""How long eventfold blocks the event loop.

A timer should be called every millisecond. The main figures are its delays in milliseconds, each limited to the
processor time that this process used in that time. The other columns are the whole delay, including that caused by
other programs, and the longest processor time of a single callback. The first two rows are measured without eventfold.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ._bench import Bench
from ._child import Contender
from ._harness import Case, Figures, Goal, Table
from .contenders._eventfold_hold import WORKS

COLUMNS = {"p99.9": "ms", "max": "ms", "late p99.9": "ms", "computing": "ms"}
BASELINES = ("nothing", "a computing thread")


def tables(bench: Bench) -> Iterator[Table]:
    """Each kind of work runs for some seconds."""
    options = bench.options
    events = options.size(min(options.events, 200_000), min(options.events, 10_000))
    seconds = 0.1 if options.quick else 2.0
    dirs: dict[str, Path | None] = {}

    @contextmanager
    def written() -> Iterator[None]:
        with bench.new_dir() as parent:
            for contender in bench.contenders("raw", "eventfold"):
                dirs[contender.name] = bench.write(contender, parent, events)
            yield

    def case(work: str, contender: Contender) -> Case:
        def once() -> Figures | None:
            dir = dirs[contender.name]
            answer = None if dir is None else contender.ask("hold", dir=str(dir), what=work, seconds=seconds)
            if answer is None:
                return None
            fields = zip(COLUMNS, ("p999", "max", "late", "callback"), strict=True)
            return {column: answer[field] * 1e3 for column, field in fields}

        goals = (Goal(5, at_least=False),) if contender.name == "eventfold" else ()
        return Case(work, contender.name, once, goals)

    cases = [case(work, bench.contender("raw")) for work in BASELINES]
    cases += [case(work, contender) for work in WORKS for contender in bench.contenders("eventfold")]
    yield Table(
        "hold",
        f"lateness of a timer, about {seconds:g} s each, logs of {events:,} events",
        COLUMNS,
        cases,
        rounds=min(options.rounds, 3),
        warm_up=False,
        setting=written,
    )
