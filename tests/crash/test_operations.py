"""Every state that a crash can leave between two file operations of a rotation, or in the middle of one, or of its
recovery: computed from recorded operations, then opened, read, appended to and rotated."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.crash.disk import Files, Journal, Op, States, read_files, write_files
from tests.crash.truth import Opened, Truth, append, check_directory, check_files, read
from tests.support import event, line

from eventfold import EventLog, _archive, _layout, _rotation

COMPAT = Path(__file__).parents[1] / "data" / "compat"
BATCH = b"".join(line(100 + i, batch=f"{i},3") for i in (1, 2, 3))


class Recorded(NamedTuple):
    """Where an operation began, what it did, and what the log may be then."""

    files: Files
    ops: list[Op]
    truth: Truth
    acknowledged: int


@pytest.fixture(autouse=True)
def small_frames(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Makes frames so small that a few events are several, and the disk fast."""
    for module in (_archive, _rotation):
        monkeypatch.setattr(module, "FRAME_SIZE", 200)
    monkeypatch.setattr(_layout, "sync", lambda fd: None)
    monkeypatch.setattr(_layout, "sync_dir", lambda path: None)
    caplog.set_level(logging.ERROR, "eventfold")


class Play:
    """A directory in which a scenario is played, and what it appends."""

    def __init__(self, directory: Path) -> None:
        self.dir = directory
        self.truth = Truth()
        self.journal: Journal | None = None

    def add(self, opened: Opened, *lines: bytes) -> None:
        """Appends lines, or whole batches, one commit each; acknowledged once they are written."""
        for data in lines:
            self.truth.add(data)
            append(opened.active, data)
            if self.journal is not None:
                self.journal.acknowledge(opened.active.head.offset)

    def record(self, monkeypatch: pytest.MonkeyPatch, act: Callable[[Journal], None]) -> Recorded:
        """Does something and records its operations."""
        files, acknowledged = read_files(self.dir), len(self.truth.data)
        with monkeypatch.context() as patch:
            self.journal = Journal(patch, self.dir)
            act(self.journal)
        return Recorded(files, self.journal.ops, self.truth, acknowledged)


def first_rotation(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """The log's first rotation, which makes the archive."""
    with Opened(play.dir) as opened:
        play.add(opened, *map(line, range(6)), BATCH, line(6))

    def act(journal: Journal) -> None:
        with Opened(play.dir) as opened:
            opened.rotate()
            play.add(opened, line(7))

    return play.record(monkeypatch, act)


def later_rotation(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """A rotation after another."""
    with Opened(play.dir) as opened:
        play.add(opened, *map(line, range(4)))
        opened.rotate()
        play.add(opened, *map(line, range(4, 14)))

    def act(journal: Journal) -> None:
        with Opened(play.dir) as opened:
            opened.rotate()
            play.add(opened, line(14))

    return play.record(monkeypatch, act)


def rotation_with_appends(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """A rotation during which events and batches are appended before each frame."""
    with Opened(play.dir) as opened:
        play.add(opened, *map(line, range(3)))
        opened.rotate()
        play.add(opened, *map(line, range(3, 9)))

    def act(journal: Journal) -> None:
        with Opened(play.dir) as opened:
            for new in (line(9), BATCH, line(10)):
                journal.before_archive_write.append(lambda new=new: play.add(opened, new))
            opened.rotate()
            play.add(opened, line(11))
            opened.rotate()

    return play.record(monkeypatch, act)


def first_rotation_with_appends(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """The first rotation, during which events are appended."""
    with Opened(play.dir) as opened:
        play.add(opened, *map(line, range(5)))

    def act(journal: Journal) -> None:
        with Opened(play.dir) as opened:
            for new in (line(9), BATCH):
                journal.before_archive_write.append(lambda new=new: play.add(opened, new))
            opened.rotate()
            play.add(opened, line(10))

    return play.record(monkeypatch, act)


class _StoppedError(Exception):
    """Stands for the death of the process."""


def resumed_rotation(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """A rotation that is finished at the opening, with events behind what is being archived."""
    with Opened(play.dir) as opened:
        play.add(opened, *map(line, range(3)))
        opened.rotate()
        play.add(opened, *map(line, range(3, 12)))
        writes = itertools.count()

        def stop_at_third_frame(fd: int, data: bytes, position: int) -> None:
            if next(writes) == 2:
                raise _StoppedError
            os.pwrite(fd, data, position)

        with monkeypatch.context() as patch, pytest.raises(_StoppedError):
            patch.setattr(_layout, "write", stop_at_third_frame)
            opened.rotate()
        play.add(opened, line(12), BATCH)

    def act(journal: Journal) -> None:
        with Opened(play.dir) as opened:
            play.add(opened, line(13))

    return play.record(monkeypatch, act)


def rotation_after_a_full_disk(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """A rotation that fails in its second frame, and that the same writer goes on with later."""
    with Opened(play.dir) as opened:
        play.add(opened, *map(line, range(3)))
        opened.rotate()
        play.add(opened, *map(line, range(3, 9)))

    def fail() -> None:
        raise OSError(errno.ENOSPC, "made to fail")

    def act(journal: Journal) -> None:
        with Opened(play.dir) as opened:
            journal.before_archive_write += [lambda: None, fail]
            with pytest.raises(OSError, match="made to fail"):
                opened.rotate()
            play.add(opened, line(9), BATCH)
            journal.before_archive_write.append(lambda: play.add(opened, line(10)))
            opened.rotate()
            play.add(opened, line(11))

    return play.record(monkeypatch, act)


def directory_of_the_rust_crate(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """The opening of a directory that the Rust crate wrote, whose frames get their record, and a rotation."""
    archive = (COMPAT / "stale_snapshot" / "archive.jsonl.zst").read_bytes()
    log = (COMPAT / "stale_snapshot" / "app.jsonl").read_bytes()
    (play.dir / "archive.jsonl.zst").write_bytes(archive)
    (play.dir / "app.jsonl").write_bytes(log)
    play.truth = Truth(_archive.zstd.decompress(archive) + log)

    def act(journal: Journal) -> None:
        with Opened(play.dir) as opened:
            opened.rotate()
            play.add(opened, line(9))

    return play.record(monkeypatch, act)


async def test_every_state_that_a_crash_leaves_while_a_log_rotates_by_itself_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same through the public names, with several tasks that append while rotations go on in other threads."""
    directory = tmp_path / "played"
    truth, states, failures = Truth(), States(), []
    directory.mkdir()
    with monkeypatch.context() as patch:
        journal = Journal(patch, directory)
        async with EventLog.open(directory, max_log_size=400) as log:

            async def append_some(task: int) -> None:
                for n in range(4):
                    result = await log.append(event(100 * task + n))
                    journal.acknowledge(result.end_offset)

            for tasks in (range(1, 4), range(4, 7)):
                await asyncio.gather(*map(append_some, tasks))
                while rotations := list(log._writer._rotations):
                    await asyncio.wait(rotations)
            head = log.head
    for record in await read(directory):
        truth.add(line(record.event.data["n"]))
    acknowledged = 0
    ops = []
    for op in journal.ops:  # those of the tasks come in any order
        if op.kind == "acknowledge":
            acknowledged = max(acknowledged, op.value)
            op = op._replace(value=acknowledged)
        ops.append(op)
    for number, state in enumerate(states.after({}, ops, 0)):
        copy = write_files(tmp_path / str(number), state.files)
        try:
            await check_directory(copy, truth, state.acknowledged)
        except Exception as error:
            failures.append(f"{state.after}: {sorted(state.files)}: {error!r:.300}")
    print(f"{len(states)} states")

    assert truth.head(len(truth.data)) == head
    assert sum(op.kind == "rename" and op.file.startswith("app.jsonl.next") for op in ops) >= 2
    assert not failures, f"{len(failures)} of {len(states)} states:\n" + "\n".join(failures[:20])
    assert len(states) >= 200


# The least number of different states that each must give, so that the test can't shrink unseen.
SCENARIOS = {
    first_rotation: 100,
    first_rotation_with_appends: 150,
    later_rotation: 70,
    rotation_with_appends: 250,
    resumed_rotation: 70,
    rotation_after_a_full_disk: 150,
    directory_of_the_rust_crate: 140,
}
BY_NAME = {scenario.__name__: scenario for scenario in SCENARIOS}


@pytest.fixture
def recorded(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """The operations of one of the scenarios."""
    directory = tmp_path / "played"
    directory.mkdir()
    return BY_NAME[request.param](Play(directory), monkeypatch)


@pytest.mark.parametrize("recorded", BY_NAME, indirect=True)
async def test_every_state_that_a_crash_leaves_is_read_opened_appended_to_and_rotated(
    recorded: Recorded, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """No acknowledged event is missing, nothing is there twice or torn, offsets and hashes are what they were."""
    states = States()
    failures = []
    for number, state in enumerate(states.after(recorded.files, recorded.ops, recorded.acknowledged)):
        directory = write_files(tmp_path / str(number), state.files)
        try:
            await check_directory(directory, recorded.truth, state.acknowledged)
        except Exception as error:
            failures.append(f"{state.after}: {sorted(state.files)}: {error!r:.300}")
    name = request.node.callspec.params["recorded"]
    print(f"{name}: {len(states)} states")

    assert not failures, f"{len(failures)} of {len(states)} states:\n" + "\n".join(failures[:20])
    assert len(states) >= SCENARIOS[BY_NAME[name]]


@pytest.mark.parametrize("recorded", BY_NAME, indirect=True)
def test_every_state_that_a_crash_of_the_recovery_leaves_is_read_opened_appended_to_and_rotated(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The recovery of each state is itself crashed after, and in, each of its operations."""
    states = States()
    first = list(states.after(recorded.files, recorded.ops, recorded.acknowledged))
    failures = []
    for number, state in enumerate(first):
        directory = write_files(tmp_path / str(number), state.files)
        with monkeypatch.context() as patch:
            journal = Journal(patch, directory)
            try:
                with Opened(directory):
                    pass
            except Exception as error:
                failures.append(f"{state.after}: {error!r:.300}")
                continue
        for second, again in enumerate(states.after(state.files, journal.ops, state.acknowledged)):
            copy = write_files(tmp_path / f"{number}.{second}", again.files)
            try:
                check_files(copy, recorded.truth, again.acknowledged)
            except Exception as error:
                failures.append(f"{state.after}, then {again.after}: {sorted(again.files)}: {error!r:.300}")

    name = request.node.callspec.params["recorded"]
    print(f"{name}: {len(states) - len(first)} states of the recovery from {len(first)}")

    assert not failures, f"{len(failures)} of {len(states)} states:\n" + "\n".join(failures[:20])
    assert len(states) - len(first) >= SCENARIOS[BY_NAME[name]]
