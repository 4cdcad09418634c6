"""The scenarios: each uses a log and returns the recorded operations."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import support
from tests.crash.oracle import NEW, Opened, Oracle, append, check_files, read_now
from tests.crash.peers import Peer
from tests.crash.recorder import Expected, Op, Recorded, Recorder, State, States, read_files, write_files
from tests.support import event, line

from eventfold import Event, EventLog, LockMode, SyncMode, View, snapshot
from eventfold._files import committer, frames, operations

COMPAT = Path(__file__).parents[1] / "data" / "compat"
BATCH = b"".join(line(100 + i, batch=f"{i},3") for i in (1, 2, 3))
# The name of the data directory, which is created in the recorded directory.
DATA = "data"


def small_frames(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Makes frames so small that a few events fill several, and makes syncs take no time."""
    support.small_frames(monkeypatch, 200)
    monkeypatch.setattr(operations, "sync", lambda fd: None)
    monkeypatch.setattr(operations, "sync_dir", lambda path: None)
    caplog.set_level(logging.ERROR, "eventfold")


def opener(lock: LockMode) -> type[Opened]:
    """Returns how a log is opened for writing in this mode."""
    found: Any = Peer if lock is LockMode.SHARED else Opened
    return found


class Play:
    """A directory in which a scenario runs, and what it appends."""

    def __init__(self, root: Path, lock: LockMode = LockMode.FLOCK) -> None:
        root.mkdir()
        self.root = root
        self.lock = lock
        self.dir = root / DATA
        self.oracle = Oracle()
        self.recorder: Recorder | None = None

    def open(self) -> Opened:
        """Returns the log, opened for writing."""
        return opener(self.lock)(self.dir)

    def add(self, opened: Opened, *lines: bytes, sync: bool = True) -> None:
        """Appends lines or batches, one commit each, which are acknowledged once written or, with `sync`, synced."""
        for data in lines:
            self.oracle.add(data)
            append(opened.active, data, sync)
            if self.recorder is not None:
                (self.recorder.acknowledge if sync else self.recorder.written)(opened.active.head.offset)

    def add_together(self, opened: Opened, *lines: bytes) -> None:
        """Appends lines or batches, all in one commit."""
        for data in lines:
            self.oracle.add(data)
        self.recorder.acknowledge(append(opened.active, b"".join(lines)).offset)

    def record(self, monkeypatch: pytest.MonkeyPatch, act: Callable[[Recorder], None]) -> Recorded:
        """Runs an action and records its operations."""
        files, acknowledged = read_files(self.root), len(self.oracle.data)
        with monkeypatch.context() as patch:
            self.recorder = Recorder(patch, self.root)
            act(self.recorder)
        return Recorded(files, self.recorder.ops, Expected(self.oracle, acknowledged, acknowledged))


def new_log(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Creates a log with events and batches in a new directory."""

    def act(recorder: Recorder) -> None:
        with play.open() as opened:
            play.add(opened, line(0), BATCH)
            play.add_together(opened, line(1), BATCH, line(2))

    return play.record(monkeypatch, act)


def refused_commit(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Commits for which the disk is full after the first of their lines, then one for which there is space."""
    with play.open() as opened:
        play.add(opened, line(0))

    def act(recorder: Recorder) -> None:
        with play.open() as opened:
            for refused in (line(1) + line(2), BATCH):
                while_undecided = Oracle(play.oracle.data)
                while_undecided.add(refused)
                while_undecided.ends.add(len(play.oracle.data) + len(line(1)))
                recorder.expect(while_undecided)
                recorder.log_write_ends_after = len(line(1)) + 10
                with pytest.raises(OSError, match="made to end early"):
                    append(opened.active, refused)
                recorder.expect(play.oracle)
            play.add(opened, line(3))

    return play.record(monkeypatch, act)


def unsynced_commits(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Commits that are synced later or not at all, and a rotation of unsynced ones."""

    def act(recorder: Recorder) -> None:
        with play.open() as opened:
            play.add(opened, line(0), BATCH, sync=False)
            opened.active.sync()
            recorder.acknowledge(opened.active.head.offset)
            play.add(opened, *map(line, range(1, 5)), sync=False)
            opened.rotate()
            play.add(opened, line(5), sync=False)
            play.add(opened, BATCH, sync=False)

    return play.record(monkeypatch, act)


def first_rotation(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """The log's first rotation, which creates the archive."""
    with play.open() as opened:
        play.add(opened, *map(line, range(6)), BATCH, line(6))

    def act(recorder: Recorder) -> None:
        with play.open() as opened:
            opened.rotate()
            play.add(opened, line(7))

    return play.record(monkeypatch, act)


def first_rotation_with_appends(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """The first rotation, during which events are appended."""
    with play.open() as opened:
        play.add(opened, *map(line, range(5)))

    def act(recorder: Recorder) -> None:
        with play.open() as opened:
            for new in (line(9), BATCH):
                recorder.before_archive_write.append(lambda new=new: play.add(opened, new))
            opened.rotate()
            play.add(opened, line(10))

    return play.record(monkeypatch, act)


def later_rotation(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """A rotation after another."""
    with play.open() as opened:
        play.add(opened, *map(line, range(4)))
        opened.rotate()
        play.add(opened, *map(line, range(4, 14)))

    def act(recorder: Recorder) -> None:
        with play.open() as opened:
            opened.rotate()
            play.add(opened, line(14))

    return play.record(monkeypatch, act)


def rotation_with_appends(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """A rotation during which events and batches are appended before each frame."""
    with play.open() as opened:
        play.add(opened, *map(line, range(3)))
        opened.rotate()
        play.add(opened, *map(line, range(3, 9)))

    def act(recorder: Recorder) -> None:
        with play.open() as opened:
            for new in (line(9), BATCH, line(10)):
                recorder.before_archive_write.append(lambda new=new: play.add(opened, new))
            opened.rotate()
            play.add(opened, line(11))
            opened.rotate()

    return play.record(monkeypatch, act)


class _StoppedError(Exception):
    """Simulates the death of the process."""


def resumed_rotation(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """A rotation that is finished at opening, with events after the part that is being archived."""
    with play.open() as opened:
        play.add(opened, *map(line, range(3)))
        opened.rotate()
        play.add(opened, *map(line, range(3, 12)))
        writes = itertools.count()

        def stop_at_third_frame(fd: int, data: bytes, position: int) -> None:
            if next(writes) == 2:
                raise _StoppedError
            os.pwrite(fd, data, position)

        with monkeypatch.context() as patch, pytest.raises(_StoppedError):
            patch.setattr(operations, "write", stop_at_third_frame)
            opened.rotate()
        play.add(opened, line(12), BATCH)

    def act(recorder: Recorder) -> None:
        with play.open() as opened:
            play.add(opened, line(13))

    return play.record(monkeypatch, act)


def rotation_after_a_full_disk(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """A rotation that fails in its second frame, and that the same writer finishes later."""
    with play.open() as opened:
        play.add(opened, *map(line, range(3)))
        opened.rotate()
        play.add(opened, *map(line, range(3, 9)))

    def fail() -> None:
        raise OSError(errno.ENOSPC, "made to fail")

    def act(recorder: Recorder) -> None:
        with play.open() as opened:
            recorder.before_archive_write += [lambda: None, fail]
            with pytest.raises(OSError, match="made to fail"):
                opened.rotate()
            play.add(opened, line(9), BATCH)
            recorder.before_archive_write.append(lambda: play.add(opened, line(10)))
            opened.rotate()
            play.add(opened, line(11))

    return play.record(monkeypatch, act)


def directory_of_the_rust_crate(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """The opening and rotation of a directory of the Rust crate, whose frames get their record."""
    archive = (COMPAT / "stale_snapshot" / "archive.jsonl.zst").read_bytes()
    log = (COMPAT / "stale_snapshot" / "app.jsonl").read_bytes()
    write_files(play.dir, {"archive.jsonl.zst": archive, "app.jsonl": log})
    play.oracle = Oracle(frames.zstd.decompress(archive) + log)

    def act(recorder: Recorder) -> None:
        with play.open() as opened:
            opened.rotate()
            play.add(opened, line(9))

    return play.record(monkeypatch, act)


def torn_frame_of_the_rust_crate(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """The opening and rotation of a directory whose writer, the Rust crate, was killed in a rotation."""
    with play.open() as opened:
        play.add(opened, *map(line, range(4)))
        opened.rotate()
        play.add(opened, *map(line, range(4, 9)))
    with (play.dir / "archive.jsonl.zst").open("ab") as archive:
        archive.write(frames.zstd.compress(b"".join(map(line, range(4, 9))))[:-20])

    def act(recorder: Recorder) -> None:
        with play.open() as opened:
            play.add(opened, line(9))
            opened.rotate()

    return play.record(monkeypatch, act)


def _count(state: dict[str, int], event: Event) -> dict[str, int]:
    state[event.type] = state.get(event.type, 0) + 1
    return state


def whole_log(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Appends of several tasks, a batch, snapshots of a view, a consumer's commits, and a deleted snapshot."""

    async def use(recorder: Recorder) -> None:
        async with EventLog.open(play.dir, lock=play.lock, views=[View("counts", _count, dict)]) as log:

            async def append_one(n: int) -> None:
                recorder.acknowledge((await log.append(event(n))).end_offset)

            await asyncio.gather(*map(append_one, range(4)))
            recorder.acknowledge((await log.append_many([event(n) for n in (4, 5)]))[-1].end_offset)
            consumer = log.consumer("mailer")
            for _ in range(2):
                await consumer.commit(await anext(consumer))
                recorder.keep(f"{DATA}/consumers/mailer.json")
            await log.refresh_all()
            recorder.keep(f"{DATA}/views/counts.snapshot.json")
            await log.rotate()
            recorder.keep(f"{DATA}/views/counts.snapshot.json")
            await append_one(6)
        recorder.keep(f"{DATA}/views/counts.snapshot.json")
        await snapshot.delete(play.dir / "views" / "counts.snapshot.json")
        recorder.keep(f"{DATA}/views/counts.snapshot.json")

    for data in map(line, range(4)):
        play.oracle.add(data)
    play.oracle.add(line(4, batch="1,2") + line(5, batch="2,2"))
    play.oracle.add(line(6))
    recorded = play.record(monkeypatch, lambda recorder: asyncio.run(use(recorder)))
    return recorded._replace(expected=Expected(play.oracle))


def lazily_synced_log(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """A log that is synced every second, and when it is closed."""
    monkeypatch.setattr(committer, "SYNC_INTERVAL", 0.0)

    async def use(recorder: Recorder, mode: SyncMode, numbers: range) -> None:
        async with EventLog.open(play.dir, lock=play.lock, sync=mode) as log:
            recorder.acknowledge(log.head.offset)
            for n in numbers:
                recorder.written((await log.append(event(n))).end_offset)
            head = log.head
        recorder.acknowledge(head.offset)

    def act(recorder: Recorder) -> None:
        asyncio.run(use(recorder, SyncMode.EVERY_SECOND, range(3)))
        asyncio.run(use(recorder, SyncMode.OS, range(3, 6)))

    for data in map(line, range(6)):
        play.oracle.add(data)
    return play.record(monkeypatch, act)._replace(expected=Expected(play.oracle))


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        new_log,
        refused_commit,
        unsynced_commits,
        first_rotation,
        first_rotation_with_appends,
        later_rotation,
        rotation_with_appends,
        resumed_rotation,
        rotation_after_a_full_disk,
        directory_of_the_rust_crate,
        torn_frame_of_the_rust_crate,
        whole_log,
        lazily_synced_log,
    )
}


def check_state(state: State, root: Path, lock: LockMode = LockMode.FLOCK) -> None:
    """Asserts that a log is intact after a crash, and so are the files beside it that must be kept."""
    state.check_kept()
    try:
        write_files(root, state.files)
        check_files(root / DATA, state.expected.oracle, state.expected.acknowledged, opener(lock))
    finally:
        shutil.rmtree(root, ignore_errors=True)


def recovery(
    state: State,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    rotating: bool = False,
    lock: LockMode = LockMode.FLOCK,
) -> list[Op]:
    """Opens what a crash left, appends, and may rotate; returns the operations. What it found counts as durable."""
    try:
        write_files(root, state.files)
        with monkeypatch.context() as patch:
            recorder = Recorder(patch, root)
            with opener(lock)(root / DATA) as opened:
                head, data = read_now(root / DATA)
                recorder.expect(Oracle(data + line(NEW)))
                recorder.acknowledge(head.offset)
                append(opened.active, line(NEW))
                recorder.acknowledge(opened.active.head.offset)
                if rotating:
                    opened.rotate()
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return recorder.ops


def cuts_in_a_row(root: Path, monkeypatch: pytest.MonkeyPatch, cuts: int = 3) -> Iterator[State]:
    """Yields the states after several power cuts, each in the rotation after the recovery from the previous cut.

    The next round continues from the state with the most files of unfinished rotations.
    """
    root.mkdir()
    play = Play(root / "begun")
    with play.open() as opened:
        play.add(opened, *map(line, range(4)))
        opened.rotate()
        play.add(opened, *map(line, range(4, 9)))
    files = read_files(play.root)
    files[f"{DATA}/app.jsonl.next.200.250.{len(files[f'{DATA}/archive.jsonl.zst'])}"] = b""
    state = State(files, Expected(play.oracle, len(play.oracle.data), len(play.oracle.data)), "a rotation begun")
    for cut in range(cuts):
        ops = recovery(state, root / f"cut{cut}", monkeypatch, rotating=True)
        states = list(States().after(Recorded(state.files, ops, state.expected)))
        yield from states
        state = max(states, key=lambda state: sum("app.jsonl.next" in name for name in state.files))


def list_in_order(monkeypatch: pytest.MonkeyPatch, reverse: bool) -> None:
    """Makes directory listings sorted by name, or in reverse, whichever does more harm."""
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda *path: sorted(listdir(*path), reverse=reverse))
