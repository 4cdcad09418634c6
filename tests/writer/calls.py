"""Starting calls of a writer."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support import settle


async def started(*calls: Any) -> list[asyncio.Task[Any]]:
    """Starts the calls as tasks and lets each run until it waits."""
    tasks = [asyncio.create_task(call) for call in calls]
    await settle()
    return tasks


def run(script: str, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a separate process, with the directory as its first argument."""
    return subprocess.run(
        [sys.executable, "-c", script, str(directory), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
