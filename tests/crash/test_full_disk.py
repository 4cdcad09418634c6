"""Disks without space: a small tmpfs, a small ext4 (both need root), and a process whose files may not grow.

Appends are refused only while they can't be written: acknowledged events stay, and appends succeed again once there is
space.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.crash.mounts import Disk, ext4, tmpfs
from tests.crash.oracle import check_archive, read_now
from tests.support import check_log, event, line, numbers, records, write_log

from eventfold import Event, EventLog, EventReader, LockMode, View, _rotator
from eventfold._files import rotation

TASKS = 8
_dice = random.Random(4)


@pytest.fixture(params=["tmpfs", "ext4"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """A file system of a few megabytes."""
    with tmpfs(tmp_path / "disk") if request.param == "tmpfs" else ext4(tmp_path / "disk", 6 * 2**20) as mounted:
        yield mounted


def bulky(n: int) -> Event:
    """An event of about 4 kB that compresses badly."""
    return event(n, meta=_dice.randbytes(2000).hex())


def collect(state: list[Any], event: Event) -> list[Any]:
    return [*state, event.data["n"], event.meta]


async def append_until_refused(log: EventLog, task: int) -> tuple[list[int], OSError]:
    """Appends until refused; returns the acknowledged numbers and the error. Task 0 appends batches of three."""
    acknowledged: list[int] = []
    for n in range(task, 10**6, TASKS):
        batch = [3 * n, 3 * n + 1, 3 * n + 2] if task == 0 else [3 * n]
        try:
            await log.append_many(map(bulky, batch))
        except OSError as error:
            return acknowledged, error
        acknowledged += batch
    raise AssertionError("the disk is never full")


async def check_all_there(directory: Path, expected: list[int]) -> None:
    """Asserts that the log has exactly these events, for a reader and, after a rotation, for a plain decoder."""
    assert await numbers(EventReader(directory)) == expected
    async with EventLog.open(directory) as log:
        assert await numbers(log) == expected
        await log.rotate()
        assert await numbers(log) == expected
    check_archive(directory, (await asyncio.to_thread(read_now, directory))[1])
    await check_log(directory)


async def test_a_full_disk_refuses_appends_and_loses_no_event(disk: Disk) -> None:
    """Each append is either acknowledged and there or refused and absent; once there is space, appends continue."""
    directory = disk.path / "data"
    async with EventLog.open(directory) as log:
        await asyncio.to_thread(disk.fill, 300_000)
        outcomes = await asyncio.gather(*(append_until_refused(log, task) for task in range(TASKS)))
        there = await numbers(log)
        outside = await numbers(EventReader(directory))
        await asyncio.to_thread(disk.free)
        await log.append(event(7_000_001))
        await log.append_many([event(7_000_002), event(7_000_003)])
    print(f"{len(there)} acknowledged")

    assert {error.errno for _, error in outcomes} == {errno.ENOSPC}
    assert len(there) >= TASKS
    assert sorted(there) == sorted(n for acknowledged, _ in outcomes for n in acknowledged)
    for acknowledged, _ in outcomes:
        assert [n for n in there if n in set(acknowledged)] == acknowledged
    assert outside == there
    await check_all_there(directory, [*there, 7_000_001, 7_000_002, 7_000_003])


@pytest.mark.parametrize("left", [0, 4096, 8192, 12288])
@pytest.mark.parametrize("lock", [LockMode.FLOCK, LockMode.SHARED])
async def test_the_first_append_after_a_rotation_that_finds_no_space_is_only_refused(
    disk: Disk, left: int, lock: LockMode
) -> None:
    """The base file can't be replaced then, or it announces a line that could not be written."""
    directory = disk.path / "data"
    async with EventLog.open(directory, lock=lock) as log:
        await log.append(event(0))
        await log.rotate()
        await asyncio.to_thread(disk.fill, left)
        appended = [n for n in range(1, 4) if await was_appended(log, bulky(n))]
        there = await numbers(log)
        outside = await numbers(EventReader(directory))
        await asyncio.to_thread(disk.free)
        await log.append(event(10))

    assert there == outside == [0, *appended]
    assert left or not appended
    await check_all_there(directory, [0, *appended, 10])


async def test_a_log_accepts_appends_after_a_rotation_without_space(disk: Disk) -> None:
    """The space that the rotation took is freed; once there is more space, the next rotation succeeds."""
    directory = disk.path / "data"
    async with EventLog.open(directory) as log:
        for n in range(100):
            await log.append(bulky(n))
        await asyncio.to_thread(disk.fill, 100_000)
        for n in range(100, 103):
            with pytest.raises(OSError) as caught:
                await log.rotate()
            assert caught.value.errno == errno.ENOSPC
            await log.append(event(n))
        await log.append(bulky(103))
        there = await numbers(log)
        await asyncio.to_thread(disk.free)
        await log.rotate()
        size = await log.active_log_size()

    assert there == list(range(104))
    assert size == 0
    await check_all_there(directory, there)


async def was_appended(log: EventLog, event: Event) -> bool:
    """Whether there was space for the event."""
    try:
        await log.append(event)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    return True


async def test_an_automatic_rotation_without_space_logs_a_warning(
    disk: Disk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Appends continue, except while it holds the last space; once there is more space, the log rotates."""
    monkeypatch.setattr(_rotator, "RETRY_INTERVAL", 0.0)
    directory = disk.path / "data"
    async with EventLog.open(directory, max_log_size=400_000) as log:
        for n in range(90):
            await log.append(bulky(n))
        await asyncio.to_thread(disk.fill, 150_000)
        n = 90
        while "could not be rotated" not in caplog.text:
            n += await was_appended(log, bulky(n) if n < 110 else event(n))
        assert not log.archive_path.exists()
        await asyncio.to_thread(disk.free)
        while not log.archive_path.exists():
            n += await was_appended(log, event(n))

    assert {record.levelno for record in caplog.records if record.name == "eventfold"} == {logging.WARNING}
    await check_all_there(directory, list(range(n)))


@pytest.mark.parametrize("rotated_before", [False, True], ids=["the first rotation", "a later rotation"])
async def test_a_rotation_without_space_is_continued_later(
    disk: Disk, rotated_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frames that found space are neither lost nor written twice, and no useless file remains."""
    monkeypatch.setattr(rotation, "FRAME_SIZE", 20_000)
    directory = disk.path / "data"
    async with EventLog.open(directory) as log:
        await log.append(event(0))
        if rotated_before:
            await log.rotate()
        for n in range(1, 100):
            await log.append(bulky(n))
        await asyncio.to_thread(disk.fill, 100_000)
        with pytest.raises(OSError):
            await log.rotate()
        await log.append(event(100))
        there = await numbers(log)
        hidden = [path.name for path in directory.iterdir() if path.name.startswith(".")]

    async with EventLog.open(directory) as log:
        again = await numbers(log)
        await asyncio.to_thread(disk.free)
        await log.rotate()

    assert there == again == list(range(101))
    assert hidden == []
    await check_all_there(directory, there)


async def test_a_snapshot_without_space_logs_a_warning(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    """The previous snapshot stays, no half of a new one is left, and the view is right after the next opening."""
    directory = disk.path / "data"
    async with EventLog.open(directory, views=[View("all", collect, list)]) as log:
        for n in range(20):
            await log.append(bulky(n))
        await log.refresh_all()
        snapshot = log.views_dir / "all.snapshot.json"
        before = snapshot.read_bytes()
        for n in range(20, 40):
            await log.append(bulky(n))
        await asyncio.to_thread(disk.fill)
        await log.refresh_all()
    warnings = [record for record in caplog.records if record.name == "eventfold"]
    files = [path.name for path in snapshot.parent.iterdir()]
    after = snapshot.read_bytes()
    async with EventLog.open(directory, views=[View("all", collect, list)]) as log:
        full = log.view("all")
        await asyncio.to_thread(disk.free)
        await log.append(event(40))
        await log.refresh_all()
        expected = [value for record in await records(log) for value in (record.event.data["n"], record.event.meta)]
        state = log.view("all")

    assert {record.levelno for record in warnings} == {logging.WARNING}
    assert "snapshot of view 'all' could not be written" in caplog.text
    assert (files, after) == ([snapshot.name], before)
    assert full == expected[:-2]
    assert state == expected
    assert snapshot.read_bytes() != before
    assert expected[::2] == list(range(41))


async def test_a_consumer_commit_without_space_leaves_the_previous_offset(disk: Disk) -> None:
    """The commit raises `OSError`, leaves no partial file, and succeeds once there is space."""
    directory = disk.path / "data"
    async with EventLog.open(directory) as log:
        for n in range(3):
            await log.append(event(n))
        first, second, _ = await records(log)
        consumer = log.consumer("mailer")
        await consumer.commit(first)
        before = (directory / "consumers" / "mailer.json").read_bytes()
        await asyncio.to_thread(disk.fill)
        with pytest.raises(OSError) as caught:
            await consumer.commit(second)
        left = {path.name: path.read_bytes() for path in (directory / "consumers").iterdir()}
        given = [record async for record in first_of(log.consumer("mailer"))]
        await asyncio.to_thread(disk.free)
        await consumer.commit(second)
        later = [record async for record in first_of(log.consumer("mailer"))]

    assert caught.value.errno == errno.ENOSPC
    assert left == {"mailer.json": before}
    assert [record.event.data["n"] for record in given + later] == [1, 2]


async def first_of(consumer: Any) -> Any:
    """Yields one record."""
    async for record in consumer:
        yield record
        return


async def test_an_intact_log_can_be_opened_on_a_full_disk(disk: Disk) -> None:
    """The log can be read, and refuses appends until there is space."""
    directory = disk.path / "data"
    write_log(directory, line(1), line(2))
    await asyncio.to_thread(disk.fill)
    async with EventLog.open(directory) as log:
        found = await numbers(log)
        # A last block that is not full yet has room for something.
        with pytest.raises(OSError) as caught:
            await log.append_many(map(bulky, range(3)))
        await asyncio.to_thread(disk.free)
        await log.append(event(3))

    assert found == [1, 2]
    assert caught.value.errno == errno.ENOSPC
    await check_all_there(directory, [1, 2, 3])


async def test_an_incomplete_end_is_not_cut_off_if_it_cannot_be_kept(disk: Disk) -> None:
    """Opening raises `OSError` until there is space for the tail, and changes nothing; readers don't notice."""
    directory = disk.path / "data"
    data = write_log(directory, line(1), line(2), b'{"type":"unfinished","data":"' + b"x" * 5000)
    await asyncio.to_thread(disk.fill)
    with pytest.raises(OSError) as caught:
        await EventLog.open(directory)
    left = {path.name: path.read_bytes() for path in directory.iterdir()}
    async with EventLog.open(directory, read_only=True) as log:
        found = await numbers(log)
    await asyncio.to_thread(disk.free)
    async with EventLog.open(directory) as log:
        await log.append(event(3))
    [torn] = directory.glob("app.jsonl.torn.*")

    assert caught.value.errno == errno.ENOSPC
    assert left == {"app.jsonl": data}
    assert found == [1, 2]
    assert torn.read_bytes() == data[len(line(1) + line(2)) :]
    await check_all_there(directory, [1, 2, 3])


LIMITED = """
import asyncio, json, resource, sys
from eventfold import Event, EventLog

async def until_refused(log, acknowledged):
    n = len(acknowledged)
    while True:
        batch = list(range(n, n + 3)) if n % 2 else [n]
        try:
            await log.append_many([Event("counted", {"n": n, "text": "x" * 50}) for n in batch])
        except OSError as error:
            return type(error).__name__
        acknowledged += batch
        n += len(batch)

async def main():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    acknowledged, errors, counts = [], [], []
    async with EventLog.open(sys.argv[1]) as log:
        for _ in range(3):
            errors.append(await until_refused(log, acknowledged))
            counts.append(len(acknowledged))
            await log.rotate()
    print(json.dumps([acknowledged, errors, counts]))

asyncio.run(main())
"""


async def test_a_log_that_may_not_grow_refuses_appends_until_it_is_rotated(data_dir: Path) -> None:
    """A limit on the size of files applies, and the compressed archive stays below it."""
    command = [sys.executable, "-c", LIMITED, str(data_dir)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    acknowledged, errors, counts = json.loads(done.stdout)

    assert errors == ["OSError"] * 3
    assert 0 < counts[0] < counts[1] < counts[2]
    await check_all_there(data_dir, acknowledged)
