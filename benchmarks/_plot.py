"""Plots as SVG text, one for each table, for light and dark pages.

If several contenders do the same work, the plot has a panel for each kind of work, sorted from best to worst, each with
its own scale. Otherwise it has one panel, in the table's order. Bars show the median of the rounds, thin lines the
lowest and the highest figure. `raw` is a limit rather than a contender, so its bar is only an outline.

The plots are drawn from the tables in Markdown, so that they agree with the page and can be redrawn at any time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

MORE = "more is better"
LESS = "less is better"
OURS = "eventfold"
LIMIT = "raw"

TABLE = re.compile(
    rf"<!-- (?P<name>\S+) -->\n\n\*\*(?P<title>.*?)\*\* \((?P<better>{MORE}|{LESS})\)\n\n(?P<rows>(?:\|.*\n)+)"
)

# Pixels.
WIDTH = 800
MARGIN = 20
GAP = 28
ROW = 22
BAR = 14
HEADING = 30
PER_CHARACTER = 7.5  # of a label: a little more than the width of a character

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2937 }
.title { font-size: 15px; font-weight: 600 }
.quiet { fill: #64748b }
.best { font-weight: 700 }
.page { fill: #ffffff; stroke: #e2e8f0 }
.ours { fill: #c2410c }
.other { fill: #94a3b8 }
.limit { fill: none; stroke: #64748b; stroke-dasharray: 3 2 }
.spread { stroke: #1f2937; stroke-width: 1 }
@media (prefers-color-scheme: dark) {
  text { fill: #e2e8f0 }
  .quiet { fill: #94a3b8 }
  .page { fill: #1e2129; stroke: #334155 }
  .ours { fill: #fb923c }
  .other { fill: #64748b }
  .limit { stroke: #94a3b8 }
  .spread { stroke: #e2e8f0 }
}
"""


@dataclass(frozen=True)
class Row:
    """A row of a table; `printed` is the median as the table shows it."""

    work: str
    contender: str
    printed: str
    median: float
    least: float
    most: float

    @property
    def kind(self) -> str:
        """The class of its bar."""
        if self.contender.startswith(LIMIT):
            return "limit"
        return "ours" if self.contender.startswith(OURS) else "other"


@dataclass(frozen=True)
class Plot:
    """A table of the page; `unit` is the heading of its main column."""

    name: str
    title: str
    unit: str
    more_is_better: bool
    rows: list[Row]


def plots_of(page: str) -> Iterator[Plot]:
    """The tables of the page, in order."""
    for found in TABLE.finditer(page):
        header, _, *lines = [
            [cell.strip() for cell in line.strip("|\n").split("|")] for line in found["rows"].splitlines()
        ]
        rows = [
            Row(work, contender, median, *(float(cell.replace(",", "")) for cell in (median, least, most)))
            for work, contender, median, least, most, *_ in lines
        ]
        yield Plot(found["name"], found["title"], header[2], found["better"] == MORE, rows)


def svg(plot: Plot) -> str:
    """The plot as an SVG document."""
    by_work: dict[str, list[Row]] = {}
    for row in plot.rows:
        by_work.setdefault(row.work, []).append(row)
    if any(sum(row.kind != "limit" for row in rows) > 1 for rows in by_work.values()):
        panels = [_Panel(work, _best_first(plot, rows), plot) for work, rows in by_work.items()]
    else:
        panels = [_Panel("", plot.rows, plot)]
    columns = 2 if len(panels) > 1 else 1
    width = (WIDTH - 2 * MARGIN - (columns - 1) * GAP) / columns
    indent = PER_CHARACTER * max(len(panel.label(row)) for panel in panels for row in panel.rows) + 8
    body: list[str] = []
    top = MARGIN + 52.0
    for at in range(0, len(panels), columns):
        line = panels[at : at + columns]
        for column, panel in enumerate(line):
            body += panel.drawn(MARGIN + column * (width + GAP), top, width, indent)
        top += max(panel.height for panel in line) + 14
    height = round(top - 14 + MARGIN)
    better = MORE if plot.more_is_better else LESS
    note = f"{plot.unit} · {better}" + (" · each panel has its own scale" if len(panels) > 1 else "")
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}">',
            f"<title>{escape(plot.title)}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>',
            f'<text class="title" x="{MARGIN}" y="{MARGIN + 14}">{escape(plot.title)}</text>',
            f'<text class="quiet" x="{MARGIN}" y="{MARGIN + 34}">{escape(note)}</text>',
            *body,
            "</svg>",
            "",
        ]
    )


def _best_first(plot: Plot, rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row.median, reverse=plot.more_is_better)


@dataclass(frozen=True)
class _Panel:
    """Bars below each other. With a heading, they are sorted, and the first contender is the leader."""

    heading: str
    rows: list[Row]
    plot: Plot

    @property
    def height(self) -> float:
        return (HEADING if self.heading else 0) + ROW * len(self.rows)

    def label(self, row: Row) -> str:
        if not self.heading:
            return row.work if row.contender == OURS else f"{row.work}, {row.contender}"
        return f"{row.contender} (limit)" if row.kind == "limit" else row.contender

    def drawn(self, x: float, y: float, width: float, indent: float) -> Iterator[str]:
        """The bars begin `indent` after `x`, and are scaled so that all figures fit within the width."""
        left = x + indent
        notes = [self._note(row) for row in self.rows]
        scale = min(
            (width - indent - PER_CHARACTER * len(note) - 8) / (row.most or 1)
            for row, note in zip(self.rows, notes, strict=True)
        )
        if self.heading:
            yield f'<text class="best" x="{x:.0f}" y="{y + 16:.0f}">{escape(self.heading)}</text>'
            y += HEADING
        for row, note in zip(self.rows, notes, strict=True):
            middle = y + ROW / 2
            best = ' class="best"' if row == self._leader else ""
            length = max(row.median * scale, 1)
            label = escape(self.label(row))
            yield f'<text{best} x="{left - 8:.0f}" y="{middle + 4:.0f}" text-anchor="end">{label}</text>'
            yield (
                f'<rect class="{row.kind}" x="{left:.1f}" y="{middle - BAR / 2:.1f}" '
                f'width="{length:.1f}" height="{BAR}"/>'
            )
            if row.most > row.least:
                ends = f'x1="{left + row.least * scale:.1f}" x2="{left + row.most * scale:.1f}"'
                yield f'<line class="spread" {ends} y1="{middle:.1f}" y2="{middle:.1f}"/>'
            at = left + max(row.most * scale, length) + 8
            yield f'<text{best} x="{at:.1f}" y="{middle + 4:.0f}">{escape(note)}</text>'
            y += ROW

    @property
    def _leader(self) -> Row | None:
        contenders = [row for row in self.rows if row.kind != "limit"]
        return contenders[0] if self.heading and len(contenders) > 1 else None

    def _note(self, row: Row) -> str:
        """The figure, and how far behind the leader it is."""
        leader = self._leader
        if leader is None or row.kind == "limit" or not row.median or not leader.median:
            return row.printed
        behind = leader.median / row.median if self.plot.more_is_better else row.median / leader.median
        return row.printed if behind < 1.05 else f"{row.printed} · {behind:.2g}× behind"
