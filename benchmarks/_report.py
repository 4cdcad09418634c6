"""The report: puts the tables into docs/benchmarks.md, and draws a plot from each table on that page.

The page has a place for each table, between `<!-- NAME -->` and `<!-- /NAME -->`, whose content is replaced; the rest
of the page is left alone. The place `losses` gets those of all tables on the page, including earlier runs. The ratios
go into a file beside the plots, with which later runs are compared. What `docs/scaling.md` calculates from a table is
put there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import _curves, _published, _scaling
from ._harness import Result
from ._plot import LESS, MORE, plots_of, svg

PAGE = "benchmarks.md"
PLOTS = "benchmarks"
LOSSES = "losses"
WHERE_WE_LOSE = "Where we lose:"


def write_report(directory: Path, results: list[Result], about: dict[str, Any]) -> None:
    """Replaces the tables of these results and draws all plots. Raises `ValueError` if the page lacks a place."""
    page = directory / PAGE
    text = page.read_text()
    for result in results:
        text = replaced(text, result.table.name, section(result, about))
        if result.table.name == _scaling.TABLE:
            _write_scaling(directory / _scaling.PAGE, result)
    page.write_text(replaced(text, LOSSES, all_losses(text)))
    draw_plots(directory)
    _published.write(directory / PLOTS / _published.FILE, results)


def _write_scaling(page: Path, result: Result) -> None:
    text = page.read_text()
    for name, content in _scaling.tables(result).items():
        text = replaced(text, name, content)
    page.write_text(text)


def draw_plots(directory: Path) -> None:
    """Draws the plots from the tables that are on the page; measures nothing."""
    plots = directory / PLOTS
    plots.mkdir(exist_ok=True)
    text = (directory / PAGE).read_text()
    drawn = {plot.name: svg(plot) for plot in plots_of(text)}
    drawn |= {plot.name: _curves.svg(plot) for plot in _curves.curves_of(text)}
    for name, plot in drawn.items():
        (plots / f"{name}.svg").write_text(plot)


def replaced(text: str, name: str, content: str) -> str:
    place = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    if not place.search(text):
        raise ValueError(f"the page has no place for {name}")
    return place.sub(lambda match: f"{match[1]}\n{content}\n{match[2]}", text)


def all_losses(text: str) -> str:
    """The losses of the tables on the page, in order."""
    lines = []
    for part in re.finditer(r"<!-- (\S+) -->\n(.*?)<!-- /\1 -->", text, re.DOTALL):
        if part[1] != LOSSES and WHERE_WE_LOSE in part[2]:
            told = part[2].partition(WHERE_WE_LOSE)[2]
            lines += [f"- **{part[1]}**: {line[2:]}" for line in told.splitlines() if line.startswith("- ")]
    return "\n".join(lines or ["Nowhere."]) + "\n"


def section(result: Result, about: dict[str, Any]) -> str:
    """The result in Markdown."""
    header = result.header()
    better = MORE if result.table.more_is_better else LESS
    lines = [
        f"**{result.table.title[0].upper()}{result.table.title[1:]}** ({better})",
        "",
        "| " + " | ".join(header) + " |",
        "| " + " | ".join("---" if i < 2 else "---:" for i in range(len(header))) + " |",
        *("| " + " | ".join(row) + " |" for row in result.cells()),
        "",
        f"![{result.table.title}]({PLOTS}/{result.table.name}.svg)",
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
