"""The names in a data directory, and file operations that keep their promises even if they fail."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from blockbuster import BlockingError
from tests.support import FaultInjector

from eventfold import View
from eventfold._files import operations
from eventfold._files.paths import Layout

GOOD_NAMES = ["a", "todos", "A-Z.a_z-0.9", "_x", "-x", "9", "x" * 128]
BAD_NAMES = ["", ".", "..", ".hidden", "a/b", "../a", "a b", "a\n", "a\0", "ä", "x" * 129, "a\\b", "a:b", None, 5]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_name_of_allowed_characters_is_accepted(name: str) -> None:
    """Names of 1 to 128 characters of `A-Z a-z 0-9 . _ -` become file names."""
    layout = Layout("/data")

    assert layout.snapshot_path(name) == Path("/data/views", f"{name}.snapshot.json")
    assert layout.consumer_path(name) == Path("/data/consumers", f"{name}.json")


@pytest.mark.parametrize("name", BAD_NAMES)
def test_any_other_name_is_refused(name: str) -> None:
    """A name that leads out of its directory, or that no file can have, raises ValueError."""
    layout = Layout("data")

    with pytest.raises(ValueError, match="view name"):
        layout.snapshot_path(name)
    with pytest.raises(ValueError, match="consumer name"):
        layout.consumer_path(name)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_view_with_an_invalid_name_is_refused(name: str) -> None:
    """The error comes when the view is created, not when it is first saved."""
    with pytest.raises(ValueError, match="view name"):
        View(name, lambda state, event: state, 0)


def test_the_files_have_the_names_of_the_format() -> None:
    """Other programs find the files by these names."""
    layout = Layout("/data")

    assert layout.log_path == Path("/data/app.jsonl")
    assert layout.archive_path == Path("/data/archive.jsonl.zst")
    assert layout.views_dir == Path("/data/views")
    assert layout.torn_path(12) == Path("/data/app.jsonl.torn.12")
    assert layout.next_path(1, 2, 3) == Path("/data/app.jsonl.next.1.2.3")


def test_a_rotation_under_way_is_recognised_by_a_file_name(tmp_path: Path) -> None:
    """The numbers in the name are parsed, and similar names are ignored."""
    layout = Layout(tmp_path)
    for name in ("app.jsonl.next", "app.jsonl.next.1.2", "app.jsonl.next.1.2.3.tmp", "app.jsonl.next.a.b.c"):
        (tmp_path / name).touch()
    before = layout.next_file()
    layout.next_path(10, 20, 30).touch()
    found = layout.next_file()

    assert before is None
    assert found == (tmp_path / "app.jsonl.next.10.20.30", 10, 20, 30)


def test_a_missing_directory_has_no_rotation_under_way(tmp_path: Path) -> None:
    assert Layout(tmp_path / "missing").next_file() is None


def test_replace_file_leaves_only_the_new_content(tmp_path: Path) -> None:
    """Missing directories are created, the content is complete, and no temporary file remains."""
    path = tmp_path / "a" / "b" / "file.json"
    operations.replace_file(path, b"first")
    operations.replace_file(path, b"second")

    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["file.json"]


@pytest.mark.parametrize("operation", ["write", "sync", "rename"])
def test_replace_file_that_fails_leaves_the_old_file(tmp_path: Path, faults: FaultInjector, operation: str) -> None:
    """Whichever step fails, the old content stays, and no temporary file remains."""
    path = tmp_path / "file.json"
    operations.replace_file(path, b"old")
    faults.fail(operation, number=errno.ENOSPC)
    with pytest.raises(OSError, match="made to fail"):
        operations.replace_file(path, b"new")

    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.json"]


def test_replace_file_syncs_the_content_before_the_name_and_the_directory_after(
    tmp_path: Path, faults: FaultInjector
) -> None:
    """The order is what makes it safe in a power cut: write, sync, rename, sync of the directory."""
    order: list[str] = []
    for name in ("write", "sync", "rename", "sync_dir"):

        def noted(original, *args, name=name):
            order.append(name)
            return original(*args)

        faults.replace(name, noted)
    operations.replace_file(tmp_path / "file.json", b"content")

    assert order == ["write", "sync", "rename", "sync_dir"]


def test_new_directories_are_synced_into_their_parents(tmp_path: Path, faults: FaultInjector) -> None:
    """If a directory's name is not on disk, a power cut takes everything in it."""
    synced = faults.count("sync_dir")
    operations.make_dir(tmp_path / "a" / "b")
    again = len(synced)
    operations.make_dir(tmp_path / "a" / "b")

    assert synced == [(tmp_path,), (tmp_path / "a",)]
    assert again == len(synced)


def test_a_file_in_the_place_of_the_directory_is_an_error(tmp_path: Path) -> None:
    """A path that names a file can't become a directory."""
    (tmp_path / "file").touch()

    with pytest.raises(OSError):
        operations.make_dir(tmp_path / "file")


def test_a_short_write_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk, the system may write only a part of what it is given."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, position: pwrite(fd, data[:3], position))
    try:
        with pytest.raises(OSError, match="short write: 3 of 6 bytes") as caught:
            operations.write(fd, b"abcdef", 0)
    finally:
        os.close(fd)

    assert caught.value.errno == errno.ENOSPC


def test_data_larger_than_the_limit_of_a_write_is_written_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux writes at most 2 GiB in one call; the pieces join without a gap."""
    monkeypatch.setattr(operations, "_WRITE_SIZE", 4)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        operations.write(fd, b"..", 0)
        operations.write(fd, b"abcdefghij", 2)
    finally:
        os.close(fd)

    assert (tmp_path / "file").read_bytes() == b"..abcdefghij"


@pytest.mark.parametrize("operation", ["open_file", "write", "sync", "truncate", "rename", "unlink", "sync_dir"])
async def test_the_guard_sees_every_file_operation_on_the_loop(
    tmp_path: Path, loop_guard: list[str], operation: str
) -> None:
    """The other tests rely on failing if one of these is called on the event loop."""
    path = tmp_path / "file"
    path.touch()
    with path.open("r+b") as file:
        fd = file.fileno()
        arguments = {
            "open_file": (path, os.O_RDONLY),
            "write": (fd, b"x", 0),
            "sync": (fd,),
            "truncate": (fd, 0),
            "rename": (path, tmp_path / "other"),
            "unlink": (path,),
            "sync_dir": (tmp_path,),
        }

        with pytest.raises(BlockingError):
            getattr(operations, operation)(*arguments[operation])
    loop_guard.clear()


def test_temporary_files_that_nobody_wrote_to_for_an_hour_are_removed_and_no_others(tmp_path: Path) -> None:
    """A younger one may be about to be renamed by a process in another pid namespace, so process ids don't help."""
    old = {f".a.json.{'0f' * 8}.tmp", ".a.json.1.0.tmp", ".archive.jsonl.zst.tmp"}
    young = {f".a.json.{'f0' * 8}.tmp", f".a.json.{2**70}.0.tmp"}
    others = {f".a.json.{'0f' * 8}.tmp.x", f"a.json.{'0f' * 8}.tmp", "a.json"}
    for name in old | young | others:
        tmp_path.joinpath(name).touch()
        if name not in young:
            os.utime(tmp_path / name, (0, 0))
    operations.discard_leftovers(tmp_path)
    operations.discard_leftovers(tmp_path / "not there")

    assert {path.name for path in tmp_path.iterdir()} == young | others


def test_a_temporary_file_has_a_unique_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process of a container always has the same id, and a killed one may have left its file."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    names = {operations.temporary_path(tmp_path / "a.json") for _ in range(100)}

    assert len(names) == 100


def test_a_new_file_does_not_follow_a_planted_link(tmp_path: Path) -> None:
    """The link may lead to an existing file or to a missing one."""
    (tmp_path / "there").touch()
    for target in ("there", "not there"):
        (tmp_path / f"to {target}").symlink_to(tmp_path / target)
        with pytest.raises(FileExistsError):
            operations.create_file(tmp_path / f"to {target}")

    assert not (tmp_path / "not there").exists()


def test_a_pipe_in_the_place_of_a_file_is_an_error_and_does_not_block(tmp_path: Path) -> None:
    """Opening a pipe for reading would wait until somebody opens it for writing."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        operations.open_to_read(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        operations.open_regular(tmp_path / "pipe", os.O_RDWR)


def test_a_relative_directory_is_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changing the working directory later does not move the log."""
    monkeypatch.chdir(tmp_path)
    layout = Layout("data")
    monkeypatch.chdir("/")

    assert layout.log_path == tmp_path / "data" / "app.jsonl"
