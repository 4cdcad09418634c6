"""Several writers of one directory, each of which has all features of a single writer."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.crash.peers import Peer
from tests.support import FaultInjector, event, line, numbers, records

from eventfold import (
    ConditionalAppendError,
    Event,
    EventLog,
    EventReader,
    Head,
    LockMode,
    LogLockedError,
    SyncMode,
    View,
    WriterFailedError,
    snapshot,
)
from eventfold._codec.lines import Lines
from eventfold._files import operations, shared_committer, turn, watcher
from eventfold._files.segments import LogSegments

SHARED = LockMode.SHARED
HOLDER = """
import os, sys, time
from eventfold._files.paths import Layout
from eventfold._files.turn import Turn
turn = Turn(Layout(sys.argv[1]))
with turn:
    print("held", flush=True)
    sys.stdin.read()
"""


async def hold_the_turn(directory: Path) -> subprocess.Popen[str]:
    """Starts another process, which holds the turn until its standard input is closed or it is killed."""
    command = [sys.executable, "-c", HOLDER, str(directory)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert await asyncio.to_thread(process.stdout.readline) == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    with process:
        pass


async def test_two_logs_append_to_one_directory_in_one_order(data_dir: Path) -> None:
    async with EventLog.open(data_dir, lock=SHARED) as one, EventLog.open(data_dir, lock=SHARED) as other:
        for n in range(0, 10, 2):
            await one.append(event(n))
            await other.append(event(n + 1))
        assert await numbers(one) == await numbers(other) == list(range(10))
        assert one.head == other.head == await EventReader(data_dir).head()


async def test_a_condition_covers_the_appends_of_other_writers(data_dir: Path) -> None:
    async with EventLog.open(data_dir, lock=SHARED) as one, EventLog.open(data_dir, lock=SHARED) as other:
        seen = one.head
        result = await other.append(event(0))
        with pytest.raises(ConditionalAppendError) as raised:
            await one.append_if(event(1), *seen)
        assert raised.value.conflict.actual_offset == result.end_offset
        assert one.head.offset == result.end_offset
        await one.append_if(event(1), *one.head)
        assert await numbers(other) == [0, 1]


async def test_counters_with_conditional_appends_lose_no_update(data_dir: Path) -> None:
    async with EventLog.open(data_dir, lock=SHARED) as one, EventLog.open(data_dir, lock=SHARED) as other:

        async def count(log: EventLog) -> None:
            for _ in range(15):
                while True:
                    head = await log.reader().head()
                    value = len([None async for _ in log.read_full()]) if head.offset else 0
                    if head != await log.reader().head():
                        continue
                    try:
                        await log.append_if(event(value), *head)
                        break
                    except ConditionalAppendError:
                        pass

        await asyncio.gather(count(one), count(other))
        assert await numbers(one) == list(range(30))


COUNTER = """
import asyncio, sys
from eventfold import ConditionalAppendError, Event, EventLog, LockMode, View

async def main():
    view = View("count", lambda state, event: event.data["n"], 0)
    async with EventLog.open(sys.argv[1], lock=LockMode.SHARED, views=[view], max_log_size=1000) as log:
        done = 0
        while done < int(sys.argv[2]):
            value = await log.wait_until(view)
            head = log.head
            if view.offset != head.offset:
                continue
            try:
                await log.append_if(Event("counted", {"n": value + 1}), *head)
                done += 1
            except ConditionalAppendError:
                pass

asyncio.run(main())
"""


async def test_counters_in_several_processes_lose_no_update(data_dir: Path) -> None:
    processes = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", COUNTER, str(data_dir), "8") for _ in range(3)
    ]
    assert [await process.wait() for process in processes] == [0, 0, 0]
    async with EventLog.open(data_dir) as log:
        assert await numbers(log) == list(range(1, 25))


async def test_a_writer_follows_a_rotation_of_another(data_dir: Path) -> None:
    async with EventLog.open(data_dir, lock=SHARED) as one, EventLog.open(data_dir, lock=SHARED) as other:
        await one.append(event(0))
        await other.rotate()
        await one.append(event(1))
        await one.rotate()
        assert await other.active_log_size() == 0
        await other.append(event(2))
        assert await numbers(one) == [0, 1, 2]


async def test_an_idle_writer_follows_a_rotation_and_locks_the_new_file(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_committer, "ROTATION_CHECK_INTERVAL", 0.02)
    async with EventLog.open(data_dir, lock=SHARED) as idle:
        async with EventLog.open(data_dir, lock=SHARED) as other:
            await other.append(event(0))
            await other.rotate()
            async with asyncio.timeout(10):
                while idle._writer._committer.active.base == 0:
                    await asyncio.sleep(0.01)
        with pytest.raises(LogLockedError):
            await EventLog.open(data_dir)


async def test_a_tail_and_a_view_see_the_events_of_another_writer(data_dir: Path) -> None:
    view = View("count", lambda state, _: state + 1, 0)
    async with EventLog.open(data_dir, lock=SHARED, views=[view]) as one, EventLog.open(data_dir, lock=SHARED) as other:
        tail = one.tail()
        first = asyncio.ensure_future(anext(tail))
        await asyncio.sleep(0.05)
        result = await other.append(event(7))
        async with asyncio.timeout(10):
            assert (await first).event == event(7)
            assert await one.wait_until("count", result.end_offset) == 1
        await tail.aclose()


async def test_a_process_gets_its_own_appends_without_reading_them_back(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_back: list[object] = []
    lines_between = watcher.lines_between

    def counted(segments: LogSegments, start: Head, end: Head) -> Lines | None:
        read_back.append(end)
        return lines_between(segments, start, end)

    monkeypatch.setattr(watcher, "lines_between", counted)
    async with EventLog.open(data_dir, lock=SHARED) as log, asyncio.timeout(20):
        tail = log.tail()
        for n in range(30):
            reading = asyncio.ensure_future(anext(tail))
            await log.append(event(n))
            assert (await reading).event == event(n)
        await tail.aclose()
    # Such a look may come just between a commit and the notification about it.
    assert len(read_back) < 5


@pytest.mark.parametrize("announced", [False, True])
async def test_a_tail_in_a_writers_process_sees_the_events_of_other_processes(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, announced: bool
) -> None:
    """The events include those that a writer of this process announced, but did not get to report."""
    async with EventLog.open(data_dir, lock=SHARED) as log, asyncio.timeout(20):
        tail = log.tail()
        peer = await asyncio.to_thread(Peer, data_dir)
        wake_watchers = peer.turn.wake_watchers

        def wake() -> None:
            if announced:
                log._writer._committer._turn.committed_head = peer.head
            wake_watchers()

        monkeypatch.setattr(peer.turn, "wake_watchers", wake)
        for n in range(6):
            reading = asyncio.ensure_future(anext(tail))
            await asyncio.sleep(0.01)
            if n % 2:
                await log.append(event(n))
            else:
                await asyncio.to_thread(peer.append, line(n))
            assert (await reading).event.data == {"n": n}
        await asyncio.to_thread(peer.close)
        await tail.aclose()


@pytest.mark.parametrize(("first", "second"), [(SHARED, LockMode.FLOCK), (LockMode.FLOCK, SHARED)])
async def test_exclusive_and_shared_writers_exclude_each_other_and_name_the_other_process(
    data_dir: Path, first: LockMode, second: LockMode
) -> None:
    async with EventLog.open(data_dir, lock=first) as log:
        with pytest.raises(LogLockedError, match=str(os.getpid())):
            await EventLog.open(data_dir, lock=second)
        await log.append(event(0))
    async with EventLog.open(data_dir, lock=second) as log:
        assert await numbers(log) == [0]


async def test_writers_with_different_sync_modes_do_not_share_a_log(data_dir: Path) -> None:
    async with EventLog.open(data_dir, lock=SHARED, sync=SyncMode.OS):
        with pytest.raises(LogLockedError, match="sync mode"):
            await EventLog.open(data_dir, lock=SHARED)
    async with EventLog.open(data_dir, lock=SHARED):
        pass


@pytest.mark.parametrize("sync", list(SyncMode))
async def test_all_sync_modes_can_be_shared(data_dir: Path, sync: SyncMode) -> None:
    opening = EventLog.open(data_dir, lock=SHARED, sync=sync)
    async with opening as one, EventLog.open(data_dir, lock=SHARED, sync=sync) as other:
        await one.append_many([event(0), event(1)])
        await other.append(event(2))
        assert await numbers(one) == [0, 1, 2]


async def test_a_process_that_writes_does_not_see_events_before_they_are_on_disk(
    data_dir: Path, faults: FaultInjector
) -> None:
    async with EventLog.open(data_dir, lock=SHARED) as one, EventLog.open(data_dir, lock=SHARED) as other:
        await one.append(event(0))
        gate = faults.freeze("sync")
        appending = asyncio.ensure_future(one.append(event(1)))
        await gate.reached()
        assert len(await records(EventReader(data_dir))) == 1
        assert len(await records(other)) == 1
        gate.open()
        await appending
        assert await numbers(other) == [0, 1]


async def test_a_failed_sync_ends_all_writers_until_the_log_is_opened_again(
    data_dir: Path, faults: FaultInjector
) -> None:
    one = await EventLog.open(data_dir, lock=SHARED)
    other = await EventLog.open(data_dir, lock=SHARED)
    await one.append(event(0))
    faults.fail("sync")
    with pytest.raises(WriterFailedError):
        await one.append(event(1))
    with pytest.raises(WriterFailedError, match="a sync failed"):
        await other.append(event(2))
    await one.aclose()
    await other.aclose()
    async with EventLog.open(data_dir, lock=SHARED) as log:
        await log.append(event(3))
        assert (await numbers(log))[-1] == 3


async def test_a_full_disk_fails_only_the_appends_that_need_space(data_dir: Path, faults: FaultInjector) -> None:
    async with EventLog.open(data_dir, lock=SHARED) as one, EventLog.open(data_dir, lock=SHARED) as other:
        await one.append(event(0))
        faults.fail("write")
        with pytest.raises(OSError, match="made to fail"):
            await one.append(event(1))
        await other.append(event(2))
        await one.append(event(3))
        assert await numbers(one) == [0, 2, 3]


async def test_a_log_can_be_closed_while_a_stopped_process_has_the_turn(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shared_committer, "STUCK_AFTER", 0.1)
    monkeypatch.setattr(turn, "STUCK_AFTER", 0.1)
    log = await EventLog.open(data_dir, lock=SHARED)
    await log.append(event(0))
    process = await hold_the_turn(data_dir)
    try:
        os.kill(process.pid, signal.SIGSTOP)
        appending = asyncio.ensure_future(log.append(event(1)))
        cancelled = asyncio.ensure_future(log.append(event(2)))
        await asyncio.sleep(0.05)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        async with asyncio.timeout(10):
            await log.aclose()
        with pytest.raises(WriterFailedError, match=f"process {process.pid}"):
            await appending
        assert f"process {process.pid}" in caplog.text
    finally:
        end(process)
    async with asyncio.timeout(10), EventLog.open(data_dir, lock=SHARED) as log:
        assert await numbers(log) == [0]


async def test_an_idle_log_that_wants_to_follow_a_rotation_can_be_closed_while_the_turn_is_stuck(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_committer, "STUCK_AFTER", 0.1)
    monkeypatch.setattr(turn, "STUCK_AFTER", 0.1)
    idle = await EventLog.open(data_dir, lock=SHARED)
    async with EventLog.open(data_dir, lock=SHARED) as other:
        await other.append(event(0))
        await other.rotate()
    process = await hold_the_turn(data_dir)
    try:
        idle._writer._committer._check_for_rotation()
        async with asyncio.timeout(10):
            await idle.aclose()
    finally:
        end(process)


async def test_an_opening_that_waits_for_the_turn_can_be_cancelled(data_dir: Path) -> None:
    async with EventLog.open(data_dir, lock=SHARED) as log:
        await log.append(event(0))
    process = await hold_the_turn(data_dir)
    try:
        async with asyncio.timeout(10):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await EventLog.open(data_dir, lock=SHARED)
    finally:
        end(process)
    async with asyncio.timeout(10), EventLog.open(data_dir) as log:
        assert await numbers(log) == [0]


async def test_a_deleted_lock_file_ends_the_writer_before_anything_more_is_written(data_dir: Path) -> None:
    log = await EventLog.open(data_dir, lock=SHARED)
    await log.append(event(0))
    (data_dir / "app.jsonl.lock").unlink()
    with pytest.raises(WriterFailedError, match="deleted or replaced"):
        await log.append(event(1))
    await log.aclose()
    async with EventLog.open(data_dir, lock=SHARED) as log:
        assert await numbers(log) == [0]


async def test_the_next_append_restores_an_emptied_lock_file(data_dir: Path) -> None:
    async with EventLog.open(data_dir, lock=SHARED) as one, EventLog.open(data_dir, lock=SHARED) as other:
        await one.append(event(0))
        os.truncate(data_dir / "app.jsonl.lock", 0)
        await other.append(event(1))
        await one.append(event(2))
        assert await numbers(other) == [0, 1, 2]


@pytest.fixture
def starting_child(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The locked files of a child that is being started: before it executes its program, it has its parent's locks."""
    lock_shared, descriptors = operations.lock_shared, []

    def lock_and_fork(fd: int) -> bool:
        descriptors.append(os.dup(fd))
        return lock_shared(fd)

    monkeypatch.setattr(operations, "lock_shared", lock_and_fork)
    yield descriptors
    for fd in descriptors:
        os.close(fd)


async def test_a_log_that_could_not_be_opened_is_not_locked_by_a_starting_child(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, starting_child: list[int]
) -> None:
    def failing(directory: Path) -> None:
        raise OSError("made to fail")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="made to fail"):
        patch.setattr(operations, "discard_leftovers", failing)
        await EventLog.open(data_dir, lock=SHARED)
    assert starting_child
    async with EventLog.open(data_dir):
        pass


async def test_a_closed_log_is_not_locked_by_a_starting_child(data_dir: Path, starting_child: list[int]) -> None:
    async with EventLog.open(data_dir, lock=SHARED) as log:
        await log.append(event(0))
        await log.rotate()
        await log.append(event(1))
    assert starting_child
    async with EventLog.open(data_dir):
        pass


async def test_the_snapshot_of_a_view_is_not_replaced_by_an_older_one(data_dir: Path) -> None:
    def count(state: int, event: Event) -> int:
        return state + 1

    def view() -> View[int]:
        return View("count", count, 0)

    one = await EventLog.open(data_dir, lock=SHARED, views=[view()])
    other = await EventLog.open(data_dir, lock=SHARED, views=[view()])
    for n in range(2):  # the refresh does not save the second one
        await one.append(event(n))
        await one.refresh_all()
    await other.append(event(2))
    await other.refresh_all()
    newest = other.views["count"].offset
    assert one.views["count"].offset < newest
    await other.aclose()
    await one.aclose()
    saved = await snapshot.load(data_dir / "views" / "count.snapshot.json")
    assert saved is not None
    assert (saved.position, saved.state) == (newest, 3)
