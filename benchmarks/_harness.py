"""What all benchmarks share: tables of cases, measured in interleaved rounds, with ratios to a reference.

A benchmark is an async context manager `prepare(options)` that sets up what its cases work on, gives its tables, and
cleans up. A case is a name and an async function that does one round and returns its figure in the table's unit. The
rounds interleave (A B C A B C), so that a disturbance from outside meets all of them alike, and each ratio is the
median of the ratios within the rounds.
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Bytes of a line that is typical for a log; see `sample_events`.
LINE_SIZE = 190


@dataclass(frozen=True)
class Options:
    """What the command line chose: where temporary files go, and how many events a replay reads."""

    dir: str
    events: int

    @contextmanager
    def temporary_dir(self) -> Iterator[Path]:
        """A new directory, removed at the end."""
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=self.dir) as path:
            yield Path(path)


@dataclass(frozen=True)
class Goal:
    """What a case is to reach: a limit for its ratio to the reference, or (`of_figure`) for its own figure."""

    limit: float
    at_least: bool = True
    of_figure: bool = False

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{sign} {show(self.limit)}" if self.of_figure else f"{sign} {self.limit:.2f}x"


@dataclass(frozen=True)
class Case:
    """One line of a table.

    `round` does the work once and returns the figure. `reference` names the case that it is compared with; None for the
    table's first.
    """

    name: str
    round: Callable[[], Awaitable[float]]
    goal: Goal | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Table:
    """Cases that are measured together; the first is the reference. `unit` is that of all figures.

    `more_is_better` tells a rate from a time; a ratio is always the case's figure through its reference's.
    """

    title: str
    unit: str
    more_is_better: bool
    cases: list[Case]
    notes: list[str] = field(default_factory=list)


Prepare = Callable[[Options], AbstractAsyncContextManager[list[Table]]]


@dataclass(frozen=True)
class Row:
    """What was measured for a case: the figure of each round, and its ratio to the reference in the same round."""

    case: Case
    reference: str | None
    figures: list[float]
    ratios: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.figures)

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def reached(self) -> bool | None:
        """Whether the goal was reached; None without one."""
        goal = self.case.goal
        if goal is None:
            return None
        value = self.median if goal.of_figure else self.ratio
        return value >= goal.limit if goal.at_least else value <= goal.limit


@dataclass(frozen=True)
class Result:
    """A table with its figures."""

    name: str
    table: Table
    rows: list[Row]

    def losses(self) -> list[str]:
        """In plain words, where a goal was missed or a case is worse than its reference."""
        losses = []
        for row in self.rows:
            if row.reached is False:
                value = show(row.median) if row.case.goal and row.case.goal.of_figure else f"{row.ratio:.2f}x"
                losses.append(f"{row.case.name}: {value}, the goal is {row.case.goal}")
            elif row.reference is not None and (row.ratio < 1) is self.table.more_is_better and row.ratio != 1:
                word = "slower than" if self.table.more_is_better else "longer than"
                losses.append(f"{row.case.name}: {word} {row.reference} ({row.ratio:.2f}x)")
        return losses

    def __str__(self) -> str:
        header = ("", f"median, {self.table.unit}", "least", "most", "ratio", "least", "most", "goal", "")
        lines = [header]
        for row in self.rows:
            figures = (show(row.median), show(min(row.figures)), show(max(row.figures)))
            ratios = tuple(f"{ratio:.2f}" for ratio in (row.ratio, min(row.ratios), max(row.ratios)))
            verdict = {None: "", True: "reached", False: "MISSED"}[row.reached]
            lines.append((row.case.name, *figures, *ratios, str(row.case.goal or ""), verdict))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [f"{self.name}: {self.table.title}", ""]
        for line in lines:
            cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
            text.append("  ".join(cells).rstrip())
        first = self.table.cases[0].name
        text += ["", f"Ratios are to {first}, within the same round."]
        text += [f"For {row.case.name}: to {row.reference}." for row in self.rows if row.reference not in (first, None)]
        text += self.table.notes
        losses = self.losses()
        text += ["", "Where we lose:" if losses else "No losses."]
        return "\n".join(text + [f"- {loss}" for loss in losses])

    def as_json(self) -> dict[str, Any]:
        """The same for a program, with the figure of every round."""
        return {
            "name": self.name,
            "title": self.table.title,
            "unit": self.table.unit,
            "more_is_better": self.table.more_is_better,
            "notes": self.table.notes,
            "losses": self.losses(),
            "cases": [
                {
                    "name": row.case.name,
                    "figures": row.figures,
                    "median": row.median,
                    "reference": row.reference,
                    "ratios": row.ratios,
                    "ratio": row.ratio,
                    "goal": str(row.case.goal) if row.case.goal else None,
                    "reached": row.reached,
                }
                for row in self.rows
            ],
        }


async def measure(name: str, table: Table, rounds: int) -> Result:
    """Does the rounds of all cases in turn, after one of each that does not count."""
    figures: dict[str, list[float]] = {case.name: [] for case in table.cases}
    for number in range(rounds + 1):
        for case in table.cases:
            gc.collect()
            figure = await case.round()
            if number:
                figures[case.name].append(figure)
    rows = []
    for case in table.cases:
        reference = case.reference or table.cases[0].name
        pairs = zip(figures[case.name], figures[reference], strict=True)
        ratios = [mine / theirs for mine, theirs in pairs]
        rows.append(Row(case, None if reference == case.name else reference, figures[case.name], ratios))
    return Result(name, table, rows)


def show(figure: float) -> str:
    """A figure with three digits that count, or all before the point."""
    if figure >= 100:
        return f"{figure:,.0f}"
    return f"{figure:.3g}"


def file_system(path: str) -> str:
    """The type of the file system that a directory is on, such as ext4; "unknown" where the system does not tell."""
    found, longest = "unknown", -1
    try:
        with open("/proc/self/mounts") as mounts:
            for line in mounts:
                _, point, kind = line.split()[:3]
                inside = os.path.commonpath([os.path.realpath(path), point]) == point
                if inside and len(point) >= longest:
                    found, longest = kind, len(point)
    except OSError:
        pass
    return found
