"""What all benchmarks share: tables of cases, measured in interleaved rounds, with ratios to a reference.

A benchmark is a function `tables(bench)` that yields its tables. A case is a contender doing some work; its `round`
does the work once and returns its figures, or None if the contender can't do it. The rounds interleave (A B C A B C),
so that a disturbance affects all of them equally, and each ratio is the median of the ratios within the rounds.

A ratio is always the case's figure divided by its reference's: for rates, more than 1 is faster; for times and bytes,
less than 1 is better.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

Figures = dict[str, float]


@dataclass(frozen=True)
class Goal:
    """A case's goal: a limit for its ratio to another case (`to`, its label), or for its own figure.

    `column` names the figure; None for the table's first.
    """

    limit: float
    at_least: bool = True
    to: str | None = None
    column: str | None = None

    def holds(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class Case:
    """One row of a table: a contender doing some work. `reference` is the label of the case to compare it with."""

    work: str
    contender: str
    round: Callable[[], Figures | None]
    goals: tuple[Goal, ...] = ()
    reference: str | None = None

    @property
    def label(self) -> str:
        return f"{self.work}, {self.contender}"


@dataclass(frozen=True)
class Table:
    """Cases that are measured together; the first is the reference if none is named.

    `columns` names the figures with their units; ratios are of the first. `more_is_better` distinguishes rates from
    times. `rounds` overrides the command line's; `warm_up` says whether a round that doesn't count comes first.
    `setting` is entered while the table is measured.
    """

    name: str
    title: str
    columns: dict[str, str]
    cases: list[Case]
    more_is_better: bool = False
    notes: list[str] = field(default_factory=list)
    rounds: int | None = None
    warm_up: bool = True
    setting: Callable[[], AbstractContextManager[object]] = nullcontext

    @property
    def main(self) -> str:
        return next(iter(self.columns))


@dataclass(frozen=True)
class Row:
    """The measurements of a case: the figures of each round, and the ratio to the reference in the same round."""

    case: Case
    main: str
    rounds: list[Figures]
    reference: str | None
    ratios: list[float]

    @property
    def figures(self) -> list[float]:
        return [figures[self.main] for figures in self.rounds]

    @property
    def median(self) -> float:
        return statistics.median(self.figures)

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def median_of(self, column: str) -> float:
        return statistics.median(figures[column] for figures in self.rounds)


@dataclass(frozen=True)
class Verdict:
    """A goal, and whether it was reached."""

    row: Row
    goal: Goal
    value: float
    unit: str

    @property
    def reached(self) -> bool:
        return self.goal.holds(self.value)

    def __str__(self) -> str:
        sign = "at least" if self.goal.at_least else "at most"
        word = "reached" if self.reached else "MISSED"
        if self.goal.to is None:
            column = self.goal.column or self.row.main
            return (
                f"{word}: {self.row.case.label}: {column} {show(self.value)} {self.unit} "
                f"(goal: {sign} {show(self.goal.limit)})"
            )
        return (
            f"{word}: {self.row.case.label}: {show(self.value)} times {self.goal.to} "
            f"(goal: {sign} {show(self.goal.limit)})"
        )


@dataclass(frozen=True)
class Result:
    """A table with its figures. `ours` is the name of the contender whose losses are reported."""

    table: Table
    rows: list[Row]
    missing: list[Case]
    ours: str = "eventfold"

    def verdicts(self) -> list[Verdict]:
        found = []
        rows = {row.case.label: row for row in self.rows}
        for row in self.rows:
            for goal in row.case.goals:
                column = goal.column or self.table.main
                if goal.to is None:
                    found.append(Verdict(row, goal, row.median_of(column), self.table.columns[column]))
                elif goal.to in rows:
                    pairs = zip(row.rounds, rows[goal.to].rounds, strict=True)
                    value = statistics.median(quotient(mine[column], theirs[column]) for mine, theirs in pairs)
                    found.append(Verdict(row, goal, value, "x"))
        return found

    def losses(self) -> list[str]:
        """The missed goals, and the work that other contenders do better, as text."""
        losses = [str(verdict) for verdict in self.verdicts() if not verdict.reached]
        for row in self.rows:
            if not row.case.contender.startswith(self.ours):
                continue
            for other in self.rows:
                if other.case.work != row.case.work or other.case.contender.startswith(self.ours):
                    continue
                pairs = zip(other.figures, row.figures, strict=True)
                ratio = statistics.median(quotient(theirs, mine) for theirs, mine in pairs)
                if (ratio > 1) is self.table.more_is_better and ratio != 1:
                    how = "is {} times as fast" if self.table.more_is_better else "needs {} times as much"
                    losses.append(f"{row.case.label}: {other.case.contender} {how.format(show(ratio))}")
        return losses

    def header(self) -> list[str]:
        main, *others = self.table.columns.items()
        return ["work", "contender", f"{main[0]}, {main[1]}", "lowest", "highest", "ratio"] + [
            f"{n}, {u}" for n, u in others
        ]

    def cells(self) -> list[list[str]]:
        """The rows as text, in the order of the header."""
        return [
            [
                row.case.work,
                row.case.contender,
                *map(show, (row.median, min(row.figures), max(row.figures), row.ratio)),
                *(show(row.median_of(column)) for column in list(self.table.columns)[1:]),
            ]
            for row in self.rows
        ]

    def remarks(self) -> list[str]:
        """The remarks below the table."""
        if not self.rows:
            return ["No contender can do this."]
        first = self.table.cases[0].label
        others = sorted({row.reference for row in self.rows if row.reference not in (first, None)})
        remarks = [f"Ratios are to “{first}”, within the same round."] if not others else []
        if others:
            remarks += [f"Ratios are to “{first}”, or to the case named below, within the same round."]
            remarks += [
                f"Compared with “{other}”: {'; '.join(r.case.label for r in self.rows if r.reference == other)}."
                for other in others
            ]
        unable: dict[str, list[str]] = {}
        for case in self.missing:
            unable.setdefault(case.contender, []).append(case.work)
        return remarks + self.table.notes + [f"{name} can't do: {'; '.join(works)}." for name, works in unable.items()]

    def __str__(self) -> str:
        lines = [self.header(), *self.cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [f"{self.table.name}: {self.table.title}", ""]
        for line in lines:
            cells = [
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ]
            text.append("  ".join(cells).rstrip())
        text += ["", *self.remarks()]
        if verdicts := self.verdicts():
            text += ["Goals:", *(f"- {verdict}" for verdict in verdicts)]
        losses = self.losses()
        text += ["Where we lose:" if losses else "No losses."]
        return "\n".join(text + [f"- {loss}" for loss in losses])

    def as_json(self) -> dict[str, Any]:
        """The result as JSON, with the figures of every round."""
        return {
            "name": self.table.name,
            "title": self.table.title,
            "columns": self.table.columns,
            "more_is_better": self.table.more_is_better,
            "remarks": self.remarks(),
            "goals": [
                {"case": v.row.case.label, "text": str(v), "value": v.value, "reached": v.reached}
                for v in self.verdicts()
            ],
            "losses": self.losses(),
            "cases": [
                {
                    "work": row.case.work,
                    "contender": row.case.contender,
                    "rounds": row.rounds,
                    "median": row.median,
                    "reference": row.reference,
                    "ratios": row.ratios,
                    "ratio": row.ratio,
                }
                for row in self.rows
            ],
        }


def measure(table: Table, rounds: int, *, warm_up: bool = True) -> Result:
    """Runs the rounds of all cases in turn; with `warm_up`, after one round that does not count."""
    rounds = table.rounds or rounds
    found: dict[str, list[Figures]] = {case.label: [] for case in table.cases}
    if len(found) != len(table.cases):
        raise ValueError(f"two cases of {table.name} have the same label")
    missing: list[Case] = []
    os.sync()
    with table.setting():
        for number in range(0 if warm_up and table.warm_up else 1, rounds + 1):
            for case in table.cases:
                if case in missing:
                    continue
                figures = case.round()
                if figures is None:
                    missing.append(case)
                    del found[case.label]
                elif number:
                    found[case.label].append(figures)
    return Result(table, list(_rows(table, found)), missing)


def _rows(table: Table, found: dict[str, list[Figures]]) -> Iterator[Row]:
    for case in table.cases:
        if case.label not in found:
            continue
        reference = case.reference if case.reference in found else table.cases[0].label
        if reference not in found:
            reference = case.label
        pairs = zip(found[case.label], found[reference], strict=True)
        ratios = [quotient(mine[table.main], theirs[table.main]) for mine, theirs in pairs]
        yield Row(case, table.main, found[case.label], None if reference == case.label else reference, ratios)


def quotient(one: float, other: float) -> float:
    """The ratio of two figures; 1 for two zeros, while a single zero counts as the smallest measurable value."""
    return 1.0 if one == other else one / max(other, 1e-9)


def show(figure: float) -> str:
    """A figure with three significant digits, or all digits before the point."""
    if abs(figure) >= 100:
        return f"{figure:,.0f}"
    return f"{figure:.3g}"


def file_system(path: str) -> str:
    """The type of the file system that a directory is on, such as ext4; "unknown" if the system does not say."""
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
