"""A block of whole lines, which is what travels between an engine and everything above it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import msgspec
from xxhash import xxh64_hexdigest

# How much is decoded at once (bytes): small enough for the processor's cache, and not to block the event loop for long.
SLICE_SIZE = 64 * 1024


class Lines(msgspec.Struct, frozen=True, gc=False):
    """Whole lines of one file, and the offset in the whole log at which they begin."""

    path: Path | str
    start_offset: int
    data: bytes
    # (position in `data`, offset) at the start, wherever offsets jump, and at the end; empty if they count bytes.
    marks: tuple[tuple[int, int], ...] = ()

    @property
    def end_offset(self) -> int:
        """The offset in the whole log at which they end."""
        return self.offset_at(len(self.data))

    def offset_at(self, position: int) -> int:
        """The offset in the whole log of a position in `data`."""
        if not self.marks or position < self.marks[1][0]:  # the usual case: it is before the first jump
            return self.start_offset + position
        at, offset = self.marks[bisect_right(self.marks, (position, 1 << 80)) - 1]
        return offset + position - at

    def part(self, start: int, end: int) -> Lines:
        """The lines from one position to another."""
        first = self.offset_at(start)
        if not self.marks:
            return Lines(self.path, first, self.data[start:end])
        inner = tuple((at - start, offset) for at, offset in self.marks if start < at < end)
        return Lines(self.path, first, self.data[start:end], ((0, first), *inner, (end - start, self.offset_at(end))))

    def cut(self, size: int = SLICE_SIZE, start: int = 0) -> Iterator[Lines]:
        """The lines from a position onwards, in chunks of about `size` bytes or of one longer line."""
        while start < len(self.data):
            end = self.data.rfind(b"\n", start, start + size) + 1 or self.data.index(b"\n", start) + 1
            yield self.part(start, end)
            start = end

    def cut_back(self, size: int = SLICE_SIZE) -> Iterator[Lines]:
        """The same as `cut`, from the last chunk to the first."""
        end = len(self.data)
        while end > size:
            # A chunk ends with its own newline, which is not the one after which it begins.
            start = self.data.find(b"\n", end - size, end - 1) + 1 or self.data.rfind(b"\n", 0, end - 1) + 1
            yield self.part(start, end)
            end = start
        if end:
            yield self.part(0, end)


def texts_of(data: bytes) -> list[bytes]:
    """The lines, each with its newline."""
    # A third of the time of `split`; `splitlines` would also cut at carriage returns.
    return list(BytesIO(data))


def last_line(data: bytes) -> bytes:
    """The last line in `data`, which consists of at least one whole line."""
    return data[data.rfind(b"\n", 0, -1) + 1 :]


def last_line_hash(data: bytes) -> str:
    """The hash of that line."""
    # Without calls of `last_line` and `line_hash`: each commit needs it.
    return xxh64_hexdigest(data[data.rfind(b"\n", 0, -1) + 1 : -1])


def join(blocks: list[Lines]) -> Lines:
    """Joins lines that follow each other."""
    if len(blocks) == 1:
        return blocks[0]
    first = blocks[0]
    data = b"".join(lines.data for lines in blocks)
    if not first.marks:
        return Lines(first.path, first.start_offset, data)
    marks: dict[int, int] = {}
    at = 0
    for lines in blocks:
        marks.update((at + position, offset) for position, offset in lines.marks)
        at += len(lines.data)
    return Lines(first.path, first.start_offset, data, tuple(marks.items()))
