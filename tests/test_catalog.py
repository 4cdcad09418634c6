"""Typed events: the catalog, upcasting, and everything that appends or reads through a log that has one."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import attrs
import msgspec
import pydantic
import pytest

from eventfold import (
    Catalog,
    Event,
    EventLog,
    InvalidEventError,
    Query,
    Record,
    ReducerError,
    SchemaError,
    SyncMode,
    View,
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


@dataclass
class DataclassEvent:
    """The event as a dataclass."""

    order: int
    items: list[StructItem] = field(default_factory=list)
    note: str | None = None


@attrs.define
class AttrsEvent:
    """The event as an attrs class."""

    order: int
    items: list[StructItem] = attrs.field(factory=list)
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


def listed(**options: Any) -> View[list[Any]]:
    """Returns a view that keeps the data of all its events as text, so that a snapshot can hold any class's."""
    return View("listed", lambda state, event: [*state, repr(event.data)], list, **options)


# Classes


@pytest.mark.parametrize(
    "obj",
    [
        StructEvent(7, [StructItem("a", 1)], "x"),
        DataclassEvent(7, [StructItem("a", 1)], "x"),
        AttrsEvent(7, [StructItem("a", 1)], "x"),
        ModelEvent(order=7, items=[ModelItem(name="a", count=1)], note="x"),
    ],
    ids=lambda obj: type(obj).__name__,
)
async def test_an_object_is_appended_and_read_back(tmp_path: Path, obj: Any) -> None:
    """Tested with each kind of class and with nested values; on disk, the event is plain JSON."""
    catalog = Catalog()
    catalog.event("placed")(type(obj))
    async with EventLog.open(tmp_path, catalog=catalog) as log:
        await log.append(obj, ts=1)
        await log.append_many([obj, Event("other", {"n": 1}, ts=1)])
        assert await data_of(log) == [obj, obj, {"n": 1}]

    first = msgspec.json.decode((tmp_path / "app.jsonl").read_bytes().splitlines()[0])
    data = {"order": 7, "items": [{"name": "a", "count": 1}], "note": "x"}
    assert first == {"type": "placed", "data": data, "ts": 1}
    async with EventLog.open(tmp_path, catalog=catalog) as log:
        assert await data_of(log) == [obj, obj, {"n": 1}]
        assert all(type(data) in (type(obj), dict) for data in await data_of(log))


def test_a_class_of_another_kind_is_refused() -> None:
    """The decorator raises the error."""
    with pytest.raises(TypeError, match=r"'placed'.*must be a msgspec struct, a dataclass"):

        @Catalog().event("placed")
        class Plain:
            pass


async def test_a_class_that_cannot_be_decoded_is_refused_when_the_log_is_opened(tmp_path: Path) -> None:
    """Annotations may name classes that are defined later, so the check has to wait for the opening."""
    catalog = Catalog()

    @catalog.event("placed")
    @dataclass
    class Odd:
        lock: NoSuchType  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(TypeError, match=r"'placed': .*Odd is not a class that can be decoded.*NoSuchType"):
        await EventLog.open(tmp_path, catalog=catalog)


def test_two_classes_for_one_type_are_refused() -> None:
    """The message names both."""
    catalog = Catalog()
    catalog.event("placed")(StructEvent)

    with pytest.raises(ValueError, match=r"two classes.*'placed': StructEvent and AttrsEvent"):
        catalog.event("placed", version=2)(AttrsEvent)


def test_one_class_for_two_types_is_refused() -> None:
    """Otherwise the event type of an object would be ambiguous."""
    catalog = Catalog()
    catalog.event("placed")(StructEvent)

    with pytest.raises(ValueError, match=r"StructEvent is declared for two event types, 'placed' and 'closed'"):
        catalog.event("closed")(StructEvent)


@pytest.mark.parametrize("version", [0, -1, True, "2", 1.5])
def test_a_version_is_an_integer_from_1(version: Any) -> None:
    """Tested for classes and for upcasters."""
    with pytest.raises(ValueError, match="version must be an integer of 1 or more"):
        Catalog().event("placed", version=version)
    with pytest.raises(ValueError, match="from_version must be an integer of 1 or more"):
        Catalog().upcast("placed", from_version=version)


@pytest.mark.parametrize("class_first", [True, False])
def test_an_upcaster_from_a_version_that_is_not_older_is_refused(class_first: bool) -> None:
    """The order of the two declarations doesn't matter."""
    catalog = Catalog()
    with pytest.raises(ValueError, match=r"no version 2 to upcast from: its class is version 2"):
        if class_first:
            catalog.event("placed", version=2)(StructEvent)
        catalog.upcast("placed", from_version=2)(dict)
        catalog.event("placed", version=2)(StructEvent)


def test_two_upcasters_from_one_version_are_refused() -> None:
    """The second declaration raises the error."""
    catalog = Catalog()
    catalog.upcast("placed", from_version=1)(dict)

    with pytest.raises(ValueError, match="two upcasters are declared for event type 'placed' from version 1"):
        catalog.upcast("placed", from_version=1)(dict)


async def test_a_gap_between_the_upcasters_is_refused_when_the_log_is_opened(tmp_path: Path) -> None:
    """The message names the version without an upcaster, and no file is created."""
    catalog = Catalog()
    catalog.event("placed", version=4)(StructEvent)
    catalog.upcast("placed", from_version=1)(dict)
    catalog.upcast("placed", from_version=3)(dict)

    with pytest.raises(ValueError, match="'placed' has no upcaster from version 2"):
        await EventLog.open(tmp_path / "log", catalog=catalog)
    assert not (tmp_path / "log").exists()


async def test_upcasters_of_a_type_without_a_class_are_refused_when_the_log_is_opened(tmp_path: Path) -> None:
    """Such an upcaster must be a mistake, since nothing could use its result."""
    catalog = Catalog()
    catalog.event("placed", version=2)(StructEvent)
    catalog.upcast("plaecd", from_version=1)(dict)

    with pytest.raises(ValueError, match="'plaecd' has upcasters, but no class"):
        await EventLog.open(tmp_path, catalog=catalog)


async def test_an_unknown_value_of_on_mismatch_is_refused(tmp_path: Path) -> None:
    """Only "raise" and "skip" are allowed."""
    with pytest.raises(ValueError, match="on_mismatch"):
        await EventLog.open(tmp_path, catalog=Catalog(), on_mismatch="ignore")  # type: ignore[arg-type]


# Appending


def test_an_event_of_an_object_has_its_type_version_and_tags() -> None:
    """The tags of the class come first, and no tag occurs twice."""
    event = orders().to_event(
        OrderPlaced(7, 100, "EUR"), ts=5, id="i", actor="ann", meta={"a": 1}, tags=("vip", "order:7")
    )

    data = {"order": 7, "cents": 100, "currency": "EUR"}
    assert event == Event("order_placed", data, ts=5, id="i", actor="ann", meta={"a": 1}, tags=("order:7", "vip"))
    assert pickle.loads(pickle.dumps(event)) == event


async def test_the_version_is_on_the_line_unless_it_is_1(tmp_path: Path) -> None:
    """The version comes after the tags and before the position in a batch."""
    async with EventLog.open(tmp_path, catalog=orders()) as log:
        await log.append(OrderPlaced(7, 100, "EUR"), ts=1)
        await log.append(OrderPaid(7), ts=1, actor="ann")
        await log.append_many([orders().to_event(OrderPlaced(n, 1, "EUR"), ts=1) for n in (8, 9)])

    assert (tmp_path / "app.jsonl").read_bytes().splitlines() == [
        b'{"type":"order_placed","data":{"order":7,"cents":100,"currency":"EUR"},"ts":1,"tags":["order:7"],"version":3}',
        b'{"type":"order_paid","data":{"order":7},"ts":1,"actor":"ann"}',
        b'{"type":"order_placed","data":{"order":8,"cents":1,"currency":"EUR"},"ts":1,"tags":["order:8"],"version":3,'
        b'"batch":[1,2]}',
        b'{"type":"order_placed","data":{"order":9,"cents":1,"currency":"EUR"},"ts":1,"tags":["order:9"],"version":3,'
        b'"batch":[2,2]}',
    ]


async def test_objects_are_appended_by_every_way_to_append(tmp_path: Path) -> None:
    """A call may mix objects and events."""
    state: View[int] = View("count", lambda count, event: count + 1, 0)
    async with EventLog.open(tmp_path, catalog=orders(), views=[state]) as log:
        await log.append(OrderPaid(1))
        await log.append_many([OrderPaid(2), Event("order_paid", {"order": 3}), Event("order_paid", OrderPaid(4))])
        await log.append_if(OrderPaid(5), *log.head)
        await log.append_unless([OrderPaid(6)], Query(types={"order_placed"}))
        await log.decide(state, lambda count: OrderPaid(7))
        await log.decide(state, lambda count: [OrderPaid(8), Event("plain")])

        assert await data_of(log) == [*map(OrderPaid, range(1, 9)), {}]


async def test_a_decision_may_be_a_model_that_can_be_iterated_over(tmp_path: Path) -> None:
    """pydantic models define `__iter__`, but a model is still a single event."""
    catalog = Catalog()
    catalog.event("placed")(ModelEvent)
    state: View[int] = View("count", lambda count, event: count + 1, 0)
    async with EventLog.open(tmp_path, catalog=catalog, views=[state]) as log:
        await log.decide(state, lambda count: ModelEvent(order=1))

        assert await data_of(log) == [ModelEvent(order=1)]


async def test_an_object_that_could_not_be_read_back_is_refused(tmp_path: Path) -> None:
    """The message names the field, and nothing is written."""
    async with EventLog.open(tmp_path, catalog=orders()) as log:
        wrong: Any = OrderPlaced("7", 100, "EUR")  # type: ignore[arg-type]
        with pytest.raises(InvalidEventError, match=r"'order_placed'.*OrderPlaced, field 'order': Expected `int`"):
            await log.append(wrong)
        with pytest.raises(InvalidEventError, match="StructEvent is neither an Event nor in the catalog"):
            await log.append(StructEvent(1))
        with pytest.raises(InvalidEventError, match="whose type is 'order_paid'"):
            await log.append(Event("order_placed", OrderPaid(1)))

        assert log.head.offset == 0


async def test_a_plain_event_of_a_type_in_the_catalog_must_fit_the_class(tmp_path: Path) -> None:
    """The plain event counts as one of the current version."""
    async with EventLog.open(tmp_path, catalog=orders()) as log:
        with pytest.raises(InvalidEventError, match="field 'cents'"):
            await log.append(Event("order_placed", {"order": 7}))
        await log.append(Event("order_placed", {"order": 7, "cents": 1, "currency": "EUR"}))

        assert await data_of(log) == [OrderPlaced(7, 1, "EUR")]


async def test_an_event_that_was_read_can_be_appended_again(tmp_path: Path) -> None:
    """Tested with typed events, and with plain events that have a version."""
    write(tmp_path / "old", line("order_placed", '{"order":7,"amount":2}'), line("order_paid", '{"order":1}'))
    async with EventLog.open(tmp_path / "old") as plain, EventLog.open(tmp_path / "new", catalog=orders()) as log:
        await log.append_many([record.event for record in await collect(plain.read_full())])
        await log.append_many([record.event for record in await collect(log.read_full())])

        assert await data_of(log) == [OrderPlaced(7, 200, "EUR"), OrderPaid(1)] * 2


async def test_a_copy_of_a_plain_event_keeps_its_version(tmp_path: Path) -> None:
    """A log without a catalog keeps a version that means nothing to it."""
    write(tmp_path / "old", line("placed", "{}", 3))
    async with EventLog.open(tmp_path / "old") as old, EventLog.open(tmp_path / "new") as new:
        await new.append_many([pickle.loads(pickle.dumps(r.event)) for r in await collect(old.read_full())])

    assert b'"version":3' in (tmp_path / "new" / "app.jsonl").read_bytes()


async def test_options_are_refused_with_an_event(tmp_path: Path) -> None:
    """An event already carries these options."""
    async with EventLog.open(tmp_path, catalog=orders()) as log:
        with pytest.raises(TypeError, match="give them to the Event"):
            await log.append(Event("a"), actor="ann")


async def test_tags_that_are_one_string_are_refused(tmp_path: Path) -> None:
    """Otherwise each character would become a tag."""
    catalog = Catalog()
    catalog.event("order_paid", tags=lambda e: "order")(OrderPaid)

    with pytest.raises(InvalidEventError, match="OrderPaid: the tags must be a collection of strings"):
        catalog.to_event(OrderPaid(1))


# Reading


async def test_versions_1_to_3_are_read_as_the_newest(tmp_path: Path) -> None:
    """Each event goes through the upcasters that it needs, and events of unknown types stay plain."""
    write(
        tmp_path,
        line("order_placed", '{"order":1,"amount":2}'),
        line("order_placed", '{"order":2,"amount":2,"currency":"USD"}', 2),
        line("unheard_of", '{"order":3}', 9),
        line("order_placed", '{"order":4,"cents":5,"currency":"USD"}', 3),
    )
    async with EventLog.open(tmp_path, catalog=orders()) as log:
        found = await data_of(log)

    expected = [OrderPlaced(1, 200, "EUR"), OrderPlaced(2, 200, "USD"), {"order": 3}, OrderPlaced(4, 5, "USD")]
    assert found == expected


async def test_one_event_becomes_several_or_none(tmp_path: Path) -> None:
    """The results share the offsets of the line, and each goes on through the upcasters of its own type."""
    lines = [
        line("a", "{}"),
        line("order_closed", '{"order":1}'),
        line("order_closed", '{"void":true}'),
        line("b", "1"),
    ]
    write(tmp_path, *lines)
    starts = [0, len(lines[0]), len(b"".join(lines[:3]))]
    async with EventLog.open(tmp_path, catalog=orders()) as log:
        records = await collect(log.read_full())

    assert [(r.event.type, r.start_offset) for r in records] == [
        ("a", starts[0]),
        ("order_paid", starts[1]),
        ("order_closed", starts[1]),
        ("noted", starts[1]),
        ("b", starts[2]),
    ]
    assert records[1].event.data == OrderPaid(1)
    assert {r.end_offset for r in records[1:4]} == {starts[1] + len(lines[1])}


async def test_a_selection_of_types_finds_events_that_upcasters_create(tmp_path: Path) -> None:
    """A selected event may come from a line of another type; lines of types that nobody selected are not converted."""
    write(
        tmp_path,
        line("order_closed", '{"order":1}'),
        line("order_paid", '{"order":2}'),
        line("order_placed", '{"wrong":1}', 3),
        line("order_paid", '{"order":3}'),
    )
    view = listed(event_types={"order_paid"})
    async with EventLog.open(tmp_path, catalog=orders(), views=[view]) as log:
        slices = [piece async for piece in log.read_slices(types={"order_paid"})]

        assert [event.data for piece in slices for event in piece.events] == [OrderPaid(1), OrderPaid(2), OrderPaid(3)]
        assert [r.event.data.order for piece in slices for r in piece.records()] == [1, 2, 3]
        assert view.state == ["OrderPaid(order=1)", "OrderPaid(order=2)", "OrderPaid(order=3)"]


async def test_views_tails_watches_and_consumers_get_objects(tmp_path: Path) -> None:
    """The objects include events from before the start as well as later ones."""
    view = listed(event_types={"order_paid"})
    async with EventLog.open(tmp_path, catalog=orders(), views=[view]) as log:
        await log.append(OrderPaid(1))
        tail = asyncio.create_task(collect(log.tail(0), 2))
        watch = log.watch(view)
        assert await anext(watch) == ["OrderPaid(order=1)"]
        appended = await log.append(OrderPaid(2))

        assert await anext(watch) == ["OrderPaid(order=1)", "OrderPaid(order=2)"]
        assert await log.wait_until(view, appended.end_offset) == ["OrderPaid(order=1)", "OrderPaid(order=2)"]
        assert [r.event.data for r in await tail] == [OrderPaid(1), OrderPaid(2)]
        assert [r.event.data for r in await collect(aiter(log.consumer("c")), 2)] == [OrderPaid(1), OrderPaid(2)]
        assert [r.event.data for r in await collect(log.reader().read_full())] == [OrderPaid(1), OrderPaid(2)]


async def test_objects_are_read_across_rotations_and_reopening(tmp_path: Path) -> None:
    """The events come from the archive and the active log, also in a read-only log that `builder` opened."""
    view = listed()
    async with EventLog.open(tmp_path, catalog=orders(), views=[view]) as log:
        await log.append(OrderPaid(1))
        await log.rotate()
        await log.append(OrderPaid(2))
    async with EventLog.builder(tmp_path).catalog(orders()).open() as log:
        assert await data_of(log) == [OrderPaid(1), OrderPaid(2)]
    async with EventLog.open(tmp_path, read_only=True, catalog=orders(), views=[listed()]) as log:
        assert await data_of(log) == [OrderPaid(1), OrderPaid(2)]
        assert len(log.view("listed")) == 2


async def test_a_reducer_matches_on_classes(tmp_path: Path) -> None:
    def fold(state: dict[str, int], event: Event) -> dict[str, int]:
        match event.data:
            case OrderPlaced(order=order, cents=cents):
                state[str(order)] = cents
            case OrderPaid(order=order):
                state[str(order)] = 0
        return state

    async with EventLog.open(tmp_path, catalog=orders(), views=[View("owed", fold, dict)]) as log:
        await log.append_many([OrderPlaced(7, 100, "EUR"), OrderPlaced(8, 5, "EUR"), OrderPaid(7)])
        await log.refresh_all()

        assert log.view("owed") == {"7": 0, "8": 5}


async def test_objects_are_read_backwards_and_by_tags(tmp_path: Path) -> None:
    """The results of one line come in reverse order too, and a query by type also finds what upcasters produce."""
    write(tmp_path, line("order_paid", '{"order":1}'), line("order_closed", '{"order":2}'))
    async with EventLog.open(tmp_path, catalog=orders()) as log:
        await log.append(OrderPlaced(7, 1, "EUR"))
        types = [record.event.type async for record in log.read_back()]
        paid = [record.event.data async for record in log.read_back(query=Query({"order_paid"}))]
        tagged = [record.event.data async for record in log.read_from(query=Query(tags={"order:7"}))]

    assert types == ["order_placed", "noted", "order_closed", "order_paid", "order_paid"]
    assert paid == [OrderPaid(2), OrderPaid(1)]
    assert tagged == [OrderPlaced(7, 1, "EUR")]


async def test_a_refresh_cancelled_within_the_events_of_a_line_folds_none_of_them_twice(tmp_path: Path) -> None:
    """Whenever other code can run, a view's offset is at the end of a line."""
    write(tmp_path, *[line("order_closed", f'{{"order":{n}}}') for n in range(20)])
    seen: list[str] = []

    def slow(state: list[str], event: Event) -> list[str]:
        end = asyncio.get_running_loop().time() + 0.003
        while asyncio.get_running_loop().time() < end:
            pass
        seen.append(event.type)
        return [*state, event.type]

    view: View[list[str]] = View("slow", slow, list)
    async with EventLog.open(tmp_path, catalog=orders()) as log:
        for _ in range(200):
            task = asyncio.create_task(view.refresh(log.reader()))
            for _ in range(40):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert len(view.state) % 3 == 0
            if view.offset == log.head.offset:
                break

    assert len(view.state) == len(seen) == 60


async def test_a_consumer_gets_the_rest_of_a_lines_events_after_a_crash(tmp_path: Path) -> None:
    """A commit in the middle of a line covers only the events before it."""
    write(tmp_path, line("a", "{}"), line("order_closed", '{"order":1}'), line("b", "{}"))
    async with EventLog.open(tmp_path, catalog=orders()) as log:
        consumer = log.consumer("c")
        given = []
        async for record in consumer:
            given.append(record.event.type)
            await consumer.commit(record)
            if record.event.type == "order_paid":
                break
        async for record in (again := log.consumer("c")):
            given.append(record.event.type)
            await again.commit(record)
            if record.event.type == "noted":
                break
        rest = await collect(aiter(log.consumer("c")), 1)

    assert given == ["a", "order_paid", "order_paid", "order_closed", "noted"]
    assert [record.event.type for record in rest] == ["b"]


# What does not fit

WRONG = [
    ('{"order":1,"cents":"x","currency":"EUR"}', 3, "cents", "Expected `int`, got `str`"),
    ('{"order":1,"cents":1}', 3, "currency", "missing required field"),
    ("[1]", 3, "", "Expected `object`, got `array`"),
    ('{"order":1}', 1, "", "the upcaster from version 2 failed: KeyError"),
    ('{"order":1}', 4, "", "it is of version 4, and the catalog has OrderPlaced of version 3"),
]


@pytest.mark.parametrize(("data", "version", "name", "reason"), WRONG)
async def test_an_event_that_does_not_fit_is_an_error_after_those_before_it(
    tmp_path: Path, data: str, version: int, name: str, reason: str
) -> None:
    """The error names the offset, the type and the field."""
    first = line("order_paid", '{"order":1}')
    write(tmp_path, first, line("order_placed", data, version), first)
    async with EventLog.open(tmp_path, catalog=orders()) as log:
        found = []
        with pytest.raises(SchemaError, match="order_placed") as raised:
            async for record in log.read_full():
                found.append(record)

    error = raised.value
    assert [r.event.data for r in found] == [OrderPaid(1)]
    assert (error.offset, error.type, error.field) == (len(first), "order_placed", name)
    assert reason in error.reason
    assert f"offset {len(first)}" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


async def test_a_model_that_does_not_fit_names_its_field(tmp_path: Path) -> None:
    """The reason is pydantic's own message."""
    write(tmp_path, line("placed", '{"order":1,"items":[{"name":"a","count":"x"}]}'))
    catalog = Catalog()
    catalog.event("placed")(ModelEvent)
    async with EventLog.open(tmp_path, catalog=catalog) as log:
        with pytest.raises(SchemaError, match="valid integer") as raised:
            await data_of(log)

    assert raised.value.field == "items.0.count"


async def test_a_field_within_a_list_is_named(tmp_path: Path) -> None:
    """The error shows the path to the field."""
    write(tmp_path, line("placed", '{"order":1,"items":[{"name":"a","count":1},{"name":"a"}]}'))
    catalog = Catalog()
    catalog.event("placed")(StructEvent)
    async with EventLog.open(tmp_path, catalog=catalog) as log:
        with pytest.raises(SchemaError) as raised:
            await data_of(log)

    assert raised.value.field == "items[1].count"


@pytest.mark.parametrize(("data", "version", "name", "reason"), WRONG)
async def test_an_event_that_does_not_fit_is_skipped_with_on_mismatch_skip(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, data: str, version: int, name: str, reason: str
) -> None:
    """A warning contains what the error would say, and views and reads continue after the event."""
    first = line("order_paid", '{"order":1}')
    write(tmp_path, first, line("order_placed", data, version), first)
    with caplog.at_level(logging.WARNING, "eventfold"):
        async with EventLog.open(tmp_path, catalog=orders(), on_mismatch="skip", views=[listed()]) as log:
            assert await data_of(log) == [OrderPaid(1), OrderPaid(1)]
            assert log.view("listed") == ["OrderPaid(order=1)"] * 2
            assert log.views["listed"].offset == log.head.offset

    assert reason in caplog.text
    assert f"at offset {len(first)}" in caplog.text


@pytest.mark.parametrize("result", ["no pair", [1], [("a",)], [(1, {})]])
async def test_an_upcaster_that_returns_something_else_is_an_error(tmp_path: Path, result: Any) -> None:
    """The message says what the upcaster returned."""
    write(tmp_path, line("order_paid", "{}"))
    catalog = Catalog()
    catalog.event("order_paid", version=2)(OrderPaid)
    catalog.upcast("order_paid", from_version=1)(lambda data: result)
    async with EventLog.open(tmp_path, catalog=catalog) as log:
        with pytest.raises(SchemaError):
            await data_of(log)


async def test_a_view_stops_before_an_event_that_does_not_fit(tmp_path: Path) -> None:
    """Views that do not select its type continue."""
    first = line("order_paid", '{"order":1}')
    views: list[View[Any]] = [
        View("all", lambda state, event: state + 1, 0, shares_events=True),
        View("paid", lambda state, event: state + 1, 0, shares_events=True, event_types={"order_paid"}),
    ]
    write(tmp_path, first, line("order_placed", "{}", 3), first)

    with pytest.raises(SchemaError):
        await EventLog.open(tmp_path, catalog=orders(), views=views)

    assert [(view.state, view.offset) for view in views] == [(1, len(first)), (2, views[1].offset)]
    assert views[1].offset == (tmp_path / "app.jsonl").stat().st_size


async def test_an_error_in_a_reducer_names_the_line_of_a_typed_event(tmp_path: Path) -> None:
    """Offsets are right even after lines that produced several events."""
    lines = [
        line("order_closed", '{"order":1}'),
        line("order_closed", '{"void":true}'),
        line("order_paid", '{"order":5}'),
    ]
    write(tmp_path, *lines)

    def fold(state: int, event: Event) -> int:
        return 1 // (event.data != OrderPaid(5))

    async with EventLog.open(tmp_path, catalog=orders(), views=[View("v", fold, 0)]) as log:
        with pytest.raises(ReducerError) as raised:
            log.view("v")

    assert raised.value.offset == len(lines[0] + lines[1])


async def test_a_line_of_another_version_among_current_ones_is_upcast(data_dir: Path) -> None:
    """A block of current lines is decoded in one call; if that fails, its lines are decoded one by one."""
    old, new = Catalog(), Catalog()

    @old.event("counted")
    class Old(msgspec.Struct):
        n: int

    @new.event("counted", version=2)
    class New(msgspec.Struct):
        number: int

    @new.upcast("counted", from_version=1)
    def rename(data: dict[str, Any]) -> dict[str, Any]:
        return {"number": data["n"]}

    for start in range(0, 3000, 1000):
        async with EventLog.open(data_dir, catalog=old, sync=SyncMode.OS) as log:
            await log.append_many([Old(n) for n in range(start, start + 500)])
        async with EventLog.open(data_dir, catalog=new, sync=SyncMode.OS) as log:
            await log.append_many([New(n) for n in range(start + 500, start + 1000)])
            await log.append(Event("other", {"n": start}, ts=1))
    async with EventLog.open(data_dir, catalog=new, read_only=True) as log:
        found = [record.event.data async for record in log.read_full() if record.event.type == "counted"]
    assert found == [New(n) for n in range(3000)]
