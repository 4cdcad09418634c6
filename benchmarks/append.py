"""Durable appends: what was acknowledged is on disk.

The reference writes pre-encoded lines with `os.write` and syncs each with `os.fdatasync`, which is as many single
durable lines as the disk accepts. `raw, in a thread` does the same in a thread while the event loop stays free, which
is the least that an append can do. All figures are acknowledged events per second, without the time to open and close
the log.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ._bench import Bench, per_second
from ._child import Contender
from ._harness import Case, Figures, Goal, Table

RATE = {"rate": "events/s"}
ONE = "one at a time"
MANY = 10_000
RAW = f"{ONE}, raw"
# By number of tasks: how often each of them appends, at full size and in a quick run.
TASKS = {1: (1_000, 100), 10: (200, 20), 100: (50, 5), 1_000: (10, 2), MANY: (10, 0)}
BATCH_SIZE = 100
GOALS = {
    (ONE, "eventfold"): (Goal(0.75, to=RAW),),
    (ONE, "eventfold, uvloop"): (Goal(0.8, to=RAW),),
    ("1,000 tasks", "eventfold"): (Goal(30, to=RAW), Goal(30, to="1,000 tasks, sqlite")),
    ("10,000 tasks", "eventfold"): (Goal(0.95, to="1,000 tasks, eventfold"),),
}


def tables(bench: Bench) -> Iterator[Table]:
    """Every round has a new log."""

    def case(work: str, contender: Contender, do: str = "append", variant: str = "", **fields: Any) -> Case:
        def once() -> Figures | None:
            answer = bench.in_new_dir(contender, do, **fields)
            return per_second(fields["tasks"] * fields["count"] * fields["batch"], "rate", answer)

        name = contender.name + variant
        return Case(work, name, once, GOALS.get((work, name), ()))

    def alone() -> Iterator[Case]:
        """eventfold next to its limits, so that little time passes between the measurements that are compared."""
        size: dict[str, Any] = {"tasks": 1, "count": bench.options.size(*TASKS[1]), "batch": 1}
        yield case(ONE, bench.contender("raw"), **size)
        yield case(ONE, bench.contender("eventfold"), **size)
        yield case(ONE, bench.contender("raw"), "append_in_thread", ", in a thread", **size)
        if bench.options.loop != "uvloop":
            yield case(ONE, bench.on_uvloop("eventfold"), variant=", uvloop", **size)
            yield case(ONE, bench.on_uvloop("raw"), "append_in_thread", ", in a thread, uvloop", **size)

    everybody = bench.contenders("raw", "eventfold", "sqlite", "sqlite_shared", "eventsourcing", "jsonl")
    cases = list(alone())
    for tasks, counts in TASKS.items():
        if count := bench.options.size(*counts):
            work = ONE if tasks == 1 else f"{tasks:,} tasks"
            done = {case.label for case in cases}
            # raw measures only one task.
            able = [c for c in everybody if c.name != "raw" and f"{work}, {c.name}" not in done]
            for contender in able:
                # A hundred thousand events would take the other contenders minutes.
                times = 1 if tasks == MANY and contender.name != "eventfold" else count
                cases.append(case(work, contender, tasks=tasks, count=times, batch=1))
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
            "raw, in a thread: each line is written and synced in a thread while the event loop stays free.",
            f"{MANY:,} tasks: with eventfold each task appends {TASKS[MANY][0]} times, as with 1,000 tasks, since "
            "starting a task costs as much as an append. With the other contenders each task appends once.",
            "sqlite: a transaction for each append. sqlite_shared: all tasks execute and commit on one connection, and "
            "so commit each other's appends.",
        ],
    )
    yield conditional(bench)


def conditional(bench: Bench) -> Table:
    def case(contender: Contender, tasks: int, count: int) -> Case:
        def once() -> Figures | None:
            answer = bench.in_new_dir(contender, "append_if", tasks=tasks, count=count)
            return per_second(tasks * count, "rate", answer)

        work = ONE if tasks == 1 else f"{tasks} tasks that retry"
        goals = (Goal(0.95, to=f"{plain}, eventfold"),) if tasks == 1 and contender is ours else ()
        return Case(work, contender.name, once, goals)

    def unconditional() -> Figures | None:
        return per_second(sizes[1], "rate", bench.in_new_dir(ours, "append", tasks=1, count=sizes[1], batch=1))

    ours, plain = bench.contender("eventfold"), f"{ONE}, without a condition"
    sizes = {1: bench.options.size(1_000, 100), 10: bench.options.size(50, 5)}
    return Table(
        "append-if",
        "conditional appends: only if the head has not moved",
        RATE,
        [
            Case(plain, ours.name, unconditional),
            *(
                case(contender, tasks, count)
                for tasks, count in sizes.items()
                for contender in bench.contenders("eventfold", "sqlite", "eventsourcing")
            ),
        ],
        more_is_better=True,
        notes=["Of the tasks that try at the same time, one succeeds; the others read the new head and retry."],
    )
