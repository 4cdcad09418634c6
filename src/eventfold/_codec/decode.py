"""Decodes lines into events: the decoder, and the slices of a log that it yields.

Promises: `Decoder` yields every event of the lines that it is fed. At the first bad line, it raises an error with that
line's offset, after it has yielded all events before it. It never yields a part of a batch. With a query, a line that
can't match, because of its type or the text of its tags, is not decoded; it is only checked that the line is JSON and
has a type (its text may not be valid UTF-8).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, repeat

import msgspec

from .._errors import CorruptLogError
from .._event import Record
from .._query import Query
from .lines import Lines, join, last_line, last_line_hash, split_lines
from .selection import BatchPosition, DecodedLines, as_batch_position, decode_line, selection
from .stored import StoredEvent

# What decoding a line raises if it is not an event.
DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
# The reason of a `CorruptLogError`.
INCOMPLETE_BATCH = "this batch is incomplete"
_INVALID: BatchPosition = (0, 0)
# The lists of positions of batches up to the first size are cached. Those up to the second size take about 1 MB each,
# so only two of them are cached.
_SMALL_BATCH, _LARGE_BATCH = 256, 10_000
# A lower bound for the bytes that the line of an event takes.
_SHORTEST_LINE = 20
# After this number of blocks without a batch, the next block is decoded by the faster decoder that refuses batches.
_BLOCKS_WITHOUT_BATCH = 16


class Slice:
    """Consecutive events of the log, decoded together.

    Attributes:
        events: The events; with a `query`, only those that it matches.
        query: Which events were selected; None for all.
        start_offset: Where the first examined line begins, in bytes of the whole log.
        end_offset: Where the last examined line ends, whether its event was selected or not.
    """

    __slots__ = ("_blocks", "_decoded", "_texts", "end_offset", "events", "query", "start_offset")

    def __init__(
        self,
        blocks: list[Lines],
        decoded: DecodedLines,
        events: list[StoredEvent],
        query: Query | None = None,
        texts: list[bytes] | None = None,
    ) -> None:
        self._blocks = blocks
        self._decoded = decoded
        self._texts = texts
        self.events = events
        self.query = query
        self.start_offset = blocks[0].start_offset
        self.end_offset = blocks[-1].end_offset

    def __repr__(self) -> str:
        return f"<Slice of {len(self.events)} events, offsets {self.start_offset} to {self.end_offset}>"

    @property
    def _lines(self) -> Lines:
        """All lines in one block, which is joined on demand."""
        if len(self._blocks) > 1:
            self._blocks = [join(self._blocks)]
        return self._blocks[0]

    def records(self) -> Iterator[Record]:
        """The events with their offsets in the log."""
        lines = self._lines
        texts = split_lines(lines.data) if self._texts is None else self._texts
        offsets = list(accumulate(map(len, texts), initial=0 if lines.offset_map else lines.start_offset))
        if lines.offset_map:
            offsets = list(map(lines.offset_at, offsets))
        records = map(Record, self._decoded, offsets, offsets[1:], texts)
        if self.query is None:
            return records
        return (record for record in records if isinstance(record.event, StoredEvent))

    @property
    def last_line_hash(self) -> str:
        """The hash of the last line that was examined."""
        return last_line_hash(self._blocks[-1].data)


class Decoder:
    """Turns the lines of a log, fed in order, into slices of events; with a `query`, only those that it matches.

    With `exact_offsets`, each line is decoded on its own, so that the offsets of the records are certainly right.
    Without it, decoding is faster. Reading may begin inside a batch, except at the start of the log. Then the rest of
    that batch is yielded.
    """

    def __init__(self, query: Query | None = None, *, exact_offsets: bool = True) -> None:
        self._query = None if query is None or query._matches_all else query
        self._selection_without_batches = selection(self._query, False)
        self._exact_offsets = exact_offsets
        self._may_be_inside_batch = True  # before the first slice
        # How many of the next blocks are decoded as lines that may be in batches; set again by each block with a batch.
        self._batch_blocks_left = 0
        # A batch whose end has not been fed yet: its lines so far, the decoded lines, and the position that the next
        # line must have.
        self._open_batch: list[Lines] = []
        self._open_decoded: DecodedLines = []
        self._expected: BatchPosition | None = None

    def feed(self, lines: Lines) -> Iterator[Slice]:
        """The events of these lines. A batch that continues beyond them is held back until its end is fed.

        Raises `CorruptLogError` at the first line that is not an event, or at the beginning of an incomplete batch.
        """
        if not lines.start_offset:
            self._may_be_inside_batch = False  # no earlier line can complete a batch at the start of the log
        if not self._batch_blocks_left and self._expected is None:
            # Two events on one line and none on another leave the number of events right, but not their offsets. If
            # the offsets are needed, each line is decoded on its own.
            texts = split_lines(lines.data) if self._exact_offsets else None
            decoded = self._decode_at_once(lines.data, texts, False)
            if decoded is not None:
                yield from self._slice_of(lines, decoded, texts)
                return
            self._batch_blocks_left = _BLOCKS_WITHOUT_BATCH
        for block in self._split_at_open_batch(lines):
            yield from self._feed_batches(block)

    def _split_at_open_batch(self, lines: Lines) -> list[Lines]:
        """The lines in two blocks if a batch begins among them and continues beyond them."""
        data = lines.data
        index, size = batch_position(last_line(data)) or (1, 1)
        if index < size:
            if self._expected is not None and index >= self._expected[0] and size > len(data) // _SHORTEST_LINE:
                return [lines]  # all of them are in the open batch, which is larger than this block
            start = len(data)
            for _ in range(index):
                start = data.rfind(b"\n", 0, start - 1) + 1
                if not start:
                    return [lines]
            return [lines.part(0, start), lines.part(start, len(data))]
        return [lines]

    def _feed_batches(self, lines: Lines) -> Iterator[Slice]:
        """Does the same as `feed` for lines that may be in batches."""
        texts = split_lines(lines.data) if self._exact_offsets else None
        decoded = self._decode_at_once(lines.data, texts, True)
        if decoded is None:
            yield from self._line_by_line(lines)
            return
        positions = [line.batch for line in decoded]
        if self._expected is not None or positions.count(None) < len(positions):
            self._batch_blocks_left = _BLOCKS_WITHOUT_BATCH
            yield from self._in_batches(lines, decoded, positions)
        else:
            self._batch_blocks_left = max(0, self._batch_blocks_left - 1)
            yield from self._slice_of(lines, decoded, texts)

    def _slice_of(self, lines: Lines, decoded: DecodedLines, texts: list[bytes] | None) -> Iterator[Slice]:
        if decoded:
            self._may_be_inside_batch = False
            events = decoded if self._query is None else [line for line in decoded if line.relevant]
            yield Slice([lines], decoded, events, self._query, texts)

    def _in_batches(
        self, lines: Lines, decoded: DecodedLines, positions: list[BatchPosition | None]
    ) -> Iterator[Slice]:
        """The slice of lines some of which are in batches; nothing yet if all of them are in a batch that continues."""
        checked = _check_batches(positions, self._expected, self._may_be_inside_batch)
        if checked is None or (checked[1] is not None and checked[0]):
            yield from self._line_by_line(lines)
            return
        self._open_batch.append(lines)
        self._open_decoded += decoded
        self._expected = checked[1]
        if self._expected is None:
            blocks, decoded = self._open_batch, self._open_decoded
            self._open_batch, self._open_decoded, self._may_be_inside_batch = [], [], False
            yield Slice(blocks, decoded, decoded if self._query is None else _events_in(decoded), self._query)

    def _decode_at_once(self, data: bytes, texts: list[bytes] | None, allow_batches: bool) -> DecodedLines | None:
        """One object for each line; None if a line is blank, is not an event, or is in a batch that is not allowed."""
        try:
            return self._decode(data, texts, allow_batches)
        except DECODE_ERRORS:
            return None

    def _decode(self, data: bytes, texts: list[bytes] | None, allow_batches: bool) -> DecodedLines | None:
        """The decoded lines. Without `allow_batches`, an error or None if one of them is in a batch."""
        decoding = selection(self._query, True) if allow_batches else self._selection_without_batches
        return decoding.decode(data, texts)

    def _line_by_line(self, lines: Lines) -> Iterator[Slice]:
        """The slow way, for lines some of which are blank or bad: one slice for each line or batch."""
        lines = join([*self._open_batch, lines])
        self._open_batch, self._open_decoded, self._expected = [], [], None
        path, data = lines.path, lines.data
        decoded: DecodedLines = []
        start = position = 0  # of the line or batch that becomes the next slice; of the current line
        expected = None
        select = selection(self._query, True).select
        while position < len(data):
            end = data.index(b"\n", position) + 1
            if expected is None:
                start = position
                if not data[position:end].strip():
                    yield Slice([lines.part(position, end)], [], [])
                    position = end
                    continue
            try:
                event = decode_line(data[position:end])
            except DECODE_ERRORS as error:
                raise CorruptLogError(path, lines.offset_at(position), f"not an event: {error}") from error
            may_be_inside = self._may_be_inside_batch and position == start
            expected = _position_after(as_batch_position(event.batch), expected, may_be_inside)
            if expected is _INVALID:
                raise CorruptLogError(path, lines.offset_at(start), INCOMPLETE_BATCH)
            decoded.append(select(event))
            position = end
            if expected is None:
                self._may_be_inside_batch = False
                yield Slice([lines.part(start, end)], decoded, _events_in(decoded), self._query)
                decoded = []
        if expected is not None:
            self._open_batch, self._open_decoded = [lines.part(start, len(data))], decoded
            self._expected = expected


def _events_in(decoded: DecodedLines) -> list[StoredEvent]:
    return [line for line in decoded if isinstance(line, StoredEvent)]


def _check_batches(
    positions: list[BatchPosition | None], expected: BatchPosition | None, may_be_inside: bool
) -> tuple[int, BatchPosition | None] | None:
    """Checks the positions of consecutive lines in their batches, the first of which must be the expected one.

    Returns how many of the lines come before a batch that continues beyond them, and the position that the next line
    must have (None: no batch continues). Returns None if a batch is incomplete.
    """
    if expected is None and may_be_inside:
        expected = positions[0]
    first = expected or (None if positions[0] is None else (1, positions[0][1]))
    if first is not None and 1 <= first[0] <= first[1] <= _LARGE_BATCH:
        # In the usual case, all batches have the same size, and one comparison is enough.
        index, size = first
        count, pattern = len(positions), _whole_batch(size)
        if index - 1 + count > size:
            pattern = pattern * (count // size + 2)
        if positions == pattern[index - 1 : index - 1 + count]:
            index = (index - 1 + count) % size
            return max(0, count - index), (index + 1, size) if index else None
    complete = number = 0
    while number < len(positions):
        if expected is None and positions[number] is None:
            number += 1
            complete = number
            continue
        first = positions[number]
        index, size = expected or (1, 0 if first is None else first[1])
        if not 1 <= index <= size:
            return None
        batch = positions[number : number + size - index + 1]
        # All lines of a batch are compared at once. Line by line, it would take as long as decoding.
        if batch != _part_of_batch(index, size, len(batch)):
            return None
        number += len(batch)
        index += len(batch)
        expected = (index, size) if index <= size else None
        if expected is None:
            complete = number
    return complete, expected


def _part_of_batch(index: int, size: int, count: int) -> list[BatchPosition]:
    """The positions of `count` lines in a batch of `size` lines, from an index on."""
    if count == size <= _LARGE_BATCH:
        return _whole_batch(size)
    return list(zip(range(index, index + count), repeat(size), strict=False))


def _whole_batch(size: int) -> list[BatchPosition]:
    """The positions of all lines in a batch of `size` lines."""
    return _small_batch(size) if size <= _SMALL_BATCH else _large_batch(size)


def _positions_in_batch(size: int) -> list[BatchPosition]:
    return list(zip(range(1, size + 1), repeat(size), strict=False))


_small_batch = lru_cache(maxsize=_SMALL_BATCH)(_positions_in_batch)
_large_batch = lru_cache(maxsize=2)(_positions_in_batch)


def _position_after(
    position: BatchPosition | None, expected: BatchPosition | None, may_be_inside: bool
) -> BatchPosition | None:
    """The position in its batch that the line after a line with this position must have; None for any line.

    Returns `_INVALID` if the line itself does not have the position that was expected of it.
    """
    if position is None:
        return None if expected is None else _INVALID
    index, size = position
    if position != expected and (expected is not None or (index != 1 and not may_be_inside)):
        return _INVALID
    return None if index == size else (index + 1, size)


def may_be_in_batch(text: bytes) -> bool:
    """Whether `text` may contain a line of a batch. The key `batch` may be written with escapes, as any key in JSON."""
    return b'"batch"' in text or b"\\u" in text


def batch_position(line: bytes) -> BatchPosition | None:
    """The position `(i, n)` of a line in its batch; None for a line that is outside of batches, or not an event."""
    if not may_be_in_batch(line):
        return None
    try:
        return as_batch_position(decode_line(line).batch)
    except DECODE_ERRORS:
        return None


def is_event(line: bytes) -> bool:
    """Whether a line, without its newline, is an event."""
    try:
        decode_line(line)
    except DECODE_ERRORS:
        return False
    return True
