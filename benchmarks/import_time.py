"""The time of an import in a new interpreter, without the interpreter's startup."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from ._bench import Bench
from ._harness import Case, Figures, Goal, Table

_PROGRAM = """
from time import perf_counter, process_time
start, used = perf_counter(), process_time()
import {module}
print((perf_counter() - start) * 1000, (process_time() - used) * 1000)
"""
ASYNCIO = "import asyncio alone, Python"
MODULES = {
    "eventfold": "eventfold",
    "sqlite": "aiosqlite",
    "eventsourcing": "eventsourcing.sqlite",
    "jsonl": "aiofiles",
}


def tables(bench: Bench) -> Iterator[Table]:
    """The reference is asyncio, which every program that uses eventfold imports anyway."""

    def case(work: str, contender: str, module: str) -> Case:
        def once() -> Figures:
            command = [sys.executable, "-c", _PROGRAM.format(module=module)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            time, used = map(float, output.split())
            return {"time": time, "processor": used}

        goals = (Goal(2.25, at_least=False, to=ASYNCIO),) if contender == "eventfold" else ()
        return Case(work, contender, once, goals)

    yield Table(
        "import",
        "import in a fresh interpreter",
        {"time": "ms", "processor": "ms"},
        [
            case(*ASYNCIO.split(", "), "asyncio"),
            *(case("import", contender, module) for contender, module in MODULES.items()),
        ],
        notes=["asyncio is included for packages that import it; eventsourcing does not."],
    )
