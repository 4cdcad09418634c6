"""Reads the archive: where it ends, and its lines from an offset onwards.

Promises: the end is found in one read if the archive ends with a record; lines that a record describes are verified
before they are yielded; memory is bounded by a few frames, whatever the archive's size. Damage raises a
`CorruptLogError` after everything before it has been yielded.
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
    frame,
    record_before,
    walk,
)
from .span_places import span_with

# In bytes of lines: up to this size, a span, which is then one of our frames, is decompressed as a whole.
WHOLE_SIZE = 8 * 1024 * 1024
# The block size for larger ones, such as the Rust crate's, all of whose frames share one record.
PART_SIZE = 1024 * 1024
_RECENT_FRAMES = 4


class Archive:
    """An archive opened for reading, up to `size` bytes of it. Close it.

    `head` is its end: the offset after its last line, with that line's hash. `end_position` (bytes in the file) is
    where its last whole frame or record ends; what follows is an unfinished tail, or `damage`, in which case the end is
    unknown. `recorded` says whether records describe everything up to there.
    """

    # What a walk through an archive without a last record has found, since readers would repeat it.
    _walked: ClassVar[dict[tuple[int, int, int, int], tuple[Span | None, CorruptLogError | None]]] = {}

    # The most recently used frames, in that order, for all readers of the process.
    _recent: ClassVar[dict[tuple[object, ...], Lines]] = {}
    _recent_lock: ClassVar[threading.Lock] = threading.Lock()

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
        """The error if the archive ends with one of our frames without its record although no rotation is under way.

        A crash can't leave that, since a rotation's file exists as long as its frames may be torn. The Rust crate's
        frames, which may be torn and have no records yet, have no checksum.
        """
        position = self.end_position if self.recorded or self._last is None else self._last.position
        if self.damage is None and position < self.size:
            begin = os.pread(self.fd, len(ZSTD_MAGIC) + 1, position)
            if begin[:-1] == ZSTD_MAGIC and begin[-1] & CHECKSUM_FLAG:
                return CorruptLogError(self.path, self.head.offset, "the file ends in a frame without its record")
        return None

    def unrecorded(self) -> Span | None:
        """The frames at the end that no record describes yet, with the hash that their record will have."""
        if self.recorded or self._last is None:
            return None
        tally = Tally()
        for chunk, _ in decompressed(self.fd, self._last.position, self._last.after):
            tally.add(chunk)
        return tally.span(self._last.position, self._last.size, self._last.first_offset)

    def lines(self, offset: int, block_size: Callable[[], int]) -> Iterator[Lines]:
        """The lines from `offset` (bytes in the whole log) onwards; `ValueError` if no line begins there.

        `block_size` is called before each block and returns how many bytes of a frame it may have. Of a larger frame,
        nothing is held between two blocks: it is read again, unless it is among those used most recently.

        Raises `CorruptLogError` at damage, after yielding all lines before it.
        """
        reached = 0
        for span in self._spans_from(offset):
            reached = span.end_offset
            if reached > offset:
                offset = max(offset, span.first_offset)
                yield from self._blocks_of(span, offset, block_size)
        if self.damage is not None:
            raise self.damage
        if reached < self.head.offset:
            raise CorruptLogError(self.path, reached, "a frame or its commit record is damaged here")

    def _blocks_of(self, span: Span, offset: int, block_size: Callable[[], int]) -> Iterator[Lines]:
        """A span's lines from `offset` onwards."""
        if _is_large(span):
            for lines in self._span_lines(span):
                if lines.end_offset > offset:
                    yield lines.part(_position_in(lines, offset), len(lines.data))
                    offset = lines.end_offset
        while offset < span.end_offset:
            size = block_size()
            at_once = offset == span.first_offset and span.end_offset - offset <= size
            [lines] = self._span_lines(span) if at_once else self._cached_lines(span)
            block = next(lines.cut(size, _position_in(lines, offset)))
            offset = block.end_offset
            del lines  # don't hold the rest of the frame while this block is used
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
        """Just the line that begins at `offset` (bytes in the whole log); `ValueError` if none does.

        Decompresses one of our frames, or none if it was used recently.
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
        """The lines that end at `offset` (bytes in the whole log, more than 0), back to where their frames begin.

        In frames larger than ours, only the last of those lines. Raises `ValueError` if no line ends there.
        """
        for span in self._spans_with(offset - 1):
            if span.end_offset < offset:
                continue
            held: deque[Lines] = deque()
            for lines in self._span_lines(span):
                held.append(lines)
                if lines.end_offset >= offset:
                    held[-1] = lines.part(0, offset - lines.start_offset)
                    if not held[-1].data.endswith(b"\n"):
                        raise ValueError(f"offset {offset} is not where a line ends")
                    return join(list(held))
                while held[-1].start_offset - held[0].start_offset > WHOLE_SIZE:
                    held.popleft()
        raise self.damage or CorruptLogError(self.path, offset, "a frame or its commit record is damaged before this")

    def spans(self) -> Iterator[Span]:
        """All spans, by their records; if one of these is damaged, by decoding everything."""
        return self._spans_from(0)

    def position_of(self, offset: int) -> int:
        """The position (bytes in the file) of the frames that begin at `offset`, or `CorruptLogError` if none do."""
        span = next(self._spans_from(offset), None)
        if span is None or span.first_offset != offset:
            raise CorruptLogError(self.path, offset, "no frame begins here, but the active log does")
        return span.position

    def _spans_with(self, offset: int) -> Iterator[Span]:
        """The same as `_spans_from`, for callers that rarely need more than the first one."""
        span = None if self._last is None else span_with(self.fd, self._last, offset)
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
        # A record is damaged, so only decoding everything shows what comes before it.
        yield from walk(self.path, self.fd, 0, 0, self.size)

    def _walk_to_end(self) -> tuple[Span | None, CorruptLogError | None]:
        stat = os.fstat(self.fd)
        key = (stat.st_dev, stat.st_ino, self.size, stat.st_mtime_ns)
        if key not in self._walked:
            last = damage = None
            try:
                for span in walk(self.path, self.fd, 0, 0, self.size):
                    last = span
            except CorruptLogError as error:
                damage = error
            while len(self._walked) >= 8:
                self._walked.pop(next(iter(self._walked)), None)
            self._walked[key] = last, damage
        return self._walked[key]

    def _cached_lines(self, span: Span) -> Iterator[Lines]:
        """The same as `_span_lines`, but our most recently used frames are cached."""
        key = (self.path, *span)
        with self._recent_lock:
            kept = self._recent.pop(key, None)
        if kept is None:
            if span.lines_hash is None or _is_large(span):
                yield from self._span_lines(span)
                return
            [kept] = self._span_lines(span)
        with self._recent_lock:
            self._recent[key] = kept
            while len(self._recent) > _RECENT_FRAMES:
                del self._recent[next(iter(self._recent))]
        yield kept

    def _span_lines(self, span: Span) -> Iterator[Lines]:
        """A span's lines, verified before the first is yielded."""
        try:
            if not _is_large(span):
                data = frame(self.fd, span) or b"".join(self._decompressed(span))
                # The usual case in three calls; `_verify` says what is wrong otherwise. Counting the newlines so takes
                # a third of the time of `count`, during which the event loop can't run.
                if (
                    xxhash.xxh64_intdigest(data) != span.lines_hash
                    or len(data) - len(data.replace(b"\n", b"")) != span.events
                    or not data.endswith(b"\n")
                ):
                    self._verify(span, [data])
                yield Lines(self.path, span.first_offset, data)
                return
            self._verify(span, self._decompressed(span))
            offset, held = span.first_offset, bytearray()
            for chunk in self._decompressed(span):
                held += chunk
                end = held.rfind(b"\n") + 1
                if end >= PART_SIZE:
                    yield Lines(self.path, offset, bytes(held[:end]))
                    offset += end
                    del held[:end]
            if held:
                yield Lines(self.path, offset, bytes(held))
        except UnfinishedError:
            raise CorruptLogError(self.path, span.first_offset, "the file ends inside a frame") from None
        except DamagedError as error:
            raise CorruptLogError(self.path, span.first_offset, str(error)) from error

    def _decompressed(self, span: Span) -> Iterator[bytes]:
        """What a span's frames expand to; raises `DamagedError` as soon as that is more than the record says."""
        left = span.end_offset - span.first_offset
        for chunk, _ in decompressed(self.fd, span.position, span.position + span.size):
            left -= len(chunk)
            if left < 0:
                raise DamagedError("the frames expand to more than their commit record says")
            yield chunk

    def _verify(self, span: Span, chunks: Iterable[bytes]) -> None:
        tally = Tally()
        for chunk in chunks:
            tally.add(chunk)
        found = tally.span(span.position, span.size, span.first_offset)
        if found != (span if span.lines_hash is not None else span._replace(lines_hash=found.lines_hash)):
            raise DamagedError("the frames do not contain the lines that their commit record describes")
        if not tally.whole:
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
    Archive._recent_lock = threading.Lock()


# In a forked child, the thread that held it in the parent will never release it.
os.register_at_fork(after_in_child=_after_fork)
