"""What the same work costs with logs of different lengths, each ten times as long as the previous one.

The longest log has as many events as `--events` says. All work is done on a log whose events are in `app.jsonl`, and
again after they were moved into the archive. Some of it must cost the same however long the log is. The rest reads the
whole log: for a log ten times as long, it may take ten times as long, but no more memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ._bench import Bench
from ._child import Answer, Contender, ContenderError
from ._harness import Case, Figures, Goal, Table

ACTIVE, ARCHIVED = "active log", "archive"
# Work that must not depend on the log's length: its name in the table, and in the request.
FLAT = {
    "opening with a snapshot": "open",
    "a refresh, nothing new": "refresh",
    "a refresh, one new event": "refresh, one",
    "an append": "append",
    "a condition on the last 100 events": "condition, recent",
    "a condition on the whole log, with the index": "condition, index",
    "a tail's start": "tail",
    "reading the last 50": "last",
}
# Work that reads the whole log. The last one moves it into the archive.
WHOLE = {
    "opening without a snapshot": "replay",
    "verifying": "verify",
    "a condition on the whole log, without an index": "condition",
    "building the index": "index",
    "opening with the index, which is checked": "open, index",
    "rotating": "archive",
}
# Work that is not done on a log in the archive: its index is the same, and it is already rotated.
ONCE = ("index", "archive")
# The references: a loop over the lines of the file, and a write and a sync at its end.
RAW = {"whole": {"decoding each line": "replay"}, "flat": {"a write and a sync": "append"}}
GROWTH = "growth"
# Megabytes below which the use of memory is negligible.
LITTLE = 1.0
# Megabytes that reading ahead in blocks, and decoding them, may take at most.
ENOUGH = 40.0


class Work(NamedTuple):
    """Work that is done with a log of each length: its name in the table, and in the request to the contender."""

    name: str
    contender: str
    what: str
    kind: str


@dataclass
class Logs:
    """The logs of one run, and what was measured with them."""

    bench: Bench
    parent: Path
    sizes: list[int]

    def __post_init__(self) -> None:
        self._answers: dict[tuple[Work, int], Answer] = {}

    def dir(self, kind: str, size: int) -> Path:
        return self.parent / f"{kind.replace(' ', '-')}-{size}"

    def write(self) -> None:
        ours = self.bench.contender("eventfold")
        for size in self.sizes:
            (dir := self.dir(ACTIVE, size)).mkdir()
            ours.ask("write_tagged", dir=str(dir), events=size, tags=size)

    def ask(self, work: Work, size: int) -> Answer:
        """The answer of a contender that does work which may be repeated."""
        return self._ask(self.bench.contender(work.contender), work.what, self.dir(work.kind, size))

    def ask_once(self, work: Work, size: int) -> Answer:
        """The answer of a new process that does work on the whole log, which is done only once."""
        if (work, size) not in self._answers:
            dir = self.dir(work.kind, size)
            if work.what == "archive":
                dir = self.dir(ARCHIVED, size)
                shutil.copytree(self.dir(ACTIVE, size), dir)
            contender = self.bench.contender(work.contender)
            with nullcontext(contender) if self.bench.options.quick else contender.again() as asked:
                self._answers[work, size] = self._ask(asked, work.what, dir)
        return self._answers[work, size]

    def _ask(self, contender: Contender, what: str, dir: Path) -> Answer:
        answer = contender.ask("grow", dir=str(dir), what=what, times=self.bench.options.size(20, 2))
        if answer is None:
            raise ContenderError(f"{contender!r} can't do: {what}")
        return answer


def tables(bench: Bench) -> Iterator[Table]:
    """First the work on whole logs, a part of which creates the archives."""
    longest = bench.options.events
    sizes = [longest // share for share in (1000, 100, 10, 1) if longest // share >= 10_000 or share <= 100]
    with bench.new_dir() as parent:
        logs = Logs(bench, parent, sizes)
        logs.write()
        yield whole(logs)
        yield memory(logs)
        yield flat(logs)


def works(names: dict[str, str], raw: dict[str, str]) -> Iterator[Work]:
    """First the work of raw, then that of eventfold with each kind of log."""
    for name, what in raw.items():
        yield Work(name, "raw", what, ACTIVE)
    for kind in (ACTIVE, ARCHIVED):
        for name, what in names.items():
            if kind == ACTIVE or what not in ONCE:
                yield Work(name, "eventfold", what, kind)


def case(logs: Logs, work: Work, once: Callable[[], Figures], limit: float, column: str = GROWTH) -> Case:
    # With a few thousand events, reading ahead in blocks of megabytes hides the growth.
    has_goal = work.contender == "eventfold" and not logs.bench.options.quick
    goals = (Goal(limit, at_least=False, column=column),) if has_goal else ()
    return Case(f"{work.name}, {work.kind}", work.contender, once, goals)


def columns(logs: Logs, unit: str) -> dict[str, str]:
    return {GROWTH: "times"} | {f"{size:,}": unit for size in logs.sizes}


def figures(logs: Logs, growth: Callable[[list[float]], float], measure: Callable[[int], float]) -> Figures:
    found = [measure(size) for size in logs.sizes]
    return {GROWTH: growth(found)} | {f"{size:,}": figure for size, figure in zip(logs.sizes, found, strict=True)}


def whole(logs: Logs) -> Table:
    """Time for the whole log; the growth is that of the time for one event."""

    def once(work: Work) -> Figures:
        # From the second length on: with the first, most of the time is for starting.
        return figures(
            logs,
            lambda found: found[-1] / found[1] / (logs.sizes[-1] / logs.sizes[1]),
            lambda size: logs.ask_once(work, size)["seconds"] * 1e3,
        )

    return Table(
        "growth-whole",
        f"work on a whole log, by its length (to {logs.sizes[-1]:,} events)",
        columns(logs, "ms"),
        [case(logs, work, partial(once, work), 1.5) for work in works(WHOLE, RAW["whole"])],
        rounds=1,
        warm_up=False,
        notes=[f"Growth: of the time per event, from {logs.sizes[1]:,} events to {logs.sizes[-1]:,}."],
    )


def memory(logs: Logs) -> Table:
    """The memory that the same work took; it is not done again."""

    def once(work: Work) -> Figures:
        # Of the two longest: short logs don't fill the blocks that are read ahead.
        return figures(
            logs,
            lambda found: max(found[-1], LITTLE) / max(found[-2], LITTLE),
            lambda size: logs.ask_once(work, size)["bytes"] / 1e6,
        )

    return Table(
        "growth-memory",
        "peak memory of the same work, each in a new process",
        columns(logs, "MB"),
        [case(logs, work, partial(once, work), ENOUGH, f"{logs.sizes[-1]:,}") for work in works(WHOLE, RAW["whole"])],
        rounds=1,
        warm_up=False,
        notes=[
            "Growth: from the second longest log to the longest; shorter logs don't fill the blocks that are read "
            "ahead."
        ],
    )


def flat(logs: Logs) -> Table:
    """The time of work that must not depend on the length."""

    def once(work: Work) -> Figures:
        return figures(logs, lambda found: found[-1] / found[0], lambda size: logs.ask(work, size)["seconds"] * 1e3)

    return Table(
        "growth",
        f"work that must not depend on the log's length (to {logs.sizes[-1]:,} events)",
        columns(logs, "ms"),
        [case(logs, work, partial(once, work), 2) for work in works(FLAT, RAW["flat"])],
        notes=[f"Growth: from {logs.sizes[0]:,} events to {logs.sizes[-1]:,}."],
    )
