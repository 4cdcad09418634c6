"""SQLite through aiosqlite, in WAL mode with `synchronous=FULL`, so that a commit is on disk before it returns.

One connection, as in aiosqlite's documentation. Each append is its own transaction (one statement in autocommit mode,
so one trip to aiosqlite's thread), like an append of eventfold: its outcome does not depend on others. For tasks that
share transactions, see `sqlite_shared`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any

import aiosqlite
import msgspec

from benchmarks._events import PlainEvent, Totals, add, blocks, plain_events

from ._serve import Answer, Unsupported, serve, time_appends, time_conditional, time_together

TABLES = (
    "CREATE TABLE IF NOT EXISTS events (position INTEGER PRIMARY KEY, type TEXT NOT NULL, data TEXT NOT NULL, "
    "ts INTEGER NOT NULL, id TEXT, actor TEXT, meta TEXT)",
    "CREATE TABLE IF NOT EXISTS snapshots (name TEXT PRIMARY KEY, position INTEGER NOT NULL, state TEXT NOT NULL)",
)
COLUMNS = "type, data, ts, id, actor, meta"
INSERT = f"INSERT INTO events ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"
# How many rows aiosqlite fetches in one trip to its thread; its own default is 64.
ROWS = 1_000
# Seconds for which a process waits while others have the database's lock.
LOCK_TIMEOUT = 60
# Events to insert repeatedly.
EVENTS = 5_000
INSERT_IF = (
    f"INSERT INTO events ({COLUMNS}) SELECT ?, ?, ?, ?, ?, ? WHERE (SELECT ifnull(max(position), 0) FROM events) = ?"
)

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder().decode


def row(event: PlainEvent) -> tuple[Any, ...]:
    meta = None if event.meta is None else encode(event.meta).decode()
    return event.type, encode(event.data).decode(), event.ts, event.id, event.actor, meta


class Log:
    """An open database, in autocommit mode."""

    def __init__(self, db: aiosqlite.Connection) -> None:
        self.db = db

    async def append(self, event: PlainEvent) -> None:
        await self.db.execute(INSERT, row(event))

    async def append_many(self, events: Sequence[PlainEvent]) -> None:
        await self.db.execute("BEGIN IMMEDIATE")
        await self.db.executemany(INSERT, map(row, events))
        await self.db.execute("COMMIT")


@asynccontextmanager
async def connect(dir: str, isolation_level: str | None = None) -> AsyncIterator[aiosqlite.Connection]:
    path = Path(dir, "events.db")
    async with aiosqlite.connect(
        path, isolation_level=isolation_level, iter_chunk_size=ROWS, timeout=LOCK_TIMEOUT
    ) as db:
        await db.execute("PRAGMA journal_mode=WAL")
        await db.execute("PRAGMA synchronous=FULL")
        for statement in TABLES:
            await db.execute(statement)
        yield db


async def fold(db: aiosqlite.Connection, states: list[Totals], types: list[str] | None, after: int = 0) -> int:
    """Folds the events after a position into each state, in place; returns the position of the last one."""
    query, values = f"SELECT {COLUMNS}, position FROM events WHERE position > ?", [after]
    if types is not None:
        query += f" AND type IN ({', '.join('?' * len(types))})"
    position = after
    async with db.execute(f"{query} ORDER BY position", [*values, *(types or [])]) as cursor:
        async for type, data, ts, id, actor, meta, position in cursor:  # noqa: B007
            event = PlainEvent(type, decode(data), ts, id, actor, None if meta is None else decode(meta))
            for number, state in enumerate(states):
                states[number] = add(state, event)
    return position


class Sqlite:
    say: Any

    @asynccontextmanager
    async def log(self, dir: str) -> AsyncIterator[Log]:
        async with connect(dir) as db:
            yield Log(db)

    async def append(self, dir: str, tasks: int, count: int, batch: int) -> Answer:
        return await time_appends(self.log(dir), plain_events(tasks * count * batch), tasks, batch)

    async def append_if(self, dir: str, tasks: int, count: int) -> Answer:
        """Appends with the condition in the statement, so that no transaction has to stay open."""
        events = iter(plain_events(tasks * count))
        async with connect(dir) as db:
            position = 0
            waiting: list[PlainEvent] = []

            async def attempt() -> bool:
                nonlocal position
                event = waiting.pop() if waiting else next(events)
                cursor = await db.execute(INSERT_IF, (*row(event), position))
                if cursor.rowcount:
                    position = max(position, cursor.lastrowid or 0)
                    return True
                waiting.append(event)
                return False

            return await time_conditional(attempt, tasks, count)

    async def append_together(
        self,
        dir: str,
        tasks: int,
        start: str,
        seconds: float,
        shared: bool | None,
        conditional: bool,
        max_log_size: int,
    ) -> Answer:
        if max_log_size:
            raise Unsupported
        events = cycle(plain_events(EVENTS))
        async with self.log(dir) as log:

            async def plainly() -> None:
                await log.append(next(events))

            async def on_the_newest() -> None:
                event = next(events)
                while True:
                    async with log.db.execute("SELECT ifnull(max(position), 0) FROM events") as cursor:
                        (position,) = await cursor.fetchone() or (0,)
                    if (await log.db.execute(INSERT_IF, (*row(event), position))).rowcount:
                        return

            return await time_together(self.say, on_the_newest if conditional else plainly, tasks, start, seconds)

    async def write(self, dir: str, events: int, distinct: int | None) -> Answer:
        async with connect(dir) as db:
            await db.execute("BEGIN")
            for start, count in blocks(events, distinct):
                await db.executemany(INSERT, map(row, plain_events(count, start)))
            await db.execute("COMMIT")
        return {}

    async def replay(self, dir: str, views: int, types: list[str] | None) -> Answer:
        begun = perf_counter()
        async with connect(dir) as db:
            states = [Totals() for _ in range(views)]
            await fold(db, states, types)
            return {"seconds": perf_counter() - begun, **msgspec.structs.asdict(states[-1])}

    async def open(self, dir: str, snapshot: bool) -> Answer:
        begun = perf_counter()
        if await self._open(dir, snapshot) or not snapshot:
            return {"seconds": perf_counter() - begun}
        begun = perf_counter()
        await self._open(dir, snapshot)
        return {"seconds": perf_counter() - begun}

    async def _open(self, dir: str, snapshot: bool) -> bool:
        """Opens the log and writes a snapshot; returns whether there was one before."""
        async with connect(dir) as db:
            state, position, found = Totals(), 0, None
            if snapshot:
                async with db.execute("SELECT position, state FROM snapshots") as cursor:
                    found = await cursor.fetchone()
                if found is not None:
                    position, state = found[0], msgspec.json.decode(found[1], type=Totals)
            last = await fold(db, [state], None, position)
            if last != position:
                await db.execute("REPLACE INTO snapshots VALUES ('totals', ?, ?)", (last, encode(state).decode()))
        return found is not None


if __name__ == "__main__":
    serve(Sqlite())
