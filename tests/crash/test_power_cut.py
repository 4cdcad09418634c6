"""Power cuts: an ext4 that is shut down, without a flush, under a process that writes to it, or two that share a log.

Only what was acknowledged before the cut must be there after it. `EVENTFOLD_POWER_CUT_ROUNDS` says how many cuts.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.crash.mounts import Ext4, ext4
from tests.crash.oracle import check_archive, read, read_now
from tests.crash.power_cut_writer import counts
from tests.crash.test_kill import check_round

from eventfold import Event, EventfoldError, EventLog, EventReader, LockMode, Record

SCRIPT = Path(__file__).with_name("power_cut_writer.py")
ROUNDS = int(os.environ.get("EVENTFOLD_POWER_CUT_ROUNDS", "8"))
# After this many rounds, a new directory is used, so that repeated reads stay small.
ROUNDS_PER_DIRECTORY = 10

pytestmark = pytest.mark.power_cut


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Ext4]:
    """An ext4 whose power can be cut."""
    with ext4(tmp_path / "disk") as mounted:
        yield mounted


class Reported(NamedTuple):
    """What a process reported before the cut: events as (round, task, n, end offset), and a consumer's commits."""

    events: list[tuple[int, ...]]
    commits: list[int]

    def add(self, other: Reported) -> None:
        self.events.extend(other.events)
        self.commits.extend(other.commits)


def cut(disk: Ext4, directory: Path, rounds: list[int], after: int, *left_out: str) -> Reported:
    """Lets processes write, and cuts the power after some reports; returns what they had reported by then.

    There is one process for each of the rounds; several share the log.
    """
    lock = LockMode.SHARED if len(rounds) > 1 else LockMode.FLOCK
    ours, theirs = os.pipe()
    processes = []
    with os.fdopen(ours, "rb", buffering=0) as pipe:
        try:
            for round in rounds:
                command = [sys.executable, str(SCRIPT), str(directory), str(round), lock.value, *left_out]
                processes.append(subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL))
            os.close(theirs)
            reported = b""
            while reported.count(b"\n") < len(rounds) + after:
                chunk = pipe.read(4096)
                assert chunk, f"the writers ended on their own, having reported {reported!r:.200}"
                reported += chunk
            disk.cut_power()
        finally:
            for process in processes:
                process.kill()
                process.wait()
    disk.unmount()
    assert disk.needs_replay
    disk.mount()
    lines = [line.split() for line in reported.decode().split("\n")[:-1]]
    events = [tuple(map(int, words[1:])) for words in lines if words[0] == "event"]
    return Reported(events, [int(words[1]) for words in lines if words[0] == "commit"])


def lost(records: list[Record], reported: Reported) -> int:
    """Returns how many of the acknowledged events are not at their offsets."""
    found = {(r.event.data["round"], r.event.data.get("task"), r.event.data.get("n"), r.end_offset) for r in records}
    return sum(event not in found for event in reported.events)


async def place(log: EventLog) -> int:
    """Returns the offset at which the consumer continues."""
    async for record in log.consumer("mailer"):
        return record.start_offset
    raise AssertionError("the log was closed")


async def read_what_is_left(directory: Path) -> list[Record]:
    """Returns the events before any damage."""
    records = []
    try:
        async for record in EventReader(directory).read_full():
            records.append(record)
    except EventfoldError:
        pass
    return records


async def test_a_power_cut_loses_no_acknowledged_event(disk: Ext4) -> None:
    """Events are there once and in order, batches complete, the view is a replay, and the consumer not set back."""
    dice = random.Random(5)
    reported, directory = Reported([], []), disk.path / "data"
    total = commits = cut_in_rotation = 0
    for round in range(ROUNDS):
        if round % ROUNDS_PER_DIRECTORY == 0:
            reported, directory = Reported([], []), disk.path / f"data{round}"
        # Sometimes the report only says that it is about to open: then the recovery from the previous cut is cut.
        after = dice.choice((0, dice.randrange(1, 30), dice.randrange(1, 1500)))
        rounds = [round, ROUNDS + round] if round % 2 else [round]
        new = await asyncio.to_thread(cut, disk, directory, rounds, after)
        reported.add(new)
        cut_in_rotation += any(directory.glob("app.jsonl.next.*"))
        before = await read(directory)
        check_round(before, reported.events)
        assert lost(before, reported) == 0
        async with EventLog.open(directory, views=[counts()]) as log:
            assert [(r.end_offset, r.line_hash) for r in await read(directory)] == [
                (r.end_offset, r.line_hash) for r in before
            ]
            assert log.view("counts") == Counter(str(record.event.data["round"]) for record in before)
            last = await log.append(Event("reopened", {"round": round}))
            assert max(reported.commits, default=0) <= await place(log) <= last.start_offset
            await log.rotate()
            assert log.head.offset == last.end_offset
            check_archive(directory, (await asyncio.to_thread(read_now, directory))[1])
        total += len(new.events)
        commits += len(new.commits)
    print(f"{ROUNDS} cuts, {cut_in_rotation} in a rotation, {total} events and {commits} commits acknowledged, 0 lost")

    assert total >= ROUNDS * 20


async def test_without_syncs_a_power_cut_loses_events(disk: Ext4) -> None:
    """Without syncs, the previous test would fail."""
    reported = missing = 0
    for round in range(3):
        directory = disk.path / f"data{round}"
        acknowledged = await asyncio.to_thread(cut, disk, directory, [round], 200, "sync", "sync_dir")
        reported += len(acknowledged.events)
        missing += lost(await read_what_is_left(directory), acknowledged)
    print(f"without syncs: 3 cuts, {reported} events acknowledged, {missing} lost")

    assert missing > 0
