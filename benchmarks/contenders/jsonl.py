"""A plain JSONL logger with aiofiles: each append writes its line to an unbuffered file and syncs it.

Its files are read like any file of lines, with the bare loop of `raw`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiofiles
import msgspec

from benchmarks._events import PlainEvent, plain_events

from ._serve import Answer, serve, time_appends

encode = msgspec.json.Encoder().encode


class Log:
    def __init__(self, file: Any) -> None:
        self._file = file

    async def append(self, event: PlainEvent) -> None:
        await self._file.write(encode(event) + b"\n")
        await asyncio.to_thread(os.fdatasync, self._file.fileno())

    async def append_many(self, events: Sequence[PlainEvent]) -> None:
        await self._file.write(b"".join(encode(event) + b"\n" for event in events))
        await asyncio.to_thread(os.fdatasync, self._file.fileno())


@asynccontextmanager
async def open_log(dir: str) -> AsyncIterator[Log]:
    async with aiofiles.open(Path(dir, "events.jsonl"), "ab", buffering=0) as file:
        yield Log(file)


class Jsonl:
    async def append(self, dir: str, tasks: int, count: int, batch: int) -> Answer:
        return await time_appends(open_log(dir), plain_events(tasks * count * batch), tasks, batch)


if __name__ == "__main__":
    serve(Jsonl())
