"""Typed events for the tests of catalogs: classes of each kind, and an order with three versions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pydantic

from eventfold import (
    Catalog,
    EventLog,
    Record,
)


class StructItem(msgspec.Struct, frozen=True):
    """A part of an event."""

    name: str
    count: int


class StructEvent(msgspec.Struct, frozen=True):
    """One event for each kind of class; all four kinds have the same fields."""

    order: int
    items: list[StructItem] = []
    note: str | None = None


class ModelItem(pydantic.BaseModel):
    """A part of a pydantic model."""

    name: str
    count: int


class ModelEvent(pydantic.BaseModel):
    """The event as a pydantic model, which has no positional arguments."""

    model_config = pydantic.ConfigDict(strict=True)

    order: int
    items: list[ModelItem] = []
    note: str | None = None


class OrderPlaced(msgspec.Struct, frozen=True):
    """The newest version of three: 1 had no currency, 2 had the amount in units."""

    order: int
    cents: int
    currency: str


class OrderPaid(msgspec.Struct, frozen=True):
    """Another type of event."""

    order: int


def orders() -> Catalog:
    """The catalog: version 3 of `order_placed` with upcasters, and version 2 of `order_closed`, once two events."""
    catalog = Catalog()
    catalog.event("order_placed", version=3, tags=lambda e: [f"order:{e.order}"])(OrderPlaced)
    catalog.event("order_paid")(OrderPaid)

    @catalog.event("order_closed", version=2)
    class OrderClosed(msgspec.Struct):
        order: int

    @catalog.upcast("order_placed", from_version=1)
    def add_currency(data: dict[str, Any]) -> dict[str, Any]:
        return {**data, "currency": "EUR"}

    @catalog.upcast("order_placed", from_version=2)
    def in_cents(data: dict[str, Any]) -> dict[str, Any]:
        data["cents"] = data.pop("amount") * 100
        return data

    @catalog.upcast("order_closed", from_version=1)
    def split(data: dict[str, Any]) -> list[tuple[str, Any]]:
        if data.get("void"):
            return []
        return [("order_paid", {"order": data["order"]}), ("order_closed", {"order": data["order"]}), ("noted", [1])]

    return catalog


def line(type: str, data: str, version: int = 1) -> bytes:
    """Returns a line as an older or a newer program wrote it."""
    tail = f',"version":{version}' if version != 1 else ""
    return f'{{"type":"{type}","data":{data},"ts":1{tail}}}\n'.encode()


def write(directory: Path, *lines: bytes) -> None:
    """Makes a log of these lines."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "app.jsonl").write_bytes(b"".join(lines))


async def collect(records: AsyncIterator[Record], count: int | None = None) -> list[Record]:
    """Returns all records, or only the first `count`."""
    found: list[Record] = []
    async for record in records:
        found.append(record)
        if len(found) == count:
            break
    return found


async def data_of(log: EventLog) -> list[Any]:
    """The data of all events."""
    return [record.event.data for record in await collect(log.read_full())]
