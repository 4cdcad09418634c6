"""What is checked and repaired before a directory is opened for writing."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from tests.crash.oracle import Opened, append, zstd
from tests.crash.recorder import read_files
from tests.support import event, line, write_log

from eventfold import CorruptLogError, EventWriter, LogLockedError
from eventfold._files import committer, operations


def test_a_file_of_json_lines_that_are_not_events_is_not_opened_for_writing(tmp_path: Path) -> None:
    """Somebody else's file with the same name is left as it is."""
    data = write_log(tmp_path / "data", b'{"level":"info"}\n' * 5, b'{"lev')
    with pytest.raises(CorruptLogError, match="not events"):
        Opened(tmp_path / "data")

    assert read_files(tmp_path / "data") == {"app.jsonl": data}


async def test_a_log_whose_last_lines_are_damaged_says_where_and_how_to_repair_it(tmp_path: Path) -> None:
    """The offset counts from the beginning of the log, also after a rotation."""
    async with EventWriter.open(tmp_path / "data") as writer:
        await writer.append(event(0))
        await writer.rotate()
        await writer.append(event(1))
        end = writer.head.offset
    with writer.log_path.open("ab") as file:
        file.write(b"x\n" * 9)

    with pytest.raises(CorruptLogError, match="eventfold repair") as caught:
        await EventWriter.open(tmp_path / "data")
    assert end < caught.value.offset < end + 18


def test_an_incomplete_first_frame_of_the_rust_crate_is_removed_with_its_file(tmp_path: Path) -> None:
    """The crate can't read an empty archive."""
    write_log(tmp_path / "data", line(0))
    (tmp_path / "data" / "archive.jsonl.zst").write_bytes(zstd.compress(line(0))[:-5])
    with Opened(tmp_path / "data") as opened:
        append(opened.active, line(1))

    assert not (tmp_path / "data" / "archive.jsonl.zst").exists()


def test_a_locked_log_says_what_to_do(tmp_path: Path) -> None:
    """The error also names the process that holds the lock, if the system knows it."""
    with Opened(tmp_path / "data"), pytest.raises(LogLockedError, match="read_only=True") as caught:
        Opened(tmp_path / "data")
    if caught.value.pid is not None:
        assert f"in this process ({os.getpid()})" in str(caught.value)

    assert caught.value.pid in (None, os.getpid())


def test_a_log_that_could_not_be_opened_is_not_locked_by_a_starting_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it executes its program, a forked child has all descriptors of its parent, and with them the lock."""
    lock, children = operations.lock, []

    def lock_and_fork(fd: int) -> bool:
        locked = lock(fd)
        children.append(os.dup(fd))
        return locked

    def failing(fd: int) -> None:
        raise OSError("made to fail")

    with monkeypatch.context() as patch:
        patch.setattr(operations, "lock", lock_and_fork)
        patch.setattr(operations, "sync", failing)
        with pytest.raises(OSError, match="made to fail"):
            Opened(tmp_path / "data")
    with Opened(tmp_path / "data"):
        pass
    for fd in children:
        os.close(fd)


@pytest.mark.parametrize("closed", [True, False])
async def test_the_temporary_files_of_a_killed_process_are_removed_soon_after_the_opening(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, *, closed: bool
) -> None:
    """The files are removed once they are too old to be in use, or when the log is closed before that."""
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(0))
    left = [Path(data_dir, name, f".a.json.{'0f' * 8}.tmp") for name in ("", "views", "consumers")]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (0, 0))
    if not closed:
        monkeypatch.setattr(committer, "LEFTOVERS_AFTER", 0.0)
    async with EventWriter.open(data_dir):
        async with asyncio.timeout(10):
            while not closed and any(path.exists() for path in left):
                await asyncio.sleep(0.001)

    assert not [path for path in left if path.exists()]
