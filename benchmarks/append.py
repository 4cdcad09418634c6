"""Durable appends: what was acknowledged is on disk.

The reference writes pre-encoded lines with `os.write` and syncs each with `os.fdatasync`, which is as many single
durable lines as the disk takes. All figures are acknowledged events per second; opening and closing the log don't
count.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ._bench import Bench, per_second
from ._child import Contender
from ._harness import Case, Figures, Goal, Table

RATE = {"rate": "events/s"}
RAW = "one at a time, raw"
# Tasks: how often each of them appends, at full size and in a quick run.
TASKS = {1: (1_000, 100), 10: (200, 20), 100: (50, 5), 1_000: (10, 2), 10_000: (1, 0)}
BATCH_SIZE = 100
GOALS = {
    "one at a time": (Goal(0.7, to=RAW),),
    "1,000 tasks": (Goal(30, to=RAW), Goal(30, to="1,000 tasks, sqlite")),
}


def tables(bench: Bench) -> Iterator[Table]:
    """Every round has a new log."""

    def case(work: str, contender: Contender, **fields: Any) -> Case:
        def once() -> Figures | None:
            answer = bench.in_new_dir(contender, "append", **fields)
            return per_second(fields["tasks"] * fields["count"] * fields["batch"], "rate", answer)

        return Case(work, contender.name, once, GOALS.get(work, ()) if contender.name == "eventfold" else ())

    everybody = bench.contenders("raw", "eventfold", "sqlite", "sqlite_shared", "eventsourcing", "jsonl")
    cases = []
    for tasks, counts in TASKS.items():
        if count := bench.options.size(*counts):
            work = "one at a time" if tasks == 1 else f"{tasks:,} tasks"
            # One task at a time is what raw does.
            able = [c for c in everybody if tasks == 1 or c.name != "raw"]
            cases += [case(work, contender, tasks=tasks, count=count, batch=1) for contender in able]
    count = bench.options.size(100, 10)
    work = f"batches of {BATCH_SIZE}"
    cases += [case(work, contender, tasks=1, count=count, batch=BATCH_SIZE) for contender in everybody]
    yield Table(
        "append",
        "durable appends",
        RATE,
        cases,
        more_is_better=True,
        notes=[
            "sqlite: a transaction for each append. sqlite_shared: execute and commit on one connection for all tasks, "
            "which then commit each other's appends."
        ],
    )
    yield conditional(bench)


def conditional(bench: Bench) -> Table:
    def case(contender: Contender, tasks: int, count: int) -> Case:
        def once() -> Figures | None:
            answer = bench.in_new_dir(contender, "append_if", tasks=tasks, count=count)
            return per_second(tasks * count, "rate", answer)

        work = "one at a time" if tasks == 1 else f"{tasks} tasks that try again"
        return Case(work, contender.name, once)

    sizes = {1: bench.options.size(1_000, 100), 10: bench.options.size(50, 5)}
    return Table(
        "append-if",
        "conditional appends: only if nobody else came first",
        RATE,
        [
            case(contender, tasks, count)
            for tasks, count in sizes.items()
            for contender in bench.contenders("eventfold", "sqlite", "eventsourcing")
        ],
        more_is_better=True,
        notes=["Of the tasks that try at the same time one succeeds; the others look again and try again."],
    )
