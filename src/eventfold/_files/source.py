"""A directory of plain files as a `Source`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Generator
from pathlib import Path

from .._aio import in_thread, start_in_thread, uninterrupted
from .._codec.lines import Lines
from .._event import Head
from . import operations
from .paths import Layout
from .segments import LogSegments
from .watcher import Directory, directory


class FileDocuments:
    def __init__(self, layout: Layout) -> None:
        self._paths = {"view": layout.snapshot_path, "consumer": layout.consumer_path}

    def location(self, kind: str, name: str) -> Path:
        return self._paths[kind](name)

    async def load(self, kind: str, name: str) -> bytes | None:
        return await in_thread(_read, self.location(kind, name))

    async def store(self, kind: str, name: str, data: bytes) -> None:
        await in_thread(operations.replace_file, self.location(kind, name), data)

    async def delete(self, kind: str, name: str) -> None:
        await in_thread(self.location(kind, name).unlink, True)

    async def names(self, kind: str) -> list[str]:
        return await in_thread(_names, self._paths[kind]("x"))


class FileSource:
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
        known = (self.directory or await self.waiters()).durable_head
        return await in_thread(_head, self.layout) if known is None else known

    async def base(self) -> int:
        return await in_thread(_base, self.layout)

    async def line_hash_before(self, offset: int) -> str:
        return await in_thread(_line_hash_before, self.layout, offset)

    async def aclose(self) -> None:
        """Nothing is held open between two calls."""

    async def blocks(self, start: Head, end: int) -> AsyncGenerator[Lines, None]:
        blocks = _Blocks(self.layout, start, end)
        ahead = start_in_thread(blocks.next)
        try:
            while (block := await uninterrupted(ahead)) is not None:
                # The next block is read, and decompressed, while this one is decoded.
                ahead = start_in_thread(blocks.next)
                yield block
        finally:
            if not ahead.done():
                await asyncio.wait([ahead])
            blocks.close()


def _head(layout: Layout) -> Head:
    with LogSegments(layout) as parts:
        return parts.head()


def _base(layout: Layout) -> int:
    with LogSegments(layout) as parts:
        return parts.base


def _line_hash_before(layout: Layout, offset: int) -> str:
    with LogSegments(layout) as parts:
        return parts.line_hash_before(offset)


class _Blocks:
    """The blocks from one offset to another, one a call; holds files open until the last one, or until closed."""

    def __init__(self, layout: Layout, start: Head, end: int) -> None:
        self._end = end
        self._at_end = False
        self._blocks = self._read(layout, start, end)

    @staticmethod
    def _read(layout: Layout, start: Head, end: int) -> Generator[Lines, None, None]:
        with LogSegments(layout) as parts:
            if start.line_hash:
                parts.check_line_before(start)
            yield from parts.lines(start.offset, end)

    def next(self) -> Lines | None:
        if self._at_end:
            return None
        block = next(self._blocks, None)
        if block is None or block.start_offset + len(block.data) == self._end:
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
    return sorted(f.removesuffix(ending) for f in files if f.endswith(ending) and not f.startswith("."))


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
