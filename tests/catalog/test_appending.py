"""Typed events: the classes of a catalog, and appending objects of them."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import attrs
import msgspec
import pytest
from tests.catalog.orders import (
    ModelEvent,
    ModelItem,
    OrderPaid,
    OrderPlaced,
    StructEvent,
    StructItem,
    collect,
    data_of,
    line,
    orders,
    write,
)

from eventfold import (
    Catalog,
    ConditionalAppendError,
    Event,
    EventLog,
    InvalidEventError,
    Query,
    View,
)


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


@pytest.mark.parametrize("index", [False, True])
async def test_a_condition_applies_to_the_types_on_disk(tmp_path: Path, index: bool) -> None:
    """If an upcaster returns an event of another type, the condition must name the type of the line as well."""
    write(tmp_path, line("order_closed", '{"order":7}').replace(b',"ts"', b',"tags":["order:7"],"ts"'))
    paid, tags = {"order_paid"}, {"order:7"}
    async with EventLog.open(tmp_path, catalog=orders(), index=index) as log:
        read = await collect(log.read_from(0, query=Query(paid, tags)))
        await log.append_unless([Event("noted")], Query(paid, tags))
        with pytest.raises(ConditionalAppendError):
            await log.append_unless([Event("noted")], Query(paid | {"order_closed"}, tags))

    assert [record.event.type for record in read] == ["order_paid"]


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
        with pytest.raises(TypeError, match="pass them to Event"):
            await log.append(Event("a"), actor="ann")


async def test_tags_that_are_one_string_are_refused(tmp_path: Path) -> None:
    """Otherwise each character would become a tag."""
    catalog = Catalog()
    catalog.event("order_paid", tags=lambda e: "order")(OrderPaid)

    with pytest.raises(InvalidEventError, match="OrderPaid: the tags must be a collection of strings"):
        catalog.to_event(OrderPaid(1))
