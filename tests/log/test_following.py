"""`EventLog`: watching views, logs that only read, rotations, and counters."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from tests.log.views import collect, views
from tests.support import event, line, numbers, records, settle, write_log

from eventfold import (
    ConditionalAppendError,
    EventfoldError,
    EventLog,
    EventWriter,
    Head,
    View,
)

# Watching


async def test_a_watch_yields_the_current_state_and_each_newer_one(data_dir: Path) -> None:
    """The watcher sees appends of its own program as soon as they are durable."""
    async with EventLog.open(data_dir, views=views()) as log:
        await log.append(event(0))
        watching = log.watch("numbers")
        states = [await anext(watching)]
        for n in range(1, 4):
            await log.append(event(n))
            states.append(await asyncio.wait_for(anext(watching), 10))
        await watching.aclose()  # type: ignore[attr-defined]

    assert states == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]


async def test_a_slow_watcher_sees_the_latest_state(data_dir: Path) -> None:
    """States that were replaced while it was busy are skipped."""
    async with EventLog.open(data_dir, views=views()) as log:
        watching = log.watch("numbers")
        first = await anext(watching)
        for n in range(10):
            await log.append(event(n))
        second = await asyncio.wait_for(anext(watching), 10)
        await watching.aclose()  # type: ignore[attr-defined]

    assert first == []
    assert second == list(range(10))


async def test_a_watch_ends_when_the_log_is_closed(data_dir: Path) -> None:
    log = await EventLog.open(data_dir, views=views())

    async def follow() -> list[int]:
        return [state async for state in log.watch("count")]

    task = asyncio.create_task(follow())
    await log.append(event(0))
    await settle()
    await log.aclose()
    states = await asyncio.wait_for(task, 10)

    assert states == sorted(set(states))


async def test_a_watch_skips_events_that_change_nothing(data_dir: Path) -> None:
    """A view that selects types yields no new state for events of other types."""
    async with EventLog.open(data_dir, views=[View("v", collect, list, event_types={"a"})]) as log:
        watching = log.watch("v")
        states = [await anext(watching)]
        waiting = asyncio.create_task(anext(watching))  # type: ignore[arg-type]
        await log.append(event(0, "b"))
        await settle()
        await log.append(event(1, "a"))
        states.append(await asyncio.wait_for(waiting, 10))
        await watching.aclose()  # type: ignore[attr-defined]

    assert states == [[], [1]]


async def test_many_watches_may_share_one_view(data_dir: Path) -> None:
    """Each watch gets the newest state."""
    async with EventLog.open(data_dir, views=views()) as log:

        async def until(state: int) -> int:
            watching = log.watch("count")
            async for now in watching:
                if now >= state:
                    await watching.aclose()  # type: ignore[attr-defined]
                    return now
            return -1

        tasks = [asyncio.create_task(until(20)) for _ in range(20)]
        for n in range(20):
            await log.append(event(n))
        seen = await asyncio.wait_for(asyncio.gather(*tasks), 10)

    assert seen == [20] * 20


async def test_wait_until_returns_a_state_with_the_callers_own_writes(data_dir: Path) -> None:
    """`wait_until` returns as soon as the view includes all events before the offset."""
    async with EventLog.open(data_dir, views=views()) as log:
        result = await log.append(event(7))
        state = await asyncio.wait_for(log.wait_until("numbers", result.end_offset), 10)
        later = asyncio.create_task(log.wait_until("numbers", result.end_offset + 1))
        await settle()
        waits = not later.done()
        await log.append(event(8))
        both = await asyncio.wait_for(later, 10)

    assert state == [7]
    assert waits
    assert both == [7, 8]


# Read-only logs


async def test_a_read_only_log_reads_folds_and_watches(data_dir: Path) -> None:
    """A read-only log works next to the writer and does not take its lock."""
    async with (
        EventWriter.open(data_dir) as writer,
        EventLog.open(data_dir, views=views(), read_only=True) as log,
    ):
        watching = log.watch("count")
        states = [await anext(watching)]
        await writer.append(event(0))
        states.append(await asyncio.wait_for(anext(watching), 10))
        await watching.aclose()  # type: ignore[attr-defined]
        found = await numbers(log)
        head = await log.reader().head()
        same = head == writer.head

    assert states == [0, 1]
    assert found == [0]
    assert same


async def test_a_read_only_log_refuses_all_methods_that_write(data_dir: Path) -> None:
    """Every append and the rotation raise an `EventfoldError`."""
    write_log(data_dir, line(0))
    async with EventLog.open(data_dir, views=views(), read_only=True) as log:
        for call in (
            lambda: log.append(event(1)),
            lambda: log.append_many([event(1)]),
            lambda: log.append_if(event(1), *Head(0, "")),
            lambda: log.rotate(),
        ):
            with pytest.raises(EventfoldError, match="read-only"):
                await call()
        found = await records(log)

    assert len(found) == 1


async def test_a_read_only_log_writes_nothing(data_dir: Path) -> None:
    """A read-only log saves no snapshot on a refresh, a rebuild or a close, since the files are the writer's."""
    write_log(data_dir, line(0))
    async with EventLog.open(data_dir, views=views(), read_only=True) as log:
        await log.refresh_all()
        rebuilt = await log.rebuild("count")
    left = sorted(path.name for path in data_dir.iterdir())

    assert rebuilt == 1
    assert left == ["app.jsonl"]


async def test_a_read_only_log_of_a_missing_directory_is_empty(tmp_path: Path) -> None:
    """The directory is not created."""
    async with EventLog.open(tmp_path / "missing", views=views(), read_only=True) as log:
        states = log.view("count"), await numbers(log)

    assert states == (0, [])
    assert not (tmp_path / "missing").exists()


async def test_closing_a_read_only_log_ends_its_watches(data_dir: Path) -> None:
    """The watches end even if nobody writes."""
    write_log(data_dir, line(0))
    log = await EventLog.open(data_dir, views=views(), read_only=True)

    async def follow() -> list[int]:
        return [state async for state in log.watch("count")]

    task = asyncio.create_task(follow())
    while not log.reader()._scope.pending_waits:
        await asyncio.sleep(0)
    await log.aclose()
    states = await asyncio.wait_for(task, 10)

    assert states == [1]


# Rotating


async def test_rotating_brings_the_views_up_to_date_first(data_dir: Path) -> None:
    """Their snapshots then have the offset at which the active log begins."""
    async with EventLog.open(data_dir, views=views()) as log:
        await log.append(event(0))
        await log.rotate()
        head, state = log.head.offset, log.views["count"].state
        saved = json.loads((data_dir / "views" / "count.snapshot.json").read_bytes())

    assert state == 1
    assert (saved["state"], saved["position"], saved["offset"], saved["hash"]) == (1, head, 0, "")


@pytest.mark.parametrize("by_itself", [False, True])
async def test_a_snapshot_that_is_not_registered_does_not_mislead_the_rust_crate(
    data_dir: Path, by_itself: bool
) -> None:
    """After a rotation, its offset in the active log is beyond the end of any file; for us, it stays valid."""
    async with EventLog.open(data_dir, views=views()) as log:
        await log.append(event(0))
        await log.refresh_all()
    path = data_dir / "views" / "count.snapshot.json"
    before = json.loads(path.read_bytes())
    async with EventLog.open(data_dir, max_log_size=1 if by_itself else 0) as log:
        await log.append(event(1))
        if not by_itself:
            await log.rotate()
    after = json.loads(path.read_bytes())
    async with EventLog.open(data_dir, views=views()) as log:
        state = log.view("count")

    assert before["offset"] == before["position"]
    assert after == {**before, "offset": 2**63 - 1, "hash": ""}
    assert state == 2


async def test_the_stats_count_appends_and_waiting_calls(data_dir: Path) -> None:
    async with EventLog.open(data_dir, views=[View("count", lambda state, event: state + 1, 0)]) as log:
        assert log.stats().appends == log.stats().batches == 0
        await asyncio.gather(*(log.append(event(n)) for n in range(10)))
        with pytest.raises(ConditionalAppendError):
            await log.append_if(event(10), 0, "")
        waiting = asyncio.ensure_future(log.wait_for_events(log.head.offset))
        await settle()
        queued = asyncio.ensure_future(log.append(event(11)))
        await asyncio.sleep(0)
        stats = log.stats()

        assert (stats.appends, stats.refused, stats.batches, stats.largest_batch) == (10, 1, 2, 10)
        assert 0 < stats.slowest_commit_seconds <= stats.commit_seconds
        assert (stats.queued, stats.waiting_for_place, stats.waiting) == (1, 0, 1)
        assert stats.head == log.head.offset
        assert stats.views["count"].lag == log.head.offset
        await asyncio.gather(waiting, queued)
        await log.refresh_all()
        assert log.stats().views["count"].lag == 0


async def test_a_read_only_log_has_stats_without_a_head(data_dir: Path) -> None:
    async with EventLog.open(data_dir, read_only=True) as log:
        assert log.stats().head is None
        assert log.stats().appends == 0
