"""The report: a plot for each table, and the tables themselves put into docs/benchmarks.md.

The page has a place for each table, between `<!-- NAME -->` and `<!-- /NAME -->`; what stands there is replaced, and
the rest is left as it is. Between the marks of `losses` stand those of all tables on the page, also of earlier runs.
The ratios go into a file beside the plots, with which later runs are compared.
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from . import _published
from ._harness import Result, Row, show

PAGE = "benchmarks.md"
PLOTS = "benchmarks"
LOSSES = "losses"
WHERE_WE_LOSE = "Where we lose:"
COLOURS = {
    "eventfold": "#c2410c",
    "eventfold, View.rebuild": "#fb923c",
    "eventfold, index": "#fb923c",
    "raw": "#52525b",
    "sqlite": "#1d4ed8",
    "sqlite_shared": "#93c5fd",
    "eventsourcing": "#15803d",
    "jsonl": "#a16207",
    "umadb": "#0f766e",
}
OTHER = "#7e22ce"


def write_report(directory: Path, results: list[Result], about: dict[str, Any]) -> None:
    """Replaces the tables and plots of these results. Raises `ValueError` where the page has no place for one."""
    page = directory / PAGE
    text = page.read_text()
    plots = directory / PLOTS
    plots.mkdir(exist_ok=True)
    for result in results:
        text = replaced(text, result.table.name, section(result, about))
        (result.table.plot or plot)(result, plots / f"{result.table.name}.png")
    page.write_text(replaced(text, LOSSES, all_losses(text)))
    _published.write(plots / _published.FILE, results)


def replaced(text: str, name: str, content: str) -> str:
    place = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    if not place.search(text):
        raise ValueError(f"the page has no place for {name}")
    return place.sub(lambda match: f"{match[1]}\n{content}\n{match[2]}", text)


def all_losses(text: str) -> str:
    """The losses that the tables on the page tell of, in their order."""
    lines = []
    for part in re.finditer(r"<!-- (\S+) -->\n(.*?)<!-- /\1 -->", text, re.DOTALL):
        if part[1] != LOSSES and WHERE_WE_LOSE in part[2]:
            told = part[2].partition(WHERE_WE_LOSE)[2]
            lines += [f"- **{part[1]}**: {line[2:]}" for line in told.splitlines() if line.startswith("- ")]
    return "\n".join(lines or ["Nowhere."]) + "\n"


def section(result: Result, about: dict[str, Any]) -> str:
    """The result in Markdown."""
    header = result.header()
    lines = [
        f"**{result.table.title[0].upper()}{result.table.title[1:]}**",
        "",
        "| " + " | ".join(header) + " |",
        "| " + " | ".join("---" if i < 2 else "---:" for i in range(len(header))) + " |",
        *("| " + " | ".join(row) + " |" for row in result.cells()),
        "",
        f"![{result.table.title}]({PLOTS}/{result.table.name}.png)",
        "",
        *(f"- {remark}" for remark in result.remarks()),
        "",
    ]
    if verdicts := result.verdicts():
        lines += ["Goals:", "", *(f"- {verdict}" for verdict in verdicts), ""]
    losses = result.losses()
    lines += [WHERE_WE_LOSE, "", *(f"- {loss}" for loss in losses), ""] if losses else ["No losses.", ""]
    lines += [f"<sub>{', '.join(f'{key} {value}' for key, value in about.items())}</sub>", ""]
    return "\n".join(lines)


def plot(result: Result, path: Path) -> None:
    """A bar for each case, from the least to the most of its figures; the works stand apart from each other."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = result.rows
    places, labels = [], []
    at, work = 0.0, None
    for row in rows:
        at += 0.5 if work not in (None, row.case.work) else 0.0
        work = row.case.work
        places.append(at)
        labels.append(f"{row.case.work} · {row.case.contender}")
        at += 1.0
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.27 * at), layout="constrained")
    try:
        medians = [row.median for row in rows]
        axes.barh(places, medians, color=[colour(row) for row in rows], height=0.8)
        spread = [[m - min(r.figures) for m, r in zip(medians, rows, strict=True)]]
        spread.append([max(r.figures) - m for m, r in zip(medians, rows, strict=True)])
        axes.errorbar(medians, places, xerr=spread, fmt="none", ecolor="black", elinewidth=0.8)
        positive = [median for median in medians if median > 0]
        if positive and max(positive) > 30 * statistics.median(positive):
            axes.set_xscale("log")
        for place, row in zip(places, rows, strict=True):
            axes.annotate(
                f" {show(row.median)}", (max(row.figures), place), va="center", fontsize=7, annotation_clip=False
            )
        axes.margins(x=0.12, y=0.02)
        axes.set_yticks(places, labels, fontsize=7)
        axes.invert_yaxis()
        unit = result.table.columns[result.table.main]
        better = "more" if result.table.more_is_better else "less"
        axes.set_xlabel(f"{result.table.main}, {unit} ({better} is better)", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        axes.set_title(result.table.title, fontsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.savefig(path, dpi=110, metadata={"Software": None})
    finally:
        pyplot.close(figure)


def colour(row: Row) -> str:
    return COLOURS.get(row.case.contender, OTHER)
