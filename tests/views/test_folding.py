"""Views: the state is the fold over the log up to an offset, whatever its type is and whatever fails."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter, deque
from pathlib import Path
from typing import Any

import attrs
import msgspec
import pydantic
import pytest
from tests.support import event, line, recorded_passes, settle, write_log
from tests.views.states import Item, changed, fails_at, key

from eventfold import (
    CorruptLogError,
    Event,
    EventLog,
    EventReader,
    EventWriter,
    LogClosedError,
    ReducerError,
    SyncMode,
    View,
)
from eventfold._aio import outlast
from eventfold._view import refresh_together


@dataclasses.dataclass
class DataclassState:
    items: list[Item] = dataclasses.field(default_factory=list)


class StructItem(msgspec.Struct):
    n: int


class StructState(msgspec.Struct):
    items: list[StructItem] = []


@attrs.define
class AttrsItem:
    n: int


@attrs.define
class AttrsState:
    items: list[AttrsItem] = attrs.Factory(list)


class ModelItem(pydantic.BaseModel):
    n: int


class ModelState(pydantic.BaseModel):
    items: list[ModelItem] = []


def total(state: int, event: Event) -> int:
    return state + int(event.data["n"])


def collect(item: Any) -> Any:
    """Returns a reducer that appends `item(n=…)` to the state's `items`."""

    def reduce(state: Any, event: Event) -> Any:
        state.items.append(item(n=event.data["n"]))
        return state

    return reduce


STATES: dict[str, tuple[Any, Any, Any]] = {
    "dataclass": (collect(Item), DataclassState, None),
    "msgspec struct": (collect(StructItem), StructState, None),
    "attrs class": (collect(AttrsItem), AttrsState, None),
    "pydantic model": (collect(ModelItem), ModelState, None),
    "dict": (lambda s, e: {**s, key(e): e.data["n"]}, {}, None),
    "list": (lambda s, e: [*s, e.data["n"]], list, None),
    "set": (lambda s, e: s | {e.data["n"]}, set, None),
    "frozenset": (lambda s, e: s | {e.data["n"]}, frozenset, None),
    "tuple": (lambda s, e: (*s, e.data["n"]), (), None),
    "Counter": (lambda s, e: changed(s, lambda s: s.update([key(e)])), Counter, None),
    "deque": (lambda s, e: changed(s, lambda s: s.append(e.data["n"])), deque, None),
    "int": (lambda s, e: s + 1, 0, None),
    "str": (lambda s, e: s + key(e), "", None),
    "float": (lambda s, e: s + 0.1, 0.0, None),
    "None at first": (lambda s, e: e.data["n"], None, None),
    "dict of integers": (lambda s, e: {**s, e.data["n"]: key(e)}, dict, dict[int, str]),
    "dict of dataclasses": (lambda s, e: {**s, key(e): Item(e.data["n"])}, dict, dict[str, Item]),
    "list of models": (lambda s, e: [*s, ModelItem(n=e.data["n"])], list, list[ModelItem]),
    "dict of sets": (lambda s, e: {**s, key(e): s.get(key(e), set()) | {1}}, dict, dict[str, set[int]]),
    "a union": (lambda s, e: DataclassState([Item(1)]), None, DataclassState | None),
}


@pytest.mark.parametrize("kind", STATES)
async def test_a_state_of_any_kind_survives_a_restart(
    data_dir: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """After saving, loading and further folding, the state equals that of a single fold, and has the same type."""
    reducer, initial, state_type = STATES[kind]
    calls = 0

    def counted(state: Any, event: Event) -> Any:
        nonlocal calls
        calls += 1
        return reducer(state, event)

    def view() -> View[Any]:
        return View("v", counted, initial, state_type=state_type)

    async with EventWriter.open(data_dir, sync=SyncMode.OS) as writer:
        await writer.append_many([event(n) for n in range(5)])
        first = view()
        await first.refresh(writer.reader())
        await first.save(writer.reader())
        await writer.append_many([event(n) for n in range(5, 8)])
        calls = 0
        second = view()
        state = await second.refresh(writer.reader())
        folded = calls
        whole = await view().rebuild(writer.reader())

    assert folded == 3
    assert state == whole
    assert type(state) is type(whole)
    assert caplog.records == []


async def test_the_state_is_the_fold_over_the_log(data_dir: Path) -> None:
    """A refresh folds each event once, in order, and returns up to which offset."""
    async with EventWriter.open(data_dir) as writer:
        view: View[list[int]] = View("v", lambda s, e: [*s, e.data["n"]], [])
        before = view.state, view.offset
        await writer.append_many([event(n) for n in range(3)])
        first = await view.refresh(writer.reader())
        first_offset, first_head = view.offset, writer.head.offset
        await writer.append(event(3))
        unchanged = view.state
        second = await view.refresh(writer.reader())
        second_offset, second_head = view.offset, writer.head.offset

    assert before == ([], 0)
    assert first == unchanged == [0, 1, 2]
    assert second == view.state == [0, 1, 2, 3]
    assert (first_offset, second_offset) == (first_head, second_head)


async def test_a_refresh_without_new_events_folds_nothing(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is not even read."""
    passes = recorded_passes(monkeypatch)
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(1))
        view: View[int] = View("v", lambda s, e: s + 1, 0)
        await view.refresh(writer.reader())
        once = len(passes)
        state = await view.refresh(writer.reader())

    assert state == 1
    assert len(passes) == once == 1


async def test_concurrent_refreshes_fold_each_event_once(data_dir: Path) -> None:
    """A refresh that comes while another one is under way waits for it."""
    async with EventWriter.open(data_dir, sync=SyncMode.OS) as writer:
        await writer.append_many([event(n) for n in range(5000)])
        view: View[int] = View("v", lambda s, e: s + 1, 0)
        states = await asyncio.gather(*(view.refresh(writer.reader()) for _ in range(5)))

    assert states == [5000] * 5


async def test_a_view_of_an_empty_log_has_its_initial_state(tmp_path: Path) -> None:
    """Tested also with a missing directory."""
    view: View[list[int]] = View("v", lambda s, e: [*s, 1], [7])
    state = await view.refresh(EventReader(tmp_path / "missing"))

    assert state == [7]
    assert view.offset == 0
    assert not (tmp_path / "missing").exists()


def in_place(state: list[int], event: Event) -> list[int]:
    state.append(event.data["n"])
    return state


async def test_a_mutable_initial_value_is_never_shared(data_dir: Path) -> None:
    """Views and rebuilds don't share it, and the given value stays as it was."""
    initial: list[int] = []
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(1))
        first, second = View("a", in_place, initial), View("b", in_place, initial)
        await first.refresh(writer.reader())
        await second.refresh(writer.reader())
        rebuilt = await first.rebuild(writer.reader())

    assert initial == []
    assert first.state == second.state == rebuilt == [1]
    assert first.state is not second.state


async def test_an_initial_callable_is_called_for_each_build(data_dir: Path) -> None:
    """The callable may be a class or a function without arguments."""
    made = []

    def initial() -> list[int]:
        made.append([])
        return made[-1]

    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(1))
        view = View("v", in_place, initial)
        before = view.state
        await view.refresh(writer.reader())
        await view.rebuild(writer.reader())

    assert view.state == [1]
    assert view.state is not before


# Selecting types


async def test_only_the_named_types_are_folded(data_dir: Path) -> None:
    """The offset still advances to the head, past the events that were not selected."""
    async with EventWriter.open(data_dir, sync=SyncMode.OS) as writer:
        for n in range(200):
            await writer.append(event(n, "abcd"[n % 4]))
        view: View[list[int]] = View("v", lambda s, e: [*s, e.data["n"]], [], event_types={"b", "d"})
        state = await view.refresh(writer.reader())
        head = writer.head

    assert state == [n for n in range(200) if n % 4 in (1, 3)]
    assert view.offset == head.offset


async def test_types_that_never_occur_leave_the_initial_state(data_dir: Path) -> None:
    """An empty selection leaves the initial state too."""
    async with EventWriter.open(data_dir) as writer:
        await writer.append_many([event(n) for n in range(3)])
        nothing: View[int] = View("a", lambda s, e: s + 1, 0, event_types=[])
        others: View[int] = View("b", lambda s, e: s + 1, 0, event_types=("x",))
        states = [await view.refresh(writer.reader()) for view in (nothing, others)]
        offsets = {nothing.offset, others.offset, writer.head.offset}

    assert states == [0, 0]
    assert len(offsets) == 1


def test_a_string_is_not_a_collection_of_types() -> None:
    """`event_types="added"` would mean five types of one letter each."""
    with pytest.raises(ValueError, match="event_types"):
        View("v", lambda s, e: s, 0, event_types="added")


async def test_selected_events_of_a_batch_are_folded_once_it_is_complete(data_dir: Path) -> None:
    """Selected events in a batch with others are folded once the batch is complete."""
    async with EventWriter.open(data_dir, sync=SyncMode.OS) as writer:
        await writer.append_many([event(n, "ab"[n % 2]) for n in range(5001)])
        await writer.append_many([Event("b", {"n": "x" * 60_000}), event(1, "a"), event(2, "b")])
        view: View[int] = View("v", lambda s, e: s + 1, 0, event_types={"b"})
        state = await view.refresh(writer.reader())
        head = writer.head

    assert state == 2502
    assert view.offset == head.offset


# Failing reducers


@pytest.mark.parametrize("bad", [0, 1, 7, 9])
async def test_a_reducer_that_raises_leaves_the_view_before_that_event(data_dir: Path, bad: int) -> None:
    """The error names the view and the event's offset, and its cause is the reducer's exception."""
    async with EventWriter.open(data_dir) as writer:
        results = await writer.append_many([event(n) for n in range(10)])
        view = View("v", fails_at(bad), [])
        with pytest.raises(ReducerError, match="'v'") as caught:
            await view.refresh(writer.reader())

    assert (caught.value.view, caught.value.offset) == ("v", results[bad].start_offset)
    assert isinstance(caught.value.__cause__, KeyError)
    assert "no such thing" in str(caught.value)
    assert view.state == list(range(bad))
    assert view.offset == results[bad].start_offset


async def test_a_reducer_that_raises_among_selected_types_names_the_right_event(data_dir: Path) -> None:
    """The offset is that of the event itself, even if other events before it were skipped."""
    async with EventWriter.open(data_dir) as writer:
        results = [await writer.append(event(n, "ab"[n % 2])) for n in range(10)]
        view = View("v", fails_at(7), [], event_types={"b"})
        with pytest.raises(ReducerError) as caught:
            await view.refresh(writer.reader())

    assert caught.value.offset == view.offset == results[7].start_offset
    assert view.state == [1, 3, 5]


async def test_a_reducer_that_works_again_continues_where_it_failed(data_dir: Path) -> None:
    """No event is folded twice or left out."""
    fault = [5]

    def reduce(state: list[int], event: Event) -> list[int]:
        if event.data["n"] in fault:
            raise ValueError("not now")
        return [*state, event.data["n"]]

    async with EventWriter.open(data_dir) as writer:
        await writer.append_many([event(n) for n in range(10)])
        view = View("v", reduce, [])
        with pytest.raises(ReducerError):
            await view.refresh(writer.reader())
        with pytest.raises(ReducerError):
            await view.refresh(writer.reader())
        fault.clear()
        state = await view.refresh(writer.reader())

    assert state == list(range(10))


async def test_a_view_that_cannot_be_loaded_does_not_stop_the_others(data_dir: Path) -> None:
    """Here, there is no snapshot, and the callable for the initial state fails. The other views are up to date."""
    fails = False

    def initial() -> list[int]:
        if fails:
            raise ValueError("not now")
        return []

    async with EventLog.open(data_dir, views=[View("other", total, 0)]) as log:
        await log.append_many([event(n) for n in range(10)])
    broken, other = View("broken", lambda state, event: [*state, event.data["n"]], initial), View("other", total, 0)
    async with EventWriter.open(data_dir) as writer:
        fails = True
        with pytest.raises(ValueError, match="not now"):
            await refresh_together([broken, other], writer.reader())
        states = broken.state, other.state
        fails = False
        await refresh_together([broken, other], writer.reader())

    assert states == ([], sum(range(10)))
    assert broken.state == list(range(10))


@pytest.mark.parametrize("names", [["broken", "slow"], ["slow", "also-slow"]])
async def test_a_refresh_that_raises_or_is_cancelled_leaves_no_load_of_a_view_behind(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    """A load that ended later would replace a state that somebody else is folding."""
    loading = 0
    load = View._load

    async def slow(view: View[Any], reader: EventReader) -> None:
        nonlocal loading
        loading += 1
        try:
            if view.name == "broken":
                raise LogClosedError("broken")
            await outlast(asyncio.ensure_future(asyncio.sleep(0.02)), lambda future: asyncio.wait([future]))
            await load(view, reader)
        finally:
            loading -= 1

    monkeypatch.setattr(View, "_load", slow)
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(1))
        refresh = asyncio.create_task(refresh_together([View(name, total, 0) for name in names], writer.reader()))
        await settle()
        if "broken" not in names:
            refresh.cancel()
        with pytest.raises((LogClosedError, asyncio.CancelledError)):
            await refresh
        assert loading == 0


async def test_where_a_view_failed_it_is_after_a_restart(data_dir: Path) -> None:
    """The state before the failure may be saved, and the view can continue from it."""
    async with EventWriter.open(data_dir) as writer:
        await writer.append_many([event(n) for n in range(10)])
        failing = View("v", fails_at(6), [])
        with pytest.raises(ReducerError):
            await failing.refresh(writer.reader())
        await failing.save(writer.reader())
        again: View[list[int]] = View("v", lambda s, e: [*s, e.data["n"]], [])
        state = await again.refresh(writer.reader())

    assert state == list(range(10))


# Sharing a pass


async def test_a_view_stops_where_a_reader_does(damaged_dir: Path) -> None:
    """A line with two objects is not an event: a view does not fold what a reader refuses."""
    write_log(damaged_dir, line(0), line(1)[:-1] + line(2), line(3))
    view: View[list[int]] = View("v", lambda s, e: [*s, e.data["n"]], [])
    with pytest.raises(CorruptLogError) as caught:
        await view.refresh(EventReader(damaged_dir))

    assert view.state == [0]
    assert caught.value.offset == view.offset == len(line(0))


@pytest.mark.parametrize("types", [None, {"counted"}])
async def test_a_view_folds_all_good_events_before_damage(damaged_dir: Path, types: set[str] | None) -> None:
    """The error says where the damage is, and the view stays at that offset."""
    good = [line(n) for n in range(20)]
    write_log(damaged_dir, *good, b"damage\n", line(99))
    view: View[list[int]] = View("v", lambda s, e: [*s, e.data["n"]], [], event_types=types)
    with pytest.raises(CorruptLogError) as caught:
        await view.refresh(EventReader(damaged_dir))

    assert view.state == list(range(20))
    assert caught.value.offset == view.offset == sum(map(len, good))


async def test_a_view_comes_to_the_head_past_blank_lines(data_dir: Path) -> None:
    """Blank lines between events and at the end are skipped, but count in the offset."""
    data = write_log(data_dir, line(0), b"\n\n", line(1), b" \n")
    view: View[list[int]] = View("v", lambda s, e: [*s, e.data["n"]], [])
    state = await view.refresh(EventReader(data_dir))
    (data_dir / "app.jsonl").write_bytes(data + line(2))
    offset, again = view.offset, await view.refresh(EventReader(data_dir))
    (data_dir / "app.jsonl").write_bytes(line(0))

    assert state == [0, 1]
    assert offset == len(data)
    assert again == [0, 1, 2]


async def test_blank_lines_before_a_batch_that_crosses_slices_shift_nothing(data_dir: Path) -> None:
    """Every event is folded once, and the offsets are those in the file."""
    batch = [
        f'{{"type":"counted","data":{{"n":{n},"x":"{"x" * 20_000}"}},"ts":1,"batch":[{n},6]}}\n'.encode()
        for n in range(1, 7)
    ]
    data = write_log(data_dir, line(0), b"\n\n\n", line(0), *batch, line(7))
    view: View[list[int]] = View("v", lambda s, e: [*s, e.data["n"]], [])
    state = await view.refresh(EventReader(data_dir))

    assert state == [0, 0, 1, 2, 3, 4, 5, 6, 7]
    assert view.offset == len(data)
