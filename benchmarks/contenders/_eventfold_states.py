"""Logs with a large state."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from benchmarks._events import Totals, add, sample_fields
from eventfold import Event, EventLog, SyncMode, View

ENTRY = "x" * 1000


class Entries(msgspec.Struct):
    """A state that is about 1 KB per text when encoded."""

    texts: dict[str, str] = {}
    totals: Totals = msgspec.field(default_factory=Totals)


def fill(state: Entries, event: Event) -> Entries:
    """Adds the texts once, then counts events."""
    if event.type == "filled":
        state.texts.update((str(number), ENTRY) for number in range(event.data["texts"]))
    else:
        add(state.totals, event)
    return state


def sample_events(count: int) -> list[Event]:
    return [Event(**sample_fields(number)) for number in range(count)]


@asynccontextmanager
async def large_log(dir: str | Path, bytes: int) -> AsyncIterator[EventLog]:
    """A log with the view "large", whose state has about `bytes` bytes and is saved. Appends are not synced."""
    async with EventLog.open(dir, views=[View("large", fill, Entries)], sync=SyncMode.OS) as log:
        await log.append(Event("filled", {"texts": bytes // len(ENTRY)}))
        await log.append_many(sample_events(1_000))
        await log.refresh_all()
        await log.views["large"].save(log.reader())
        yield log
