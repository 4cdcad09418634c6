"""The index: conditions and reads by tags give the same answers as without it, whatever happened to its file."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations_with_replacement
from pathlib import Path

import pytest

from eventfold import (
    ConditionalAppendError,
    CorruptLogError,
    Event,
    EventLog,
    EventReader,
    Head,
    LockMode,
    Query,
    Record,
    SyncMode,
)
from eventfold._codec import keys
from eventfold._codec.keys import key_of_tag
from eventfold._files.source import FileSource
from eventfold._index import file_index, index, store
from eventfold._index.index import MAX_CANDIDATES

WRITE_BATCH_SIZE = 5000


@pytest.fixture(autouse=True)
def _small_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a log of some thousand events need several transactions to be written to the file."""
    monkeypatch.setattr(file_index, "WRITE_BATCH_SIZE", WRITE_BATCH_SIZE)


def tagged(n: int, *tags: str, type: str = "counted") -> Event:
    return Event(type, {"n": n}, ts=1, tags=tags)


def tag(name: str) -> Query:
    return Query(tags={name})


async def numbers(log: EventLog, query: Query) -> list[int]:
    return [record.event.data["n"] async for record in log.read_from(query=query)]


async def fill(log: EventLog, count: int, start: int = 0) -> None:
    await log.append_many([tagged(n, f"seven:{n % 7}", f"own:{n}") for n in range(start, start + count)])


@pytest.fixture
def index_path(data_dir: Path) -> Path:
    return data_dir / "index.sqlite"


async def test_events_of_a_tag_are_read_in_order_and_backwards(data_dir: Path) -> None:
    async with EventLog.open(data_dir, index=True) as log:
        await fill(log, 50)

        assert await numbers(log, tag("seven:3")) == list(range(3, 50, 7))
        backwards = [record.event.data["n"] async for record in log.read_back(query=tag("seven:3"))]
        assert backwards == list(range(3, 50, 7))[::-1]


async def test_reading_by_tags_does_not_read_the_rest_of_the_log(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the lines that are returned are read, each from its own offset."""
    async with EventLog.open(data_dir, index=True) as log:
        await fill(log, 5000)
        await numbers(log, tag("own:0"))
        read: list[int] = []
        lines_at = FileSource.lines_at

        async def noted(source: FileSource, offsets: Sequence[int]) -> object:
            read.extend(offsets)
            return await lines_at(source, offsets)

        with monkeypatch.context() as patch:
            patch.setattr(FileSource, "lines_at", noted)
            patch.setattr(FileSource, "blocks", None)
            [record] = [record async for record in log.read_from(query=tag("own:4321"))]

        assert read == [record.start_offset]


@pytest.mark.parametrize("offset", ["start", "end"])
async def test_reading_by_tags_respects_the_start_and_the_end(data_dir: Path, offset: str) -> None:
    async with EventLog.open(data_dir, index=True) as log:
        results = [await log.append(tagged(n, "a")) for n in range(5)]

        found = [
            record.event.data["n"]
            async for record in log.read_from(results[1].start_offset, query=tag("a"), until=results[3].end_offset)
        ]
        assert found == [1, 2, 3]
        before = [record.event.data["n"] async for record in log.read_back(results[2].end_offset, query=tag("a"))]
        assert before == [2, 1, 0]


@pytest.mark.parametrize("archived", [False, True])
async def test_every_range_is_the_same_with_and_without_the_index(data_dir: Path, archived: bool) -> None:
    """The test has batches that cross the ends of the range, lines longer than one read, and all offsets."""
    async with EventLog.open(data_dir, index=True) as log:
        results = [await log.append(tagged(0, "a"))]
        results += await log.append_many([tagged(n, "a" if n % 2 else "b") for n in range(1, 5)])
        results += [await log.append(Event("long", {"n": 5, "text": "x" * 50_000}, tags=("a",)))]
        results += await log.append_many([tagged(6, "a"), tagged(7, "a")])
        if archived:
            await log.rotate()
        offsets = [0, *(result.end_offset for result in results)]
        reader = EventReader(data_dir)
        for start, end in combinations_with_replacement(offsets, 2):
            with_index = [record async for record in log.read_from(start, query=tag("a"), until=end)]
            assert with_index == [record async for record in reader.read_from(start, query=tag("a"), until=end)]
        for end in offsets:
            with_index = [record async for record in log.read_back(end, query=tag("a"))]
            assert with_index == [record async for record in reader.read_back(end, query=tag("a"))]


async def test_events_before_damage_are_yielded_first(tmp_path: Path) -> None:
    async with EventLog.open(tmp_path, index=True) as log:
        results = [await log.append(tagged(n, "a")) for n in range(5)]
        assert len(await numbers(log, tag("a"))) == 5
        with open(tmp_path / "app.jsonl", "r+b") as file:
            file.seek(results[3].start_offset)
            file.write(b"!")
        found = []
        with pytest.raises(CorruptLogError) as caught:
            async for record in log.read_from(query=tag("a")):
                found.append(record.event.data["n"])

    assert found == [0, 1, 2]
    assert caught.value.offset == results[3].start_offset


async def test_an_offset_inside_a_line_is_refused_as_without_the_index(data_dir: Path) -> None:
    async with EventLog.open(data_dir, index=True) as log:
        await log.append(tagged(0, "a"))
        await log.append(tagged(1, "b"))
        with pytest.raises(ValueError, match="not where a line begins"):
            await numbers_from(log, 3, tag("a"))
        with pytest.raises(ValueError, match="beyond the head"):
            await numbers_from(log, 10_000, tag("a"))
        with pytest.raises(ValueError, match="not where a line begins"):
            await log.append_unless([tagged(2, "a")], tag("a"), after=3)


async def numbers_from(log: EventLog, offset: int, query: Query) -> list[int]:
    return [record.event.data["n"] async for record in log.read_from(offset, query=query)]


async def test_the_condition_of_an_append_covers_the_whole_log(data_dir: Path) -> None:
    async with EventLog.open(data_dir, index=True) as log:
        await fill(log, 100)
        await log.rotate()
        first = await log.append_unless([tagged(1, "new")], tag("new"))
        with pytest.raises(ConditionalAppendError) as caught:
            await log.append_unless([tagged(2, "new")], tag("new"))
        assert caught.value.conflict.offset == first[0].start_offset

        with pytest.raises(ConditionalAppendError):
            await log.append_unless([tagged(2, "own:5")], tag("own:5"))


async def test_many_conditions_at_once_are_checked_with_the_file_memory_and_each_other(data_dir: Path) -> None:
    """There are more conditions than one query to the file takes, and each tag is wanted by one append or by two."""
    async with EventLog.open(data_dir, index=True) as log:
        in_file = {f"own:{n}": (await log.append(tagged(n, f"own:{n}"))).start_offset for n in range(0, 300, 3)}
    async with EventLog.open(data_dir, index=True) as log:
        in_memory = {f"own:{n}": (await log.append(tagged(n, f"own:{n}"))).start_offset for n in range(1, 300, 3)}
        wanted = [f"own:{n}" for n in range(300)] + [f"own:{n}" for n in range(2, 300, 6)]
        outcomes = await asyncio.gather(
            *(log.append_unless([tagged(0, "other"), tagged(1, name)], tag(name)) for name in wanted),
            return_exceptions=True,
        )
        taken = in_file | in_memory
        for name, outcome in zip(wanted, outcomes, strict=True):
            if name in taken:
                assert isinstance(outcome, ConditionalAppendError)
                assert outcome.conflict.offset == taken[name]
            else:
                assert isinstance(outcome, list)
                taken[name] = outcome[1].start_offset
        offsets = [record.start_offset async for record in log.read_full() if record.event.tags[0] in taken]
        assert offsets == sorted(taken.values())


async def test_a_condition_with_an_offset_ignores_earlier_events_in_the_file(data_dir: Path) -> None:
    async with EventLog.open(data_dir, index=True) as log:
        results = [await log.append(tagged(n, "a", f"own:{n}")) for n in range(10)]
    async with EventLog.open(data_dir, index=True) as log:
        outcomes = await asyncio.gather(
            *(
                log.append_unless([], tag(f"own:{n}"), after=result.start_offset if n % 2 else result.end_offset)
                for n, result in enumerate(results)
            ),
            return_exceptions=True,
        )
        assert [isinstance(outcome, ConditionalAppendError) for outcome in outcomes] == [n % 2 == 1 for n in range(10)]


async def test_two_texts_with_the_same_key_are_distinguished(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test gives every tag the same hash."""
    for module in (index, keys):
        monkeypatch.setattr(module, "key_of_tag", lambda text: 7)
    async with EventLog.open(data_dir, index=True) as log:
        await log.append(tagged(0, "a"))
        await log.append_unless([tagged(1, "b")], tag("b"))

        assert await numbers(log, tag("a")) == [0]
        assert await numbers(log, tag("b")) == [1]


async def test_a_tag_of_too_many_events_is_searched_for_in_the_log(data_dir: Path) -> None:
    async with EventLog.open(data_dir, index=True) as log:
        await log.append_many([tagged(n, "common") for n in range(MAX_CANDIDATES + 10)])
    async with EventLog.open(data_dir, index=True) as log:
        assert len(await numbers(log, tag("common"))) == MAX_CANDIDATES + 10
        with pytest.raises(ConditionalAppendError):
            await log.append_unless([tagged(0, "common")], tag("common"))
        await log.append_unless([tagged(0, "rare")], Query(types={"other"}, tags={"common"}))


async def test_many_events_of_one_tag_are_not_read_one_by_one(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tested with events in the file, and with events that are not in the file yet."""
    async with EventLog.open(data_dir, index=True) as log:
        await log.append_many([tagged(n, "common") for n in range(MAX_CANDIDATES + 1)])

        def fail(source: FileSource, offsets: Sequence[int]) -> None:
            raise AssertionError(f"{len(offsets)} lines are read one by one")

        monkeypatch.setattr(FileSource, "lines_at", fail)
        assert len(await numbers(log, tag("common"))) == MAX_CANDIDATES + 1


async def test_a_file_that_is_behind_is_brought_up_to_date(data_dir: Path, index_path: Path) -> None:
    async with EventLog.open(data_dir, index=True) as log:
        await fill(log, 20)
    kept = index_path.read_bytes()
    async with EventLog.open(data_dir) as log:
        await fill(log, 20, 20)
        await log.rotate()
        await fill(log, 5, 40)
    index_path.write_bytes(kept)
    async with EventLog.open(data_dir, index=True) as log:
        assert await numbers(log, tag("seven:0")) == list(range(0, 45, 7))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def execute(path: Path, sql: str, *values: object) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(sql, values)
    connection.close()


def of_another_log(path: Path) -> None:
    execute(path, "UPDATE state SET line_hash = '0123456789abcdef'")


def ahead(path: Path) -> None:
    execute(path, "UPDATE state SET offset = offset * 2")


def without_pairs(path: Path) -> None:
    execute(path, "DROP TABLE pairs")


def of_another_version(path: Path) -> None:
    execute(path, "UPDATE state SET version = 99")


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        of_another_log,
        ahead,
        without_pairs,
        of_another_version,
        lambda path: path.write_bytes(b"no database at all" * 1000),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), path.symlink_to(path.with_name("app.jsonl"))),
        lambda path: (path.unlink(), os.mkfifo(path)),
    ],
)
async def test_a_file_that_cannot_be_trusted_is_rebuilt_with_a_warning(
    data_dir: Path, index_path: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    async with EventLog.open(data_dir, index=True) as log:
        await fill(log, 300)
    log_bytes = (data_dir / "app.jsonl").read_bytes()
    damage(index_path)
    async with EventLog.open(data_dir, index=True) as log:
        assert await numbers(log, tag("seven:0")) == list(range(0, 300, 7))
        with pytest.raises(ConditionalAppendError):
            await log.append_unless([tagged(0, "own:299")], tag("own:299"))

    assert (data_dir / "app.jsonl").read_bytes() == log_bytes
    assert [record for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("damage", ["DELETE FROM pairs", "UPDATE pairs SET offset = offset + 1048576"])
async def test_a_missing_or_wrong_pair_is_noticed(
    data_dir: Path, index_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    async with EventLog.open(data_dir, index=True) as log:
        await fill(log, 100)
    execute(index_path, f"{damage} WHERE key = ?", key_of_tag("own:50"))
    async with EventLog.open(data_dir, index=True) as log:
        assert await numbers(log, tag("own:50")) == [50]
    assert "not those that were written" in caplog.text


@pytest.mark.parametrize("column", ["line_hash", "machine"])
async def test_a_file_with_a_text_that_is_not_utf_8_is_rebuilt(
    data_dir: Path, index_path: Path, caplog: pytest.LogCaptureFixture, column: str
) -> None:
    """Python's module reports such a text in the same way as a file that is locked, which will be usable later."""
    async with EventLog.open(data_dir, index=True) as log:
        await fill(log, 10)
    execute(index_path, f"UPDATE state SET {column} = CAST(x'ff' AS TEXT)")
    async with EventLog.open(data_dir, index=True) as log:
        assert await numbers(log, tag("own:7")) == [7]

    assert "is rebuilt" in caplog.text


async def test_no_flipped_bit_gives_a_wrong_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    original = tmp_path / "original"
    async with EventLog.open(original, index=True) as log:
        await fill(log, 200)
    size = (original / "index.sqlite").stat().st_size
    for position in random.Random(5).sample(range(size), 60):
        copy = tmp_path / str(position)
        shutil.copytree(original, copy)
        flip(copy / "index.sqlite", position)
        async with EventLog.open(copy, index=True) as log:
            for n in (0, 77, 199):
                assert await numbers(log, tag(f"own:{n}")) == [n], position
            assert await numbers(log, tag("seven:6")) == list(range(6, 200, 7)), position


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


async def test_closing_does_not_write_an_unchanged_file(data_dir: Path, index_path: Path) -> None:
    async with EventLog.open(data_dir, index=True) as log:
        await fill(log, 10)
    before, changed = index_path.read_bytes(), index_path.stat().st_mtime_ns
    async with EventLog.open(data_dir, index=True) as log:
        assert await numbers(log, tag("own:7")) == [7]

    assert (index_path.read_bytes(), index_path.stat().st_mtime_ns) == (before, changed)


async def test_the_checksum_of_a_closed_file_replaces_a_check_of_its_pairs(
    data_dir: Path, index_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file has a checksum; if it fits, the stored sums are not even looked at."""
    async with EventLog.open(data_dir, index=True) as log:
        await fill(log, 10)

    def falsify_sums() -> None:
        file = store.Store(index_path)
        file.open()
        file._has_checksum = False
        execute(index_path, "UPDATE state SET low = low + 1")
        file.close()

    await asyncio.to_thread(falsify_sums)
    async with EventLog.open(data_dir, index=True) as log:
        assert await numbers(log, tag("own:7")) == [7]
    assert not caplog.records


async def test_a_file_that_lost_pairs_while_it_was_open_is_not_trusted_afterwards(
    data_dir: Path, index_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with EventLog.open(data_dir, index=True) as log:
        await fill(log, 10)
    async with EventLog.open(data_dir, index=True) as log:
        assert await numbers(log, tag("own:7")) == [7]
        execute(index_path, "DELETE FROM pairs WHERE key = ?", key_of_tag("own:7"))
        await fill(log, 10, 10)
    async with EventLog.open(data_dir, index=True) as log:
        assert await numbers(log, tag("own:7")) == [7]
    assert "is rebuilt" in caplog.text


async def test_a_damaged_file_is_abandoned_and_not_trusted_afterwards(
    data_dir: Path, index_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file is damaged while it is open, and SQLite does not notice."""
    async with EventLog.open(data_dir, index=True) as log:
        await fill(log, 5000)
    async with EventLog.open(data_dir, index=True) as log:
        assert await numbers(log, tag("own:7")) == [7]
        damaged = bytearray(index_path.read_bytes())
        for page in range(4096, len(damaged), 4096):
            damaged[page : page + 4096] = bytes(4096)
        with open(index_path, "r+b") as file:
            file.write(damaged)
            file.seek(24)
            file.write(b"\xff\xff\xff\x00")  # as if another process had changed it: SQLite must read it again
        for n in range(5000, 5100):
            await log.append(tagged(n, f"own:{n}"))
        for n in (0, 2345, 4999, 5099):
            assert await numbers(log, tag(f"own:{n}")) == [n]
        with pytest.raises(ConditionalAppendError):
            await log.append_unless([tagged(0, "own:2345")], tag("own:2345"))
    assert "can't be read" in caplog.text
    async with EventLog.open(data_dir, index=True) as log:
        assert await numbers(log, tag("own:2345")) == [2345]


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


async def test_a_copy_of_an_open_index_is_not_trusted(
    tmp_path: Path, data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The copied pages may come from different moments."""
    async with EventLog.open(data_dir, index=True) as log:
        await fill(log, 2 * WRITE_BATCH_SIZE)
        await numbers(log, tag("own:1"))
        shutil.copytree(data_dir, tmp_path / "copy")
    async with EventLog.open(tmp_path / "copy", index=True) as log:
        assert await numbers(log, tag("own:1")) == [1]
    assert "before it was copied" in caplog.text


async def test_the_index_of_a_killed_process_is_brought_up_to_date(data_dir: Path) -> None:
    script = """
import asyncio, sys
from eventfold import Event, EventLog
async def main():
    async with EventLog.open(sys.argv[1], index=True) as log:
        n = 0
        while True:
            await log.append_many([Event("counted", {"n": i}, ts=1, tags=(f"own:{i}",)) for i in range(n, n + 500)])
            n += 500
            print(n, flush=True)
asyncio.run(main())
"""
    for _ in range(3):
        shutil.rmtree(data_dir, ignore_errors=True)
        process = subprocess.Popen([sys.executable, "-c", script, data_dir], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        written = 0
        for line in process.stdout:
            written = int(line)
            if written >= 12_000:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        process.wait()
        async with EventLog.open(data_dir, index=True) as log:
            for n in (0, 5000, written - 1):
                assert await numbers(log, tag(f"own:{n}")) == [n]


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


def test_a_forked_child_can_open_the_index_while_its_parent_uses_it(data_dir: Path) -> None:
    """The parent may even fork during a look-up, although the child has none of its threads."""

    async def child() -> None:
        async with EventLog.open(data_dir, lock=LockMode.SHARED, index=True) as log:
            assert await numbers(log, tag("own:1")) == [1]
            await log.append_unless([tagged(0, f"child:{os.getpid()}")], tag(f"child:{os.getpid()}"))

    async def parent() -> None:
        async with EventLog.open(data_dir, lock=LockMode.SHARED, index=True) as log:
            await fill(log, 100)
            children = []
            reading = asyncio.create_task(look_up(log))
            for _ in range(3):
                await asyncio.sleep(0.01)
                if not (pid := os.fork()):
                    status = 1
                    try:
                        asyncio.events._set_running_loop(None)
                        asyncio.run(asyncio.wait_for(child(), 20))
                        status = 0
                    finally:
                        os._exit(status)
                children.append(pid)
            for pid in children:
                assert (await asyncio.to_thread(os.waitpid, pid, 0))[1] == 0
                assert len(await numbers(log, tag(f"child:{pid}"))) == 1
            reading.cancel()
            assert await numbers(log, tag("own:99")) == [99]

    async def look_up(log: EventLog) -> None:
        while True:
            assert await numbers(log, tag("own:7")) == [7]

    asyncio.run(parent())


async def test_several_processes_share_one_index(data_dir: Path) -> None:
    """Two logs of one directory in the same process stand for them, since each has its own connection."""
    async with (
        EventLog.open(data_dir, lock=LockMode.SHARED, index=True) as one,
        EventLog.open(data_dir, lock=LockMode.SHARED, index=True) as two,
    ):
        for start in range(0, 2 * WRITE_BATCH_SIZE, 1000):
            await fill(one if start % 2000 else two, 1000, start)
        for n in (0, 4321, 2 * WRITE_BATCH_SIZE - 1):
            assert await numbers(one, tag(f"own:{n}")) == [n]
            assert await numbers(two, tag(f"own:{n}")) == [n]

        async def attempt(log: EventLog, n: int) -> bool:
            try:
                await log.append_unless([tagged(n, f"once:{n}")], tag(f"once:{n}"))
            except ConditionalAppendError:
                return False
            return True

        won = await asyncio.gather(*(attempt(log, n) for n in range(100) for log in (one, two)))
        assert sum(won) == 100
    async with EventLog.open(data_dir, index=True) as log:
        assert await numbers(log, tag("own:4321")) == [4321]


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


async def test_the_index_may_be_in_another_directory(data_dir: Path, tmp_path: Path) -> None:
    async with EventLog.open(data_dir, index=tmp_path / "elsewhere.sqlite") as log:
        await fill(log, 10)
        assert await numbers(log, tag("own:3")) == [3]
    assert (tmp_path / "elsewhere.sqlite").exists()
    assert not (data_dir / "index.sqlite").exists()


async def test_a_read_only_log_has_no_index(data_dir: Path) -> None:
    with pytest.raises(ValueError, match="read_only"):
        await EventLog.open(data_dir, index=True, read_only=True)


@pytest.mark.parametrize("seed", range(3))
async def test_random_histories_are_the_same_with_and_without_the_index(tmp_path: Path, seed: int) -> None:
    """The model is a log without an index, which reads every event."""
    random_ = random.Random(seed)

    def query() -> Query:
        found = Query(
            types=random_.sample(["a", "b", "c"], random_.randrange(3)),
            tags=random_.sample(["x", "y", "z"], random_.randrange(1, 3)),
        )
        return found | query() if random_.random() < 0.3 else found

    def events() -> list[Event]:
        return [
            tagged(random_.randrange(100), *random_.sample(["x", "y", "z", "w"], random_.randrange(3)), type=type)
            for type in random_.choices(["a", "b", "c"], k=random_.randrange(1, 4))
        ]

    async def all_of(records: object) -> list[Record]:
        return [record async for record in records]  # type: ignore[attr-defined]

    plain = await EventLog.open(tmp_path / "plain", sync=SyncMode.OS)
    indexed = await EventLog.open(tmp_path / "indexed", sync=SyncMode.OS, index=True)
    offsets = [0]
    try:
        for step in range(150):
            action = random_.random()
            if action < 0.4:
                batch = events()
                results = await plain.append_many(batch)
                assert await indexed.append_many(batch) == results
                offsets.append(results[-1].end_offset)
            elif action < 0.7:
                batch, condition, after = events(), query(), random_.choice(offsets)
                outcomes = []
                for log in (plain, indexed):
                    try:
                        outcomes.append(str(await log.append_unless(batch, condition, after=after)))
                    except ConditionalAppendError as error:
                        outcomes.append(f"conflict at {error.conflict.offset}")
                assert outcomes[0] == outcomes[1], (step, condition, after)
            elif action < 0.95:
                wanted, start = query(), random_.choice(offsets)
                assert await all_of(plain.read_from(start, query=wanted)) == await all_of(
                    indexed.read_from(start, query=wanted)
                )
                assert await all_of(plain.read_back(start, query=wanted)) == await all_of(
                    indexed.read_back(start, query=wanted)
                )
            elif action < 0.975:
                await plain.rotate()
                await indexed.rotate()
            else:
                await indexed.aclose()
                indexed = await EventLog.open(tmp_path / "indexed", sync=SyncMode.OS, index=True)
    finally:
        await plain.aclose()
        await indexed.aclose()


async def test_a_condition_on_types_alone_is_checked_by_reading_the_log(data_dir: Path) -> None:
    async with EventLog.open(data_dir, index=True) as log:
        await log.append_unless([tagged(0)], Query(types={"counted"}))
        with pytest.raises(ConditionalAppendError):
            await log.append_unless([tagged(1)], Query(types={"counted"}))
        await log.append_unless([tagged(1)], Query(types={"counted"}), after=log.head.offset)


def test_a_fork_waits_for_the_end_of_a_transaction(tmp_path: Path) -> None:
    """Otherwise the child would roll the transaction back when it ends."""
    reached, go_on, forked = threading.Event(), threading.Event(), threading.Event()

    class Pairs(dict[int, int | list[int]]):
        def __iter__(self) -> Iterator[int]:
            reached.set()
            assert go_on.wait(10)
            return super().__iter__()

    def fork() -> None:
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        forked.set()

    index = store.Store(tmp_path / "index.sqlite")
    index.open()
    adding = threading.Thread(target=index.add, args=(0, Head(10, "x"), Pairs({1: 0, 2: [0, 5]})))
    adding.start()
    assert reached.wait(10)
    forking = threading.Thread(target=fork)
    forking.start()
    assert not forked.wait(0.1)
    go_on.set()
    assert forked.wait(10)
    adding.join()
    forking.join()
    assert index.find([(1, 0), (2, 1), (3, 0)], 10) == {
        (1, 0): store.StoredOffsets([0], True),
        (2, 1): store.StoredOffsets([5], True),
    }
    index.close()
