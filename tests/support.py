"""What the tests share: small events, the content of a log, and the fault injector for file operations."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from eventfold import Event, EventReader, Head, Record, _view, line_hash
from eventfold._codec.lines import Lines
from eventfold._files import archive, operations, rotation
from eventfold._files.base_file import BaseFile, Generation
from eventfold._files.source import FileSource
from eventfold._fold import Fold

START = 1_700_000_000


def event(n: int, type: str = "counted", **options: Any) -> Event:
    """Returns an event that is identified by its number."""
    return Event(type, {"n": n}, ts=START + n, **options)


def line(n: int, type: str = "counted", batch: str = "") -> bytes:
    """Returns the line of `event(n, type)`, or that of a line of a batch (`batch` as in "1,3")."""
    tail = f',"batch":[{batch}]' if batch else ""
    return f'{{"type":"{type}","data":{{"n":{n}}},"ts":{START + n}{tail}}}\n'.encode()


def write_log(directory: Path, *lines: bytes) -> bytes:
    """Creates a data directory whose active log has these bytes, and returns them."""
    directory.mkdir(parents=True, exist_ok=True)
    data = b"".join(lines)
    (directory / "app.jsonl").write_bytes(data)
    return data


def small_frames(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Makes archive frames, and the chunks in which they are read, so small that a few events fill several."""
    monkeypatch.setattr(rotation, "FRAME_SIZE", size)
    monkeypatch.setattr(archive, "WHOLE_SIZE", 2 * size)
    monkeypatch.setattr(archive, "PART_SIZE", size // 4)


async def records(reader: Any, offset: int = 0) -> list[Record]:
    """Returns all records from an offset; `reader` is anything that has `read_from`."""
    return [record async for record in reader.read_from(offset)]


async def numbers(reader: Any) -> list[int]:
    """Returns the numbers of all events in the log."""
    return [record.event.data["n"] for record in await records(reader)]


async def check_log(directory: Path) -> None:
    """Reads a whole log and checks that its offsets chain and its hashes match."""
    reader = EventReader(directory)
    head = await reader.head()
    offset, last, looked_up = 0, "", 0
    async for record in reader.read_full():
        assert record.end_offset > record.start_offset >= offset
        offset, last = record.end_offset, record.line_hash
        if looked_up < 20:
            assert await reader.read_line_hash_before(offset) == last
            looked_up += 1
    assert (offset, last) == head


def recorded_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that gets the start offset of every pass of views over a log from now on."""
    passes: list[int] = []
    fold_together = _view.fold_together

    def recorded(folds: Sequence[Fold[Any]], *args: Any) -> Any:
        passes.append(folds[0].position.offset)
        return fold_together(folds, *args)

    monkeypatch.setattr(_view, "fold_together", recorded)
    return passes


@contextlib.asynccontextmanager
async def counted_turns() -> AsyncIterator[list[int]]:
    """Counts the turns that the event loop gives to another task while the block runs; yields `[count]`."""
    turns = [0]

    async def count() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await settle()
    turns[0] = 0
    try:
        yield turns
    finally:
        counting.cancel()


async def settle() -> None:
    """Lets every task run until it waits for something other than the loop."""
    for _ in range(10):
        await asyncio.sleep(0)


class Gate:
    """A gate before a file operation: a thread that reaches it waits until the gate is opened."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._opened = threading.Event()

    def open(self) -> None:
        """Lets the operation continue."""
        self._opened.set()

    async def reached(self) -> None:
        """Waits until a thread has reached the gate."""
        assert await asyncio.to_thread(self._reached.wait, 10), "nobody came to the gate"

    def pass_through(self) -> None:
        """The replaced operation calls this first."""
        self._reached.set()
        assert self._opened.wait(30), "nobody opened the gate"


def recorded_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that gets the start offset of every read of a log in files from now on."""
    starts: list[int] = []
    blocks = FileSource.blocks

    def noted(source: FileSource, start: Head, end: int) -> AsyncGenerator[Lines, None]:
        starts.append(start.offset)
        return blocks(source, start, end)

    monkeypatch.setattr(FileSource, "blocks", noted)
    return starts


class FaultInjector:
    """Replaces operations of `eventfold._files.operations` with ones that are counted, fail, or wait at a gate.

    The operations that replace the base file are left alone, since they happen only before the first line.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._replacing_base = threading.local()
        self.gates: list[Gate] = []
        original = BaseFile.write

        def write(file: BaseFile, generation: Generation) -> None:
            self._replacing_base.now = True
            try:
                original(file, generation)
            finally:
                self._replacing_base.now = False

        monkeypatch.setattr(BaseFile, "write", write)

    def replace(self, name: str, wrap: Callable[..., Any]) -> None:
        """Replaces the operation `name` with `wrap(original, *args)`."""
        original = getattr(operations, name)

        def replacement(*args: Any) -> Any:
            if getattr(self._replacing_base, "now", False):
                return original(*args)
            return wrap(original, *args)

        self._monkeypatch.setattr(operations, name, replacement)

    def count(self, name: str) -> list[tuple[Any, ...]]:
        """Returns a list that gets the arguments of every call from now on."""
        calls: list[tuple[Any, ...]] = []

        def counted(original: Callable[..., Any], *args: Any) -> Any:
            calls.append(args)
            return original(*args)

        self.replace(name, counted)
        return calls

    def fail(self, name: str, times: int = 1, number: int = errno.EIO) -> None:
        """Makes the next `times` calls fail; later calls succeed."""
        left = [times]

        def failing(original: Callable[..., Any], *args: Any) -> Any:
            if left[0]:
                left[0] -= 1
                raise OSError(number, "made to fail")
            return original(*args)

        self.replace(name, failing)

    def freeze(self, name: str) -> Gate:
        """Makes all calls from now on wait at a gate."""
        gate = Gate()
        self.gates.append(gate)

        def frozen(original: Callable[..., Any], *args: Any) -> Any:
            gate.pass_through()
            return original(*args)

        self.replace(name, frozen)
        return gate


__all__ = [
    "START",
    "FaultInjector",
    "Gate",
    "check_log",
    "event",
    "line",
    "line_hash",
    "numbers",
    "records",
    "settle",
    "write_log",
]


def free_port() -> int:
    """Returns a free port of the loopback address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def no_thread(self: threading.Thread) -> None:
    """In place of `Thread.start`, this is what happens when the process may not have another thread."""
    raise RuntimeError("can't start new thread")
