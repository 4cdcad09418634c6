"""Reads the archive: where it ends, and its lines from an offset onwards.

Promises: if the archive ends with a record, its end is found in one read; lines that a record describes are verified
before they are yielded; memory is bounded by a few frames, whatever the size of the archive. Damage raises a
`CorruptLogError` after all lines before it have been yielded.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import xxhash

from .._codec.lines import Lines, join
from .._errors import CorruptLogError
from .._event import Head
from .frames import (
    CHECKSUM_FLAG,
    ZSTD_MAGIC,
    DamagedError,
    Span,
    Tally,
    UnfinishedError,
    decompressed,
    read_frame,
    record_before,
    walk,
)
from .span_lookup import span_containing

# In bytes of lines: a span of up to this size, such as each of our frames, is decompressed as a whole.
WHOLE_SIZE = 8 * 1024 * 1024
# The block size for larger spans: all frames that the Rust crate wrote may share one record.
PART_SIZE = 1024 * 1024
_CACHED_FRAMES = 4
_CACHED_WALKS = 8


class Archive:
    """An archive, opened to read its first `size` bytes. Close it.

    `head` is the offset after its last line, with that line's hash. `end_position` (bytes in the file) is where its
    last whole frame or record ends. After that comes an unfinished frame, or `damage`, which hides the true end.
    `recorded` says whether records describe everything up to `end_position`.
    """

    # The results of walks through archives that do not end with a record: otherwise each reader would walk.
    _walks: ClassVar[dict[tuple[int, int, int, int], tuple[Span | None, CorruptLogError | None]]] = {}

    # The frames that the readers of this process used last, the most recent one last.
    _frames: ClassVar[dict[tuple[object, ...], Lines]] = {}
    _frames_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, path: Path, fd: int, size: int) -> None:
        self.path = path
        self.fd = fd
        self.size = size
        self.damage: CorruptLogError | None = None
        self._last = record_before(fd, size)
        if self._last is None and size:
            self._last, self.damage = self._walk_to_end()
        last = self._last
        self.end_position = 0 if last is None else last.after
        self.recorded = last is None or last.lines_hash is not None
        self.head = Head(0, "") if last is None else Head(last.end_offset, f"{last.last_hash:016x}")

    def __repr__(self) -> str:
        return f"<Archive {str(self.path)!r} up to {self.head}>"

    def close(self) -> None:
        os.close(self.fd)

    def missing_record(self) -> CorruptLogError | None:
        """The error if the archive ends with one of our frames without its record. Call it if no rotation is under way.

        A crash can't leave such a frame, since the rotation's file exists as long as a frame may be unfinished. The
        Rust crate's frames may be unfinished and have no record yet; they have no checksum.
        """
        position = self.end_position if self.recorded or self._last is None else self._last.position
        if self.damage is None and position < self.size:
            begin = os.pread(self.fd, len(ZSTD_MAGIC) + 1, position)
            if begin[:-1] == ZSTD_MAGIC and begin[-1] & CHECKSUM_FLAG:
                return CorruptLogError(self.path, self.head.offset, "the file ends in a frame without its record")
        return None

    def unrecorded_span(self) -> Span | None:
        """The frames at the end that have no record yet, as their record must describe them."""
        if self.recorded or self._last is None:
            return None
        tally = Tally()
        for chunk, _ in decompressed(self.fd, self._last.position, self._last.after):
            tally.add(chunk)
        return tally.span(self._last.position, self._last.size, self._last.first_offset)

    def lines(self, offset: int, block_size: Callable[[], int]) -> Iterator[Lines]:
        """The lines from `offset` (bytes in the whole log) onwards; `ValueError` if no line begins there.

        `block_size` is called before each block and returns its maximum size in bytes. Between two blocks of a larger
        frame, the frame is not kept in memory unless it is cached.

        Raises `CorruptLogError` at damage, after yielding all lines before it.
        """
        reached = 0
        for span in self._spans_from(offset):
            reached = span.end_offset
            if reached > offset:
                offset = max(offset, span.first_offset)
                yield from self._blocks(span, offset, block_size)
        if self.damage is not None:
            raise self.damage
        if reached < self.head.offset:
            raise CorruptLogError(self.path, reached, "a frame or its commit record is damaged here")

    def _blocks(self, span: Span, offset: int, block_size: Callable[[], int]) -> Iterator[Lines]:
        """A span's lines from `offset` onwards."""
        if _is_large(span):
            for lines in self._span_lines(span):
                if lines.end_offset > offset:
                    yield lines.part(_position_in(lines, offset), len(lines.data))
                    offset = lines.end_offset
        while offset < span.end_offset:
            size = block_size()
            is_one_block = offset == span.first_offset and span.end_offset - offset <= size
            [lines] = self._span_lines(span) if is_one_block else self._cached_lines(span)
            block = next(lines.chunks(size, _position_in(lines, offset)))
            offset = block.end_offset
            del lines  # the rest of the frame need not stay in memory while the block is used
            yield block

    def line_before(self, offset: int) -> bytes:
        """The line that ends at `offset` (bytes in the whole log, more than 0), without its newline."""
        for span in self._spans_with(offset - 1):
            for lines in self._cached_lines(span):
                end = offset - lines.start_offset
                if end <= len(lines.data):
                    _position_in(lines, offset)
                    return lines.data[lines.data.rfind(b"\n", 0, end - 1) + 1 : end - 1]
        raise self.damage or CorruptLogError(self.path, offset, "a frame or its commit record is damaged before this")

    def line_at(self, offset: int) -> Lines:
        """The line that begins at `offset` (bytes in the whole log), and no others; `ValueError` if none begins there.

        Decompresses one of our frames, or none if the frame is cached.
        """
        for span in self._spans_with(offset):
            if span.end_offset <= offset:
                continue
            for lines in self._cached_lines(span):
                if offset < lines.end_offset:
                    start = _position_in(lines, offset)
                    return lines.part(start, lines.data.index(b"\n", start) + 1)
        raise self.damage or CorruptLogError(self.path, offset, "a frame or its commit record is damaged before this")

    def block_before(self, offset: int) -> Lines:
        """The lines that end at `offset` (bytes in the whole log, more than 0), from the beginning of their span.

        Of a large span, only about the last `WHOLE_SIZE` bytes of them. Raises `ValueError` if no line ends there.
        """
        for span in self._spans_with(offset - 1):
            if span.end_offset < offset:
                continue
            newest: deque[Lines] = deque()
            for lines in self._span_lines(span):
                newest.append(lines)
                if lines.end_offset >= offset:
                    newest[-1] = lines.part(0, offset - lines.start_offset)
                    if not newest[-1].data.endswith(b"\n"):
                        raise ValueError(f"offset {offset} is not where a line ends")
                    return join(list(newest))
                while newest[-1].start_offset - newest[0].start_offset > WHOLE_SIZE:
                    newest.popleft()
        raise self.damage or CorruptLogError(self.path, offset, "a frame or its commit record is damaged before this")

    def spans(self) -> Iterator[Span]:
        """All spans: from their records, or by decoding everything if a record is damaged."""
        return self._spans_from(0)

    def position_of(self, offset: int) -> int:
        """The position (bytes in the file) of the span that begins at `offset`; `CorruptLogError` if none does."""
        span = next(self._spans_from(offset), None)
        if span is None or span.first_offset != offset:
            raise CorruptLogError(self.path, offset, "no frame begins here, but the active log does")
        return span.position

    def _spans_with(self, offset: int) -> Iterator[Span]:
        """The span that contains `offset`; if records don't lead to it, what `_spans_from` yields."""
        span = None if self._last is None else span_containing(self.fd, self._last, offset)
        if span is None:
            yield from self._spans_from(offset)
        else:
            yield span

    def _spans_from(self, offset: int) -> Iterator[Span]:
        """The spans from the one that contains `offset` onwards."""
        spans = []
        span = self._last
        while span is not None:
            spans.append(span)
            if span.first_offset <= offset:
                yield from reversed(spans)
                return
            before = record_before(self.fd, span.position)
            span = before if before is not None and before.end_offset == span.first_offset else None
        # A record is damaged, so what comes before it can only be found by decoding everything.
        yield from walk(self.path, self.fd, 0, 0, self.size)

    def _walk_to_end(self) -> tuple[Span | None, CorruptLogError | None]:
        stat = os.fstat(self.fd)
        key = (stat.st_dev, stat.st_ino, self.size, stat.st_mtime_ns)
        if key not in self._walks:
            last = damage = None
            try:
                for span in walk(self.path, self.fd, 0, 0, self.size):
                    last = span
            except CorruptLogError as error:
                damage = error
            while len(self._walks) >= _CACHED_WALKS:
                self._walks.pop(next(iter(self._walks)), None)
            self._walks[key] = last, damage
        return self._walks[key]

    def _cached_lines(self, span: Span) -> Iterator[Lines]:
        """A span's lines: see `_span_lines`. Our frames are cached."""
        key = (self.path, *span)
        with self._frames_lock:
            cached = self._frames.pop(key, None)
        if cached is None:
            if span.lines_hash is None or _is_large(span):
                yield from self._span_lines(span)
                return
            [cached] = self._span_lines(span)
        with self._frames_lock:
            self._frames[key] = cached
            while len(self._frames) > _CACHED_FRAMES:
                del self._frames[next(iter(self._frames))]
        yield cached

    def _span_lines(self, span: Span) -> Iterator[Lines]:
        """A span's lines, verified before the first is yielded."""
        try:
            if not _is_large(span):
                data = read_frame(self.fd, span) or b"".join(self._decompressed(span))
                # A fast check; `_verify` finds out what is wrong. Counting newlines with `replace` takes a third of the
                # time of `count`, and the event loop can't run meanwhile.
                if (
                    xxhash.xxh64_intdigest(data) != span.lines_hash
                    or len(data) - len(data.replace(b"\n", b"")) != span.events
                    or not data.endswith(b"\n")
                ):
                    self._verify(span, [data])
                yield Lines(self.path, span.first_offset, data)
                return
            self._verify(span, self._decompressed(span))
            offset, buffer = span.first_offset, bytearray()
            for chunk in self._decompressed(span):
                buffer += chunk
                end = buffer.rfind(b"\n") + 1
                if end >= PART_SIZE:
                    yield Lines(self.path, offset, bytes(buffer[:end]))
                    offset += end
                    del buffer[:end]
            if buffer:
                yield Lines(self.path, offset, bytes(buffer))
        except UnfinishedError:
            raise CorruptLogError(self.path, span.first_offset, "the file ends inside a frame") from None
        except DamagedError as error:
            raise CorruptLogError(self.path, span.first_offset, str(error)) from error

    def _decompressed(self, span: Span) -> Iterator[bytes]:
        """The content of a span's frames. Raises `DamagedError` as soon as there is more than the record says."""
        remaining = span.end_offset - span.first_offset
        for chunk, _ in decompressed(self.fd, span.position, span.position + span.size):
            remaining -= len(chunk)
            if remaining < 0:
                raise DamagedError("the frames expand to more than their commit record says")
            yield chunk

    def _verify(self, span: Span, chunks: Iterable[bytes]) -> None:
        tally = Tally()
        for chunk in chunks:
            tally.add(chunk)
        found = tally.span(span.position, span.size, span.first_offset)
        if found != (span if span.lines_hash is not None else span._replace(lines_hash=found.lines_hash)):
            raise DamagedError("the frames do not contain the lines that their commit record describes")
        if not tally.ends_with_newline:
            raise DamagedError("the frames end inside a line")


def _is_large(span: Span) -> bool:
    return span.end_offset - span.first_offset > WHOLE_SIZE


def _position_in(lines: Lines, offset: int) -> int:
    """The position of an offset within some lines; `ValueError` if no line begins or ends there."""
    position = offset - lines.start_offset
    if position > 0 and lines.data[position - 1 : position] != b"\n":
        raise ValueError(f"offset {offset} is not where a line begins")
    return max(0, position)


def _after_fork() -> None:
    Archive._frames_lock = threading.Lock()


# If a thread of the parent held the lock at the fork, the child's copy would never be released.
os.register_at_fork(after_in_child=_after_fork)
