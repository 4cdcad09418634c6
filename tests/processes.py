"""Other processes for the tests: a writer that obeys commands, and the resources of a test's own process."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

SCRIPT = """
import asyncio, sys
from eventfold import Event, EventLog

async def main():
    n = 0
    async with EventLog.open(sys.argv[1]) as log:
        print(0, flush=True)
        while command := (await asyncio.to_thread(sys.stdin.readline)).split():
            if command[0] == "rotate":
                await log.rotate()
            else:
                events = [Event("counted", {"n": n + i}) for i in range(int(command[1]))]
                n += len(events)
                if command[0] == "batch":
                    await log.append_many(events)
                else:
                    for event in events:
                        await log.append(event)
            print(log.head.offset, flush=True)

asyncio.run(main())
"""


class OtherWriter:
    """A writer in another process, whose events are numbered from 0."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def _do(self, command: str) -> int:
        self._process.stdin.write(command.encode() + b"\n")
        return await self.answer()

    async def answer(self) -> int:
        line = await asyncio.wait_for(self._process.stdout.readline(), 20)
        return int(line)

    async def append(self, count: int = 1) -> int:
        """Appends `count` events one by one; returns the head's offset."""
        return await self._do(f"append {count}")

    async def batch(self, count: int) -> int:
        """Appends `count` events as a batch; returns the head's offset."""
        return await self._do(f"batch {count}")

    async def rotate(self) -> int:
        """Rotates the log; returns the head's offset."""
        return await self._do("rotate")


@asynccontextmanager
async def other_writer(directory: Path) -> AsyncIterator[OtherWriter]:
    """Opens the log in another process, and closes it there when the block ends."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SCRIPT, str(directory), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    writer = OtherWriter(process)
    try:
        await writer.answer()
        yield writer
    finally:
        process.stdin.close()
        await process.wait()
        await asyncio.sleep(0)  # Lets the transports of its pipes end.


def add_lines(directory: Path, *lines: bytes) -> None:
    """Adds lines to an active log as a writer in another process would."""
    with directory.joinpath("app.jsonl").open("ab") as file:
        file.write(b"".join(lines))


class Resources(NamedTuple):
    """The resources of a process: descriptors by what they refer to, tasks, and watcher threads."""

    descriptors: list[str]
    tasks: int
    watchers: int


def resources() -> Resources:
    """Returns the current resources of the running event loop's process; descriptors on Linux only."""
    found = []
    for number in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        try:
            link = os.readlink(f"/proc/self/fd/{number}")
            found.append(link if link.startswith(("/", "anon")) else link.split(":")[0])
        except FileNotFoundError:  # the descriptor of this listing
            pass
    return Resources(sorted(found), len(asyncio.all_tasks()), len(watchers()))


def watchers() -> list[threading.Thread]:
    """Returns the threads that watch a directory."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("eventfold watcher")]


async def resources_at_rest() -> Resources:
    """Returns the resources once the watchers of earlier waits and their descriptors are gone."""
    unchanged, found = 0, resources()
    async with asyncio.timeout(10):
        while unchanged < 5 or found.watchers or "anon_inode:inotify" in found.descriptors:
            await asyncio.sleep(0.005)
            before, found = found, resources()
            unchanged = unchanged + 1 if found == before else 0
    return found


async def wait_for_resources(expected: Resources) -> Resources:
    """Waits until the resources are as expected, at most some seconds since threads take time to end; returns them."""
    for _ in range(500):
        if resources() == expected:
            break
        await asyncio.sleep(0.01)
    return resources()
