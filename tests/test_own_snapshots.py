"""`EventLog.open(…, read_only=True, snapshots=DIR)`: a read-only log keeps snapshots of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.crash.recorder import read_files
from tests.support import event

from eventfold import Event, EventLog, View


class Counting:
    """A view that counts events, and the number of events that it has folded."""

    def __init__(self) -> None:
        self.folded = 0
        self.view = View("count", self.count, 0)

    def count(self, state: int, event: Event) -> int:
        self.folded += 1
        return state + 1


async def write(directory: Path, events: int) -> None:
    async with EventLog.open(directory) as log:
        await log.append_many([event(n) for n in range(events)])


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return tmp_path / "own" / "snapshots"


async def test_a_view_continues_from_its_own_snapshot(log: Path, own: Path) -> None:
    """The snapshot is saved when the log is closed, and afterwards only new events are folded."""
    await write(log, 100)
    async with EventLog.open(log, views=[Counting().view], read_only=True, snapshots=own):
        pass
    await write(log, 3)

    later = Counting()
    async with EventLog.open(log, views=[later.view], read_only=True, snapshots=own) as reading:
        assert reading.view("count") == 103
    assert later.folded == 3


async def test_nothing_is_written_to_the_log_s_directory(log: Path, own: Path) -> None:
    await write(log, 100)
    before = read_files(log)

    async with EventLog.open(log, views=[Counting().view], read_only=True, snapshots=own) as reading:
        await reading.rebuild("count")

    assert read_files(log) == before
    assert list(read_files(own)) == ["count.snapshot.json"]


async def test_the_writer_s_snapshot_of_the_same_name_is_neither_read_nor_changed(log: Path, own: Path) -> None:
    """Two programs may have different views with the same name."""
    await write(log, 10)
    async with EventLog.open(log, views=[View("count", lambda state, event: state + 2, 0)]):
        pass
    theirs = (log / "views" / "count.snapshot.json").read_bytes()

    async with EventLog.open(log, views=[Counting().view], read_only=True, snapshots=own) as reading:
        assert reading.view("count") == 10

    assert (log / "views" / "count.snapshot.json").read_bytes() == theirs


async def test_a_snapshot_is_saved_while_the_log_is_followed(log: Path, own: Path) -> None:
    """As in the writer, a snapshot is saved each time there are enough new events."""
    async with (
        EventLog.open(log) as writing,
        EventLog.open(log, views=[Counting().view], read_only=True, snapshots=own) as reading,
    ):
        await writing.append_many([event(n, meta="x" * 1000) for n in range(100)])
        await reading.refresh_all()

        assert json.loads((own / "count.snapshot.json").read_bytes())["state"] == 100


async def test_a_snapshot_of_another_log_is_not_used(log: Path, own: Path, tmp_path: Path) -> None:
    await write(log, 100)
    async with EventLog.open(log, views=[Counting().view], read_only=True, snapshots=own):
        pass
    async with EventLog.open(tmp_path / "other") as other:
        await other.append_many([event(n, type="other") for n in range(200)])

    async with EventLog.open(tmp_path / "other", views=[Counting().view], read_only=True, snapshots=own) as reading:
        assert reading.view("count") == 200


async def test_a_view_that_moves_from_another_log_is_saved_here_too(log: Path, own: Path) -> None:
    """The snapshot in the log's directory is not the one from which this process continues."""
    await write(log, 10)
    view = Counting().view
    async with EventLog.open(log, views=[view]):
        pass

    async with EventLog.open(log, views=[view], read_only=True, snapshots=own):
        pass

    assert (own / "count.snapshot.json").exists()


async def test_consumers_stay_in_the_log_s_directory(log: Path, own: Path) -> None:
    await write(log, 3)
    async with EventLog.open(log, read_only=True, snapshots=own) as reading:
        consumer = reading.consumer("mailer")
        async for record in consumer:
            await consumer.commit(record)
            break

    assert (log / "consumers" / "mailer.json").exists()


@pytest.mark.parametrize("inside", [".", "views", "own"])
async def test_a_directory_within_that_of_the_log_is_refused(log: Path, inside: str) -> None:
    """The files in the log's directory belong to the writer."""
    await write(log, 3)

    with pytest.raises(ValueError, match="is inside the log's directory"):
        await EventLog.open(log, read_only=True, snapshots=log / inside)


async def test_a_writer_cannot_have_another_directory_for_its_snapshots(log: Path, own: Path) -> None:
    with pytest.raises(ValueError, match="read_only"):
        EventLog.open(log, snapshots=own)


async def test_a_snapshot_that_cannot_be_saved_is_only_logged(
    log: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a snapshot, the next start only has to fold again."""
    await write(log, 3)
    (tmp_path / "file").touch()

    async with EventLog.open(log, views=[Counting().view], read_only=True, snapshots=tmp_path / "file") as reading:
        assert reading.view("count") == 3

    assert "could not be written" in caplog.text


async def test_a_backup_has_the_writer_s_snapshots(log: Path, own: Path, tmp_path: Path) -> None:
    """Otherwise the restored log would continue from the state of another view with the same name."""
    await write(log, 10)
    async with EventLog.open(log, views=[View("count", lambda state, event: state + 2, 0)]):
        pass

    async with EventLog.open(log, views=[Counting().view], read_only=True, snapshots=own) as reading:
        await reading.refresh_all()
        await reading.backup(tmp_path / "backup")

    assert json.loads((tmp_path / "backup" / "views" / "count.snapshot.json").read_bytes())["state"] == 20
