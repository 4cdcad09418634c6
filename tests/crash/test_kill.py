"""Real processes are killed while they append from many tasks and rotate every few kilobytes."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from tests.crash.oracle import check_archive, read, read_now

from eventfold import Event, EventLog, Record

SCRIPT = Path(__file__).with_name("killed_writer.py")
ROUNDS = int(os.environ.get("EVENTFOLD_KILL_ROUNDS", "25"))
# After this many rounds, a new directory is used, so that repeated reads stay small.
ROUNDS_PER_DIRECTORY = 10


def killed(directory: Path, round: int, after: int, pipe_size: int = -1) -> list[tuple[int, int, int, int]]:
    """Lets a writer append and kills it after some events; returns every event acknowledged until it died.

    With a small pipe, the writer can't get far ahead of whoever reads its reports.
    """
    command = [sys.executable, str(SCRIPT), str(directory), str(round)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, pipesize=pipe_size) as process:
        reported = b""
        while reported.count(b"\n") < after:
            chunk = process.stdout.read(4096)
            assert chunk, "the writer ended on its own"
            reported += chunk
        process.kill()
        while chunk := process.stdout.read(4096):
            reported += chunk
    *lines, _ = reported.decode().split("\n")
    return [tuple(map(int, line.split())) for line in lines]


def check_round(records: list[Record], acknowledged: list[tuple[int, int, int, int]]) -> None:
    """Asserts that every acknowledged event is at its offset, and each task's events are there once, in order."""
    by_end = {record.end_offset: record.event.data for record in records}
    counts: dict[tuple[int, int], int] = defaultdict(int)
    for record in records:
        data = record.event.data
        if "task" in data:
            key = data["round"], data["task"]
            assert data["n"] == counts[key]
            counts[key] += 1
    for round, task, n, end in acknowledged:
        assert (by_end[end]["round"], by_end[end]["task"], by_end[end]["n"]) == (round, task, n)
    assert all(count % 3 == 0 for (_, task), count in counts.items() if task == 0)


async def test_a_killed_writer_loses_no_acknowledged_event(tmp_path: Path) -> None:
    """After each of many kills, every acknowledged event is there once, each task's in order, batches complete."""
    dice = random.Random(20)
    total = rotations_seen = left_rotating = 0
    acknowledged: list[tuple[int, int, int, int]] = []
    directory = tmp_path / "data"
    for round in range(ROUNDS):
        if round % ROUNDS_PER_DIRECTORY == 0:
            shutil.rmtree(directory, ignore_errors=True)
            acknowledged = []
        acknowledged += killed(directory, round, dice.randrange(1, 400))
        left_rotating += any(directory.glob("app.jsonl.next.*"))
        before = await read(directory)
        check_round(before, acknowledged)
        async with EventLog.open(directory) as log:
            after = await read(directory)
            result = await log.append(Event("reopened", {"round": round}))
            assert log.head.offset == result.end_offset
            if dice.random() < 0.3:
                await log.rotate()
                check_archive(directory, (await asyncio.to_thread(read_now, directory))[1])
        assert [(r.end_offset, r.line_hash) for r in after] == [(r.end_offset, r.line_hash) for r in before]
        rotations_seen += (directory / "archive.jsonl.zst").exists()
        total += len(acknowledged)
    print(f"{ROUNDS} rounds, {total} acknowledged events looked for, {left_rotating} rotations left under way")

    assert rotations_seen >= ROUNDS // 2
    assert total >= ROUNDS * 20
