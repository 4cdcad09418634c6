"""How long `import eventfold` takes in a fresh interpreter, measured inside it, so without the interpreter's start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ._harness import Case, Goal, Options, Table

_PROGRAM = """
from time import perf_counter
start = perf_counter()
import {module}
print((perf_counter() - start) * 1000)
"""


async def import_time(module: str) -> float:
    """Milliseconds."""
    command = [sys.executable, "-c", _PROGRAM.format(module=module)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@asynccontextmanager
async def prepare(options: Options) -> AsyncIterator[list[Table]]:
    """The reference is asyncio, which every program that uses the package has imported anyway."""
    yield [
        Table(
            "import in a fresh interpreter",
            "ms",
            False,
            [
                Case("asyncio", lambda: import_time("asyncio")),
                Case("eventfold", lambda: import_time("eventfold"), Goal(120, at_least=False, of_figure=True)),
            ],
        )
    ]
