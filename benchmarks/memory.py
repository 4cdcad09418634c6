"""The peak memory of processing a log of 1 GB.

Each case runs once, in a new process. Its figure is the peak growth of the resident memory after everything has been
imported and the log has been opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ._bench import Bench, events_in
from ._child import Contender
from ._harness import Case, Figures, Table

SIZE, QUICK_SIZE = 1_000_000_000, 10_000_000
DISTINCT = 100_000


def tables(bench: Bench) -> Iterator[Table]:
    """The cases depend on each other: the log is rotated once, and then read from the archive."""
    size = bench.options.size(SIZE, QUICK_SIZE)
    dirs: dict[str, Path | None] = {}

    @contextmanager
    def written() -> Iterator[None]:
        with bench.new_dir() as parent:
            for contender in bench.contenders("raw", "eventfold"):
                dirs[contender.name] = bench.write(contender, parent, events_in(size), DISTINCT)
            yield

    def case(work: str, contender: Contender, what: str) -> Case:
        def once() -> Figures | None:
            dir = dirs[contender.name]
            if dir is None:
                return None
            with contender.again() as new:
                answer = new.ask("peak", dir=str(dir), what=what)
            return None if answer is None else {"growth": answer["bytes"] / 1e6}

        return Case(work, contender.name, once)

    both = bench.contenders("raw", "eventfold")
    not_raw = bench.contenders("eventfold")
    yield Table(
        "memory",
        f"peak memory for {size / 1e9:g} GB of log",
        {"growth": "MB"},
        [
            *(case("replay into one view", contender, "replay") for contender in both),
            *(case("rotate", contender, "rotate") for contender in both),
            *(case("replay from the archive", contender, "replay") for contender in not_raw),
        ],
        rounds=1,
        warm_up=False,
        setting=written,
    )
