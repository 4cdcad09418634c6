"""Decisions: conditional appends of tagged events, and reading the events of one tag, compared with UmaDB.

Each appended event has its own tag, and the condition is that no event in the whole log has this tag. The log is either
new in each round, or a large one, in which each tag has ten events that are far apart, like those of an entity.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from ._bench import Bench, per_second
from ._child import Answer, Contender
from ._harness import Case, Figures, Goal, Table

INDEX = "eventfold, index"
RATE = {"rate": "events/s"}
# By number of tasks: how often each of them appends, at full size and in a quick run.
TASKS = {1: (1_000, 50), 100: (100, 2), 1_000: (10, 1)}
# The same with a condition that is checked by reading the log, without an index.
TASKS_THAT_READ = {1: (200, 20), 100: (5, 1), 1_000: (1, 1)}
EVENTS_OF_A_TAG = 10
# Tags that are read in a round, after the first one.
TAGS = 20


def tables(bench: Bench) -> Iterator[Table]:
    yield new_log(bench)
    with Logs.written(bench) as logs:
        yield large_log(bench, logs)
        yield reading(bench, logs)
        yield building(bench, logs)


def who(bench: Bench) -> list[tuple[str, Contender, bool | None]]:
    """All contenders that append and read: the name in the tables, the contender, and whether it uses an index."""
    ours, *others = bench.contenders("eventfold", "umadb")
    return [("eventfold", ours, False), (INDEX, ours, True), *((other.name, other, None) for other in others)]


def works(tasks: int) -> str:
    return "one at a time" if tasks == 1 else f"{tasks:,} tasks"


def new_log(bench: Bench) -> Table:
    def case(name: str, contender: Contender, index: bool | None, conditional: bool, tasks: int) -> Case:
        sizes = TASKS_THAT_READ if conditional and index is False else TASKS
        times = bench.options.size(*sizes[tasks])

        def once() -> Figures | None:
            fields = {"tasks": tasks, "count": times, "start": 0, "conditional": conditional, "index": index}
            return per_second(tasks * times, "rate", bench.in_new_dir(contender, "append_tagged", **fields))

        work = f"{'conditional' if conditional else 'unconditional'}, {works(tasks)}"
        goals: tuple[Goal, ...] = ()
        if name == INDEX and tasks == 1_000:
            goals = (Goal(4, to=f"{work}, umadb"),) if conditional else (Goal(0.8, to=f"{work}, eventfold"),)
        return Case(work, name, once, goals)

    return Table(
        "decisions",
        "appends of single tagged events to a new log",
        RATE,
        [case(*one, conditional, tasks) for conditional in (False, True) for tasks in TASKS for one in who(bench)],
        more_is_better=True,
        notes=[
            "Conditional: appended only if no event in the whole log has the tag.",
            "eventfold without an index reads the whole log for a condition, so it appends fewer events: "
            + ", ".join(f"{tasks * size[0]:,} ({works(tasks)})" for tasks, size in TASKS_THAT_READ.items())
            + ".",
            "The index also contains the events' ids. UmaDB's events have no ids.",
        ],
    )


class Logs:
    """A large log of each contender, and eventfold's also as an archive."""

    def __init__(self, events: int) -> None:
        self.events = events
        self.dirs: dict[str, Path] = {}
        self._tags = events // EVENTS_OF_A_TAG
        self._next_event = events
        self._next_tag = count()

    @classmethod
    @contextmanager
    def written(cls, bench: Bench) -> Iterator[Logs]:
        logs, ours = cls(bench.options.events), bench.contender("eventfold")
        with bench.new_dir() as parent:
            for contender in bench.contenders("eventfold", "umadb"):
                (dir := parent / contender.name).mkdir()
                if contender.ask("write_tagged", dir=str(dir), events=logs.events, tags=logs._tags) is not None:
                    logs.dirs[contender.name] = dir
            ours.ask("index", dir=str(logs.dirs["eventfold"]))
            archived = logs.dirs["archive"] = parent / "archive"
            shutil.copytree(logs.dirs["eventfold"], archived)
            ours.ask("rotate", dir=str(archived), tasks=0)
            ours.ask("index", dir=str(archived))
            yield logs

    def append(self, contender: Contender, index: bool | None, tasks: int, times: int) -> Answer | None:
        """The answer of a contender that appends events with new tags, on the condition that no event has the tag."""
        if contender.name not in self.dirs:
            return None
        start, self._next_event = self._next_event, self._next_event + tasks * times
        fields = {"tasks": tasks, "count": times, "start": start, "conditional": True, "index": index}
        return contender.ask("append_tagged", dir=str(self.dirs[contender.name]), **fields)

    def read(self, contender: Contender, log: str, index: bool | None) -> Answer | None:
        """The answer of a contender that reads the events of some tags, which differ each time."""
        if log not in self.dirs:
            return None
        tags = [next(self._next_tag) * 7919 % self._tags for _ in range(2 if index is False else TAGS + 1)]
        answer = contender.ask("read_tagged", dir=str(self.dirs[log]), tags=tags, index=index)
        if answer is not None and answer["events"] != EVENTS_OF_A_TAG:
            raise AssertionError(f"{contender.name} found {answer['events']} events of a tag, not {EVENTS_OF_A_TAG}")
        return answer


def large_log(bench: Bench, logs: Logs) -> Table:
    def case(name: str, contender: Contender, index: bool | None, tasks: int) -> Case:
        times = bench.options.size(*TASKS[tasks])

        def once() -> Figures | None:
            return per_second(tasks * times, "rate", logs.append(contender, index, tasks, times))

        return Case(f"conditional, {works(tasks)}", name, once)

    return Table(
        "decisions-large",
        f"conditional appends to a log of {logs.events:,} events",
        RATE,
        [case(*one, tasks) for tasks in TASKS for one in who(bench) if one[2] is not False],
        more_is_better=True,
        notes=["eventfold without an index is left out: it would read the whole log for each condition."],
    )


def reading(bench: Bench, logs: Logs) -> Table:
    def case(work: str, name: str, figure: str, ask: Callable[[], Answer | None], goal: float | None = None) -> Case:
        def once() -> Figures | None:
            answer = ask()
            return None if answer is None else {"time": answer[figure] * 1e3}

        return Case(work, name, once, () if goal is None else (Goal(goal, at_least=False),))

    cases = []
    for work, figure, goals in (("reading", "p50", (5, 30)), ("opening and reading", "open", (None, None))):
        for archived, goal in zip((False, True), goals, strict=True):
            for name, contender, index in who(bench):
                log = "archive" if archived and contender.name == "eventfold" else contender.name
                if archived and log != "archive":
                    continue
                cases.append(
                    case(
                        f"{work}, {'archive' if archived else 'active log'}",
                        name,
                        figure,
                        lambda contender=contender, log=log, index=index: logs.read(contender, log, index),
                        goal if index else None,
                    )
                )
    return Table(
        "decisions-read",
        f"reading the {EVENTS_OF_A_TAG} events of one tag out of {logs.events:,}",
        {"time": "ms"},
        cases,
        notes=[
            f"Reading: the median of {TAGS} tags that have not been read before; without an index, a single tag.",
            "Opening: for UmaDB, this includes starting its server. UmaDB has no archive.",
        ],
    )


def building(bench: Bench, logs: Logs) -> Table:
    ours = bench.contender("eventfold")

    def once() -> Figures | None:
        answer = ours.ask("index", dir=str(logs.dirs["eventfold"]))
        return None if answer is None else {"time": answer["seconds"]}

    return Table(
        "decisions-index",
        f"building the index of {logs.events:,} events, each with a tag and an id",
        {"time": "s"},
        [Case("building", INDEX, once)],
        rounds=1,
        warm_up=False,
    )
