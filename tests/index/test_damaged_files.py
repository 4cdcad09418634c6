"""An index file that is damaged, outdated or of another log is noticed, and never gives a wrong answer."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.index.events import WRITE_BATCH_SIZE, fill, numbers, tag, tagged

from eventfold import (
    ConditionalAppendError,
    EventLog,
)
from eventfold._codec.keys import key_of_tag
from eventfold._index import store


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


async def test_a_file_that_was_recreated_while_it_was_open_is_not_trusted(
    data_dir: Path, tmp_path: Path, index_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After a program has emptied the file, the next process that opens it creates the tables in the same file."""
    async with EventLog.open(tmp_path / "new", index=True):
        pass
    recreated = bytearray((tmp_path / "new" / "index.sqlite").read_bytes())
    recreated[24:28] = b"\xff\xff\xff\x00"  # the counter by which SQLite notices that another process wrote the file
    async with EventLog.open(data_dir, index=True) as log:
        await fill(log, 10)
    async with EventLog.open(data_dir, index=True) as log:
        assert await numbers(log, tag("own:7")) == [7]
        with open(index_path, "r+b") as file:
            file.truncate()
            file.write(recreated)
        assert await numbers(log, tag("own:7")) == [7]
        with pytest.raises(ConditionalAppendError):
            await log.append_unless([tagged(0, "own:7")], tag("own:7"))
    assert "can't be read" in caplog.text


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
