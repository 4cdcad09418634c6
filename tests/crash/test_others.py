"""Readers and a thousand tails while writers are killed, clocks, cancellations, and a close under full load.

Only offsets order a log, so the clock does not matter. At any moment, a reader sees a prefix of the log.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.crash.oracle import check_archive, read, read_now
from tests.crash.test_kill import check_round, killed
from tests.processes import resources_at_rest, wait_for_resources
from tests.support import event, numbers, records

from eventfold import Event, EventLog, EventReader, LogClosedError, LogLockedError, Record, View

# More rounds show nothing new, and a thousand tails read every event a thousand times.
KILLS = 3
TAILS = 1000
STOP = "stop"
CANCELLED = 10_000


class Follower:
    """A tail from 0 that checks each event's offsets, and keeps only where the log's end is."""

    def __init__(self, directory: Path) -> None:
        self.end = 0
        self.hashes: list[int] = []
        self._records = EventReader(directory).tail(0)

    async def run(self) -> None:
        async for record in self._records:
            assert record.start_offset == self.end
            self.end = record.end_offset
            self.hashes.append(hash((record.end_offset, record.event.type, str(record.event.data))))
            if record.event.type == STOP:
                return


Reading = list[tuple[int, str]]


async def read_once(directory: Path) -> Reading:
    return [(r.end_offset, r.line_hash) async for r in EventReader(directory).read_full()]


async def read_again_and_again(directory: Path, reads: list[Reading]) -> None:
    """Reads repeatedly, and notes each result."""
    while True:
        reads.append(await read_once(directory))
        await asyncio.sleep(0.02)


async def test_readers_and_a_thousand_tails_miss_nothing_while_writers_are_killed(tmp_path: Path) -> None:
    """Each tail yields the log once and in order; each read is a prefix of it, and never shorter than the last."""
    directory, dice = tmp_path / "data", random.Random(7)
    acknowledged: list[tuple[int, ...]] = []
    reads: list[Reading] = []
    around: list[Reading] = []  # before and after each recovery
    followers = [Follower(directory) for _ in range(TAILS)]
    reading = asyncio.create_task(read_again_and_again(directory, reads))
    async with asyncio.TaskGroup() as group:
        for follower in followers:
            group.create_task(follower.run())
        for round in range(KILLS):
            acknowledged += await asyncio.to_thread(killed, directory, round, dice.randrange(1, 150), 4096)
            around.append(await read_once(directory))
            async with EventLog.open(directory) as log:
                around.append(await read_once(directory))
                await log.append(event(round))
                if round % 2:
                    await log.rotate()
        async with EventLog.open(directory) as log:
            await log.append(Event(STOP))
    reading.cancel()
    with suppress(asyncio.CancelledError):
        await reading
    found = await read(directory)
    print(
        f"{KILLS} kills, {len(acknowledged)} acknowledged of {len(found)} events, {TAILS} tails, {len(reads)} readings"
    )

    check_round(found, acknowledged)
    expected = [hash((r.end_offset, r.event.type, str(r.event.data))) for r in found]
    assert all(follower.hashes == expected for follower in followers)
    log_now = [(r.end_offset, r.line_hash) for r in found]
    for readings in (reads, around):
        assert all(reading == log_now[: len(reading)] for reading in readings)
        assert [len(reading) for reading in readings] == sorted(len(reading) for reading in readings)


async def test_of_many_tasks_that_open_a_log_at_once_one_succeeds(data_dir: Path) -> None:
    """The others get an error; once the log is closed, the next one can open it."""
    for n in range(5):
        outcomes = await asyncio.gather(*(EventLog.open(data_dir) for _ in range(20)), return_exceptions=True)
        [log] = [outcome for outcome in outcomes if isinstance(outcome, EventLog)]
        await log.append(event(n))
        await log.aclose()

        assert [type(outcome) for outcome in outcomes].count(LogLockedError) == 19
    assert await numbers(EventReader(data_dir)) == list(range(5))


TAKE_TURNS = """
import asyncio, sys
from eventfold import Event, EventLog, LogLockedError

async def main():
    locked = n = 0
    while n < int(sys.argv[3]):
        try:
            async with EventLog.open(sys.argv[1]) as log:
                await log.append_many(Event("turn", {"by": int(sys.argv[2]), "n": n}) for _ in range(2))
                await log.rotate()
                await log.append(Event("turn", {"by": int(sys.argv[2]), "n": n}))
            n += 1
        except LogLockedError:
            locked += 1
        await asyncio.sleep(0.001)
    print(locked)

asyncio.run(main())
"""


async def test_processes_that_take_turns_with_a_log_never_write_at_the_same_time(data_dir: Path) -> None:
    """Each rotation replaces the log with another file, which has another lock."""
    processes, turns = 4, 20

    def take_turns(number: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", TAKE_TURNS, str(data_dir), str(number), str(turns)]
        return subprocess.run(command, capture_output=True, text=True)

    done = await asyncio.gather(*(asyncio.to_thread(take_turns, number) for number in range(processes)))
    found = [(r.event.data["by"], r.event.data["n"]) for r in await read(data_dir)]
    print(f"{processes * turns} turns, {sum(int(one.stdout or 0) for one in done)} times locked")

    assert [one.stderr for one in done] == [""] * processes
    assert found[::3] == found[1::3] == found[2::3]
    assert sorted(found[::3]) == [(number, n) for number in range(processes) for n in range(turns)]


FORK = """
import asyncio, os, sys
from eventfold import Event, EventLog, LogLockedError

async def opened():
    try:
        async with EventLog.open(sys.argv[1]) as log:
            await log.append(Event("opened"))
        return True
    except LogLockedError:
        return False

async def main():
    log = await EventLog.open(sys.argv[1])
    await log.append(Event("parent"))
    (told, tell), (rest, until) = os.pipe(), os.pipe()
    if not os.fork():
        os.close(until)
        os.write(tell, b"opened" if asyncio.run(opened()) else b"locked")
        os.read(rest, 1)  # until the parent has come to its end
        os._exit(0)
    print("child:", os.read(told, 6).decode())
    await log.append(Event("parent again"))
    await log.aclose()
    print("parent:", "opened" if await opened() else "locked")
    os.close(until)
    os.wait()

asyncio.run(main())
"""


def test_a_forked_child_neither_opens_its_parents_log_nor_keeps_it_locked(tmp_path: Path) -> None:
    """The child inherits the lock's descriptor; that does not keep the log locked once the parent has closed it."""
    done = subprocess.run([sys.executable, "-c", FORK, str(tmp_path / "data")], capture_output=True, text=True)

    assert done.stdout.splitlines() == ["child: locked", "parent: opened"], done.stderr


async def test_a_clock_that_jumps_changes_no_order(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ts` is what the clock said, and neither reads, tails and rotations nor views and consumers use it."""
    dice = random.Random(3)
    monkeypatch.setattr(time, "time", lambda: float(dice.randrange(2**33)))
    given: list[int] = []
    view = View("all", lambda state, event: [*state, event.data["n"]], list)
    async with EventLog.open(data_dir, views=[view], max_log_size=2000) as log:
        tail = asyncio.create_task(follow(log, given))
        for n in range(200):
            await log.append(Event("counted", {"n": n}))
        stamps = [record.event.ts for record in await records(log)]
        state = await log.wait_until("all", log.head.offset)
        async for record in (consumer := log.consumer("mailer")):
            await consumer.commit(record)
            if record.end_offset == log.head.offset:
                break
        head = log.head
    await tail
    async with EventLog.open(data_dir) as log:
        again = log.head
        found = await numbers(log)

    assert stamps != sorted(stamps)
    assert found == state == given == list(range(200))
    assert again == head


async def follow(log: Any, given: list[int]) -> None:
    """Notes the numbers that a tail yields, until the log is closed."""
    async for record in log.tail(0):
        given.append(record.event.data["n"])


def check_whole(found: list[Record], sizes: list[int]) -> Counter[int]:
    """Asserts that each call's events are together, once, and in the order of the calls; returns their numbers."""
    calls = [record.event.data["call"] for record in found]
    counts = Counter(calls)
    assert calls == sorted(calls)
    assert all(count == sizes[call] for call, count in counts.items())
    assert [r.event.data["i"] for r in found] == [i for call in counts for i in range(sizes[call])]
    return counts


async def test_ten_thousand_appends_cancelled_at_random_moments_are_in_the_log_completely_or_not_at_all(
    data_dir: Path,
) -> None:
    """Each append is completely in the log or not at all, in the order of the calls; those that returned are in it."""
    dice = random.Random(11)
    sizes = [dice.choice((1, 1, 3)) for _ in range(CANCELLED)]
    returned: list[int] = []

    async def append(log: EventLog, call: int) -> None:
        await log.append_many(Event("called", {"call": call, "i": i}) for i in range(sizes[call]))
        returned.append(call)

    async with EventLog.open(data_dir, max_log_size=100_000) as log:
        tasks: list[asyncio.Task[None]] = []
        for call in range(CANCELLED):
            tasks.append(asyncio.create_task(append(log, call)))
            if call % 50 == 0:
                for _ in range(dice.randrange(6)):
                    await asyncio.sleep(0)
            if dice.random() < 0.9:
                dice.choice(tasks[-100:]).cancel()
            if call % 1000 == 999:
                await asyncio.wait(tasks)
        await asyncio.wait(tasks)
        found = await records(log)
    counts = check_whole(found, sizes)
    cancelled = [call for call, task in enumerate(tasks) if task.cancelled()]
    kept = sum(call in counts for call in cancelled)
    print(f"{CANCELLED} appends, {len(cancelled)} cancelled, {kept} of these in the log")

    assert set(returned) == set(range(CANCELLED)) - set(cancelled)
    assert set(returned) <= counts.keys()
    assert len(cancelled) > CANCELLED / 3
    assert kept < len(cancelled)


async def test_closing_a_busy_log_loses_no_event_and_leaves_no_task(data_dir: Path) -> None:
    """Appends return or are refused, reads, tails and watches end, a rotation is finished, and no task is left."""
    before = await resources_at_rest()
    for round in range(5):
        acknowledged, refused, given = await close_amid_all(data_dir / str(round), appends=3 * round)
        found = await read(data_dir / str(round))
        there = [(r.event.data["task"], r.event.data["n"]) for r in found]

        assert sorted(there) == sorted(acknowledged)
        assert not set(refused) & set(there)
        for task in range(10):
            mine = [n for other, n in there if other == task]
            assert mine == list(range(len(mine)))
        assert all(tail == there[: len(tail)] for tail in given)
        await asyncio.to_thread(check_archive_if_there, data_dir / str(round))
        assert await wait_for_resources(before) == before


def check_archive_if_there(directory: Path) -> None:
    """Asserts that the archive has the events that a reader finds before the active log, and no rotation is left."""
    assert not list(directory.glob("app.jsonl.next.*"))
    data = read_now(directory)[1]
    active = (directory / "app.jsonl").read_bytes()
    if (directory / "archive.jsonl.zst").exists():
        check_archive(directory, data[: len(data) - len(active)])
    else:
        assert active == data


Key = tuple[int, int]


async def close_amid_all(directory: Path, appends: int) -> tuple[list[Key], list[Key], list[list[Key]]]:
    """Closes a log during many other calls, after enough appends; returns what was acknowledged, refused, tailed."""
    acknowledged: list[Key] = []
    refused: list[Key] = []
    given: list[list[Key]] = [[] for _ in range(20)]
    enough = asyncio.Event()
    view: View[int] = View("count", lambda state, _: state + 1, 0)
    log = await EventLog.open(directory, views=[view], max_log_size=1500)

    async def append(task: int) -> None:
        for n in range(10**6):
            size = 3 if task == 0 else 1
            keys = [(task, size * n + i) for i in range(size)]
            try:
                await log.append_many(Event("counted", {"task": task, "n": n}) for task, n in keys)
            except LogClosedError:
                refused.extend(keys)
                return
            acknowledged.extend(keys)
            if len(acknowledged) >= appends:
                enough.set()

    async def tail(into: list[Key]) -> None:
        async for record in log.tail(0):
            into.append((record.event.data["task"], record.event.data["n"]))

    async def commit() -> None:
        async for record in (consumer := log.consumer("mailer")):
            await consumer.commit(record)

    async def watch() -> None:
        async for state in log.watch("count"):
            assert state <= len(acknowledged) + 40

    async def wait() -> None:
        with suppress(LogClosedError):
            while True:
                await log.wait_for_events(log.head.offset)

    async def again_and_again(call: Any) -> None:
        with suppress(LogClosedError):
            while not enough.is_set():
                await call()
                await asyncio.sleep(0)  # A refresh without new events waits for nothing.

    async with asyncio.TaskGroup() as group:
        for task in range(10):
            group.create_task(append(task))
        for into in given:
            group.create_task(tail(into))
        for call in (log.refresh_all, log.rotate, lambda: records(log)):
            group.create_task(again_and_again(call))
        for others in (commit(), watch(), wait()):
            group.create_task(others)
        await enough.wait()
        await asyncio.gather(log.aclose(), log.aclose())
    return acknowledged, refused, given
