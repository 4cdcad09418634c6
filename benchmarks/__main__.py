"""Runs the named benchmarks, or all of them, prints their tables, and writes the figures to a JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

from . import (
    _published,
    append,
    decisions,
    growth,
    hold,
    import_time,
    memory,
    opening,
    operations,
    reading,
    refresh,
    replay,
    rotation,
    shared,
    tail,
)
from ._bench import Bench, Options, Tables, missing_packages
from ._child import Contender, ContenderError
from ._harness import Result, file_system, measure
from ._report import draw_plots, write_report

BENCHMARKS: dict[str, Tables] = {
    "append": append.tables,
    "decisions": decisions.tables,
    "replay": replay.tables,
    "read": reading.tables,
    "open": opening.tables,
    "refresh": refresh.tables,
    "tail": tail.tables,
    "rotate": rotation.tables,
    "shared": shared.tables,
    "memory": memory.tables,
    "hold": hold.tables,
    "operations": operations.tables,
    "import": import_time.tables,
    "growth": growth.tables,
}
PACKAGES = ("eventfold", "msgspec", "aiosqlite", "eventsourcing", "aiofiles", "umadb", "uvloop")
# File systems in memory, where a sync reaches no disk.
MEMORY = {"tmpfs", "ramfs"}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"one or more of {', '.join(BENCHMARKS)} (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="run a little of everything, to see that it works")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="how often each case is measured (default: 5; quick: 1)"
    )
    parser.add_argument(
        "--events", type=int, metavar="N", help="the number of events in the log (default: 1,000,000; quick: 20,000)"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        default=Path("build/benchmarks.json"),
        help="the file for the figures of all rounds (default: %(default)s)",
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="write the tables and plots to DIR/benchmarks.md")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="warn about ratios that are a third worse than in published.json"
    )
    parser.add_argument(
        "--redraw", type=Path, metavar="DIR", help="measure nothing; draw the plots of DIR/benchmarks.md again"
    )
    parser.add_argument(
        "--dir",
        default=tempfile.gettempdir(),
        help="where to create temporary directories, which decides the disk that is measured",
    )
    parser.add_argument(
        "--loop", choices=["asyncio", "uvloop"], default="asyncio", help="the event loop of all contenders"
    )
    parser.add_argument(
        "--contender",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="also measure another program, which implements the protocol in docs/benchmarks.md; may be repeated",
    )
    chosen = parser.parse_args(given)
    chosen.rounds = chosen.rounds if chosen.rounds is not None else (1 if chosen.quick else 5)
    chosen.events = chosen.events if chosen.events is not None else (20_000 if chosen.quick else 1_000_000)
    unknown = set(chosen.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    if chosen.rounds < 1 or chosen.events < 400 or chosen.events % 4:
        parser.error("--rounds must be 1 or more, --events a multiple of 4 and at least 400")
    if chosen.redraw is not None:
        return chosen
    if missing := missing_packages("uvloop"):
        parser.error(f"not installed: {', '.join(missing)}; install the extra named benchmark")
    try:
        for option in chosen.contender:
            Contender.from_option(option)
    except ValueError as error:
        parser.error(str(error))
    return chosen


def environment(options: Options) -> dict[str, Any]:
    """The environment on which the figures depend."""
    about = {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "file system": file_system(options.dir),
        "loop": options.loop,
        "rounds": options.rounds,
        "sqlite": sqlite3.sqlite_version,
    }
    for package in PACKAGES:
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            pass
    return about | ({"quick": "yes"} if options.quick else {})


def run(names: list[str], options: Options) -> list[Result]:
    """Measures and prints one table after another."""
    results = []
    with Bench(options) as bench:
        for name in names:
            for table in BENCHMARKS[name](bench):
                begun = perf_counter()
                result = measure(table, options.rounds, warm_up=not options.quick)
                print(f"{result}\n({perf_counter() - begun:.0f} seconds)\n", flush=True)
                results.append(result)
    return results


def warn_of_falls(published: dict[str, Any], results: list[Result]) -> None:
    """Reports on standard error which ratios are much worse than the published ones. Never fails."""
    compared, worse = _published.compare(published, results)
    print(f"{compared} ratios compared with the published ones, {len(worse)} worse by a third or more", file=sys.stderr)
    for line in worse:
        print(f"warning: {line}", file=sys.stderr)


def main(given: list[str] | None = None) -> None:
    chosen = arguments(given)
    if chosen.redraw is not None:
        draw_plots(chosen.redraw)
        return
    options = Options(chosen.dir, chosen.events, chosen.rounds, chosen.quick, chosen.loop, tuple(chosen.contender))
    about = environment(options)
    published = {} if chosen.compare is None else _published.read(chosen.compare)
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
    if about["file system"] in MEMORY:
        print(f"The temporary directories are in memory ({about['file system']}), where a sync costs nothing.\n")
    try:
        results = run(chosen.names or list(BENCHMARKS), options)
    except ContenderError as error:
        raise SystemExit(str(error)) from None
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    figures = {"environment": about, "results": [result.as_json() for result in results]}
    chosen.json.write_text(json.dumps(figures, indent=2) + "\n")
    if chosen.compare is not None:
        warn_of_falls(published, results)
    if chosen.report is not None:
        write_report(chosen.report, results, about)


if __name__ == "__main__":
    main()
