"""The format of the archive: zstd frames of whole lines, each followed by a commit record that describes it.

A commit record is a skippable frame (RFC 8878, section 3.1.2) of 80 bytes, little-endian: magic 0x184D2A5B and the
length of the rest (u32 each); `EVTFOLD` and a NUL; version and a zero (u32 each); then, as u64, the first offset, the
end offset, the number of events, the hash of the last line, the size in bytes of the compressed data that it describes,
which is right before it, the xxh64 of the lines, and the xxh64 of everything before it in the record.

Frames that the Rust crate wrote have no record until one of our writers appends one for all of them.

Promises: at most a few frames are in memory, whatever the size of the archive; damage raises a `CorruptLogError`, after
everything before it has been yielded, but an unfinished last write, as a crash may leave it, does not.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import xxhash

from .._errors import CorruptLogError
from . import operations

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# In bytes of lines. Larger frames compress no better, and to read one event, a whole frame must be decompressed.
FRAME_SIZE = 1024 * 1024
_READ_SIZE = 256 * 1024
# By how many bytes a frame may be larger than its content: far more than any of our frames is.
_OVERHEAD = 64 * 1024
# How many bytes a search for whole frames may decompress, and how many each candidate counts for at least.
_SEARCH_SIZE = 256 * 2**20
_CANDIDATE_SIZE = 4096
_VERSION = 1
_BODY = struct.Struct("<II8sIIQQQQQQ")
_HASH = struct.Struct("<Q")
RECORD_SIZE = _BODY.size + _HASH.size
_PREFIX = struct.pack("<II8sII", 0x184D2A5B, RECORD_SIZE - 8, b"EVTFOLD\0", _VERSION, 0)
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
CHECKSUM_FLAG = 0x04  # in the byte after the magic (RFC 8878, section 3.1.1.1.1)
_SKIPPABLE = struct.Struct("<II")
_OPTIONS: dict[int, int] = {
    zstd.CompressionParameter.compression_level: 3,
    zstd.CompressionParameter.checksum_flag: 1,
    zstd.CompressionParameter.content_size_flag: 1,
}


class Span(NamedTuple):
    """The part of an archive that one record describes; `position` and `size` are bytes in the file."""

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


class UnfinishedError(Exception):
    """The file ends inside a frame or a record."""


class DamagedError(Exception):
    """The bytes are not a frame, or not the frame that the record describes."""


def pack_record(span: Span) -> bytes:
    """The commit record of a span."""
    body = _PREFIX + struct.pack(
        "<6Q", span.first_offset, span.end_offset, span.events, span.last_hash, span.size, span.lines_hash
    )
    return body + _HASH.pack(xxhash.xxh64_intdigest(body))


def record_before(fd: int, position: int) -> Span | None:
    """The span whose record ends at this position of the file; None if no valid record does."""
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


def _has_record_header_before(fd: int, position: int) -> bool:
    return (
        position >= RECORD_SIZE and os.pread(fd, _SKIPPABLE.size, position - RECORD_SIZE) == _PREFIX[: _SKIPPABLE.size]
    )


def decompressed(fd: int, position: int, end: int) -> Iterator[tuple[bytes, int]]:
    """Yields the content of the frames from `position` to `end`, as `(chunk, 0)`.

    After each frame, skippable ones included, yields `(b"", position)`, where `position` is the end of the frame.
    """
    while position < end:
        header = os.pread(fd, min(_SKIPPABLE.size, end - position), position)
        if len(header) < _SKIPPABLE.size:
            raise UnfinishedError
        magic, length = _SKIPPABLE.unpack(header)
        if magic & 0xFFFFFFF0 == 0x184D2A50:
            position += _SKIPPABLE.size + length
            if position > end:
                raise UnfinishedError
        elif header[:4] == ZSTD_MAGIC:
            decompressor = zstd.ZstdDecompressor()
            read_position = position
            while not decompressor.eof:
                data = b""
                if decompressor.needs_input:
                    data = os.pread(fd, min(_READ_SIZE, end - read_position), read_position)
                    if not data:
                        raise UnfinishedError
                    read_position += len(data)
                try:
                    chunk = decompressor.decompress(data, max_length=_READ_SIZE)
                except zstd.ZstdError as error:
                    raise DamagedError(str(error)) from error
                if chunk:
                    yield chunk, 0
            position = read_position - len(decompressor.unused_data)
        else:
            raise DamagedError("no zstd frame begins here")
        yield b"", position


def read_frame(fd: int, span: Span) -> bytes | None:
    """The content of a span that is a single frame; None for any other span.

    Makes as few calls as possible, since each of them releases the interpreter's lock, and then waits for it while
    another thread decodes lines, which can take milliseconds.
    """
    size = span.end_offset - span.first_offset
    if span.size > size + _OVERHEAD:
        return None
    data = os.pread(fd, span.size, span.position)
    decompressor = zstd.ZstdDecompressor()
    try:
        # The decompressor reaches the end of the frame only with room for one more byte.
        content = decompressor.decompress(data, max_length=size + 1)
    except zstd.ZstdError:
        return None
    return content if decompressor.eof and not decompressor.unused_data and len(content) == size else None


class Tally:
    """Counts and hashes the lines of a span, chunk by chunk."""

    def __init__(self) -> None:
        self.size = 0
        self.events = 0
        self._all = xxhash.xxh64()
        self._line = xxhash.xxh64()
        self.last_hash = 0
        self.ends_with_newline = True

    def add(self, chunk: bytes) -> None:
        if not chunk:
            return
        self.size += len(chunk)
        self._all.update(chunk)
        self.events += chunk.count(b"\n")
        newline = chunk.rfind(b"\n")
        if newline >= 0:
            previous_newline = chunk.rfind(b"\n", 0, newline)
            if previous_newline >= 0:
                self._line = xxhash.xxh64()
            self._line.update(chunk[previous_newline + 1 : newline])
            self.last_hash = self._line.intdigest()
            self._line = xxhash.xxh64()
        self._line.update(chunk[newline + 1 :])
        self.ends_with_newline = chunk.endswith(b"\n")

    def span(self, position: int, size: int, first_offset: int) -> Span:
        """The span of these lines."""
        end = first_offset + self.size
        return Span(position, size, first_offset, end, self.events, self.last_hash, self._all.intdigest())


def walk(path: Path, fd: int, start: int, offset: int, end: int) -> Iterator[Span]:
    """The spans from position `start` to `end`, found by decoding everything; ends before an unfinished frame.

    `offset` is the offset of the first line (bytes in the whole log). Raises `CorruptLogError` at damage.
    """
    tally = Tally()
    unrecorded = None
    try:
        for chunk, after in decompressed(fd, start, end):
            if not after:
                tally.add(chunk)
            elif _has_record_header_before(fd, after):
                span = tally.span(start, after - RECORD_SIZE - start, offset)
                if record_before(fd, after) != span:
                    raise DamagedError("the commit record here is not that of the lines before it")
                yield span
                start, offset, tally, unrecorded = after, span.end_offset, Tally(), None
            elif tally.ends_with_newline:
                unrecorded = tally.span(start, after - start, offset)
            else:
                raise DamagedError("the frame ends inside a line")
    except UnfinishedError:
        unfinished = start if unrecorded is None else unrecorded.position + unrecorded.size
        if _continues_after(fd, unfinished, end):
            raise CorruptLogError(path, offset, "a frame or its commit record is damaged here") from None
    except DamagedError as error:
        if unrecorded is None or not _is_torn_record(fd, unrecorded, end):
            raise CorruptLogError(path, offset, str(error)) from error
    if unrecorded is not None:
        yield unrecorded._replace(lines_hash=None)


def _continues_after(fd: int, position: int, end: int) -> bool:
    """Whether a whole frame or record follows what looks like an unfinished one, which is then a damaged one.

    An attacker could plant bytes that make the search slow, so it decompresses at most `_SEARCH_SIZE` bytes. If it
    finds nothing in them, the answer is true as well: damage is reported, while an unfinished frame is cut off.
    """
    remaining = _SEARCH_SIZE
    for start in range(position + 1, end, _READ_SIZE):
        data = os.pread(fd, min(_READ_SIZE + len(_PREFIX) - 1, end - start), start)
        for magic in (_PREFIX, ZSTD_MAGIC):
            index = data.find(magic)
            while index >= 0:
                is_whole, size = _is_whole(fd, start + index, end, remaining)
                remaining -= max(size, _CANDIDATE_SIZE)
                if is_whole or remaining <= 0:
                    return True
                index = data.find(magic, index + 1)
    return False


def _is_whole(fd: int, position: int, end: int, limit: int) -> tuple[bool, int]:
    """Whether a frame of whole lines, or a record, begins here, and how many bytes were decompressed.

    Decompresses little more than `limit` bytes.
    """
    last, size = b"", 0
    try:
        for chunk, after in decompressed(fd, position, end):
            if after:
                return last.endswith(b"\n") or record_before(fd, after) is not None, size
            last = chunk
            size += len(chunk)
            if size >= limit:
                break
    except (UnfinishedError, DamagedError):
        pass
    return False, size


def _is_torn_record(fd: int, span: Span, end: int) -> bool:
    """Whether only the span's record follows, truncated or with NULs in place of a page that was not written."""
    position = span.position + span.size
    if end - position > RECORD_SIZE:
        return False
    written = os.pread(fd, end - position, position)
    return all(byte in (0, whole) for byte, whole in zip(written, pack_record(span), strict=False))


def spans_after(path: Path, fd: int, position: int, offset: int) -> Iterator[Span]:
    """The spans with records after a position of the file, at which the line at `offset` begins.

    Ends before an unfinished last write, truncated or with pages that never reached the disk, as a crash may leave it.
    Other damage raises `CorruptLogError`.
    """
    size = os.fstat(fd).st_size
    try:
        for span in walk(path, fd, position, offset, size):
            if span.lines_hash is not None:
                position = span.after
                yield span
    except CorruptLogError:
        last = record_before(fd, size)
        if last is not None and last.position != position:
            raise


def write_record(fd: int, span: Span) -> int:
    """Appends the record of a span that has none, durably; returns the position after the record."""
    operations.write(fd, pack_record(span), span.position + span.size)
    operations.sync(fd)
    return span.after


def write_frames(fd: int, position: int, offset: int, chunks: Iterable[bytes]) -> int:
    """Appends chunks of whole lines as frames with records, each on disk before the next; returns the end position.

    `position` is in bytes of the file, and `offset` the offset of the first line in the whole log.
    """
    for chunk in chunks:
        tally = Tally()
        tally.add(chunk)
        frame = zstd.compress(chunk, options=_OPTIONS)
        span = tally.span(position, len(frame), offset)
        # Some free space must be left for appends.
        operations.check_space(fd, 2 * len(frame))
        # With one sync per frame, a power cut can damage only the last frame.
        try:
            operations.write(fd, frame + pack_record(span), position)
            operations.sync(fd)
        except BaseException:
            # A record must never remain whose frame could not be synced.
            operations.truncate(fd, position)
            raise
        position, offset = span.after, span.end_offset
    return position
