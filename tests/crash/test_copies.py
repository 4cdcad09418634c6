"""Copies of a directory that are taken file by file while the log is appended to and rotated.

Every file may be from another moment. The copy is either read as a prefix of the log with everything that was
acknowledged before the copy began, or it is refused; opening it for writing never makes it worse.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.crash.oracle import NEW, Opened, append, read_now
from tests.crash.recorder import Files, Recorded, kills, read_files, write_files
from tests.crash.scenarios import DATA, Play, small_frames
from tests.support import event, line, numbers

from eventfold import CorruptLogError, EventLog, EventReader

LOG, BASE, ARCHIVE = "app.jsonl", "app.jsonl.base", "archive.jsonl.zst"


def two_rotations(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """A log that is created, rotated twice during appends, and appended to."""

    def act(recorder: object) -> None:
        with Opened(play.dir) as opened:
            play.add(opened, line(0), line(1))
            opened.rotate()
            play.add(opened, line(2), line(3))
            play.recorder.before_archive_write.append(lambda: play.add(opened, line(4)))
            opened.rotate()
            play.add(opened, line(5))

    return play.record(monkeypatch, act)


def copies(recorded: Recorded) -> Iterator[tuple[Files, int]]:
    """Yields every different copy, each file from any moment, with what was acknowledged before the first of them."""
    moments: list[tuple[Files, int]] = []
    for state, _ in kills(recorded):
        if not moments or moments[-1] != (state.files, state.expected.acknowledged):
            moments.append((state.files, state.expected.acknowledged))
    begun = next(i for i, (files, _) in enumerate(moments) if f"{DATA}/app.jsonl.base" in files)
    moments = moments[begun:]
    names = sorted({name for files, _ in moments for name in files if not name.endswith(".tmp")})
    # For each content of each file, the last moment at which it was there: everything acknowledged before any of these
    # moments must be in the copy.
    contents = []
    for name in names:
        last: dict[bytes | None, int] = {}
        for number, (files, _) in enumerate(moments):
            last[files.get(name)] = number
        contents.append([(name, data, number) for data, number in last.items()])
    for choice in itertools.product(*contents):
        files = {name: data for name, data, _ in choice if data is not None}
        yield files, moments[min(number for _, _, number in choice)][1]


def test_a_copy_in_any_order_is_correct_or_refused(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each combination of the files' contents during two rotations is read, opened, and read again."""
    small_frames(monkeypatch, caplog)
    recorded = two_rotations(Play(scratch / "played"), monkeypatch)
    oracle = recorded.expected.oracle
    read = refused = 0
    for files, acknowledged in copies(recorded):
        root = write_files(scratch / "copy", files)
        directory = root / DATA
        try:
            head, data = read_now(directory)
        except CorruptLogError:
            refused += 1
            head, data = None, b""
        else:
            read += 1
            assert oracle.data.startswith(data), sorted(files)
            assert head == oracle.head(len(data))
            assert len(data) >= acknowledged, sorted(files)
        try:
            with Opened(directory) as opened:
                assert head is not None, "what was refused to a reader was opened for writing"
                assert opened.active.head == head
                append(opened.active, line(NEW))
                assert read_now(directory)[1] == data + line(NEW)
        except CorruptLogError:
            if head is not None:
                assert read_now(directory) == (head, data)
        shutil.rmtree(root)
    print(f"{read} copies read, {refused} refused")

    assert read > 100
    assert refused > 100


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
