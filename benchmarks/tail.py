"""The time from the call of append until an event reaches the tails, in the writer's process and in another one.

It includes the time until the event is on disk, which is also shown separately. In the writer's process, each event is
appended when the previous one has reached all tails. To another process, events are sent at a steady rate. A second
table shows the cost of idle tails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ._bench import Bench
from ._child import Answer, Contender
from ._harness import Case, Figures, Goal, Table

COLUMNS = {"p50": "ms", "p99": "ms", "max": "ms", "append": "ms"}
# By number of tails: events in the same process, events to another process, and seconds between the latter.
SIZES = {1: (200, 100, 0.01), 100: (50, 30, 0.03), 1_000: (10, 8, 0.1)}
# Goals for eventfold in another process, with any number of tails.
GOALS = (Goal(0.4, at_least=False), Goal(1.5, at_least=False, column="p99"))
IDLE_SECONDS, QUICK_IDLE_SECONDS = 2.0, 0.1
# Percent of one processor.
IDLE_GOALS = (Goal(0.1, at_least=False),)


def tables(bench: Bench) -> Iterator[Table]:
    """Each round has a new log."""
    yield latencies(bench)
    yield idle(bench)


def latencies(bench: Bench) -> Table:
    listeners: dict[str, Contender] = {}

    @contextmanager
    def listening() -> Iterator[None]:
        listeners.update({contender.name: contender.again() for contender in bench.contenders("raw", "eventfold")})
        try:
            yield
        finally:
            for listener in listeners.values():
                listener.close()

    def inside(contender: Contender, tails: int) -> Answer | None:
        count = bench.options.size(SIZES[tails][0], 5)
        return bench.in_new_dir(contender, "tail", tails=tails, count=count)

    def across(contender: Contender, tails: int) -> Answer | None:
        _, full, interval = SIZES[tails]
        count = bench.options.size(full, 5)
        listener = listeners[contender.name]
        with bench.new_dir() as dir:
            listener.request("listen", dir=str(dir), tails=tails, count=count)
            if listener.answer() is None:
                return None
            sent = contender.ask("send", dir=str(dir), count=count, interval=interval)
            got = listener.answer()
        return None if sent is None or got is None else {**got, **sent}

    def case(contender: Contender, tails: int, ask: Callable[[Contender, int], Answer | None]) -> Case:
        def once() -> Figures | None:
            answer = ask(contender, tails)
            return None if answer is None else {column: answer[column] * 1e3 for column in COLUMNS}

        where = "same process" if ask is inside else "another process"
        goals = GOALS if ask is across and contender.name == "eventfold" else ()
        return Case(f"{tails:,} tail{'s' * (tails > 1)}, {where}", contender.name, once, goals)

    cases = [case(contender, tails, inside) for tails in SIZES for contender in bench.contenders("eventfold")]
    cases += [case(contender, tails, across) for tails in SIZES for contender in bench.contenders("raw", "eventfold")]
    return Table(
        "tail",
        "from the call of append to the delivery by a tail",
        COLUMNS,
        cases,
        notes=[
            "raw: a thread that blocks in inotify, and as many asyncio tasks that wait for the thread and decode the "
            "line. It knows its file, checks nothing, and does not wait for the sync."
        ],
        setting=listening,
    )


def idle(bench: Bench) -> Table:
    """The processor time of a process that only waits."""
    seconds = QUICK_IDLE_SECONDS if bench.options.quick else IDLE_SECONDS

    def case(work: str, contender: Contender, logs: int) -> Case:
        def once() -> Figures | None:
            answer = bench.in_new_dir(contender, "idle", logs=logs, seconds=seconds)
            return None if answer is None else {"share": answer["seconds"] / seconds * 100}

        return Case(work, contender.name, once, IDLE_GOALS if contender.name == "eventfold" else ())

    return Table(
        "tail-idle",
        f"idle tails, measured for {seconds:g} s",
        {"share": "% of a processor"},
        [
            case("an event loop with a timer", bench.contender("raw"), 0),
            *(
                case(f"a tail of {'one log' if logs == 1 else f'each of {logs} logs'}", contender, logs)
                for logs in (1, 20)
                for contender in bench.contenders("eventfold")
            ),
        ],
        rounds=min(bench.options.rounds, 3),
        warm_up=False,
    )
