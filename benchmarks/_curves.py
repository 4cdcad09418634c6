"""Plots of tables whose columns are lengths of a log: cost against length, both logarithmic, as SVG text.

A cost that does not depend on the length is a horizontal line; a cost proportional to it rises one decade per decade.
Each row of the table is one curve, named below the plot; the active log is on the left, the archive on the right.
Like the bars of `_plot`, the curves are drawn from the tables on the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from math import floor, log10
from typing import NamedTuple

from ._plot import MARGIN, STYLE, TABLE, WIDTH

# The heading of the main column of such a table.
GROWTH = "growth, times"
KINDS = ("active log", "archive")
HEIGHT = 380
TOP, BOTTOM = 86, 40
AXIS, GAP = 56, 36
COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#a16207", "#7e22ce", "#0f766e", "#be123c", "#64748b", "#0369a1")


class Curve(NamedTuple):
    work: str
    kind: str
    costs: list[float]


class Curves(NamedTuple):
    """A table of the page; `unit` is that of the costs."""

    name: str
    title: str
    unit: str
    sizes: list[int]
    curves: list[Curve]


def curves_of(page: str) -> Iterator[Curves]:
    """The tables of the page that have lengths for columns, in order."""
    for found in TABLE.finditer(page):
        header, _, *lines = [
            [cell.strip() for cell in line.strip("|\n").split("|")] for line in found["rows"].splitlines()
        ]
        if header[2] != GROWTH:
            continue
        places = [at for at, heading in enumerate(header) if re.match(r"[\d,]+, ", heading)]
        sizes = [_number(header[at].rpartition(", ")[0]) for at in places]
        curves = []
        for line in lines:
            work, _, kind = line[0].rpartition(", ")
            curves.append(Curve(work, kind, [_number(line[at]) for at in places]))
        unit = header[places[0]].rpartition(", ")[2]
        yield Curves(found["name"], found["title"], unit, [round(size) for size in sizes], curves)


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def svg(plot: Curves) -> str:
    """The plot as an SVG document."""
    works = list(dict.fromkeys(curve.work for curve in plot.curves))
    colours = {work: COLOURS[at % len(COLOURS)] for at, work in enumerate(works)}
    least = min((cost for curve in plot.curves for cost in curve.costs if cost > 0), default=1.0)
    most = max((cost for curve in plot.curves for cost in curve.costs), default=1.0)
    low, high = floor(log10(least)), floor(log10(max(most, least))) + 1
    width = (WIDTH - 2 * MARGIN - 2 * AXIS - GAP) / 2
    bottom = HEIGHT - BOTTOM
    first, last = log10(plot.sizes[0]), log10(plot.sizes[-1])

    def y(cost: float) -> float:
        return bottom - (log10(max(cost, 10**low)) - low) / (high - low) * (bottom - TOP)

    body = []
    for number, kind in enumerate(KINDS):
        left = MARGIN + AXIS + number * (width + GAP + AXIS / 2)

        def x(size: int, left: float = left) -> float:
            return left + (log10(size) - first) / ((last - first) or 1) * width

        body.append(f'<text class="best" x="{left:.0f}" y="{TOP - 12}">{kind}</text>')
        for power in range(low, high + 1):
            at = y(10.0**power)
            body.append(f'<line class="grid" x1="{left:.0f}" x2="{left + width:.0f}" y1="{at:.1f}" y2="{at:.1f}"/>')
            text = f"{10.0**power:,.0f}" if power >= 0 else f"{10.0**power:.{-power}f}"
            body.append(f'<text class="quiet" x="{left - 6:.0f}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
        for size in plot.sizes:
            middle = f'x="{x(size):.0f}" y="{bottom + 18}" text-anchor="middle"'
            body.append(f'<text class="quiet" {middle}>{size:,}</text>')
        for curve in plot.curves:
            if curve.kind == kind:
                points = " ".join(f"{x(s):.1f},{y(c):.1f}" for s, c in zip(plot.sizes, curve.costs, strict=True))
                colour = colours[curve.work]
                body.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    height = HEIGHT
    for at, work in enumerate(works):
        column, line = at % 2, at // 2
        left, height = MARGIN + column * (WIDTH / 2 - MARGIN), HEIGHT + 20 * line + 12
        body.append(f'<rect x="{left:.0f}" y="{height - 8}" width="18" height="4" fill="{colours[work]}"/>')
        body.append(f'<text x="{left + 26:.0f}" y="{height}">{escape(work)}</text>')
    height += MARGIN
    grid = ".grid { stroke: #94a3b8; stroke-width: 0.5; opacity: 0.6 }"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}">',
            f"<title>{escape(plot.title)}</title>",
            f"<style>{STYLE}{grid}</style>",
            f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>',
            f'<text class="title" x="{MARGIN}" y="{MARGIN + 14}">{escape(plot.title)}</text>',
            f'<text class="quiet" x="{MARGIN}" y="{MARGIN + 34}">{escape(plot.unit)} · by the events in the log</text>',
            *body,
            "</svg>",
            "",
        ]
    )
