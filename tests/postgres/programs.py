"""Several programs that append to one log while its server is harmed, and what must be true of the log afterwards."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from eventfold import EventReader

Number = tuple[int, int]  # the program, and its event
PROGRAM = Path(__file__).with_name("writing_program.py")
GOES_ON_WITHIN = 60  # seconds


class Programs:
    """What the programs have printed. Use `writing` to create it."""

    def __init__(self, processes: list[asyncio.subprocess.Process]) -> None:
        self.acknowledged: list[set[Number]] = [set() for _ in processes]
        self.unknown: set[Number] = set()
        self.seen: list[list[Number]] = [[] for _ in processes]
        self._processes = processes
        self._reading = [asyncio.create_task(self._read(i)) for i in range(len(processes))]

    async def _read(self, index: int) -> None:
        stream = self._processes[index].stdout
        assert stream is not None
        async for line in stream:
            what, program, n = line.split()
            number = int(program), int(n)
            if what == b"acknowledged":
                self.acknowledged[index].add(number)
            elif what == b"unknown":
                self.unknown.add(number)
            else:
                self.seen[index].append(number)

    async def go_on(self, count: int = 100) -> None:
        """Waits until each program has got so many more events acknowledged."""
        goals = [len(acknowledged) + count for acknowledged in self.acknowledged]
        async with asyncio.timeout(GOES_ON_WITHIN):
            while any(len(found) < goal for found, goal in zip(self.acknowledged, goals, strict=True)):
                assert all(process.returncode is None for process in self._processes), "a program has ended"
                await asyncio.sleep(0.01)

    async def end(self) -> None:
        """Ends the programs, which then print what their tails have seen."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        async with asyncio.timeout(GOES_ON_WITHIN):
            await asyncio.gather(*self._reading)
            assert [await process.wait() for process in self._processes] == [0] * len(self._processes)

    async def check(self, address: str, what: str) -> None:
        """Asserts that no acknowledged event is lost, none is there twice, and the tails have seen exactly the log."""
        reader = EventReader(address)
        written = [(r.event.data["program"], r.event.data["n"]) async for r in reader.read_full()]
        await reader.aclose()
        counts = Counter(written)
        acknowledged = set().union(*self.acknowledged)
        lost = acknowledged - counts.keys()
        doubled = [number for number, count in counts.items() if count > 1]
        strange = {number for number in counts if number[1] >= 0} - acknowledged - self.unknown
        print(f"{what}: {len(acknowledged)} acknowledged, {len(lost)} lost, {len(doubled)} doubled")
        print(f"{len(self.unknown)} of unknown outcome, {len(self.unknown & counts.keys())} of them in the log")
        assert not lost
        assert not doubled
        assert not strange
        for number, seen in enumerate(self.seen):
            assert seen == written[: len(seen)]
            assert seen[-1] == (number, -1)


@asynccontextmanager
async def writing(addresses: list[str], tasks: int) -> AsyncIterator[Programs]:
    """Runs one program for each address, all with the same log, each with that many tasks."""
    pipe = asyncio.subprocess.PIPE
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, PROGRAM, address, str(number), str(tasks), stdin=pipe, stdout=pipe
        )
        for number, address in enumerate(addresses)
    ]
    try:
        yield Programs(processes)
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
                await process.wait()
