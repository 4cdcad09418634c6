"""Appends and reads go on if the index can't be opened or written, or while it is being built."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.index.events import WRITE_BATCH_SIZE, fill, numbers, tag, tagged

from eventfold import (
    ConditionalAppendError,
    Event,
    EventLog,
    EventReader,
    Head,
)
from eventfold._index import file_index, store


async def test_a_log_is_open_before_its_index_is(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the check of the file takes, only the calls that need the index wait for it."""
    async with EventLog.open(data_dir, index=True) as log:
        await fill(log, 10)
    go_on = threading.Event()
    original = store.Store.open

    def slowly(file: store.Store) -> Head:
        assert go_on.wait(10)
        return original(file)

    monkeypatch.setattr(store.Store, "open", slowly)
    async with asyncio.timeout(10), EventLog.open(data_dir, index=True) as log:
        await log.append(tagged(10, "own:10"))
        reading = asyncio.create_task(numbers(log, tag("own:10")))
        await asyncio.sleep(0.05)
        assert not reading.done()
        go_on.set()
        assert await reading == [10]


async def test_an_index_that_cannot_be_written_for_long_uses_bounded_memory(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Indexing stops for a while, and later catches up from the log."""
    fails = True
    add = store.Store.add

    def failing(file: store.Store, *arguments: object) -> None:
        if fails:
            raise sqlite3.OperationalError("database or disk is full")
        add(file, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store.Store, "add", failing)
    monkeypatch.setattr(file_index, "MAX_PENDING", 2 * WRITE_BATCH_SIZE)
    monkeypatch.setattr(file_index, "POLL_INTERVAL", 0.01)
    async with EventLog.open(data_dir, index=True) as log:
        for start in range(0, 2 * WRITE_BATCH_SIZE, 1000):
            await fill(log, 1000, start)
            last = start + 999
            assert await numbers(log, tag(f"own:{last}")) == [last]
            with pytest.raises(ConditionalAppendError):
                await log.append_unless([tagged(0, "own:17")], tag("own:17"))
            assert log._writer._index is not None
            assert log._writer._index._pending.count <= 2 * WRITE_BATCH_SIZE + 2000
        assert log._writer._index._pending.count == 0
        assert caplog.text.count("could not be written for a long time") == 1
        fails = False
        log._writer._index._retry_at = 0.0
        with monkeypatch.context() as patch:
            patch.setattr(EventReader, "read_from", None)
            assert await numbers(log, tag(f"own:{last}")) == [last]


async def test_keys_that_are_being_written_do_not_count_as_waiting(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(file_index, "MAX_PENDING", WRITE_BATCH_SIZE)
    async with EventLog.open(data_dir, index=True) as log:
        for start in range(0, 2 * WRITE_BATCH_SIZE, 1000):
            await fill(log, 1000, start)
            assert await numbers(log, tag(f"own:{start + 500}")) == [start + 500]
    async with EventLog.open(data_dir, index=True) as log:
        for n in range(0, 2 * WRITE_BATCH_SIZE, 500):
            assert await numbers(log, tag(f"own:{n}")) == [n]
    assert not caplog.records


async def test_nothing_fails_if_the_index_cannot_be_written(
    data_dir: Path, index_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(store.Store, "add", fail)
    async with EventLog.open(data_dir, index=True) as log:
        await fill(log, WRITE_BATCH_SIZE)
        assert await numbers(log, tag("own:17")) == [17]
        with pytest.raises(ConditionalAppendError):
            await log.append_unless([tagged(0, "own:17")], tag("own:17"))
    assert "could not be written" in caplog.text


async def test_nothing_fails_if_the_index_cannot_be_opened(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr(store.Store, "open", fail)
    async with EventLog.open(data_dir, index=True, unique_ids=True) as log:
        await fill(log, 10)
        assert await numbers(log, tag("own:7")) == [7]
        first = await log.append(Event("a", id="one"))
        assert (await log.append(Event("a", id="one"))).start_offset == first.start_offset
        with pytest.raises(ConditionalAppendError):
            await log.append_unless([tagged(0, "own:7")], tag("own:7"))
    assert "can't be used" in caplog.text


def test_nothing_fails_if_the_index_file_may_not_grow(damaged_dir: Path) -> None:
    """As on a full disk, the system refuses to let the file grow beyond a size that the log does not reach."""
    script = """
import asyncio, resource, sys
from eventfold import ConditionalAppendError, Event, EventLog, Query, SyncMode
from eventfold._index import file_index
file_index.WRITE_BATCH_SIZE, file_index.MAX_PENDING, file_index.RETRY_INTERVAL = 2_000, 8_000, 0.1
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))

async def main():
    async with EventLog.open(sys.argv[1], index=True, unique_ids=True, sync=SyncMode.OS) as log:
        for n in range(0, 2_000, 200):
            await log.append_many(
                Event("a", {}, ts=1, id=f"{k}", tags=tuple(f"{k}.{i}" for i in range(20))) for k in range(n, n + 200)
            )
            for known in (0, n // 2, n + 199):
                [_] = [record async for record in log.read_from(query=Query(tags={f"{known}.7"}))]
                assert (await log.append(Event("a", id=f"{known}"))).duplicate
                try:
                    await log.append_unless([Event("a")], Query(tags={f"{known}.7"}))
                except ConditionalAppendError:
                    continue
                raise AssertionError(known)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", script, damaged_dir], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "could not be written" in done.stderr

    async def check() -> None:
        async with EventLog.open(damaged_dir, index=True) as log:
            for n in (0, 1_000, 1_999):
                assert len([record async for record in log.read_from(query=tag(f"{n}.19"))]) == 1

    asyncio.run(check())


async def test_a_cancelled_call_does_not_affect_the_answers_of_others(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls share a query in the thread, and one of them may be cancelled at any point of it."""
    async with EventLog.open(data_dir, index=True) as log:
        await fill(log, 100)
    find = store.Store.find

    def slowly(file: store.Store, *arguments: object) -> object:
        time.sleep(0.002)
        return find(file, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store.Store, "find", slowly)
    async with EventLog.open(data_dir, index=True) as log:
        for turns in range(20):
            readings = [asyncio.create_task(numbers(log, tag(f"own:{n}"))) for n in range(10)]
            appending = asyncio.create_task(log.append_unless([tagged(0, "new")], tag("own:5")))
            for _ in range(turns):
                await asyncio.sleep(0)
            for reading in readings[::2]:
                reading.cancel()
            assert await asyncio.gather(*readings[1::2]) == [[n] for n in range(1, 10, 2)]
            with pytest.raises(ConditionalAppendError):
                await appending
            await asyncio.wait(readings)


async def test_a_log_can_be_closed_while_its_index_is_being_built(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The next log that is opened continues the build."""
    monkeypatch.setattr("eventfold._index.file_index.MAX_READ_AT_CLOSE", 0)
    monkeypatch.setattr("eventfold._index.file_index.WRITE_BATCH_SIZE", 500)
    async with EventLog.open(data_dir) as log:
        await fill(log, 20_000)
    for _ in range(3):
        async with asyncio.timeout(20):
            async with EventLog.open(data_dir, index=True):
                await asyncio.sleep(0.02)
    async with EventLog.open(data_dir, index=True) as log:
        assert await numbers(log, tag("own:19999")) == [19_999]
    assert not caplog.records
