"""A short soak (`benchmarks/soak.py`), and what its ledger must find."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks._ledger import ENOUGH, TOLERANCE, Batch, Ledger, Sample, Samples, Sum
from tests.support import records

from eventfold import Event, EventLog, Record


def test_a_short_soak_loses_nothing(tmp_path: Path) -> None:
    """The run takes a few seconds with at least one kill, exits with 0, and prints what it did."""
    command = [sys.executable, "-m", "benchmarks.soak", "0.1", "--seed", "5", "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    print(done.stdout)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "no faults" in done.stdout
    assert " killed" in done.stdout
    assert "events acknowledged in the steady log" in done.stdout


async def written(directory: Path, ledger: Ledger) -> list[Record]:
    """A log of single events and a batch, noted in a ledger."""
    async with EventLog.open(directory) as log:
        for batch in (Batch(0, 0, 0, 1), Batch(0, 1, 0, 1), Batch(0, 0, 1, 3), Batch(0, 1, 1, 1)):
            results = await log.append_many(Event("counted", data) for data in batch.data())
            for n, result in enumerate(results, batch.n):
                ledger.note("acknowledged", batch.run, batch.task, n, result.end_offset, int(result.line_hash, 16))
        return await records(log)


def summed(found: list[Record]) -> Sum:
    result = Sum()
    for record in found:
        result.add(record.end_offset, int(record.line_hash, 16))
    return result


async def test_an_intact_log_has_no_faults(data_dir: Path) -> None:
    """Without faults, the ledger reports none."""
    ledger = Ledger()
    found = await written(data_dir, ledger)
    ledger.check(found, summed(found))

    assert ledger.faults == []


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda found: found[:-1], "was acknowledged at"),
        (lambda found: found[:1] + found[2:], "was acknowledged at"),
        (lambda found: [found[0], *found], "is there twice, or out of order"),
        (lambda found: [found[1], found[0], *found[2:]], "is followed by"),
        (lambda found: found[:3] + found[4:], "part of an incomplete batch"),
        (lambda found: found[:4], "the last batch is incomplete"),
    ],
    ids=[
        "the last is lost",
        "one is lost",
        "one is there twice",
        "two are swapped",
        "a batch lacks one",
        "a torn batch",
    ],
)
async def test_the_ledger_finds_each_kind_of_loss(
    data_dir: Path, harm: Callable[[list[Record]], list[Record]], fault: str
) -> None:
    """Each kind of loss is a fault."""
    ledger = Ledger()
    found = harm(await written(data_dir, ledger))
    ledger.check(found, summed(found))

    assert fault in "\n".join(ledger.faults)


async def test_the_ledger_finds_a_refused_event_and_a_tail_that_missed_one(data_dir: Path) -> None:
    """A refused event must not be in the log, and a tail must yield the same events as a read."""
    ledger = Ledger()
    found = await written(data_dir, ledger)
    ledger.note("refused", 0, 1, 0)
    ledger.check(found, summed(found[1:]))

    assert [fault[:20] for fault in ledger.faults] == ["event (0, 1, 0) was ", "a read yields 6 even"]


def test_the_ledger_finds_a_consumer_that_begins_elsewhere() -> None:
    """A consumer may begin at its last commit, or at one that was under way when it was killed."""
    ledger = Ledger()
    for note in (("committed", 10), ("committing", 20), ("begun", 20), ("committing", 30), ("begun", 20)):
        ledger.note(*note)
    assert ledger.faults == []

    ledger.note("begun", 30)

    assert len(ledger.faults) == 1


@pytest.mark.parametrize("name", TOLERANCE)
def test_growth_is_found(name: str) -> None:
    """A count that is higher at the end by more than the tolerance is a fault; a constant one is not."""
    level, growing = Samples(0), Samples(0)
    for i in range(ENOUGH):
        now = Sample(i, 10, 10, 10, 10.0)
        level.all.append(now)
        growing.all.append(now._replace(**{name: 10 + 2 * TOLERANCE[name] * i / ENOUGH}))

    assert level.growth() == []
    assert [fault.split()[0] for fault in growing.growth()] == [name]
