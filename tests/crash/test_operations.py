"""Every state that a crash can leave during the file operations of a log or of its recovery.

The states are computed from recorded operations, then opened, read, appended to and rotated. Crashing every recovery
takes minutes. By default, only every sixth recovery is crashed; `EVENTFOLD_CRASHES=all` crashes each one.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import pytest
from tests.crash.oracle import Oracle, check_directory, read
from tests.crash.recorder import Expected, Recorded, Recorder, State, States, kills, write_files
from tests.crash.scenarios import (
    DATA,
    SCENARIOS,
    Play,
    check_state,
    cuts_in_a_row,
    list_in_order,
    recovery,
)
from tests.support import event, line

from eventfold import EventLog

pytestmark = pytest.mark.usefixtures("fast_disk")

STEP = 1 if os.environ.get("EVENTFOLD_CRASHES") == "all" else 6

# The least number of different states in each scenario, so that the test can't shrink unnoticed: states after a crash,
# and states after a crash of their recovery.
LEAST = {
    "new_log": (50, 50),
    "refused_commit": (50, 50),
    "unsynced_commits": (100, 100),
    "first_rotation": (100, 100),
    "first_rotation_with_appends": (150, 150),
    "later_rotation": (70, 70),
    "rotation_with_appends": (250, 250),
    "resumed_rotation": (70, 70),
    "rotation_after_a_full_disk": (150, 150),
    "directory_of_the_rust_crate": (140, 90),
    "torn_frame_of_the_rust_crate": (50, 50),
    "whole_log": (200, 200),
    "lazily_synced_log": (50, 50),
}


class Failures(list[str]):
    """What was wrong, and where."""

    def note(self, error: Exception, *states: State) -> None:
        after = ", then ".join(state.after for state in states)
        self.append(f"{after}: {sorted(states[-1].files)}: {error!r:.300}")


@pytest.fixture
def scenario(request: pytest.FixtureRequest) -> str:
    """The name of one of the scenarios."""
    return request.param


@pytest.fixture
def recorded(scenario: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """The recorded operations of the scenario."""
    return SCENARIOS[scenario](Play(scratch / "played"), monkeypatch)


def check_recoveries(states: States, firsts: Iterable[State], root: Path, monkeypatch: pytest.MonkeyPatch) -> Failures:
    """Recovers each state, crashes the recovery after and during each of its operations, and checks the result."""
    failures = Failures()
    for number, first in enumerate(firsts):
        try:
            ops = recovery(first, root / f"{number}", monkeypatch)
        except Exception as error:
            failures.note(error, first)
            continue
        for again, second in enumerate(states.after(Recorded(first.files, ops, first.expected))):
            try:
                check_state(second, root / f"{number}.{again}")
            except Exception as error:
                failures.note(error, first, second)
    return failures


@pytest.mark.parametrize("scenario", LEAST, indirect=True)
async def test_every_state_after_a_crash_can_be_read_opened_appended_to_and_rotated(
    recorded: Recorded, scratch: Path, scenario: str
) -> None:
    """No acknowledged event is missing, nothing is twice or torn, and offsets and hashes are the same as before."""
    states, failures = States(), Failures()
    for number, state in enumerate(states.after(recorded, fine=True)):
        directory = write_files(scratch / str(number), state.files) / DATA
        try:
            state.check_kept()
            await check_directory(directory, state.expected.oracle, state.expected.acknowledged)
        except Exception as error:
            failures.note(error, state)
        await asyncio.to_thread(shutil.rmtree, directory.parent)
    print(f"{scenario}: {len(states)} states")

    assert not failures, f"{len(failures)} of {len(states)} states:\n" + "\n".join(failures[:20])
    assert len(states) >= LEAST[scenario][0]


@pytest.mark.parametrize("scenario", LEAST, indirect=True)
def test_every_state_after_a_crash_of_the_recovery_from_a_power_cut_is_intact(
    recorded: Recorded, scratch: Path, monkeypatch: pytest.MonkeyPatch, scenario: str
) -> None:
    """The recovery of each state, followed by an append, crashes after and during each of its operations."""
    states = States()
    firsts = list(states.after(recorded))
    failures = check_recoveries(states, firsts[::STEP], scratch, monkeypatch)
    seconds = len(states) - len(firsts)
    print(f"{scenario}: {seconds} states of the recovery from {len(firsts[::STEP])}")

    assert not failures, f"{len(failures)} of {seconds} states:\n" + "\n".join(failures[:20])
    assert seconds * STEP >= LEAST[scenario][1]


@pytest.mark.parametrize("scenario", LEAST, indirect=True)
def test_every_state_after_a_power_cut_in_the_recovery_from_a_kill_is_intact(
    recorded: Recorded, scratch: Path, monkeypatch: pytest.MonkeyPatch, scenario: str
) -> None:
    """Data that a killed process wrote may not be on disk when the next process reads it and continues."""
    states, failures = States(), Failures()
    firsts = 0
    for first, ops in islice(kills(recorded), 0, None, STEP):
        firsts += 1
        try:
            more = recovery(first, scratch / f"{firsts}", monkeypatch, rotating=True)
        except Exception as error:
            failures.note(error, first)
            continue
        both = Recorded(recorded.files, ops + more, recorded.expected)
        for number, second in enumerate(states.after(both, since=len(ops))):
            try:
                check_state(second, scratch / f"{firsts}.{number}")
            except Exception as error:
                failures.note(error, first, second)
    print(f"{scenario}: {len(states)} states of the recovery from {firsts} kills")

    assert not failures, f"{len(failures)} of {len(states)} states:\n" + "\n".join(failures[:20])
    assert len(states) * STEP >= LEAST[scenario][1]


@pytest.mark.parametrize("reverse", [False, True])
def test_every_state_after_several_power_cuts_is_intact(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, reverse: bool
) -> None:
    """Each cut comes in the rotation after the recovery from the previous cut, and leaves the worst state for it."""
    list_in_order(monkeypatch, reverse)
    failures, count = Failures(), 0
    for state in cuts_in_a_row(scratch / "cuts", monkeypatch):
        count += 1
        try:
            check_state(state, scratch / str(count))
        except Exception as error:
            failures.note(error, state)
    print(f"{count} states")

    assert not failures, "\n".join(failures)
    assert count >= 50


async def test_every_state_after_a_crash_of_a_log_that_rotates_automatically_is_intact(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test uses public names; several tasks append while rotations go on in other threads."""
    root = scratch / "played"
    oracle, states, failures = Oracle(), States(), Failures()
    root.mkdir()
    with monkeypatch.context() as patch:
        recorder = Recorder(patch, root)
        async with EventLog.open(root / DATA, max_log_size=400) as log:

            async def append_some(task: int) -> None:
                for n in range(4):
                    result = await log.append(event(100 * task + n))
                    recorder.acknowledge(result.end_offset)

            for tasks in (range(1, 4), range(4, 7)):
                await asyncio.gather(*map(append_some, tasks))
                while rotations := list(log._writer._rotator.running):
                    await asyncio.wait(rotations)
            head = log.head
    for record in await read(root / DATA):
        oracle.add(line(record.event.data["n"]))
    for number, state in enumerate(states.after(Recorded({}, recorder.ops, Expected(oracle)))):
        directory = write_files(scratch / str(number), state.files) / DATA
        try:
            await check_directory(directory, oracle, state.expected.acknowledged)
        except Exception as error:
            failures.note(error, state)
        await asyncio.to_thread(shutil.rmtree, directory.parent)
    print(f"{len(states)} states")

    assert oracle.head(len(oracle.data)) == head
    assert sum(op.kind == "rename" and f"{DATA}/app.jsonl.next" in op.file for op in recorder.ops) >= 2
    assert not failures, f"{len(failures)} of {len(states)} states:\n" + "\n".join(failures[:20])
    assert len(states) >= 120
