"""The tables of docs/scaling.md: the cost of work on a whole log, calculated from the table `growth-whole`.

Such work reads the log once, and its cost per event must not grow with the log. So the cost per event in the longest
measured log is used for longer logs too.
"""

from __future__ import annotations

from ._events import tagged_lines
from ._harness import Result, show

PAGE, TABLE = "scaling.md", "growth-whole"
GROWS, CALCULATED = "grows", "calculated"
BARE = "decoding each line, active log"
# The work for which users wait: its name in the table, and on the page.
WORKS = {
    "opening without a snapshot, active log": "rebuild a view",
    "opening without a snapshot, archive": "the same in the archive",
    "verifying, archive": "verify the archive",
    "a condition on the whole log, without an index, archive": "a condition without an index",
    "building the index, active log": "build the index",
}
SIZES = [10**power for power in range(6, 10)]


def tables(result: Result) -> dict[str, str]:
    """The tables in Markdown, by the names of their places on the page."""
    longest = list(result.table.columns)[-1]
    events = int(longest.replace(",", ""))
    cost = {row.case.work: row.median_of(longest) / 1e3 / events for row in result.rows}
    grows = [["what", "relative to decoding each line in a bare loop", "per event, µs"], ["---", "---:", "---:"]]
    grows += [[work, show(cost[work] / cost[BARE]), show(cost[work] * 1e6)] for work in (BARE, *WORKS)]
    calculated = [["events", "bytes of lines", *WORKS.values()], ["---:"] * (2 + len(WORKS))]
    size = len(tagged_lines(1, events)[0])
    for count in SIZES:
        times = [duration(cost[work] * count) for work in WORKS]
        calculated.append([f"{count:,}", f"{show(count * size / 1e9)} GB", *times])
    return {name: _markdown(rows) for name, rows in ((GROWS, grows), (CALCULATED, calculated))}


def duration(seconds: float) -> str:
    """The seconds as text, in a suitable unit."""
    for unit, size in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{show(seconds / size)} {unit}"
    return f"{show(seconds)} s"


def _markdown(rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
