"""SQLite as in `sqlite`, with transactions that tasks share: `execute`, then `commit`, on one connection.

That is the result of the first example in aiosqlite's documentation when many tasks use one connection: a commit
commits everything that was executed before, by any task. It is fast and durable, but a task's rollback or failed
statement affects the others too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import cycle
from typing import Any

from benchmarks._events import PlainEvent, plain_events

from ._serve import Answer, Unsupported, serve, time_appends, time_together
from .sqlite import EVENTS, INSERT, Log, connect, row


class SharedLog(Log):
    async def append(self, event: PlainEvent) -> None:
        await self.db.execute(INSERT, row(event))
        await self.db.commit()

    async def append_many(self, events: Sequence[PlainEvent]) -> None:
        await self.db.executemany(INSERT, map(row, events))
        await self.db.commit()


class SqliteShared:
    say: Any

    @asynccontextmanager
    async def log(self, dir: str) -> AsyncIterator[Log]:
        async with connect(dir, "DEFERRED") as db:
            yield SharedLog(db)

    async def append(self, dir: str, tasks: int, count: int, batch: int) -> Answer:
        return await time_appends(self.log(dir), plain_events(tasks * count * batch), tasks, batch)

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
        if conditional or max_log_size:
            raise Unsupported
        events = cycle(plain_events(EVENTS))
        async with self.log(dir) as log:
            return await time_together(self.say, lambda: log.append(next(events)), tasks, start, seconds)


if __name__ == "__main__":
    serve(SqliteShared())
