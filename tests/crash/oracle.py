"""The oracle: what a log must contain, whatever happened to it, and where it may end."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.support import event, line

from eventfold import EventLog, EventReader, Head, Record, line_hash
from eventfold._files import recovery
from eventfold._files import rotation as rotations
from eventfold._files.active import ActiveLog
from eventfold._files.paths import Layout
from eventfold._files.segments import LogSegments

try:
    from compression import zstd
except ImportError:
    from backports import zstd

NEW = 9_000_000


class Oracle:
    """A whole log as bytes, with the offsets at which a crash may let it end."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = b""
        self.ends = {0}
        if data:
            for one in data.splitlines(keepends=True):
                self.add(one)

    def add(self, data: bytes) -> None:
        """Adds one line, or the lines of one batch."""
        self.data += data
        self.ends.add(len(self.data))

    def head(self, offset: int) -> Head:
        """Returns the head of the log that ends at this offset."""
        return Head(offset, line_hash(self.data[:offset].splitlines()[-1]) if offset else "")

    def check_records(self, records: list[Record], acknowledged: int) -> int:
        """Asserts that these are exactly the events from 0 to an allowed end; returns that end."""
        offset = 0
        for record in records:
            text = self.data[offset : record.end_offset]
            assert record.start_offset == offset
            assert text.endswith(b"\n")
            assert text.count(b"\n") == 1
            assert record.line_hash == line_hash(text)
            found = json.loads(text)
            assert (record.event.type, record.event.data, record.event.ts) == (
                found["type"],
                found["data"],
                found["ts"],
            )
            offset = record.end_offset
        assert offset in self.ends
        assert offset >= acknowledged
        return offset


def read_now(directory: Path) -> tuple[Head, bytes]:
    """Returns the head and all lines up to it, read without a writer and without an event loop."""
    with LogSegments(Layout(directory)) as parts:
        head = parts.head()
        return head, b"".join(lines.data for lines in parts.lines(0, head.offset))


def append(active: ActiveLog, data: bytes, sync: bool = True) -> Head:
    """Commits complete lines as a writer would; returns the head."""
    head = Head(active.head.offset + len(data), line_hash(data.splitlines()[-1]))
    active.commit(data, head, sync)
    return head


def rotate(layout: Layout, active: ActiveLog) -> int:
    """Runs a whole rotation, after finishing an interrupted one; returns the old file's descriptor."""
    rotation = recovery.recover(layout, active.fd) or rotations.begin(layout, active)
    try:
        rotation.archive(active)
        rotation.catch_up(active)
        return rotation.switch(active)
    finally:
        rotation.close()


class Opened:
    """A log opened for writing without an event loop; closes all its descriptors at the end of a `with`."""

    def __init__(self, directory: Path) -> None:
        self.layout = Layout(directory)
        self.active, self._old = recovery.open_log(self.layout, True)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._old:
            os.close(fd)
        self.active.close()

    def rotate(self) -> None:
        """Runs a whole rotation."""
        self._old.append(rotate(self.layout, self.active))


def check_files(directory: Path, oracle: Oracle, acknowledged: int, opener: type[Opened] = Opened) -> None:
    """Asserts that a log is intact after a crash: for a reader, for a writer, and after an append and a rotation."""
    head, data = read_now(directory)
    assert head.offset in oracle.ends
    assert head.offset >= acknowledged
    assert head == oracle.head(head.offset)
    assert data == oracle.data[: head.offset]
    with opener(directory) as opened:
        assert opened.active.head == head
        assert read_now(directory) == (head, data)
        data += line(NEW)
        append(opened.active, line(NEW))
        assert read_now(directory) == (opened.active.head, data)
        opened.rotate()
        assert read_now(directory) == (opened.active.head, data)
        assert opened.active.base == len(data)
    check_archive(directory, data)


def check_archive(directory: Path, data: bytes) -> None:
    """Asserts that a plain decoder finds exactly these lines in the archive, and that no rotation is under way."""
    assert zstd.decompress((directory / "archive.jsonl.zst").read_bytes()) == data
    assert not list(directory.glob("app.jsonl.next.*"))


async def read(directory: Path) -> list[Record]:
    """Returns all events, read as another process would."""
    return [record async for record in EventReader(directory).read_full()]


async def check_directory(directory: Path, oracle: Oracle, acknowledged: int) -> None:
    """Asserts the same as `check_files`, through public names."""
    end = oracle.check_records(await read(directory), acknowledged)
    reader = EventReader(directory)
    assert await reader.head() == oracle.head(end)
    if end:
        assert await reader.read_line_hash_before(end) == oracle.head(end).line_hash
    async with EventLog.open(directory) as log:
        assert log.head == oracle.head(end)
        assert oracle.check_records([record async for record in log.read_full()], end) == end
        new = Oracle(oracle.data[:end] + line(NEW))
        result = await log.append_if(event(NEW), *log.head)
        assert result.start_offset == end
        assert new.check_records(await read(directory), len(new.data)) == len(new.data)
        await log.rotate()
        assert await log.active_log_size() == 0
        assert new.check_records(await read(directory), len(new.data)) == len(new.data)
        assert log.head == new.head(len(new.data))
    check_archive(directory, new.data)
