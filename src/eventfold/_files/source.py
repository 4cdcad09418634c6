"""A directory of plain files as a `Source`."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic

from .._codec.lines import Lines
from .._engine import is_name
from .._event import Head
from .._threads import in_thread, quick_in_thread, start_in_thread
from . import operations
from .named_lock import NamedLock
from .paths import Layout
from .segments import BLOCK_SIZE, LogSegments
from .watcher import Directory, directory

# The size of a read's first block, in bytes. Later ones have up to `BLOCK_SIZE`.
_FIRST_BLOCK_SIZE = 64 * 1024
# How much is read at a time of what one call left of a document, in bytes.
_READ_SIZE = 64 * 1024**2
# Seconds per block: below the first value, the next block may be larger; above the second, blocks start small again.
_QUICK, _SLOW = 0.1, 1.0


class FileDocuments:
    """The documents beside a log in files: `views/NAME.snapshot.json` and `consumers/NAME.json`."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._paths = {"view": layout.snapshot_path, "consumer": layout.consumer_path}

    def location(self, kind: str, name: str) -> Path:
        return self._paths[kind](name)

    async def load(self, kind: str, name: str) -> bytes | None:
        path = self.location(kind, name)
        return await quick_in_thread(lambda: _read(path))

    async def store(self, kind: str, name: str, data: bytes) -> None:
        await in_thread(operations.replace_file, self.location(kind, name), data)

    async def delete(self, kind: str, name: str) -> None:
        await in_thread(self.location(kind, name).unlink, True)

    async def lock(self, kind: str, name: str) -> NamedLock | None:
        path = self.location(kind, name)
        # A snapshot's lock is held only while it is replaced, so one for all of them is enough: that of their
        # directory.
        take = NamedLock.take_directory if kind == "view" else NamedLock.take
        lock_path = path.parent if kind == "view" else self._layout.document_lock_path(path)
        taking = start_in_thread(lambda: take(lock_path))
        try:
            return await taking
        except asyncio.CancelledError:
            # Nobody owns what the thread took.
            with suppress(OSError):  # as nobody asks for it any more
                if (lock := taking.result()) is not None:
                    lock.release()
            raise
        finally:
            del taking

    async def names(self, kind: str) -> list[str]:
        return await in_thread(_names, self._paths[kind]("x"))


class FileSource:
    """The log in one directory of plain files. Creating one does no I/O, and nothing is open between calls."""

    def __init__(self, dir: str | os.PathLike[str]) -> None:
        self.layout = Layout(dir)
        self.documents = FileDocuments(self.layout)
        self.directory: Directory | None = None

    @property
    def location(self) -> Path:
        return self.layout.log_path

    async def identity(self) -> str:
        return await in_thread(os.path.realpath, self.layout.dir)

    async def waiters(self) -> Directory:
        if self.directory is None:
            self.directory = await in_thread(directory, self.layout.dir)
        return self.directory

    async def head(self) -> Head:
        directory = self.directory or await self.waiters()
        known = directory.durable_head
        return await quick_in_thread(directory.lookup.head) if known is None else known

    async def base(self) -> int:
        return await in_thread(_base, self.layout)

    async def block_before(self, offset: int) -> Lines:
        return await in_thread(_block_before, self.layout, offset)

    async def lines_at(self, offsets: Sequence[int]) -> list[Lines]:
        return await in_thread(_lines_at, self.layout, offsets)

    async def line_hash_before(self, offset: int) -> str:
        known = None if self.directory is None else self.directory.durable_head
        if known is not None and known.offset == offset:
            return known.line_hash  # as for a snapshot that was saved when the log was closed
        return await in_thread(_line_hash_before, self.layout, offset)

    async def aclose(self) -> None:
        """Does nothing, since nothing is open between calls."""

    async def blocks(self, start: Head, end: int) -> AsyncGenerator[Lines, None]:
        """See `Source`. Keeps the files open, and one block besides the last one, until it is closed."""
        blocks = _Blocks(self.layout, start, end)
        ahead = start_in_thread(blocks.next)
        try:
            while (block := await ahead) is not None:
                # The next block is read, and decompressed, while this one is decoded.
                ahead = start_in_thread(blocks.next)
                given = monotonic()
                yield block
                blocks.keep_up(monotonic() - given)
        finally:
            try:
                await ahead
            except Exception:  # noqa: S110
                pass  # raised above, or that block is no longer needed
            finally:
                blocks.close()


def _base(layout: Layout) -> int:
    with LogSegments(layout) as parts:
        return parts.base


def _block_before(layout: Layout, offset: int) -> Lines:
    with LogSegments(layout) as parts:
        return parts.block_before(offset)


def _lines_at(layout: Layout, offsets: Sequence[int]) -> list[Lines]:
    with LogSegments(layout) as parts:
        return [parts.line_at(offset) for offset in offsets]


def _line_hash_before(layout: Layout, offset: int) -> str:
    with LogSegments(layout) as parts:
        return parts.line_hash_before(offset)


class _Blocks:
    """The blocks from one offset to another, one per call; keeps files open until the last one, or until closed.

    Blocks are small at first and grow while their reader keeps up, so that many slow readers need little memory.
    """

    def __init__(self, layout: Layout, start: Head, end: int) -> None:
        self._end = end
        self._at_end = False
        self._size = _FIRST_BLOCK_SIZE
        self._blocks = self._read(layout, start, end)

    def _read(self, layout: Layout, start: Head, end: int) -> Generator[Lines, None, None]:
        with LogSegments(layout) as parts:
            if start.line_hash:
                parts.check_line_before(start)
            yield from parts.lines(start.offset, end, lambda: self._size)

    def keep_up(self, seconds: float) -> None:
        """Adapts the size of the next blocks to how long the reader took for one."""
        if seconds < _QUICK:
            self._size = min(2 * self._size, BLOCK_SIZE)
        elif seconds > _SLOW:
            self._size = _FIRST_BLOCK_SIZE

    def next(self) -> Lines | None:
        if self._at_end:
            return None
        block = next(self._blocks, None)
        if block is None or block.end_offset == self._end:
            self.close()
        return block

    def close(self) -> None:
        self._at_end = True
        self._blocks.close()


def _names(example: Path) -> list[str]:
    ending = example.name.removeprefix("x")
    try:
        files = os.listdir(example.parent)
    except FileNotFoundError:
        return []
    # Anything else that somebody has put there, such as a copy with a space in its name, is not a document.
    return sorted(name for file in files if file.endswith(ending) and is_name(name := file.removesuffix(ending)))


def _read(path: Path) -> bytes | None:
    try:
        # Whatever somebody has put there: opening a pipe must not wait for its other end.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file; move it away", str(path))
        data = os.read(fd, status.st_size + 1)
        # One call reads at most 2 GiB, and somebody may write to a document, although it is always replaced as a whole.
        while len(data) != status.st_size and (chunk := os.read(fd, _READ_SIZE)):
            data += chunk
        return data
    finally:
        os.close(fd)
