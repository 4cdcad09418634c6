"""How long after the call of append an event reaches the tails, in the writer's process and in another one.

That includes the time of the append itself, until the event is on disk, which is also shown separately. In the same
process, each event is appended when the previous one has reached all tails; to another process, they are sent at a
steady pace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ._bench import Bench
from ._child import Answer, Contender
from ._harness import Case, Figures, Table

COLUMNS = {"p50": "ms", "p99": "ms", "max": "ms", "append": "ms"}
# Tails: events in the same process, events to another one, and seconds between these.
SIZES = {1: (200, 100, 0.01), 100: (50, 30, 0.03), 1_000: (10, 8, 0.3)}


def tables(bench: Bench) -> Iterator[Table]:
    """Each round has a new log."""
    listeners: dict[str, Contender] = {}

    @contextmanager
    def listening() -> Iterator[None]:
        listeners.update({contender.name: contender.again() for contender in bench.contenders("eventfold")})
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

    def case(where: str, contender: Contender, tails: int, ask: Callable[[Contender, int], Answer | None]) -> Case:
        def once() -> Figures | None:
            answer = ask(contender, tails)
            return None if answer is None else {column: answer[column] * 1e3 for column in COLUMNS}

        return Case(f"{tails:,} tail{'s' * (tails > 1)}, {where}", contender.name, once)

    cases = [
        case(where, contender, tails, ask)
        for where, ask in (("same process", inside), ("another process", across))
        for tails in SIZES
        for contender in bench.contenders("eventfold")
    ]
    yield Table("tail", "from the call of append to the delivery", COLUMNS, cases, setting=listening)
