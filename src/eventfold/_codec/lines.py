"""A block of whole lines: what an engine and the modules above it pass to each other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import msgspec
from xxhash import xxh64_hexdigest

# How many bytes are decoded at once: few enough for the processor's cache, and not to hold the event loop for long.
SLICE_SIZE = 64 * 1024


class Lines(msgspec.Struct, frozen=True, gc=False):
    """A block of whole lines, and the offset in the whole log at which it begins."""

    path: Path | str
    start_offset: int
    data: bytes
    # Pairs (position in `data`, offset): one for the start, for each position after which offsets do not simply count
    # bytes from the previous pair, and for the end. Empty if all offsets count bytes from `start_offset`.
    offset_map: tuple[tuple[int, int], ...] = ()

    @property
    def end_offset(self) -> int:
        """The offset in the whole log at which the block ends."""
        return self.offset_at(len(self.data))

    def offset_at(self, position: int) -> int:
        """The offset in the whole log of a position in `data`."""
        if not self.offset_map or position < self.offset_map[1][0]:  # usually, the position is before the first jump
            return self.start_offset + position
        known_position, offset = self.offset_map[bisect_right(self.offset_map, (position, 1 << 80)) - 1]
        return offset + position - known_position

    def part(self, start: int, end: int) -> Lines:
        """The lines from one position to another."""
        first = self.offset_at(start)
        if not self.offset_map:
            return Lines(self.path, first, self.data[start:end])
        inner = tuple((position - start, offset) for position, offset in self.offset_map if start < position < end)
        return Lines(self.path, first, self.data[start:end], ((0, first), *inner, (end - start, self.offset_at(end))))

    def chunks(self, size: int = SLICE_SIZE, start: int = 0) -> Iterator[Lines]:
        """The lines from a position onwards, in chunks of at most `size` bytes or of one longer line."""
        while start < len(self.data):
            end = self.data.rfind(b"\n", start, start + size) + 1 or self.data.index(b"\n", start) + 1
            yield self.part(start, end)
            start = end

    def chunks_backwards(self, size: int = SLICE_SIZE) -> Iterator[Lines]:
        """All lines, in chunks of about the same size, from the last chunk to the first."""
        end = len(self.data)
        while end > size:
            # A chunk begins after the newline of an earlier line, never after its own last newline.
            start = self.data.find(b"\n", end - size, end - 1) + 1 or self.data.rfind(b"\n", 0, end - 1) + 1
            yield self.part(start, end)
            end = start
        if end:
            yield self.part(0, end)


def split_lines(data: bytes) -> list[bytes]:
    """The lines in `data`, each with its newline."""
    # Takes a third of the time of `split`; `splitlines` would also split at carriage returns.
    return list(BytesIO(data))


def last_line(data: bytes) -> bytes:
    """The last line in `data`, which consists of at least one whole line."""
    return data[data.rfind(b"\n", 0, -1) + 1 :]


def last_line_hash(data: bytes) -> str:
    """The hash of the last line in `data`."""
    # Without calls of `last_line` and `line_hash`, since each commit needs it.
    return xxh64_hexdigest(data[data.rfind(b"\n", 0, -1) + 1 : -1])


def join(blocks: list[Lines]) -> Lines:
    """Joins consecutive blocks into one."""
    if len(blocks) == 1:
        return blocks[0]
    first = blocks[0]
    data = b"".join(lines.data for lines in blocks)
    if not first.offset_map:
        return Lines(first.path, first.start_offset, data)
    # A dict, since the end of one block and the start of the next are the same position.
    offset_map: dict[int, int] = {}
    size = 0
    for lines in blocks:
        offset_map.update((size + position, offset) for position, offset in lines.offset_map)
        size += len(lines.data)
    return Lines(first.path, first.start_offset, data, tuple(offset_map.items()))
