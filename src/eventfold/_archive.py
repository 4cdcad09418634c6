"""The archive: zstd frames of whole lines, and after each a commit record that says what it holds.

A commit record is a skippable frame (RFC 8878, section 3.1.2) of 80 bytes, little-endian: magic 0x184D2A5B and the
length of the rest (u32 each); `EVTFOLD` and a NUL; version and a zero (u32 each); then, u64 each, the first offset, the
end offset, the number of events, the hash of the last line, the number of compressed bytes that it speaks for (those
right before it), the xxh64 of the lines, and the xxh64 of all that stands before in the record.

Frames that the Rust crate wrote have no record until a writer of ours appends one for all of them.

Promises: the end is found in one read where the last thing is a record; lines that a record speaks for are verified
before they are given; memory stays within a few frames, whatever the archive's size. Damage is a `CorruptLogError`
after everything before it has been given.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

import xxhash

from . import _layout
from ._errors import CorruptLogError
from ._event import Head
from ._lines import Lines

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

FRAME_SIZE = 4 * 1024 * 1024
_READ_SIZE = 256 * 1024
_VERSION = 1
_BODY = struct.Struct("<II8sIIQQQQQQ")
_HASH = struct.Struct("<Q")
RECORD_SIZE = _BODY.size + _HASH.size
_PREFIX = struct.pack("<II8sII", 0x184D2A5B, RECORD_SIZE - 8, b"EVTFOLD\0", _VERSION, 0)
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_CHECKSUM_FLAG = 0x04  # in the byte after the magic (RFC 8878, section 3.1.1.1.1)
_SKIPPABLE = struct.Struct("<II")
_OPTIONS: dict[int, int] = {
    zstd.CompressionParameter.compression_level: 3,
    zstd.CompressionParameter.checksum_flag: 1,
    zstd.CompressionParameter.content_size_flag: 1,
}


class Span(NamedTuple):
    """The part of an archive that one record speaks for; `position` and `size` are bytes in the file."""

    position: int
    size: int
    first_offset: int
    end_offset: int
    events: int
    last_hash: int
    lines_hash: int | None  # None for the Rust crate's frames, which have no record yet

    @property
    def after(self) -> int:
        """The position after the span and its record."""
        return self.position + self.size + (0 if self.lines_hash is None else RECORD_SIZE)


class _UnfinishedError(Exception):
    """The file ends inside a frame or a record."""


class _DamagedError(Exception):
    """These bytes are no frame, or not the frame they should be."""


def pack_record(span: Span) -> bytes:
    """The commit record of a span."""
    body = _PREFIX + struct.pack(
        "<6Q", span.first_offset, span.end_offset, span.events, span.last_hash, span.size, span.lines_hash
    )
    return body + _HASH.pack(xxhash.xxh64_intdigest(body))


def record_before(fd: int, position: int) -> Span | None:
    """The span whose record ends at this position of the file; None if no record does."""
    if position < RECORD_SIZE:
        return None
    data = os.pread(fd, RECORD_SIZE, position - RECORD_SIZE)
    if len(data) < RECORD_SIZE or not data.startswith(_PREFIX):
        return None
    if _HASH.unpack_from(data, _BODY.size)[0] != xxhash.xxh64_intdigest(data[: _BODY.size]):
        return None
    first, end, events, last_hash, size, lines_hash = struct.unpack_from("<6Q", data, len(_PREFIX))
    start = position - RECORD_SIZE - size
    if start < 0 or end < first:
        return None
    return Span(start, size, first, end, events, last_hash, lines_hash)


def _claims_record(fd: int, position: int) -> bool:
    return (
        position >= RECORD_SIZE and os.pread(fd, _SKIPPABLE.size, position - RECORD_SIZE) == _PREFIX[: _SKIPPABLE.size]
    )


def _pieces(fd: int, position: int, end: int) -> Iterator[tuple[bytes, int]]:
    """What the frames from `position` to `end` hold: `(piece, 0)` again and again, `(b"", position after)` a frame."""
    while position < end:
        head = os.pread(fd, min(_SKIPPABLE.size, end - position), position)
        if len(head) < _SKIPPABLE.size:
            raise _UnfinishedError
        magic, length = _SKIPPABLE.unpack(head)
        if magic & 0xFFFFFFF0 == 0x184D2A50:
            position += _SKIPPABLE.size + length
            if position > end:
                raise _UnfinishedError
        elif head[:4] == _ZSTD_MAGIC:
            decompressor = zstd.ZstdDecompressor()
            fed = position
            while not decompressor.eof:
                data = b""
                if decompressor.needs_input:
                    data = os.pread(fd, min(_READ_SIZE, end - fed), fed)
                    if not data:
                        raise _UnfinishedError
                    fed += len(data)
                try:
                    piece = decompressor.decompress(data, max_length=_READ_SIZE)
                except zstd.ZstdError as error:
                    raise _DamagedError(str(error)) from error
                if piece:
                    yield piece, 0
            position = fed - len(decompressor.unused_data)
        else:
            raise _DamagedError("no zstd frame begins here")
        yield b"", position


class _Tally:
    """Counts and hashes the lines of a span as they go by."""

    def __init__(self) -> None:
        self.size = 0
        self.events = 0
        self._all = xxhash.xxh64()
        self._line = xxhash.xxh64()
        self.last_hash = 0
        self.whole = True

    def add(self, piece: bytes) -> None:
        if not piece:
            return
        self.size += len(piece)
        self._all.update(piece)
        self.events += piece.count(b"\n")
        at = piece.rfind(b"\n")
        if at >= 0:
            before = piece.rfind(b"\n", 0, at)
            if before >= 0:
                self._line = xxhash.xxh64()
            self._line.update(piece[before + 1 : at])
            self.last_hash = self._line.intdigest()
            self._line = xxhash.xxh64()
        self._line.update(piece[at + 1 :])
        self.whole = piece.endswith(b"\n")

    def span(self, position: int, size: int, first_offset: int) -> Span:
        """The span that these lines make."""
        end = first_offset + self.size
        return Span(position, size, first_offset, end, self.events, self.last_hash, self._all.intdigest())


def _walk(path: Path, fd: int, start: int, offset: int, end: int) -> Iterator[Span]:
    """The spans from position `start` to `end`, by decoding everything; ends before an unfinished tail.

    `offset` is that of the first line in the whole log. Raises `CorruptLogError` where damage begins.
    """
    tally = _Tally()
    unrecorded = None
    try:
        for piece, after in _pieces(fd, start, end):
            if not after:
                tally.add(piece)
            elif _claims_record(fd, after):
                span = tally.span(start, after - RECORD_SIZE - start, offset)
                if record_before(fd, after) != span:
                    raise _DamagedError("the commit record here is not that of the lines before it")
                yield span
                start, offset, tally, unrecorded = after, span.end_offset, _Tally(), None
            elif tally.whole:
                unrecorded = tally.span(start, after - start, offset)
            else:
                raise _DamagedError("the frame ends inside a line")
    except _UnfinishedError:
        unfinished = start if unrecorded is None else unrecorded.position + unrecorded.size
        if _goes_on(fd, unfinished, end):
            raise CorruptLogError(path, offset, "a frame or its commit record is damaged here") from None
    except _DamagedError as error:
        if unrecorded is None or not _is_torn_record(fd, unrecorded, end):
            raise CorruptLogError(path, offset, str(error)) from error
    if unrecorded is not None:
        yield unrecorded._replace(lines_hash=None)


def _goes_on(fd: int, position: int, end: int) -> bool:
    """Whether a whole frame or record stands behind what looks like an unfinished one: then that is damaged instead."""
    for start in range(position + 1, end, _READ_SIZE):
        data = os.pread(fd, min(_READ_SIZE + len(_PREFIX) - 1, end - start), start)
        for magic in (_PREFIX, _ZSTD_MAGIC):
            at = data.find(magic)
            while at >= 0:
                if _is_whole(fd, start + at, end):
                    return True
                at = data.find(magic, at + 1)
    return False


def _is_whole(fd: int, position: int, end: int) -> bool:
    """Whether a frame that holds whole lines, or a record, begins here."""
    last = b""
    try:
        for piece, after in _pieces(fd, position, end):
            if after:
                return last.endswith(b"\n") or record_before(fd, after) is not None
            last = piece
    except (_UnfinishedError, _DamagedError):
        pass
    return False


def _is_torn_record(fd: int, span: Span, end: int) -> bool:
    """Whether all that follows a span is its record, cut short or with NULs where a page was not written."""
    at = span.position + span.size
    if end - at > RECORD_SIZE:
        return False
    written = os.pread(fd, end - at, at)
    return all(byte in (0, whole) for byte, whole in zip(written, pack_record(span), strict=False))


class Archive:
    """An archive opened for reading, up to `size` bytes of it. Close it.

    `head` is its end: the offset after its last line, with that line's hash. `end_position` (bytes in the file) is
    where its last whole frame or record ends; what follows is an unfinished tail, or `damage`, with which the end can't
    be told. `recorded` tells whether a record speaks for everything up to there.
    """

    # What walking an archive without a last record has found, since readers would do it again and again.
    _walked: ClassVar[dict[tuple[int, int, int, int], tuple[Span | None, CorruptLogError | None]]] = {}

    def __init__(self, path: Path, fd: int, size: int) -> None:
        self.path = path
        self._fd = fd
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
        os.close(self._fd)

    def cut_short(self) -> CorruptLogError | None:
        """Where no rotation is under way: what is wrong if the archive ends in a frame of ours without its record.

        A crash can't leave that, since a rotation says that it is under way as long as its frames may be torn. The Rust
        crate's frames, which it may leave torn, and which have no records yet, have no checksum.
        """
        position = self.end_position if self.recorded or self._last is None else self._last.position
        if self.damage is None and position < self.size:
            begin = os.pread(self._fd, len(_ZSTD_MAGIC) + 1, position)
            if begin[:-1] == _ZSTD_MAGIC and begin[-1] & _CHECKSUM_FLAG:
                return CorruptLogError(self.path, self.head.offset, "the file ends in a frame without its record")
        return None

    def unrecorded(self) -> Span | None:
        """The frames at the end for which no record speaks yet, with the hash that their record will have."""
        if self.recorded or self._last is None:
            return None
        tally = _Tally()
        for piece, _ in _pieces(self._fd, self._last.position, self._last.after):
            tally.add(piece)
        return tally.span(self._last.position, self._last.size, self._last.first_offset)

    def lines(self, offset: int) -> Iterator[Lines]:
        """The lines from `offset` (bytes in the whole log) on, which must be where a line begins, else `ValueError`.

        Raises `CorruptLogError` where the damage begins, after all lines before it.
        """
        reached = 0
        for span in self._spans_from(offset):
            reached = span.end_offset
            if reached <= offset:
                continue
            for lines in self._span_lines(span):
                skip = offset - lines.start_offset
                if skip >= len(lines.data):
                    continue
                if skip > 0:
                    if lines.data[skip - 1 : skip] != b"\n":
                        raise ValueError(f"offset {offset} is not where a line begins")
                    lines = Lines(lines.path, offset, lines.data[skip:])
                yield lines
        if self.damage is not None:
            raise self.damage
        if reached < self.head.offset:
            raise CorruptLogError(self.path, reached, "a frame or its commit record is damaged here")

    def line_before(self, offset: int) -> bytes:
        """The line that ends at `offset` (bytes in the whole log, more than 0), without its newline."""
        for span in self._spans_from(offset - 1):
            for lines in self._span_lines(span):
                end = offset - lines.start_offset
                if end <= len(lines.data):
                    if lines.data[end - 1 : end] != b"\n":
                        raise ValueError(f"offset {offset} is not where a line begins")
                    return lines.data[lines.data.rfind(b"\n", 0, end - 1) + 1 : end - 1]
        raise self.damage or CorruptLogError(self.path, offset, "a frame or its commit record is damaged before this")

    def _spans_from(self, offset: int) -> Iterator[Span]:
        """The spans from the one that holds `offset` on."""
        spans = []
        span = self._last
        while span is not None:
            spans.append(span)
            if span.first_offset <= offset:
                yield from reversed(spans)
                return
            before = record_before(self._fd, span.position)
            span = before if before is not None and before.end_offset == span.first_offset else None
        # A record is damaged, so that only going through everything tells what stands before it.
        yield from _walk(self.path, self._fd, 0, 0, self.size)

    def _walk_to_end(self) -> tuple[Span | None, CorruptLogError | None]:
        stat = os.fstat(self._fd)
        key = (stat.st_dev, stat.st_ino, self.size, stat.st_mtime_ns)
        if key not in self._walked:
            last = damage = None
            try:
                for span in _walk(self.path, self._fd, 0, 0, self.size):
                    last = span
            except CorruptLogError as error:
                damage = error
            while len(self._walked) >= 8:
                self._walked.pop(next(iter(self._walked)), None)
            self._walked[key] = last, damage
        return self._walked[key]

    def _span_lines(self, span: Span) -> Iterator[Lines]:
        """A span's lines, verified before the first is given."""
        try:
            if span.end_offset - span.first_offset <= 2 * FRAME_SIZE:
                data = b"".join(piece for piece, _ in _pieces(self._fd, span.position, span.position + span.size))
                self._verify(span, [data])
                yield Lines(self.path, span.first_offset, data)
                return
            self._verify(span, (piece for piece, _ in _pieces(self._fd, span.position, span.position + span.size)))
            offset, held = span.first_offset, bytearray()
            for piece, _ in _pieces(self._fd, span.position, span.position + span.size):
                held += piece
                end = held.rfind(b"\n") + 1
                if end >= FRAME_SIZE // 4:
                    yield Lines(self.path, offset, bytes(held[:end]))
                    offset += end
                    del held[:end]
            if held:
                yield Lines(self.path, offset, bytes(held))
        except _UnfinishedError:
            raise CorruptLogError(self.path, span.first_offset, "a frame ends before its end") from None
        except _DamagedError as error:
            raise CorruptLogError(self.path, span.first_offset, str(error)) from error

    def _verify(self, span: Span, pieces: Iterable[bytes]) -> None:
        tally = _Tally()
        for piece in pieces:
            tally.add(piece)
        found = tally.span(span.position, span.size, span.first_offset)
        if found != (span if span.lines_hash is not None else span._replace(lines_hash=found.lines_hash)):
            raise _DamagedError("the frames do not hold the lines that their commit record speaks of")
        if not tally.whole:
            raise _DamagedError("the frames end inside a line")


def spans_after(path: Path, fd: int, position: int, offset: int) -> Iterator[Span]:
    """The recorded spans after a position of the file, where a line of that offset begins.

    Ends before what a crash left of the last write: cut short, or with pages that never got to the disk. Other damage
    raises `CorruptLogError`.
    """
    size = os.fstat(fd).st_size
    try:
        for span in _walk(path, fd, position, offset, size):
            if span.lines_hash is not None:
                position = span.after
                yield span
    except CorruptLogError:
        last = record_before(fd, size)
        if last is not None and last.position != position:
            raise


def write_record(fd: int, span: Span) -> int:
    """Appends the record of a span that has none, for good; the position after it."""
    _layout.write(fd, pack_record(span), span.position + span.size)
    _layout.sync(fd)
    return span.after


def write_frames(fd: int, position: int, offset: int, chunks: Iterable[bytes]) -> int:
    """Appends each chunk of whole lines as a frame with its record, each on disk before the next; the position after.

    `position` is in bytes of the file, `offset` that of the first line in the whole log.
    """
    for chunk in chunks:
        tally = _Tally()
        tally.add(chunk)
        frame = zstd.compress(chunk, options=_OPTIONS)
        span = tally.span(position, len(frame), offset)
        # The last of the space is left to the appends.
        _layout.check_space(fd, 2 * len(frame))
        # One sync a frame: a power cut can then tear only the last one, and what stands before it is whole.
        try:
            _layout.write(fd, frame + pack_record(span), position)
            _layout.sync(fd)
        except BaseException:
            # A record may never stand there whose frame could not be synced.
            _layout.truncate(fd, position)
            raise
        position, offset = span.after, span.end_offset
    return position
