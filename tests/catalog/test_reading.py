"""Typed events: reading and upcasting them, and events that do not fit their class."""

from __future__ import annotations

import asyncio
import logging
import pickle
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.catalog.orders import (
    ModelEvent,
    OrderPaid,
    OrderPlaced,
    StructEvent,
    collect,
    data_of,
    line,
    orders,
    write,
)

from eventfold import (
    Catalog,
    Event,
    EventLog,
    Query,
    ReducerError,
    SchemaError,
    SyncMode,
    View,
)


def listed(**options: Any) -> View[list[Any]]:
    """Returns a view that keeps the data of all its events as text, so that a snapshot can hold any class's."""
    return View("listed", lambda state, event: [*state, repr(event.data)], list, **options)


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


# Events that do not fit their class

WRONG = [
    ('{"order":1,"cents":"x","currency":"EUR"}', 3, "cents", "Expected `int`, got `str`"),
    ('{"order":1,"cents":1}', 3, "currency", "missing required field"),
    ("[1]", 3, "", "Expected `object`, got `array`"),
    ('{"order":1}', 1, "", "the upcaster from version 2 failed: KeyError"),
    ('{"order":1}', 4, "", "it has version 4, but the catalog has OrderPlaced of version 3"),
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
