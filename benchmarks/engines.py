"""The same appends and the same replay on each engine, beside plain asyncpg with a row and a transaction an event.

Run it apart, since it starts a PostgreSQL server: `python -m benchmarks.engines`. Needs the server's binaries.
Client and server share the machine's processors, so only the ratios count. It fails where a floor is not reached.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import asyncpg
import msgspec
from tests.postgres.servers import running_server

from eventfold import Event, EventLog, EventReader

from ._events import PlainEvent, sample_fields

TASKS = (1, 100, 1000)
# How many times as fast as plain asyncpg the engine must be.
APPEND_FLOOR, REPLAY_FLOOR = 15.0, 5.0
_CONNECTIONS = 20
_INSERT = "INSERT INTO plain (line) VALUES ($1)"


async def _appends_a_second(append: Callable[[int], Awaitable[Any]], tasks: int, seconds: float) -> float:
    """How many of these calls end in a second, where each of so many tasks makes one after the other."""
    done, until = 0, perf_counter() + seconds
    start = perf_counter()

    async def run(task: int) -> None:
        nonlocal done
        while perf_counter() < until:
            await append(task)
            done += 1

    await asyncio.gather(*(run(task) for task in range(tasks)))
    return done / (perf_counter() - start)


async def _events_a_second(events: Callable[[], Awaitable[int]]) -> float:
    start = perf_counter()
    return await events() / (perf_counter() - start)


async def _measure(address: str, directory: Path, seconds: float, events: int) -> dict[str, dict[str, float]]:
    """For each contender its figures, by what is measured."""
    figures: dict[str, dict[str, float]] = {}

    async with asyncpg.create_pool(address, min_size=_CONNECTIONS, max_size=_CONNECTIONS) as pool:
        await pool.execute(
            "CREATE TABLE plain (n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, line bytea NOT NULL)"
        )

        async def append_row(n: int) -> None:
            await pool.execute(_INSERT, msgspec.json.encode(PlainEvent(**sample_fields(n))))

        plain = figures["asyncpg, a row an event"] = {}
        for tasks in TASKS:
            plain[f"{tasks} tasks"] = await _appends_a_second(append_row, tasks, seconds)
        await pool.execute("TRUNCATE plain")
        rows = [(msgspec.json.encode(PlainEvent(**sample_fields(n))),) for n in range(events)]
        await pool.copy_records_to_table("plain", records=rows, columns=["line"])

        async def select() -> int:
            decoder, count = msgspec.json.Decoder(PlainEvent), 0
            async with pool.acquire() as connection, connection.transaction():
                async for row in connection.cursor("SELECT line FROM plain ORDER BY n"):
                    decoder.decode(row[0])
                    count += 1
            return count

        plain["replay"] = await _events_a_second(select)

    for name, where in (("files", directory / "log"), ("postgres", f"{address}?log=appends")):
        mine = figures[name] = {}
        async with EventLog.open(where) as log:

            async def append(n: int, log: EventLog = log) -> None:
                await log.append(Event(**sample_fields(n)))

            for tasks in TASKS:
                mine[f"{tasks} tasks"] = await _appends_a_second(append, tasks, seconds)
    for name, where in (("files", directory / "replay"), ("postgres", f"{address}?log=replay")):
        async with EventLog.open(where) as log:
            for start in range(0, events, 1000):
                # One commit for a thousand events, as with as many tasks.
                await asyncio.gather(*(log.append(Event(**sample_fields(n))) for n in range(start, start + 1000)))
        reader = EventReader(where)

        async def read(reader: EventReader = reader) -> int:
            count = 0
            async for piece in reader.read_slices():
                count += len(piece.events)
            return count

        figures[name]["replay"] = await _events_a_second(read)
        await reader.aclose()
    return figures


def main() -> int:
    """Measures, prints a table, and tells by the status whether the floors were reached."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each number of tasks")
    parser.add_argument("--events", type=int, default=200_000, help="to replay, a multiple of 1,000")
    options = parser.parse_args()
    with running_server() as server, tempfile.TemporaryDirectory() as directory:
        figures = asyncio.run(_measure(server.address(), Path(directory), options.seconds, options.events))
    columns = [*(f"{tasks} tasks" for tasks in TASKS), "replay"]
    print(f"{'events a second':24}", *(f"{column:>12}" for column in columns))
    for name, row in figures.items():
        print(f"{name:24}", *(f"{row[column]:12,.0f}" for column in columns))
    plain, mine = figures["asyncpg, a row an event"], figures["postgres"]
    reached = True
    for column, floor in ((f"{TASKS[-1]} tasks", APPEND_FLOOR), ("replay", REPLAY_FLOOR)):
        ratio = mine[column] / plain[column]
        reached = reached and ratio >= floor
        print(f"{column}: {ratio:.1f} times plain asyncpg; the floor is {floor:g}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
