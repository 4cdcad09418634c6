"""The events that the benchmarks write and read: an order book's, with lines of about 190 bytes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from eventfold import Event, EventWriter, SyncMode

# Each type has a quarter of the events.
TYPES = ("order_placed", "order_paid", "order_sent", "order_closed")


def sample_event(number: int) -> Event:
    """The event with this number; always the same one."""
    return Event(
        TYPES[number % len(TYPES)],
        {
            "order": number // len(TYPES),
            "customer": f"customer-{number % 977:04}",
            "amount": number % 9973,
            "note": "please leave it at the back door",
        },
        ts=1_700_000_000 + number // 10,
        id=f"event-{number:012}",
        actor=f"user-{number % 100:02}",
    )


def sample_events(count: int, start: int = 0) -> list[Event]:
    """Events with the numbers from `start`."""
    return [sample_event(number) for number in range(start, start + count)]


class PlainEvent(msgspec.Struct):
    """What a program without eventfold would decode a line into."""

    type: str
    data: Any
    ts: int
    id: str | None = None
    actor: str | None = None
    meta: Any = None


def sample_lines(events: Iterable[Event]) -> list[bytes]:
    """The lines of the events as `EventWriter` writes them, each with its newline."""
    encoder = msgspec.json.Encoder()
    lines = []
    for event in events:
        fields = {"type": event.type, "data": event.data, "ts": event.ts, "id": event.id, "actor": event.actor}
        lines.append(encoder.encode(fields) + b"\n")
    return lines


async def write_log(dir: Path, count: int) -> None:
    """A log of `count` sample events, in single appends' lines (no batches)."""
    block = b"".join(sample_lines(sample_events(1)))
    async with EventWriter.open(dir, sync=SyncMode.OS) as writer:
        await writer.append(sample_event(0))
        path = writer.log_path
    if path.read_bytes() != block:
        raise AssertionError("the writer's line is not the one that the raw contenders write")
    with open(path, "ab") as file:
        for start in range(1, count, 10_000):
            file.writelines(sample_lines(sample_events(min(10_000, count - start), start)))


class Totals(msgspec.Struct):
    """The state of the replayed view."""

    events: int = 0
    amount: int = 0


def add(state: Totals, event: Any) -> Totals:
    """The reducer of the replayed view: as cheap as one can be that looks at the data, so that the rest counts."""
    state.events += 1
    state.amount += event.data["amount"]
    return state
