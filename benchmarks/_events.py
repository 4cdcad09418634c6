"""The events that the benchmarks write and read: those of an order book, with lines of about 190 bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

# Each type has a quarter of the events.
TYPES = ("order_placed", "order_paid", "order_sent", "order_closed")
# The lines of these types, without the last bracket. Formatting is several times as fast as encoding.
_LINES = [
    b'{"type":"%s","data":{"order":%%d,"customer":"customer-%%04d","amount":%%d,"note":"please leave it at the back '
    b'door"},"ts":%%d,"id":"event-%%012d","actor":"user-%%02d"' % type.encode()
    for type in TYPES
]
# Average bytes of a line.
LINE_SIZE = 190
_BLOCK = 10_000


class PlainEvent(msgspec.Struct, omit_defaults=True):
    """The event class of a program without eventfold."""

    type: str
    data: Any
    ts: int
    id: str | None = None
    actor: str | None = None
    meta: Any = None


class BatchedEvent(PlainEvent, omit_defaults=True):
    """An event with its position in a batch, from 1, and the batch's size."""

    batch: tuple[int, int] | None = None


class Order(msgspec.Struct, frozen=True, gc=False):
    """The typed data of every event."""

    order: int
    customer: str
    amount: int
    note: str


def sample_fields(number: int) -> dict[str, Any]:
    """The fields of the sample event with this number."""
    return {
        "type": TYPES[number % len(TYPES)],
        "data": {
            "order": number // len(TYPES),
            "customer": f"customer-{number % 977:04}",
            "amount": number % 9973,
            "note": "please leave it at the back door",
        },
        "ts": 1_700_000_000 + number // 10,
        "id": f"event-{number:012}",
        "actor": f"user-{number % 100:02}",
    }


def tagged_fields(number: int, tags: int | None = None) -> dict[str, Any]:
    """The fields of the sample event with one tag: its own, or one of `tags` different tags in turn."""
    return {**sample_fields(number), "tags": (f"entity:{number if tags is None else number % tags}",)}


def plain_events(count: int, start: int = 0) -> list[PlainEvent]:
    """Events with the numbers from `start`."""
    return [PlainEvent(**sample_fields(number)) for number in range(start, start + count)]


def sample_lines(count: int, start: int = 0) -> list[bytes]:
    """The lines of the same events as `EventWriter` writes them, each with its newline."""
    return [_open_line(number) + b"}\n" for number in range(start, start + count)]


def tagged_lines(count: int, start: int = 0, tags: int | None = None) -> list[bytes]:
    """The lines of the events of `tagged_fields`."""
    return [
        b'%b,"tags":["entity:%d"]}\n' % (_open_line(number), number if tags is None else number % tags)
        for number in range(start, start + count)
    ]


def batch_lines(count: int, start: int = 0) -> list[bytes]:
    """The lines of the same events as one `append_many` writes them."""
    return [b'%b,"batch":[%d,%d]}\n' % (_open_line(start + at), at + 1, count) for at in range(count)]


def _open_line(number: int) -> bytes:
    """The line of the event of `sample_fields`, without its last bracket."""
    order, type = divmod(number, len(TYPES))
    ts = 1_700_000_000 + number // 10
    return _LINES[type] % (order, number % 977, number % 9973, ts, number, number % 100)


def blocks(count: int, distinct: int | None = None) -> Iterator[tuple[int, int]]:
    """The numbers of `count` events in chunks, as (start, count); they start over after `distinct`."""
    distinct = distinct or count
    done = 0
    while done < count:
        start = done % distinct
        size = min(_BLOCK, count - done, distinct - start)
        yield start, size
        done += size


class Totals(msgspec.Struct):
    """The state of the replayed view."""

    events: int = 0
    amount: int = 0


def add(state: Totals, event: Any) -> Totals:
    """The reducer of the replayed view, as cheap as possible for a reducer that reads the data."""
    state.events += 1
    state.amount += event.data["amount"]
    return state


def add_wanted(state: Totals, event: Any) -> Totals:
    """The reducer that selects a quarter of the events itself."""
    return add(state, event) if event.type == TYPES[0] else state


def add_typed(state: Totals, event: Any) -> Totals:
    """The reducer `add` for typed data."""
    state.events += 1
    state.amount += event.data.amount
    return state


def totals(count: int, *, selective: bool = False) -> Totals:
    """The expected state for the events with numbers below `count`."""
    numbers = range(0, count, len(TYPES) if selective else 1)
    return Totals(len(numbers), sum(number % 9973 for number in numbers))
