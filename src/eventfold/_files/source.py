"""A directory of plain files as a `Source`."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncGenerator, Generator, Sequence
from pathlib import Path
from time import monotonic

from .._codec.lines import Lines
from .._documents import acquired, is_name
from .._event import Head
from .._threads import in_thread, quick_in_thread, start_in_thread
from . import operations
from .named_lock import NamedLock
from .paths import Layout
from .segments import BLOCK_SIZE, LogSegments
from .watcher import Directory, directory_at

# The size of the first block in bytes. Later blocks have up to `BLOCK_SIZE`.
_FIRST_BLOCK_SIZE = 64 * 1024
# How many bytes each further call reads of a document that one call did not read completely.
_READ_SIZE = 64 * 1024**2
# Seconds that a reader takes for a block: blocks grow for one that takes less than the first value, and are small again
# for one that takes more than the second.
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
        if kind == "view":
            # A snapshot is locked only while it is replaced, so one lock is enough for all of them.
            return await acquired(start_in_thread(lambda: NamedLock.acquire_directory(path.parent)))
        lock_path = self._layout.document_lock_path(path)
        return await acquired(start_in_thread(lambda: NamedLock.acquire(lock_path)))

    async def names(self, kind: str) -> list[str]:
        example = self.location(kind, "x")
        return await in_thread(_names, example.parent, example.name.removeprefix("x"))


class FileSource:
    """The log in one directory of plain files. The constructor does no I/O, and nothing is open between calls."""

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
            self.directory = await in_thread(directory_at, self.layout.dir)
        return self.directory

    async def head(self) -> Head:
        directory = self.directory or await self.waiters()
        durable = directory.durable_head
        return await quick_in_thread(directory.head_cache.head) if durable is None else durable

    async def base(self) -> int:
        return await in_thread(_base, self.layout)

    async def block_before(self, offset: int) -> Lines:
        return await in_thread(_block_before, self.layout, offset)

    async def lines_at(self, offsets: Sequence[int]) -> list[Lines]:
        return await in_thread(_lines_at, self.layout, offsets)

    async def line_hash_before(self, offset: int) -> str:
        durable = None if self.directory is None else self.directory.durable_head
        if durable is not None and durable.offset == offset:
            return durable.line_hash  # the usual case for a snapshot that was saved when the log was closed
        return await in_thread(_line_hash_before, self.layout, offset)

    async def aclose(self) -> None:
        """Does nothing, since nothing is open between calls."""

    async def blocks(self, start: Head, end: int) -> AsyncGenerator[Lines, None]:
        """See `Source.blocks`. Until it is closed, it keeps the files open and one block in memory."""
        blocks = _Blocks(self.layout, start, end)
        next_block = start_in_thread(blocks.next)
        try:
            while (block := await next_block) is not None:
                # The next block is read and decompressed while this one is decoded.
                next_block = start_in_thread(blocks.next)
                yielded = monotonic()
                yield block
                blocks.adapt_size(monotonic() - yielded)
        finally:
            try:
                await next_block
            except Exception:  # noqa: S110
                pass  # raised above, or that block is no longer needed
            finally:
                blocks.close()


def _base(layout: Layout) -> int:
    with LogSegments(layout) as segments:
        return segments.base


def _block_before(layout: Layout, offset: int) -> Lines:
    with LogSegments(layout) as segments:
        return segments.block_before(offset)


def _lines_at(layout: Layout, offsets: Sequence[int]) -> list[Lines]:
    with LogSegments(layout) as segments:
        return [segments.line_at(offset) for offset in offsets]


def _line_hash_before(layout: Layout, offset: int) -> str:
    with LogSegments(layout) as segments:
        return segments.line_hash_before(offset)


class _Blocks:
    """The blocks from one offset to another, one per call of `next`. Files stay open until the last block or `close`.

    The blocks are small at first, and grow if their reader is fast, so even many slow readers need little memory.
    """

    def __init__(self, layout: Layout, start: Head, end: int) -> None:
        self._end = end
        self._closed = False
        self._size = _FIRST_BLOCK_SIZE
        self._blocks = self._read(layout, start, end)

    def _read(self, layout: Layout, start: Head, end: int) -> Generator[Lines, None, None]:
        with LogSegments(layout) as segments:
            if start.line_hash:
                segments.check_line_before(start)
            yield from segments.lines(start.offset, end, lambda: self._size)

    def adapt_size(self, seconds: float) -> None:
        """Adapts the size of the next blocks to the time that the reader took for one."""
        if seconds < _QUICK:
            self._size = min(2 * self._size, BLOCK_SIZE)
        elif seconds > _SLOW:
            self._size = _FIRST_BLOCK_SIZE

    def next(self) -> Lines | None:
        if self._closed:
            return None
        block = next(self._blocks, None)
        if block is None or block.end_offset == self._end:
            self.close()
        return block

    def close(self) -> None:
        self._closed = True
        self._blocks.close()


def _names(directory: Path, suffix: str) -> list[str]:
    try:
        files = os.listdir(directory)
    except FileNotFoundError:
        return []
    # Other files that somebody has put there, such as a copy with a space in its name, are not documents.
    return sorted(name for file in files if file.endswith(suffix) and is_name(name := file.removesuffix(suffix)))


def _read(path: Path) -> bytes | None:
    try:
        # O_NONBLOCK, since opening a pipe that somebody has put there must not wait for its other end.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file; move it away", str(path))
        data = os.read(fd, status.st_size + 1)
        # One call reads at most 2 GiB. The size may change meanwhile only if another program writes to the file.
        while len(data) != status.st_size and (chunk := os.read(fd, _READ_SIZE)):
            data += chunk
        return data
    finally:
        os.close(fd)
