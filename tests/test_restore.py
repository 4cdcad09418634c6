"""`restore`: a backup becomes a log completely or not at all, and remains a backup."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.crash.oracle import Oracle
from tests.crash.recorder import Expected, Recorded, Recorder, States, read_files, scratch_directory, write_files
from tests.support import FaultInjector, check_log, event, records

from eventfold import CorruptLogError, Event, EventfoldError, EventLog, EventReader, View, restore, verify


def count(state: int, event: Event) -> int:
    return state + 1


async def make_backup(directory: Path, archived: int = 3, active: int = 3) -> None:
    """Creates a backup with a snapshot and a consumer, from a log that is partly archived."""
    source = directory.with_name("source")
    async with EventLog.open(source, views=[View("count", count, 0)]) as log:
        for n in range(archived):
            await log.append(event(n))
        if archived:
            await log.rotate()
        for n in range(archived, archived + active):
            await log.append(event(n))
        await log.refresh_all()
        consumer = log.consumer("mailer")
        for record in (await records(log))[:1]:
            await consumer.commit(record)
    async with EventLog.open(source) as log:
        await log.backup(directory)
    shutil.rmtree(source)


async def numbers(directory: Path) -> list[int]:
    return [record.event.data["n"] for record in await records(EventReader(directory))]


@pytest.mark.parametrize(("archived", "active"), [(3, 3), (3, 0), (0, 3), (0, 0)])
@pytest.mark.parametrize("target", ["new/log", "empty"])
async def test_a_restored_log_opens_at_once(tmp_path: Path, archived: int, active: int, target: str) -> None:
    """The log has its snapshots and consumers' offsets, and its directory is created if necessary."""
    backup, log_dir = tmp_path / "backup", tmp_path / target
    (tmp_path / "empty").mkdir()
    await make_backup(backup, archived, active)

    head = await restore(backup, log_dir)

    assert head == await EventReader(backup).head()
    assert read_files(log_dir) == read_files(backup)
    assert (await verify(log_dir)).ok
    async with EventLog.open(log_dir, views=[View("count", count, 0)]) as log:
        assert log.view("count") == archived + active
        await log.append(event(99))
    assert await numbers(log_dir) == [*range(archived + active), 99]


async def test_the_restored_log_never_changes_the_backup(tmp_path: Path) -> None:
    """The files are not linked: an append changes app.jsonl in place, and a rotation changes the archive."""
    await make_backup(tmp_path / "backup")
    before = read_files(tmp_path / "backup")

    await restore(tmp_path / "backup", tmp_path / "log")
    async with EventLog.open(tmp_path / "log", views=[View("count", count, 0)]) as log:
        await log.append(event(7))
        await log.rotate()
        await log.append(event(8))

    assert read_files(tmp_path / "backup") == before


async def test_a_damaged_backup_is_not_restored(tmp_path: Path) -> None:
    await make_backup(tmp_path / "backup")
    path = tmp_path / "backup" / "app.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"n":4', b'"n":\0'))

    with pytest.raises(CorruptLogError, match=r"not an event: .*; restore another backup"):
        await restore(tmp_path / "backup", tmp_path / "log")

    assert not (tmp_path / "log").exists()


async def test_a_snapshot_that_does_not_fit_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A bad snapshot is no reason to refuse the events."""
    await make_backup(tmp_path / "backup")
    (tmp_path / "backup" / "views" / "count.snapshot.json").write_bytes(b"{}")

    with caplog.at_level(logging.WARNING):
        await restore(tmp_path / "backup", tmp_path / "log")

    assert "did not restore" in caplog.text
    assert "count.snapshot.json" in caplog.text
    assert await numbers(tmp_path / "log") == [*range(6)]
    assert not (tmp_path / "log" / "views").exists()


async def test_a_target_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    """A directory with another log is refused too."""
    await make_backup(tmp_path / "backup")
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "note.txt").write_text("mine")

    with pytest.raises(EventfoldError, match=r"is not empty: it contains 'note\.txt'"):
        await restore(tmp_path / "backup", tmp_path / "log")
    with pytest.raises(EventfoldError, match="is not empty"):
        await restore(tmp_path / "backup", tmp_path / "backup")

    assert read_files(tmp_path / "log") == {"note.txt": b"mine"}


async def test_without_a_backup_nothing_is_created(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    for backup in ("none", "empty"):
        with pytest.raises(EventfoldError, match="there is no log in"):
            await restore(tmp_path / backup, tmp_path / "log")

    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


async def test_progress_is_reported(tmp_path: Path) -> None:
    await make_backup(tmp_path / "backup")
    reported: list[tuple[int, int]] = []

    await restore(tmp_path / "backup", tmp_path / "log", progress=lambda done, total: reported.append((done, total)))

    assert reported[-1][0] == reported[-1][1] > 0


async def test_a_cancelled_restore_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the restore is complete, there is no log."""
    await make_backup(tmp_path / "backup")
    faults = FaultInjector(monkeypatch)
    gate = faults.freeze("sync")
    task = asyncio.create_task(restore(tmp_path / "backup", tmp_path / "log"))
    await gate.reached()
    task.cancel()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await numbers(tmp_path / "log") == []

    await restore(tmp_path / "backup", tmp_path / "log")

    assert read_files(tmp_path / "log") == read_files(tmp_path / "backup")


async def test_only_one_restore_at_a_time_writes_to_a_directory(tmp_path: Path, faults: FaultInjector) -> None:
    await make_backup(tmp_path / "backup")
    gate = faults.freeze("sync")
    first = asyncio.create_task(restore(tmp_path / "backup", tmp_path / "log"))
    await gate.reached()
    with pytest.raises(EventfoldError, match="is being restored"):
        await restore(tmp_path / "backup", tmp_path / "log")
    gate.open()
    await first

    assert read_files(tmp_path / "log") == read_files(tmp_path / "backup")


@pytest.mark.parametrize("before", [".restoring/app.jsonl", "app.jsonl.base", "app.jsonl", "archive.jsonl.zst"])
async def test_a_log_that_is_created_during_a_restore_loses_no_event(
    tmp_path: Path, faults: FaultInjector, before: str
) -> None:
    """Some program may be restarted all the time: either it can't open the directory, or the restore fails."""
    await make_backup(tmp_path / "backup")
    target = tmp_path / "log"
    appended: list[bool] = []

    def rename(original: Callable[..., None], source: Path, to: Path) -> None:
        if to == target / before and not appended:
            appended.append(False)
            with ThreadPoolExecutor(1) as other:
                appended.append(other.submit(asyncio.run, append_live(target)).result())
        original(source, to)

    faults.replace("rename", rename)
    try:
        await restore(tmp_path / "backup", target)
        restored = True
    except EventfoldError:
        restored = False
    assert appended == [False, not restored]
    async for record in EventReader(target).read_full():
        assert (record.event.type == "live") is not restored


async def append_live(directory: Path) -> bool:
    """Tries to append an event; returns whether that worked."""
    try:
        async with EventLog.open(directory) as log:
            await log.append(Event("live"))
    except CorruptLogError:
        return False
    return True


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    with scratch_directory(tmp_path) as path:
        yield path


@pytest.mark.parametrize(("archived", "active"), [(3, 3), (3, 0), (0, 3)])
async def test_a_crash_never_leaves_an_incomplete_log_that_looks_complete(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, archived: int, active: int
) -> None:
    """A reader or a writer finds nothing, an error, or the whole log."""
    backup, target = scratch / "backup", scratch / "log"
    await make_backup(backup, archived, active)
    target.mkdir()
    with monkeypatch.context() as patch:
        recorder = Recorder(patch, target)
        await restore(backup, target)

    outcomes = {"nothing": 0, "refused": 0, "all": 0}
    for number, state in enumerate(States().after(Recorded({}, recorder.ops, Expected(Oracle())))):
        directory = write_files(scratch / str(number), state.files)
        outcome = await found_in(directory, archived + active)
        outcomes[outcome] += 1
        if number % 5 == 0 and all(name.startswith(".restoring/") for name in state.files):
            again = write_files(scratch / f"{number} again", state.files)
            await restore(backup, again)
            assert read_files(again) == read_files(backup), state.after
            await check_log(again)
    assert all(outcomes.values()), outcomes


async def found_in(directory: Path, events: int) -> str:
    """Returns what a reader and a writer find in a directory, which must be the same."""
    found = []
    for open_ in (lambda: EventLog.open(directory, read_only=True), lambda: EventLog.open(directory)):
        try:
            async with open_() as log:
                found.append({0: "nothing", events: "all"}[len(await records(log))])
        except CorruptLogError:
            found.append("refused")
    # Before the base file or app.jsonl is there, a writer either starts a new log, or it creates an empty app.jsonl and
    # notices that the base file describes another one.
    assert found[0] == found[1] or found == ["nothing", "refused"]
    return found[1]
