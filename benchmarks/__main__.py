"""`python -m benchmarks [NAME ...]`: runs the named benchmarks, or all, and prints a table for each."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import append, import_time, refresh, replay
from ._harness import Options, Prepare, file_system, measure

BENCHMARKS: dict[str, Prepare] = {
    "append": append.prepare,
    "replay": replay.prepare,
    "refresh": refresh.prepare,
    "import": import_time.prepare,
}
# Where a sync reaches no disk.
MEMORY = {"tmpfs", "ramfs"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one or more of {', '.join(BENCHMARKS)}; default all")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each case is measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of all rounds there")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where temporary directories are made")
    parser.add_argument("--events", type=int, default=200_000, metavar="N", help="how many events the replay reads")
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="asyncio", help="the event loop")
    chosen = parser.parse_args()
    unknown = set(chosen.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    if chosen.rounds < 1 or chosen.events < 4 or chosen.events % 4:
        parser.error("--rounds must be 1 or more, --events a multiple of 4")
    return chosen


def environment(chosen: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "file system": file_system(chosen.dir),
        "loop": chosen.loop,
        "rounds": chosen.rounds,
        **{package: version(package) for package in ("eventfold", "msgspec")},
    }


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "uvloop":
        import uvloop

        return uvloop.new_event_loop
    return asyncio.new_event_loop


async def run(names: list[str], options: Options, rounds: int) -> list[dict[str, Any]]:
    results = []
    for name in names:
        async with BENCHMARKS[name](options) as tables:
            for table in tables:
                result = await measure(name, table, rounds)
                print(f"{result}\n", flush=True)
                results.append(result.as_json())
    return results


def main() -> None:
    chosen = arguments()
    about = environment(chosen)
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
    if about["file system"] in MEMORY:
        print(f"The temporary directories are in memory ({about['file system']}): syncing costs nothing there.\n")
    options = Options(chosen.dir, chosen.events)
    with asyncio.Runner(loop_factory=loop_factory(chosen.loop)) as runner:
        results = runner.run(run(chosen.names or list(BENCHMARKS), options, chosen.rounds))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps({"environment": about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
