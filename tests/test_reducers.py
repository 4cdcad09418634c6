"""Reducers: what they do to states and events, and the errors they raise, harm no other view and no snapshot."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support import FaultInjector, event, line, write_log

from eventfold import Event, EventLog, EventReader, EventWriter, ReducerError, View, snapshot


class Halves:
    """A reducer that counts in two steps, in place, and raises between them at the given events."""

    def __init__(self, *bad: int, error: BaseException | None = None) -> None:
        self.bad = set(bad)
        self.error = error or KeyError("no such thing")
        self.calls: list[int] = []

    def __call__(self, state: dict[str, int], event: Event) -> dict[str, int]:
        self.calls.append(event.data["n"])
        state["first"] += 1
        if event.data["n"] in self.bad:
            raise self.error
        state["second"] += 1
        return state


def halves_view(reducer: Halves) -> View[dict[str, int]]:
    return View("v", reducer, lambda: {"first": 0, "second": 0})


# A reducer that raises


class Stop(BaseException):
    """A BaseException like KeyboardInterrupt that does no harm to the test run."""


@pytest.mark.parametrize("error", [KeyError("no"), Stop()], ids=["Exception", "BaseException"])
async def test_a_half_changed_state_is_neither_saved_nor_used(data_dir: Path, error: BaseException) -> None:
    """Repeated refreshes don't change that; once the reducer works, the state is the fold over the log."""
    reducer = Halves(3, error=error)
    async with EventWriter.open(data_dir) as writer:
        await writer.append_many([event(n) for n in range(5)])
        view = halves_view(reducer)
        for _ in range(3):
            with pytest.raises((ReducerError, Stop)):
                await view.refresh(writer.reader())
            await view.save(writer.reader())
        saved = await snapshot.load(data_dir / "views" / "v.snapshot.json")
        reducer.bad.clear()
        state = await view.refresh(writer.reader())

    assert state == {"first": 5, "second": 5}
    assert saved is None or saved.state == {"first": 3, "second": 3}


async def test_closing_a_log_saves_no_half_changed_state(data_dir: Path) -> None:
    """The next program starts from the last good state."""
    async with EventLog.open(data_dir, views=[halves_view(Halves(3))]) as log:
        await log.append_many([event(n) for n in range(5)])
        with pytest.raises(ReducerError):
            await log.refresh_all()
    async with EventLog.open(data_dir, views=[halves_view(Halves())]) as log:
        state = log.view("v")

    assert state == {"first": 5, "second": 5}


async def test_an_event_that_fails_repeatedly_does_not_refold_the_whole_log(data_dir: Path) -> None:
    """At the second attempt, the state before the event is saved; from then on, only that event is tried again."""
    reducer = Halves(99)
    async with EventLog.open(data_dir, views=[halves_view(reducer)]) as log:
        await asyncio.gather(*(log.append(event(n)) for n in range(100)))
        for _ in range(2):
            with pytest.raises(ReducerError):
                await log.refresh_all()
        reducer.calls.clear()
        with pytest.raises(ReducerError):
            await log.refresh_all()

    assert reducer.calls == [99]


# Events


def keep(state: list[Any], event: Event) -> list[Any]:
    state.append(event.data)
    return state


def keep_and_change(state: list[Any], event: Event) -> list[Any]:
    event.data["n"] = "changed"
    return keep(state, event)


@pytest.mark.parametrize("archived", [False, True])
async def test_each_view_gets_its_own_event_objects(data_dir: Path, archived: bool) -> None:
    """If a view changes an event, no other view's state changes."""
    async with EventWriter.open(data_dir) as writer:
        await writer.append_many([event(n) for n in range(3)])
        if archived:
            await writer.rotate()
    async with EventLog.open(data_dir, views=[View("a", keep_and_change, list), View("b", keep, list)]) as log:
        await log.append(event(3))
        await log.refresh_all()
        states = log.view("a"), log.view("b")

    assert states == ([{"n": "changed"}] * 4, [{"n": n} for n in range(4)])


async def test_views_that_share_events_get_the_same_objects(data_dir: Path) -> None:
    """The objects are decoded once for all of them, and the view that does not share gets its own."""
    write_log(data_dir, line(0), line(1, "other"))
    made = [View(name, keep, list, shares_events=True) for name in "ab"]
    made.append(View("c", keep, list, shares_events=True, event_types={"counted"}))
    made.append(View("d", keep, list))
    async with EventLog.open(data_dir, views=made) as log:
        a, b, c, d = (log.view(view) for view in made)

        assert a == b == d == [{"n": 0}, {"n": 1}]
        assert c == [{"n": 0}]
        assert a[0] is b[0] is c[0]
        assert a[0] is not d[0]


async def test_the_bytes_are_read_once_for_all_views(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tested with several views that select different types."""
    write_log(data_dir, *(line(n, "ab"[n % 2]) for n in range(100)))
    source = type(EventReader(data_dir)._source)
    passes = []
    blocks = source.blocks

    def counted(self: Any, *args: Any) -> Any:
        passes.append(args)
        return blocks(self, *args)

    monkeypatch.setattr(source, "blocks", counted)
    made = [View(f"v{n}", lambda s, e: s + 1, 0, event_types=["a"] if n else None) for n in range(5)]
    async with EventLog.open(data_dir, read_only=True, views=made) as log:
        states = [log.view(view) for view in made]

    assert len(passes) == 1
    assert states == [100, 50, 50, 50, 50]


# Pauses


@pytest.mark.parametrize("cost", [50e-6, 1e-3], ids=["50 µs", "1 ms"])
async def test_a_slow_reducer_lets_other_tasks_run(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, cost: float
) -> None:
    """By the clock, it folds for a few milliseconds at most between two turns of the others, even within a slice."""
    count = 2000
    write_log(data_dir, *(line(n) for n in range(count)))
    now = [0.0]
    monkeypatch.setattr("eventfold._fold.perf_counter", lambda: now[0])
    turns: list[float] = []

    def reduce(state: int, event: Event) -> int:
        now[0] += cost  # The test has its own clock, so that nothing depends on the machine.
        return state + 1

    async def others() -> None:
        while True:
            turns.append(now[0])
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    state = await View("v", reduce, 0).refresh(EventReader(data_dir))
    task.cancel()
    turns.append(now[0])

    assert state == count
    assert max(later - turn for turn, later in itertools.pairwise(turns)) < 0.004


def slowly(state: int, event: Event) -> int:
    until = time.perf_counter() + 0.0001
    while time.perf_counter() < until:
        pass
    return state + 1


def slow_list(state: list[int], event: Event) -> list[int]:
    slowly(0, event)
    return [*state, event.data["n"]]


async def test_the_state_in_a_pause_fits_the_view_s_offset(data_dir: Path) -> None:
    """If others look at a view while it folds a slice, its state fits its offset."""
    data = write_log(data_dir, *(line(n) for n in range(300)))
    view = View("v", slowly, 0)
    seen: set[tuple[int, int]] = set()
    task = asyncio.create_task(view.refresh(EventReader(data_dir)))
    while not task.done():
        seen.add((view.state, view.offset))
        await asyncio.sleep(0)
    await task

    assert len(seen) > 3
    assert all(data[:offset].count(b"\n") == state for state, offset in seen)


async def test_a_refresh_that_is_cancelled_within_a_slice_folds_each_event_once(data_dir: Path) -> None:
    """The next refresh continues with the first event that was not folded."""
    write_log(data_dir, *(line(n) for n in range(300)))
    view = View("v", slow_list, [])
    task = asyncio.create_task(view.refresh(EventReader(data_dir)))
    while not view.offset and not task.done():
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    partly = len(view.state)
    state = await view.refresh(EventReader(data_dir))

    assert 0 < partly < 300
    assert state == list(range(300))


# Saving


class Job(msgspec.Struct):
    due: Any = 0
    cost: float = 0.0


@dataclasses.dataclass
class Jobs:
    jobs: dict[str, Job] = dataclasses.field(default_factory=dict)


async def test_an_integer_in_a_float_field_is_saved(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """People write `0` and mean `0.0`; it reads back as an equal value."""
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(1))
        view = View("v", lambda s, e: Jobs({"x": Job(cost=0)}), Jobs)
        await view.refresh(writer.reader())
        again = View("v", lambda s, e: s, Jobs)
        state = await again.refresh(writer.reader())

    assert state == Jobs({"x": Job(cost=0.0)})
    assert caplog.records == []


@pytest.mark.parametrize(
    ("state_type", "made", "where"),
    [
        (Jobs, lambda: Jobs({"x": Job(due=(1, 2))}), r"jobs\['x'\]\.due: \(1, 2\) became \[1, 2\]"),
        (list, lambda: [1, float("nan")], r"\[1\]: nan became None"),
        (dict, lambda: {"a": [{"b": {1}}]}, r"\['a'\]\[0\]\['b'\]: \{1\} became \[1\]"),
        (dict, lambda: {1: 2}, r"the state: \{1: 2\} became \{'1': 2\}"),
    ],
)
async def test_the_warning_says_where_a_loaded_state_differs(
    data_dir: Path, caplog: pytest.LogCaptureFixture, state_type: Any, made: Callable[[], Any], where: str
) -> None:
    """The warning contains the path to the value, and the value before and after."""
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(1))
        view: View[Any] = View("v", lambda s, e: made(), state_type, state_type=state_type)
        with caplog.at_level(logging.WARNING, "eventfold"):
            await view.refresh(writer.reader())

    assert len(caplog.messages) == 1
    assert re.search(where, caplog.text)


@pytest.mark.parametrize("reason", ["disk", "state"])
async def test_a_snapshot_that_cannot_be_saved_is_not_tried_at_every_refresh(
    data_dir: Path, faults: FaultInjector, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    """Many refreshes log one warning; closing and rotating try again."""
    async with EventWriter.open(data_dir) as writer:
        if reason == "disk":
            faults.fail("rename", times=1000)
        view: View[Any] = View("v", lambda s, e: {"pair": (1, 2) if reason == "state" else 1}, {})
        with caplog.at_level(logging.WARNING, "eventfold"):
            for n in range(20):
                await writer.append(event(n))
                await view.refresh(writer.reader())
            refreshed = len(caplog.messages)
            await view.save(writer.reader())

    assert refreshed == 1
    assert len(caplog.messages) == 2


# What people meet first


async def counted_later(state: int, event: Event) -> int:
    return state + 1


class AsyncReducer:
    async def __call__(self, state: int, event: Event) -> int:
        return state + 1


@pytest.mark.parametrize("reducer", [counted_later, AsyncReducer()])
def test_an_async_reducer_is_refused(reducer: Any) -> None:
    """The error comes when the view is created, not at its first event."""
    with pytest.raises(TypeError, match=r"'v'.*async"):
        View("v", reducer, 0)


@pytest.mark.parametrize(
    "arguments",
    [(0, lambda state, event: state), ({}, lambda state, event: state), (list, lambda state, event: state)],
    ids=["value", "dict", "class"],
)
def test_swapped_arguments_are_refused(arguments: tuple[Any, Any]) -> None:
    """The message shows the right order."""
    with pytest.raises(TypeError, match=r"View\(name, reducer, initial\)"):
        View("v", *arguments)


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("goes_on", [False, True], ids=["raises on None", "takes None"])
async def test_a_reducer_that_returns_none_is_an_error_that_says_so(data_dir: Path, first: int, goes_on: bool) -> None:
    """With `state.append(…)` but no `return state`, the error names the first event that got no result."""

    def reduce(state: Any, event: Event) -> Any:
        if not goes_on:
            state.append(event.data["n"])
        return state if event.data["n"] < first else None

    async with EventWriter.open(data_dir) as writer:
        results = await writer.append_many([event(n) for n in range(first + 1)])
        with pytest.raises(ReducerError, match="returned None") as caught:
            await View("v", reduce, list).refresh(writer.reader())

    assert caught.value.offset == results[first].start_offset


async def test_a_reducer_that_returns_a_coroutine_is_an_error_that_says_so(data_dir: Path) -> None:
    """A lambda around an async function can't be recognised earlier."""
    async with EventWriter.open(data_dir) as writer:
        await writer.append_many([event(0), event(1)])
        with pytest.raises(ReducerError, match="coroutine") as caught:
            await View("v", lambda s, e: counted_later(s, e), 0).refresh(writer.reader())  # type: ignore[arg-type]

    assert caught.value.offset == 0


async def test_none_is_a_state_if_the_type_allows_it(data_dir: Path) -> None:
    """Tested with an optional type, and with a state that began as None."""
    async with EventWriter.open(data_dir) as writer:
        await writer.append_many([event(0), event(1)])
        optional: View[int | None] = View("a", lambda s, e: None, 0, state_type=int | None)
        nothing: View[Any] = View("b", lambda s, e: None, None)
        states = [await view.refresh(writer.reader()) for view in (optional, nothing)]

    assert states == [None, None]
