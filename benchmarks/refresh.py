"""Refreshing a view that is already up to date, or nearly: in the writer's process, or in one without a writer.

The figures are microseconds for one refresh, and the bytes that the process wrote during it. Appending the new events
is not included.
"""

from __future__ import annotations

from collections.abc import Iterator

from ._bench import Bench
from ._child import Contender
from ._harness import Case, Figures, Goal, Table

COLUMNS = {"time": "µs", "written": "bytes"}
STATES = {"a small state": 1_000, "a state of 10 MB": 10_000_000}
LITTLE = 100_000


def tables(bench: Bench) -> Iterator[Table]:
    """Each round has a new log, whose view has just been saved."""

    def case(
        work: str, contender: Contender, new: int, size: int, goals: tuple[Goal, ...] = (), do: str = "refresh"
    ) -> Case:
        def once() -> Figures | None:
            fields = {"new": new} if do == "refresh" else {}
            answer = bench.in_new_dir(contender, do, bytes=size, **fields)
            return None if answer is None else {"time": answer["seconds"] * 1e6, "written": answer["written"]}

        return Case(work, contender.name, once, goals if contender.name == "eventfold" else ())

    below_5 = (Goal(5, at_least=False),)
    cases = [case("awaiting a method that does nothing", bench.contender("raw"), 0, 0)]
    for state, size in STATES.items():
        cases += [case(f"nothing new, {state}", c, 0, size, below_5) for c in bench.contenders("eventfold")]
    below_40 = (Goal(40, at_least=False),)
    work = "nothing new, a reader without a writer"
    cases += [case(work, c, 0, 1_000, below_40, "refresh_alone") for c in bench.contenders("raw", "eventfold")]
    notes = ["A reader without a writer in its process must look at the files. raw looks at one file, once."]
    yield Table("refresh", "a refresh with nothing new", COLUMNS, cases, notes=notes)
    small, large = STATES
    to_small = Goal(1.5, at_least=False, to=f"ten new events, {small}, eventfold")
    goals = {small: (), large: (to_small, Goal(LITTLE, at_least=False, column="written"))}
    yield Table(
        "refresh-new",
        "a refresh with ten new events",
        COLUMNS,
        [
            case(f"ten new events, {state}", contender, 10, size, goals[state])
            for state, size in STATES.items()
            for contender in bench.contenders("eventfold")
        ],
        notes=[
            f"The goal for the bytes: the 10 MB are not written again; {LITTLE:,} bytes would be a hundredth.",
            "A state is saved again once the log has grown by as many bytes as the state has. This cost is rare and "
            "not included here.",
        ],
    )
