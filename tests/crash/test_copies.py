"""A directory that is copied while its log rotates: file by file, in any order, each at any moment.

The copy is a prefix of the log with everything that was acknowledged before the copying began, or it is refused by an
error that names the files. It takes appends only in the first case, and is then still such a prefix with the appends
behind it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.crash.disk import Files, read_files, scratch_directory, write_files
from tests.support import event, line, numbers

from eventfold import CorruptLogError, EventLog, EventReader, SyncMode
from eventfold._files import archive, frames, operations, rotation

LOG, BASE, ARCHIVE = "app.jsonl", "app.jsonl.base", "archive.jsonl.zst"
EVENTS_OF_A_GENERATION = 3
CHANGES = ("open_file", "write", "truncate", "rename", "unlink")


class Moment(NamedTuple):
    """What the directory held after an operation, and how many events were acknowledged by then."""

    files: Files
    acknowledged: int


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    with scratch_directory(tmp_path) as path:
        yield path


async def _record(directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[Moment]:
    """Appends and rotates twice; the directory after every operation on a file."""
    moments: list[Moment] = []
    acknowledged = 0

    def note() -> None:
        files = {name: data for name, data in read_files(directory).items() if not name.startswith(".")}
        if not moments or moments[-1] != Moment(files, acknowledged):
            moments.append(Moment(files, acknowledged))

    with monkeypatch.context() as patch:
        for module in (archive, rotation, frames):
            patch.setattr(module, "FRAME_SIZE", 100)
        patch.setattr(operations, "sync", lambda fd: None)
        patch.setattr(operations, "sync_dir", lambda path: None)
        async with EventLog.open(directory, sync=SyncMode.OS) as log:
            for generation in range(3):
                for _ in range(EVENTS_OF_A_GENERATION):
                    await log.append(event(acknowledged))
                    acknowledged += 1
                note()
                if generation == 0:
                    moments.clear()
                    note()
                    for name in CHANGES:
                        original = getattr(operations, name)

                        def noting(*args: object, original: object = original) -> object:
                            note()
                            result = original(*args)  # type: ignore[operator]
                            note()
                            return result

                        patch.setattr(operations, name, noting)
                if generation < 2:
                    await log.rotate()
                    note()
    return moments


async def _check(copied: Files, acknowledged: int, directory: Path) -> str:
    """Reads the copy, opens it and appends to it; how it went."""
    write_files(directory, copied)
    try:
        found = await numbers(EventReader(directory))
    except CorruptLogError:
        found = None
    if found is not None:
        assert found == list(range(len(found)))
        assert len(found) >= acknowledged
    before = read_files(directory)
    try:
        async with EventLog.open(directory, sync=SyncMode.OS) as log:
            await log.append(event(1000))
            opened = await numbers(log)
    except CorruptLogError:
        assert read_files(directory) == before
        return "refused" if found is None else "read only"
    assert found is not None
    assert opened == [*found, 1000]
    assert await numbers(EventReader(directory)) == opened
    return "whole"


async def test_a_copy_made_in_any_order_is_a_prefix_of_the_log_or_refused(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    moments = await _record(scratch / "live", monkeypatch)
    monkeypatch.setattr(operations, "sync", lambda fd: None)
    monkeypatch.setattr(operations, "sync_dir", lambda path: None)
    outcomes: dict[str, int] = {}
    seen: dict[tuple[tuple[str, bytes], ...], int] = {}
    numbers_of = itertools.count()
    for at in itertools.product(range(len(moments)), repeat=3):
        files: Files = {}
        for name, moment in zip((LOG, BASE, ARCHIVE), at, strict=True):
            if name in moments[moment].files:
                files[name] = moments[moment].files[name]
        if LOG not in files:
            continue
        acknowledged = moments[min(at)].acknowledged
        key = tuple(sorted(files.items()))
        if seen.get(key, -1) >= acknowledged:
            continue
        seen[key] = acknowledged
        outcome = await _check(files, acknowledged, scratch / str(next(numbers_of)))
        outcomes[outcome] = outcomes.get(outcome, 0) + 1

    assert outcomes["whole"] > 20
    assert outcomes["refused"] > 20
    print(len(moments), outcomes)


async def test_a_copy_with_a_gap_names_both_files_and_both_offsets(data_dir: Path, tmp_path: Path) -> None:
    async with EventLog.open(data_dir) as log:
        await log.append(event(0))
        await log.rotate()
        first = read_files(data_dir)
        await log.append(event(1))
        await log.rotate()
        await log.append(event(2))
        second = read_files(data_dir)
    copy = write_files(tmp_path / "copy", second | {ARCHIVE: first[ARCHIVE]})
    size = len(line(0))

    with pytest.raises(CorruptLogError) as caught:
        await numbers(EventReader(copy))

    message = str(caught.value)
    assert str(copy / LOG) in message
    assert str(copy / ARCHIVE) in message
    assert f"ends at offset {size}" in message
    assert f"begins at offset {2 * size}" in message


async def test_a_damaged_base_file_says_what_to_do(data_dir: Path, damaged_dir: Path) -> None:
    async with EventLog.open(damaged_dir) as log:
        await log.append(event(0))
    await asyncio.to_thread((damaged_dir / BASE).write_bytes, b"{}")

    with pytest.raises(CorruptLogError, match="delete it"):
        await numbers(EventReader(damaged_dir))

    await asyncio.to_thread((damaged_dir / BASE).unlink)
    assert await numbers(EventReader(damaged_dir)) == [0]
