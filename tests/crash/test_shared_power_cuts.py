"""Every state that a kill of all writers of a shared log, or a power cut, can leave.

The states are computed from recorded operations, then opened, read, appended to and rotated, as a shared log and as an
exclusive one. By default, a sample of them is checked; `EVENTFOLD_CRASHES=all` checks each one, and crashes their
recovery too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import pytest
from tests.crash.recorder import Recorded, State, States, kills
from tests.crash.scenarios import check_state, recovery
from tests.crash.shared_scenarios import SHARED_SCENARIOS, TOGETHER, SharedPlay

from eventfold import LockMode

ALL = os.environ.get("EVENTFOLD_CRASHES") == "all"
STEP = 1 if ALL else 30
# Crashes of a recovery are many more.
RECOVERY_STEP = 7 if ALL else 60
SHARED = LockMode.SHARED

pytestmark = pytest.mark.usefixtures("fast_disk")


def losses(states: Iterable[State], root: Path, *locks: LockMode) -> tuple[int, list[str]]:
    """Returns how many states were checked, and what was wrong with them. They are opened in these modes in turn."""
    count, found = 0, []
    for count, state in enumerate(states, 1):
        lock = locks[count % len(locks)]
        try:
            check_state(state, root / str(count), lock)
        except Exception as error:
            found.append(f"{state.after}, opened {lock.value}: {sorted(state.files)}: {error!r:.300}")
    return count, found


@pytest.mark.parametrize("name", SHARED_SCENARIOS)
def test_every_state_after_a_crash_of_all_writers_is_intact(
    name: str, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No acknowledged event is missing, twice or torn."""
    recorded = SHARED_SCENARIOS[name](SharedPlay(scratch / "played"), monkeypatch)
    states = list(States().after(recorded))
    count, found = losses(islice(states, 0, None, STEP), scratch, SHARED, LockMode.FLOCK)
    print(f"{name}: {count} of {len(states)} states")

    assert not found, f"{len(found)} of {count} states:\n" + "\n".join(found[:20])
    assert len(states) >= 15


@pytest.mark.parametrize("name", SHARED_SCENARIOS if ALL else TOGETHER)
def test_every_state_after_a_power_cut_in_the_recovery_by_a_shared_writer_is_intact(
    name: str, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill, data of the dead process may not be on disk when the next one reads it and continues."""
    recorded = SHARED_SCENARIOS[name](SharedPlay(scratch / "played"), monkeypatch)
    states, count, found = States(), 0, []
    for number, (first, ops) in enumerate(islice(kills(recorded), 0, None, RECOVERY_STEP)):
        more = recovery(first, scratch / f"{number}", monkeypatch, rotating=True, lock=SHARED)
        both = Recorded(recorded.files, ops + more, recorded.expected)
        after = islice(states.after(both, since=len(ops)), 0, None, STEP)
        (root := scratch / f"after{number}").mkdir()
        looked_at, wrong = losses(after, root, SHARED)
        count += looked_at
        found += [f"{first.after}, then {one}" for one in wrong]
    print(f"{name}: {count} states of a recovery")

    assert not found, f"{len(found)} of {count} states:\n" + "\n".join(found[:20])
    assert count
