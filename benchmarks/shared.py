"""Several processes that write one log at the same time, compared with an exclusive writer.

All processes append from their tasks for the same few seconds. The rate is that of all events acknowledged in that
time. The lowest and the highest share say how evenly the processes share the log: a process's number of events divided
by the average of all processes. Each round has a new log, and does not include the time to open and close it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import Any

from ._bench import Bench
from ._child import Answer, Contender
from ._harness import Case, Figures, Goal, Table

OURS = "eventfold"
SHARED = "eventfold, shared"
COLUMNS = {"rate": "events/s", "p99": "ms", "lowest share": "x", "highest share": "x"}
TASKS = 1_000
PROCESSES, QUICK_PROCESSES = (1, 2, 4, 8), (1, 2)
SECONDS, QUICK_SECONDS = 2.0, 0.1
ROTATE_AT = 4 * 2**20
# Nanoseconds in which every process has seen that it is to begin.
SOON = 20_000_000
# Each process's share of the average one's events.
FAIR = (Goal(0.7, column="lowest share"), Goal(1.4, at_least=False, column="highest share"))
# Milliseconds within which an append returns, even during a rotation.
PROMPT = (Goal(100, at_least=False, column="p99"),)
# Events to a tail in another process, and seconds between them.
EVENTS, QUICK_EVENTS, INTERVAL = 100, 5, 0.01


@dataclass
class Processes:
    """Processes of the contenders, several for each, which are started once and reused."""

    bench: Bench
    _started: dict[str, list[Contender]] = field(default_factory=dict)

    @contextmanager
    def running(self) -> Iterator[None]:
        try:
            yield
        finally:
            for started in self._started.values():
                for process in started:
                    process.close()
            self._started.clear()

    def of(self, contender: Contender, count: int) -> list[Contender]:
        started = self._started.setdefault(contender.name, [])
        started += [contender.again() for _ in range(count - len(started))]
        return started[:count]

    def append(self, contender: Contender, count: int, **fields: Any) -> list[Answer] | None:
        """The answers of `count` processes that append at the same time."""
        processes = self.of(contender, count)
        with self.bench.new_dir() as dir:
            (log := dir / "log").mkdir()
            for process in processes:
                process.request("append_together", dir=str(log), start=str(dir / "start"), **fields)
                if process.answer() is None:
                    return None
            prepared = dir / "prepared"
            prepared.write_text(f"{monotonic_ns() + SOON}")
            prepared.rename(dir / "start")
            return [process.answer() or {} for process in processes]


def tables(bench: Bench) -> Iterator[Table]:
    processes = Processes(bench)
    with processes.running():
        yield appends(bench, processes)
        yield counter(bench, processes)
        yield tails(bench, processes)


def figures_of(answers: list[Answer] | None, seconds: float) -> Figures | None:
    if answers is None:
        return None
    events = [answer["events"] for answer in answers]
    average = max(sum(events) / len(events), 1)
    return {
        "rate": sum(events) / seconds,
        "p99": max(answer["p99"] for answer in answers) * 1e3,
        "lowest share": min(events) / average,
        "highest share": max(events) / average,
    }


def case_of(bench: Bench, processes: Processes, conditional: bool = False) -> Callable[..., Case]:
    seconds = QUICK_SECONDS if bench.options.quick else SECONDS
    ours = bench.contender("eventfold")

    def case(
        work: str,
        name: str,
        count: int,
        tasks: int,
        contender: Contender | None = None,
        goals: Any = (),
        limit: int = 0,
    ) -> Case:
        def once() -> Figures | None:
            answers = processes.append(
                contender or ours,
                count,
                seconds=seconds,
                tasks=tasks // count,
                shared=name != OURS,
                conditional=conditional,
                max_log_size=limit,
            )
            return figures_of(answers, seconds)

        return Case(work, name, once, goals)

    return case


def in_processes(count: int) -> str:
    return f"1,000 tasks in {count} process{'es' * (count > 1)}"


def appends(bench: Bench, processes: Processes) -> Table:
    counts = PROCESSES if not bench.options.quick else QUICK_PROCESSES
    several = counts[len(counts) // 2]
    case = case_of(bench, processes)
    alone, together = "1 task", in_processes(1)
    cases = [
        case(alone, "raw", 1, 1, bench.contender("raw")),
        case(alone, OURS, 1, 1),
        case(alone, SHARED, 1, 1, goals=(Goal(0.8, to=f"{alone}, {OURS}"),)),
        case(f"1 task in each of {several} processes", SHARED, several, several),
        case(together, OURS, 1, TASKS),
        case(together, SHARED, 1, TASKS, goals=(Goal(0.9, to=f"{together}, {OURS}"),)),
    ]
    for count in counts[1:]:
        faster = (Goal(1.3, to=f"{together}, {OURS}"),) if count == 2 else ()
        cases.append(case(in_processes(count), SHARED, count, TASKS, goals=(*faster, *FAIR)))
        if count == several:
            others = bench.contenders("sqlite", "sqlite_shared")
            cases += [case(in_processes(count), other.name, count, TASKS, other) for other in others]
    cases.append(case(f"{together}, with rotation", OURS, 1, TASKS, limit=ROTATE_AT))
    for count in sorted({1, several, counts[-1]}):
        cases.append(case(f"{in_processes(count)}, with rotation", SHARED, count, TASKS, goals=PROMPT, limit=ROTATE_AT))
    return Table(
        "shared",
        "processes that append to one log",
        COLUMNS,
        cases,
        more_is_better=True,
        notes=[
            "eventfold: one exclusive writer. The p99 is that of the slowest process.",
            "sqlite and sqlite_shared: one connection per process; the processes wait for the database's lock.",
            f"With rotation: the log is rotated whenever the active log reaches {ROTATE_AT // 2**20} MiB.",
        ],
    )


def counter(bench: Bench, processes: Processes) -> Table:
    several = bench.options.size(4, 2)
    case = case_of(bench, processes, conditional=True)
    sqlite = bench.contender("sqlite")
    cases = [case("1 task", OURS, 1, 1), case("1 task", SHARED, 1, 1), case("1 task", "sqlite", 1, 1, sqlite)]
    work = f"1 task in each of {several} processes"
    cases += [case(work, SHARED, several, several), case(work, "sqlite", several, several, sqlite)]
    return Table(
        "shared-counter",
        "a counter: conditional appends, retried until they succeed",
        COLUMNS,
        cases,
        more_is_better=True,
        notes=["The p99 is that of successful appends, including their failed attempts."],
    )


def tails(bench: Bench, processes: Processes) -> Table:
    count = bench.options.size(EVENTS, QUICK_EVENTS)
    ours = bench.contender("eventfold")

    def case(name: str, listener_writes: bool) -> Case:
        shared = name == SHARED

        def once() -> Figures | None:
            (listener,) = processes.of(ours, 1)
            with bench.new_dir() as dir:
                listener.request("listen", dir=str(dir), tails=1, count=count, shared=listener_writes)
                listener.answer()
                sent = ours.ask("send", dir=str(dir), count=count, interval=INTERVAL, shared=shared)
                got = listener.answer()
            assert sent is not None
            assert got is not None
            return {column: figure * 1e3 for column, figure in {**got, **sent}.items()}

        return Case(f"to a process that {'writes too' if listener_writes else 'reads'}", name, once)

    return Table(
        "shared-tail",
        "from the call of append to a tail in another process",
        {"p50": "ms", "p99": "ms", "max": "ms", "append": "ms"},
        [case(OURS, False), case(SHARED, False), case(SHARED, True)],
        notes=[
            "A process that also writes sees an event once it is on disk; one that only reads may see it a moment "
            "earlier."
        ],
    )
