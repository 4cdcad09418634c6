"""Damaged bytes: in small directories, every byte of every file is changed, and each file is cut at every length.

Every read then either returns exactly what the files say, or rebuilds a view, or raises `CorruptLogError` with the file
and an offset. It never raises another error, runs into an endless loop, or returns an event that is in no file.
`ALLOWED` lists, for each kind of file, what can't be detected because plain lines have no checksum.

By default, every 43rd state is checked, which takes some seconds; with EVENTFOLD_BYTES=all, all of them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import COMPAT
from tests.crash.scenes import SCENES, Files, Scene, build
from tests.fuzz import reference
from tests.fuzz.targets import Outcome, read
from tests.support import event, small_frames

from eventfold import CorruptLogError, EventLog, EventReader, Record
from eventfold._files import operations

ALL = os.environ.get("EVENTFOLD_BYTES") == "all"
# This number is coprime to the number of ways in which a byte is changed, so that all of them occur.
STRIDE = 1 if ALL else 43
# The limits for one state; if it needs more, there is an endless loop.
READS = 5_000
PATIENCE = 120  # seconds; a consumer that is stuck would wait forever

# The possible results if a file is changed or cut, when it is read and when it is opened for writing. "exact": nothing
# is missing; "reported": a `CorruptLogError`, after exact events; "other": exactly what the bytes now say, not what was
# written; "shorter": complete lines are missing.
ALLOWED = {
    ("app.jsonl", "flip"): ("exact reported other shorter", "exact reported other shorter"),
    ("app.jsonl", "cut"): ("exact shorter", "exact shorter reported"),
    ("archive.jsonl.zst", "flip"): ("exact reported", "exact reported"),
    ("archive.jsonl.zst", "cut"): ("exact reported shorter", "exact reported shorter"),
    ("app.jsonl.next", "flip"): ("exact", "exact"),
    ("app.jsonl.next", "cut"): ("exact", "exact"),
    ("views", "flip"): ("exact", "exact"),
    ("views", "cut"): ("exact", "exact"),
    ("consumers", "flip"): ("exact", "reported"),
    ("consumers", "cut"): ("exact", "reported"),
}
# The Rust crate's frames and snapshots have no checksums, so damage to them may go unnoticed. While a rotation is under
# way, its file says where the archive ends.
UNCHECKED = {
    ("rotating", "app.jsonl", "cut"): ("exact reported shorter", "exact reported shorter"),
    ("rotating", "archive.jsonl.zst", "cut"): ("exact reported", "exact reported"),
    ("crate_archive", "archive.jsonl.zst", "flip"): ("exact reported other shorter", "exact reported other shorter"),
    ("crate_snapshots", "views", "flip"): ("exact", "exact other"),
}


class _EndlessError(Exception):
    """More was read than any state needs."""


class Reads:
    """Counts what is read from files, and stops endless loops."""

    def __init__(self) -> None:
        self.left = READS
        self._pread = os.pread

    def pread(self, *args: Any) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise _EndlessError
        return self._pread(*args)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Reads:
    """Makes frames so small that a few events fill several, makes syncs take no time, and makes endless reads fail."""
    small_frames(monkeypatch, 200)
    monkeypatch.setattr(operations, "sync", lambda fd: None)
    monkeypatch.setattr(operations, "sync_dir", lambda path: None)
    caplog.set_level(logging.CRITICAL, "eventfold")
    counted = Reads()
    monkeypatch.setattr(os, "pread", counted.pread)
    return counted


@pytest.fixture
async def scene(request: pytest.FixtureRequest, tmp_path: Path, reads: Reads) -> Scene:
    """One of the small directories."""
    return await build(request.param, tmp_path / "scene", COMPAT)


def flips(data: bytes) -> Iterator[bytes]:
    """Yields the data with each byte changed in five ways."""
    for at, byte in enumerate(data):
        for other in (byte ^ 0xFF, byte ^ 1 << at % 8, 0x0A, 0x22, 0x00):
            if other != byte:
                yield data[:at] + bytes([other]) + data[at + 1 :]


def cuts(data: bytes) -> Iterator[bytes]:
    """Yields all prefixes of the data."""
    for length in range(len(data)):
        yield data[:length]


_times = itertools.count(1)


def lay(directory: Path, files: Files) -> Path:
    """Makes these files the content of the directory."""
    shutil.rmtree(directory, ignore_errors=True)
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        # Their times differ as those of files that are changed at different times do.
        os.utime(path, (next(_times),) * 2)
    return directory


class State:
    """A damaged directory, and what the log must do with it."""

    def __init__(self, scene: Scene, name: str, data: bytes, directory: Path) -> None:
        self.scene, self.name = scene, name
        self.dir = lay(directory, {**scene.files, name: data})
        # A changed active log is what it now says; if the rules don't decide, it is whatever was read.
        self.log = scene.log
        self.wanted: reference.Reading | None = None
        if name == "app.jsonl":
            self.log = scene.log[: scene.base] + data
        try:
            self.wanted = reference.read(self.log)
        except reference.UnsureError:
            pass
        self.read = self.opened = ""
        # Whether events may differ from those that were written without being noticed.
        self.unchecked = name == "app.jsonl" or (scene.name, name, "flip") in UNCHECKED

    def judge(self, found: Outcome) -> None:
        """Classifies the log as read from 0; asserts that the result is allowed."""
        if found.error is not None:
            self.check_error(found.error)
        whole = [(r.start_offset, r.end_offset, r.event) for r in found.records]
        # The file of a rotation says how much there must be, so that a shorter archive is refused before it is read.
        refused = found.error is not None and "says that it continues" in found.error.reason
        if self.name == "app.jsonl" and self.wanted is not None and not refused:
            assert whole == [line[:3] for line in self.wanted.lines]
            assert (found.error and found.error.offset) == self.wanted.fault
        records = self.scene.records
        same = found.records == records[: len(found.records)]
        if found.error is not None:
            self.read = "reported" if same else "other"
        elif found.records == records:
            self.read = "exact"
        elif same or self._is_shorter(found.records):
            self.read = "shorter"
        else:
            self.read = "other"

    def _is_shorter(self, records: list[Record]) -> bool:
        """Whether the archive lacks its end, so that the active log's lines directly follow its rest."""
        hashes, expected = [r.line_hash for r in records], [r.line_hash for r in self.scene.records]
        active = [r.line_hash for r in self.scene.records if r.start_offset >= self.scene.base]
        kept = len(hashes) - len(active)
        return self.name == "archive.jsonl.zst" and kept >= 0 and hashes == expected[:kept] + active

    def check_error(self, error: CorruptLogError) -> None:
        """Asserts that an error names the damaged file, or one that does not fit it."""
        path = Path(error.path).relative_to(self.dir)
        assert path.name in {Path(self.name).name, "app.jsonl", "archive.jsonl.zst"} or path.parent.name == "consumers"
        assert 0 <= error.offset <= len(self.log) + 10**6 * (path.parent.name == "consumers")
        assert error.reason

    async def read_elsewhere(self, found: Outcome) -> None:
        """Reads from the middle and looks lines up: the results must be those of a read from 0, older, or an error."""
        reader = EventReader(self.dir)
        places = {0: None} | {record.end_offset: record.line_hash for record in found.records}
        records = self.scene.records
        for offset in self.scene.places:
            try:
                later = await read(reader, offset)
                hashed = await reader.read_line_hash_before(offset)
            except ValueError:
                assert offset not in places or found.error is not None
                continue
            except CorruptLogError as error:
                self.check_error(error)
                continue
            ours = [record for record in found.records if record.start_offset >= offset]
            theirs = [record for record in records if record.start_offset >= offset]
            if later.error is None and found.error is None:
                assert later.records == ours
                assert hashed == places[offset]
            else:
                assert later.records in (ours, theirs[: len(later.records)]) or self.unchecked
                assert hashed in (places.get(offset), self.scene.places[offset]) or self.unchecked

    async def open(self, found: Outcome) -> None:
        """Opens the log with its views, appends to it, and lets its consumers continue."""
        views = self.scene.new_views()
        self.opened = self.read
        try:
            async with EventLog.open(self.dir, views=views) as log:
                again = await read(log.reader())
                if again.error is not None and found.error is None:
                    # Finishing a rotation has added more after a damaged place that could still be bridged before.
                    self.check_error(again.error)
                    assert again.records == found.records[: len(again.records)]
                    self.opened = "reported"
                    return
                assert again.records == found.records
                assert (again.error and again.error.args[:2]) == (found.error and found.error.args[:2])
                for view in views:
                    folded = [self.scene.fold(view.name, records) for records in (found.records, self.scene.records)]
                    if (place := self.scene.snapshots.get(view.name)) is not None:
                        before = [r for r in self.scene.records if r.end_offset <= place]
                        after = [r for r in found.records if r.start_offset >= place]
                        folded.append(self.scene.fold(view.name, before + after))
                    if view.state not in folded:
                        self.opened = "other"
                await log.append(event(7))
                for consumer in self.scene.consumers:
                    await self._consume(log, consumer, found)
        except CorruptLogError as error:
            self.check_error(error)
            self.opened = "reported"

    async def _consume(self, log: EventLog, name: str, found: Outcome) -> None:
        given = []
        async for record in log.consumer(name):
            given.append(record)
            if record.end_offset == log.head.offset:
                break
        place = self.scene.consumers[name]
        ours = [record for record in found.records if record.start_offset >= place]
        theirs = [record for record in self.scene.records if record.start_offset >= place]
        # It may have begun after the damage that stops a read from 0.
        assert given[:-1] in ((ours,) if found.error is None else (ours, theirs))
        assert given[-1].event == event(7)


async def check(scene: Scene, name: str, data: bytes, directory: Path, reads: Reads) -> tuple[str, str]:
    """Runs everything with one state; returns the outcome."""
    reads.left = READS
    state = State(scene, name, data, directory)
    async with asyncio.timeout(PATIENCE):
        found = await read(EventReader(state.dir))
        state.judge(found)
        await state.read_elsewhere(found)
        await state.open(found)
    return state.read, state.opened


@pytest.mark.parametrize("scene", SCENES, indirect=True)
@pytest.mark.parametrize("damage", [flips, cuts])
async def test_no_damage_gives_wrong_data(
    scene: Scene, damage: Any, tmp_path: Path, reads: Reads, request: pytest.FixtureRequest
) -> None:
    """With each damage, a read returns what the file now says, rebuilds a view, or raises `CorruptLogError`."""
    kind = damage.__name__[:-1]
    seen: dict[str, Counter[str]] = {}
    failures = []
    for name, whole in scene.files.items():
        file = "app.jsonl.next" if "next" in name else Path(name).parts[0]
        allowed = UNCHECKED.get((scene.name, file, kind), ALLOWED[file, kind])
        counter = seen.setdefault(name, Counter())
        for number, data in enumerate(damage(whole)):
            if number % STRIDE:
                continue
            try:
                kinds = await check(scene, name, data, tmp_path / "state", reads)
                counter[f"{kinds[0]}, then {kinds[1]}"] += 1
                if not all(found in wanted.split() for found, wanted in zip(kinds, allowed, strict=True)):
                    failures.append(f"{name}, {kind} {number}: {kinds}")
            except Exception as error:
                failures.append(f"{name}, {kind} {number}: {type(error).__name__}: {str(error)[:300]}")
        print(f"{scene.name}/{name}: {sum(counter.values())} {kind}s of {len(whole)} bytes: {dict(counter)}")

    assert not failures, f"{len(failures)} states:\n" + "\n".join(failures[:30])
    assert sum(map(len, seen.values())) > 0
