"""Symbolic links in place of the files, the directories in it, and the data directory itself.

Links are followed. A file that is replaced as a whole (by a rotation, a snapshot or a commit) replaces the link.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support import event, line, numbers

from eventfold import Event, EventLog, EventWriter, LogLockedError, View


def count(state: int, event: Event) -> int:
    return state + 1


async def used(directory: Path) -> None:
    """Uses all files of a log of five events; afterwards it has eight."""
    async with EventLog.open(directory, views=[View("count", count, 0)]) as log:
        await log.append(event(5))
        await log.rotate()
        await log.append(event(6))
        async for record in (consumer := log.consumer("mailer")):
            await consumer.commit(record)
            break
    async with EventLog.open(directory, views=[View("count", count, 0)]) as log:
        await log.append(event(7))
        await log.refresh_all()
        assert await numbers(log) == list(range(8))
        assert log.view("count") == 8
        async for record in log.consumer("mailer"):
            assert record.event.data["n"] == 2
            break


async def five(directory: Path) -> None:
    """Creates a log of five events, two of them in the archive, with a snapshot and a consumer."""
    async with EventLog.open(directory, views=[View("count", count, 0)]) as log:
        await log.append_many([event(0), event(1)])
        await log.rotate()
        await log.append_many([event(2), event(3), event(4)])
        await log.refresh_all()
        async for record in (consumer := log.consumer("mailer")):
            await consumer.commit(record)
            break


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        (".", True),
        ("app.jsonl", False),
        ("archive.jsonl.zst", True),
        ("views", True),
        ("views/count.snapshot.json", False),
        ("consumers", True),
        ("consumers/mailer.json", False),
    ],
)
async def test_a_link_is_followed_until_the_file_is_replaced(data_dir: Path, name: str, stays: bool) -> None:
    """Nothing is lost either way; a replaced file is then in the directory, not where the link led."""
    await five(data_dir)
    path, elsewhere = data_dir / name, data_dir.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    before = elsewhere.read_bytes() if elsewhere.is_file() else b""
    await used(data_dir)

    assert path.is_symlink() is stays
    assert not elsewhere.is_file() or elsewhere.read_bytes().startswith(before)


async def test_a_link_to_a_missing_file_creates_the_file(data_dir: Path) -> None:
    """An active log is created where the link leads."""
    data_dir.mkdir()
    elsewhere = data_dir.with_name("elsewhere")
    (data_dir / "app.jsonl").symlink_to(elsewhere)
    async with EventLog.open(data_dir) as log:
        await log.append(event(0))
        before = elsewhere.read_bytes()
        await log.rotate()
        await log.append(event(1))
        found = await numbers(log)

    assert before == line(0)
    assert found == [0, 1]


async def test_two_directories_with_links_to_one_log_have_one_writer(data_dir: Path) -> None:
    """The lock is on the file, whatever its name."""
    other = data_dir.with_name("other")
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(0))
        other.mkdir()
        (other / "app.jsonl").symlink_to(writer.log_path)
        with pytest.raises(LogLockedError):
            await EventWriter.open(other)
        await writer.append(event(1))


@pytest.mark.parametrize("name", ["app.jsonl", "archive.jsonl.zst", "views/count.snapshot.json", "."])
async def test_a_link_to_itself_is_an_error_or_is_replaced(tmp_path: Path, name: str) -> None:
    """An unreadable snapshot is created again; all other files cause the system's own error, for readers too."""
    directory = tmp_path / "data"
    await five(directory)
    path = directory / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(path.name if name != "." else "data")

    async def tried(opening: Any) -> Any:
        try:
            async with opening as log:
                return await numbers(log)
        except OSError as error:
            return type(error)

    outcomes = [await tried(EventLog.open(directory, views=[View("count", count, 0)], read_only=r)) for r in (0, 1)]
    if name == "views/count.snapshot.json":
        assert outcomes == [[0, 1, 2, 3, 4]] * 2
    else:
        assert set(outcomes) <= {OSError, FileExistsError}
