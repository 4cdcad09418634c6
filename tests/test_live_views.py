"""Live views: all watchers of a view share one fold and see the newest state, and callers can wait for a write."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from tests.processes import other_writer, resources_at_rest, wait_for_resources
from tests.support import event, settle

from eventfold import Event, EventfoldError, EventLog, LogClosedError, ReducerError, UnknownViewError, View


class Sum:
    """A reducer that adds up the events' numbers, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, state: int, event: Event) -> int:
        self.calls += 1
        return state + event.data["n"]


def sum_view(reducer: Any = None) -> View[int]:
    return View("sum", reducer or Sum(), 0)


async def until(states: AsyncIterator[Any], expected: Any) -> list[Any]:
    """Returns the states of a watch up to the expected one, which must come within some seconds."""
    found = []
    async with asyncio.timeout(10):
        async for state in states:
            found.append(state)
            if state == expected:
                break
    return found


async def test_a_watch_begins_with_the_current_state(data_dir: Path) -> None:
    """The first state comes at once, even from an empty log."""
    async with EventLog.open(data_dir, views=[sum_view()]) as log, aclosing(log.watch("sum")) as empty:
        nothing = await anext(empty)
        await log.append(event(5))
        async with aclosing(log.watch("sum")) as states:
            something = await anext(states)

    assert (nothing, something) == (0, 5)


async def test_a_watch_yields_each_newer_state(data_dir: Path) -> None:
    """A watcher that keeps up sees one state for each append."""
    async with EventLog.open(data_dir, views=[sum_view()]) as log, aclosing(log.watch("sum")) as states:
        found = [await anext(states)]
        for n in (1, 2, 3):
            await log.append(event(n))
            found.append(await anext(states))

    assert found == [0, 1, 3, 6]


async def test_a_slow_watcher_sees_only_the_latest_state(data_dir: Path) -> None:
    """The watcher skips the states that were replaced while it was busy."""
    async with EventLog.open(data_dir, views=[sum_view()]) as log, aclosing(log.watch("sum")) as states:
        await anext(states)
        for _ in range(100):
            await log.append(event(1))
        latest = await anext(states)

    assert latest == 100


async def test_any_number_of_watchers_fold_each_event_once(data_dir: Path) -> None:
    """The view folds each event once, whatever the number of watchers."""
    reducer = Sum()
    async with EventLog.open(data_dir, views=[sum_view(reducer)]) as log:
        watches = [asyncio.ensure_future(until(log.watch("sum"), 40)) for _ in range(100)]
        await settle()
        for _ in range(40):
            await log.append(event(1))
        found = await asyncio.gather(*watches)

    assert reducer.calls == 40
    assert all(states == sorted(set(states)) and states[-1] == 40 for states in found)


async def test_a_watcher_is_not_woken_by_events_that_its_view_does_not_select(data_dir: Path) -> None:
    """With `event_types`, only events of these types make a newer state."""
    view = View("sum", Sum(), 0, event_types=["counted"])
    async with EventLog.open(data_dir, views=[view]) as log, aclosing(log.watch("sum")) as states:
        await anext(states)
        waiting = asyncio.ensure_future(anext(states))
        await log.append(Event("ignored"))
        await log.wait_until("sum", log.head.offset)
        await settle()
        woken = waiting.done()
        await log.append(event(2))
        newer = await asyncio.wait_for(waiting, 5)

    assert not woken
    assert newer == 2


async def test_a_watch_continues_through_a_rotation(data_dir: Path) -> None:
    """No state is repeated or lost."""
    async with EventLog.open(data_dir, views=[sum_view()]) as log, aclosing(log.watch("sum")) as states:
        found = [await anext(states)]
        for _ in range(3):
            await log.append(event(1))
            found.append(await anext(states))
            await log.rotate()

    assert found == [0, 1, 2, 3]


@pytest.mark.parametrize("read_only", [False, True])
async def test_a_watch_ends_when_its_log_is_closed(data_dir: Path, read_only: bool) -> None:
    log = await EventLog.open(data_dir, views=[sum_view()], read_only=read_only)
    states = log.watch("sum")
    await anext(states)
    waiting = asyncio.ensure_future(anext(states, "ended"))
    await settle()
    await log.aclose()

    assert await asyncio.wait_for(waiting, 5) == "ended"


async def test_a_cancelled_watch_leaves_nothing_behind(data_dir: Path) -> None:
    """No task or descriptor outlives it, and the view can be watched again."""
    async with EventLog.open(data_dir, views=[sum_view()]) as log:
        await log.append(event(1))
        before = await resources_at_rest()
        watches = [asyncio.create_task(until(log.watch("sum"), "never")) for _ in range(20)]
        for _ in range(5):
            await log.append(event(1))
        for watch in watches:
            watch.cancel()
        await asyncio.wait(watches)
        left = await wait_for_resources(before)
        again = await until(log.watch("sum"), 6)

    assert left == before
    assert again == [6]


async def test_a_reducer_that_raises_ends_the_watch_with_its_error(data_dir: Path) -> None:
    """The error names the event, and the view keeps what it folded before."""
    async with EventLog.open(data_dir, views=[sum_view()]) as log, aclosing(log.watch("sum")) as states:
        await anext(states)
        good = await log.append(event(1))
        await log.append(Event("counted", {"n": "no number"}))
        with pytest.raises(ReducerError) as caught:
            await until(states, "never")

        assert caught.value.offset == good.end_offset
        assert log.views["sum"].state == 1


@pytest.mark.parametrize("ask", ["view", "watch", "wait_until"])
async def test_a_view_that_is_not_registered_is_refused(data_dir: Path, ask: str) -> None:
    """The error names the view that was asked for."""
    async with EventLog.open(data_dir, views=[sum_view()]) as log:
        with pytest.raises(UnknownViewError, match="nobody"):
            if ask == "watch":
                await anext(log.watch("nobody"))
            elif ask == "wait_until":
                await log.wait_until("nobody", 0)
            else:
                log.view("nobody")


async def test_waiting_for_the_offset_of_a_write_returns_a_state_that_includes_it(data_dir: Path) -> None:
    """The end offset of an append is enough; no refresh in between is necessary."""
    async with EventLog.open(data_dir, views=[sum_view()]) as log:
        appended = await log.append(event(3))

        assert await log.wait_until("sum", appended.end_offset) == 3


async def test_a_state_waited_for_by_many_is_folded_once(data_dir: Path) -> None:
    """A hundred requests after one write cause one call of the reducer."""
    reducer = Sum()
    async with EventLog.open(data_dir, views=[sum_view(reducer)]) as log:
        appended = await log.append(event(3))
        states = await asyncio.gather(*(log.wait_until("sum", appended.end_offset) for _ in range(100)))

    assert states == [3] * 100
    assert reducer.calls == 1


async def test_a_state_can_be_waited_for_before_the_write(data_dir: Path) -> None:
    """Waiting for an offset beyond the head ends when the log has reached it."""
    async with EventLog.open(data_dir, views=[sum_view()]) as log:
        first = await log.append(event(1))
        waiting = asyncio.ensure_future(log.wait_until("sum", 2 * first.end_offset))
        await settle()
        await asyncio.sleep(0.02)
        waited = not waiting.done()
        await log.append(event(1))
        state = await asyncio.wait_for(waiting, 5)

    assert waited
    assert state == 2


async def test_a_wait_for_a_state_raises_when_the_log_is_closed(data_dir: Path) -> None:
    """The wait raises LogClosedError instead of waiting forever."""
    log = await EventLog.open(data_dir, views=[sum_view()])
    waiting = asyncio.ensure_future(log.wait_until("sum", 1000))
    await settle()
    await log.aclose()

    with pytest.raises(LogClosedError):
        await asyncio.wait_for(waiting, 5)


async def test_a_cancelled_wait_for_a_state_leaves_nothing_behind(data_dir: Path) -> None:
    """When a time limit cancels it, no task or descriptor is left."""
    async with EventLog.open(data_dir, views=[sum_view()]) as log:
        before = await resources_at_rest()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(log.wait_until("sum", 1000), 0.05)
        left = await wait_for_resources(before)

    assert left == before


async def test_a_read_only_log_shows_another_processs_writes(data_dir: Path) -> None:
    """Views, tails, watches and waits work while another process writes."""
    async with (
        other_writer(data_dir) as writer,
        EventLog.open(data_dir, views=[sum_view()], read_only=True) as log,
    ):
        watching = asyncio.ensure_future(until(log.watch("sum"), 0 + 1 + 2))
        tailing = asyncio.ensure_future(anext(log.tail(0)))
        head = await writer.append(3)
        state = await asyncio.wait_for(log.wait_until("sum", head), 10)
        states = await watching
        record = await asyncio.wait_for(tailing, 10)

    assert state == 3
    assert states[-1] == 3
    assert record.event.data["n"] == 0


async def test_a_read_only_log_refuses_to_write(data_dir: Path) -> None:
    """Each method that would write raises an EventfoldError that says why."""
    async with EventLog.open(data_dir, read_only=True) as log:
        for write in (
            lambda: log.append(event(0)),
            lambda: log.append_many([event(0)]),
            lambda: log.append_if(event(0), 0, ""),
            lambda: log.rotate(),
        ):
            with pytest.raises(EventfoldError, match="read-only"):
                await write()

    assert not data_dir.exists()


async def test_a_read_only_log_writes_no_snapshots(data_dir: Path) -> None:
    """Snapshots belong to the writer, which may be writing them at the same time."""
    async with EventLog.open(data_dir) as log:
        await log.append_many([event(n) for n in range(3000)])
    async with EventLog.open(data_dir, views=[sum_view()], read_only=True) as log:
        state = log.view("sum")

    assert state == sum(range(3000))
    assert not data_dir.joinpath("views").exists()
