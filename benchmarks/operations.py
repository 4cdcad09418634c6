"""Operations on a large log: verifying it, and reading its last events.

Verifying is compared with a replay of the same log into one view. The last events are those of `cat --last`, without
the interpreter's startup and the imports, which the benchmark `import` measures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ._bench import Bench
from ._events import LINE_SIZE
from ._harness import Case, Figures, Goal, Table

LAST = 50
ACTIVE, ARCHIVED = "app.jsonl", "archived"
# Where the events are.
PLACES = (ACTIVE, ARCHIVED)


def tables(bench: Bench) -> Iterator[Table]:
    """One log for all rounds, in the active log and in the archive, read from the page cache."""
    events = bench.options.events
    eventfold = bench.contender("eventfold")
    dirs: dict[str, Path] = {}

    @contextmanager
    def written() -> Iterator[None]:
        with bench.new_dir() as parent:
            for place in PLACES:
                (parent / place).mkdir()
                dir = bench.write(eventfold, parent / place, events)
                assert dir is not None
                dirs[place] = dir
            eventfold.ask("rotate", dir=str(dirs[ARCHIVED]), tasks=0)
            yield

    def whole(do: str, place: str) -> Case:
        def once() -> Figures:
            answer = eventfold.ask(do, dir=str(dirs[place]), views=1, types=None)
            assert answer is not None
            if answer["events"] != events:
                raise AssertionError(f"{do} read {answer['events']} events, not {events}")
            return {"time": answer["seconds"]}

        replay = f"replay, {place}, eventfold"
        goals = (Goal(1.5, at_least=False, to=replay),) if do == "verify" else ()
        return Case(f"{do}, {place}", "eventfold", once, goals, replay)

    yield Table(
        "operations-verify",
        f"verify, {events:,} events of about {LINE_SIZE} bytes",
        {"time": "s"},
        [whole(do, place) for place in PLACES for do in ("replay", "verify")],
        notes=["The replay folds one view, and writes its snapshot."],
        setting=written,
    )

    def last(place: str) -> Case:
        def once() -> Figures:
            answer = eventfold.ask("last", dir=str(dirs[place]), count=LAST)
            assert answer is not None
            return {"time": answer["seconds"] * 1e3}

        return Case(f"cat --last {LAST}, {place}", "eventfold", once, (Goal(100, at_least=False, column="time"),))

    yield Table(
        "operations-last",
        f"the last {LAST} of {events:,} events",
        {"time": "ms"},
        [last(place) for place in PLACES],
        notes=["A new reader reads backwards; in the archive, it decompresses the last frame."],
        setting=written,
    )
