"""Reading records instead of folding a view, and replays of logs that contain the same events in other forms.

The reference for reading is the bare loop of `replay`, which decodes and folds each line of the file. Reading also
folds, but gets the events as records with their offsets. The reference for the other forms is the replay of lines of
single appends in the active log.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ._bench import Bench, per_second
from ._child import Contender
from ._events import LINE_SIZE, totals
from ._harness import Case, Figures, Goal, Table

SINGLE, ARCHIVE = "lines of single appends", "the same in the archive"
# The second is larger than a block.
BATCHES = (10, 5_000)
BARE = "a bare loop, raw"
# The methods, and the goal for each, relative to the bare loop.
READS = {"read_full": 0.75, "read_slices, with records": 1.1}


def tables(bench: Bench) -> Iterator[Table]:
    """One log in each form for all rounds, read from the page cache."""
    events = bench.options.events
    raw, eventfold = bench.contender("raw"), bench.contender("eventfold")
    dirs: dict[str, Path] = {}

    @contextmanager
    def written() -> Iterator[None]:
        with bench.new_dir() as parent:
            for batch in (1, *BATCHES):
                dirs[form(batch)] = dir = parent / f"batches-{batch}"
                dir.mkdir()
                eventfold.ask("write", dir=str(dir), events=events, distinct=None, batch=batch)
            dirs[ARCHIVE] = parent / "archive"
            shutil.copytree(dirs[form(1)], dirs[ARCHIVE])
            eventfold.ask("rotate", dir=str(dirs[ARCHIVE]), tasks=0)
            yield

    def case(
        work: str,
        contender: Contender,
        do: str,
        at: str = SINGLE,
        goals: tuple[Goal, ...] = (),
        reference: str | None = None,
        **fields: object,
    ) -> Case:
        def once() -> Figures | None:
            answer = contender.ask(do, dir=str(dirs[at]), **fields)
            if answer is not None and (answer["events"], answer["amount"]) != (expected.events, expected.amount):
                raise AssertionError(f"{work}, {contender.name}: folded {answer}, not {expected}")
            return per_second(events, "rate", answer)

        return Case(work, contender.name, once, goals, reference)

    def replay(at: str, goals: tuple[Goal, ...]) -> Case:
        return case(at, eventfold, "replay", at, goals, views=1, types=None)

    def limit(batch: int) -> Case:
        return case(form(batch), raw, "replay_batches", form(batch), (), f"{SINGLE}, raw", batch=batch)

    expected, rate = totals(events), {"rate": "events/s"}
    with written():
        yield Table(
            "read",
            f"reading {events:,} events of about {LINE_SIZE} bytes",
            rate,
            [
                case("a bare loop", raw, "replay", views=1, types=None),
                *(
                    case(work, eventfold, "read", goals=(Goal(least, to=BARE),), how=work)
                    for work, least in READS.items()
                ),
            ],
            more_is_better=True,
            notes=["All of them fold what they read. A record is an event with its offsets and its line."],
        )
        yield Table(
            "read-forms",
            f"replays of the same {events:,} events in different forms",
            rate,
            [
                replay(SINGLE, ()),
                *(replay(form(batch), (Goal(0.85, to=f"{SINGLE}, eventfold"),)) for batch in BATCHES),
                replay(ARCHIVE, (Goal(0.95, to=f"{SINGLE}, eventfold"),)),
                *(limit(batch) for batch in (1, *BATCHES)),
            ],
            more_is_better=True,
            notes=[
                "A line of a batch has 15 to 20 additional bytes for its position in the batch.",
                "raw decodes these bytes too, and hundreds of lines or a whole batch at once, whichever is more.",
            ],
        )


def form(batch: int) -> str:
    return SINGLE if batch == 1 else f"append_many of {batch:,}"
