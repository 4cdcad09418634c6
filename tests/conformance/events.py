"""Small events for the tests of all engines."""

from __future__ import annotations

import asyncio
from typing import Any

from eventfold import (
    Event,
    EventLog,
    EventReader,
)


def event(n: int, type: str = "counted") -> Event:
    return Event(type, {"n": n}, ts=n)


async def numbers(log: EventLog | EventReader, offset: int = 0) -> list[int]:
    return [record.event.data["n"] async for record in log.read_from(offset)]


async def soon(condition: Any) -> None:
    """Waits until the condition holds; fails if it never does."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)
