"""Processes that share a log are killed while they append and rotate every few kilobytes."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest
from tests.crash.oracle import check_archive, read, read_now

from eventfold import Event, EventLog, LockMode, Record

SCRIPT = Path(__file__).with_name("shared_writer.py")
ROUNDS = int(os.environ.get("EVENTFOLD_SHARED_ROUNDS", "5"))
# After this many rounds, a new directory is used, so that repeated reads stay small.
ROUNDS_PER_DIRECTORY = 5
PROCESSES = 4
# A process counts as stalled after this many seconds without an acknowledgement.
PATIENCE = 30.0

Report = tuple[int, int, int, int, int]


class Process:
    """One writer, and what it has reported."""

    def __init__(self, directory: Path, round: int, number: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(directory), str(round), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        self._output = bytearray()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()
        self._errors = bytearray()
        self._error_thread = threading.Thread(target=self._listen_to_errors)
        self._error_thread.start()

    def _listen(self) -> None:
        while piece := self._process.stdout.read(4096):
            self._output += piece

    def _listen_to_errors(self) -> None:
        while piece := self._process.stderr.read(4096):
            self._errors += piece

    @property
    def count(self) -> int:
        return self._output.count(b"\n")

    def acknowledges(self, more: int) -> float:
        """Waits until that many more events were acknowledged; returns how many seconds the first of them took.

        If others use the processors, a process may need a minute for the half second that its start takes: it counts as
        stalled only if it did nothing although it could have run.
        """
        begun, first, goal = time.monotonic(), 0.0, self.count + more
        waited = waited_for_processors(self._process.pid)
        while self.count < goal:
            assert self._process.poll() is None, self._errors.decode()
            passed = time.monotonic() - begun
            assert passed < PATIENCE or passed - waited_for_processors(self._process.pid) + waited < PATIENCE, (
                f"of {more} events {self.count - goal + more} were acknowledged: {self._errors.decode()}"
            )
            if not first and self.count > goal - more:
                first = passed
            time.sleep(0.001)
        return first

    def kill(self) -> None:
        self._process.kill()
        self._end()

    def close(self) -> None:
        """Makes it close its log."""
        self._process.stdin.close()
        self._end()
        assert self._process.returncode == 0, self._errors.decode()

    def _end(self) -> None:
        self._thread.join()
        self._error_thread.join()
        with self._process:
            pass

    def reports(self) -> list[Report]:
        *lines, _ = self._output.decode().split("\n")
        return [tuple(map(int, line.split())) for line in lines]


def waited_for_processors(pid: int) -> float:
    """Returns how many seconds the threads of a process waited for a processor; 0 if the system doesn't say."""
    waited = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            waited += int(path.read_text().split()[1])
        except (OSError, IndexError):  # The thread has ended.
            pass
    return waited / 1e9


def check_round(records: list[Record], acknowledged: list[Report]) -> None:
    """Asserts that every acknowledged event is at its offset, and each task's events are there once, in order."""
    by_end = {record.end_offset: record.event.data for record in records}
    counts: dict[tuple[int, int, int], int] = defaultdict(int)
    for record in records:
        data = record.event.data
        if "task" in data:
            key = data["round"], data["process"], data["task"]
            assert data["n"] == counts[key]
            counts[key] += 1
    for round, process, task, n, end in acknowledged:
        data = by_end[end]
        assert (data["round"], data["process"], data["task"], data["n"]) == (round, process, task, n)
    assert all(count % 3 == 0 for (_, _, task), count in counts.items() if task == 0)


async def test_killed_writers_lose_nothing_and_the_others_continue(tmp_path: Path) -> None:
    """One, several or all of four are killed and replaced; every acknowledged event is there once."""
    dice = random.Random(int(os.environ.get("EVENTFOLD_SHARED_SEED", "8")))
    acknowledged: list[Report] = []
    total = kills = left_rotating = rotated = 0
    slowest = 0.0
    directory = tmp_path / "data"
    for round in range(ROUNDS):
        if round % ROUNDS_PER_DIRECTORY == 0:
            shutil.rmtree(directory, ignore_errors=True)
            acknowledged = []
        earlier = len(acknowledged)
        killed, seconds = await asyncio.to_thread(one_round, directory, round, dice, acknowledged)
        kills += killed
        slowest = max(slowest, seconds)
        total += len(acknowledged) - earlier
        left_rotating += any(directory.glob("app.jsonl.next.*"))
        before = await read(directory)
        check_round(before, acknowledged)
        async with EventLog.open(directory, lock=LockMode.SHARED) as log:
            after = await read(directory)
            result = await log.append(Event("reopened", {"round": round}))
            assert log.head.offset == result.end_offset
            await log.rotate()
            check_archive(directory, (await asyncio.to_thread(read_now, directory))[1])
        assert not any(directory.glob("app.jsonl.next.*"))
        assert [(r.end_offset, r.line_hash) for r in after] == [(r.end_offset, r.line_hash) for r in before]
        rotated += (directory / "archive.jsonl.zst").exists()
    print(
        f"{ROUNDS} rounds, {kills} kills, {total} events acknowledged, {left_rotating} rotations left, "
        f"slowest survivor {slowest:.3f} s"
    )
    assert rotated == ROUNDS


def one_round(directory: Path, round: int, dice: random.Random, acknowledged: list[Report]) -> tuple[int, float]:
    """Runs four writers, of which some are killed and replaced.

    Returns how many were killed, and how many seconds the survivors needed for their next acknowledgement.
    """
    processes = [Process(directory, round, number) for number in range(PROCESSES)]
    ended: list[Process] = []
    kills, slowest = 0, 0.0
    try:
        for process in processes:
            process.acknowledges(1)
        time.sleep(dice.random() * 0.2)
        victims = dice.sample(processes, dice.choice([1, 1, 2, 3, PROCESSES]))
        for victim in victims:
            victim.kill()
            kills += 1
            processes.remove(victim)
            ended.append(victim)
        for survivor in processes:
            slowest = max(slowest, survivor.acknowledges(20))
        if dice.random() < 0.7:
            processes.append(Process(directory, round, PROCESSES))
            processes[-1].acknowledges(1)
        while processes:
            process = processes.pop(dice.randrange(len(processes)))
            ended.append(process)
            if dice.random() < 0.5:
                process.kill()
                kills += 1
            else:
                process.close()
    finally:
        for process in processes:
            process.kill()
    for process in ended:
        acknowledged += process.reports()
    return kills, slowest


DEATHS = list(
    itertools.product(["commits", "rotates", "undoes", "finishes"], ["die", "half", "fail"], ["beside", "alone"])
)
if os.environ.get("EVENTFOLD_SHARED_DEATHS") != "all":
    DEATHS = DEATHS[::5]


@pytest.mark.parametrize(("scenario", "how", "peer"), DEATHS)
def test_a_writer_may_end_at_any_operation_of_a_commit_a_rotation_or_an_opening(
    tmp_path: Path, scenario: str, how: str, peer: str
) -> None:
    """The writer is killed before or during the operation, even that on the mark, or the operation fails."""
    command = [sys.executable, "-m", "tests.crash.shared_deaths", scenario, how, peer, str(tmp_path / "data")]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40
