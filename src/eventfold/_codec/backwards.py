"""Decodes lines into events, newest first.

Promise: `BackwardsDecoder` yields every matching event of the lines that it is fed. At a bad line or an incomplete
batch, it raises an error with the offset of that line or batch, after it has yielded all later events.
"""

from __future__ import annotations

from collections.abc import Iterator

from .._errors import CorruptLogError
from .._event import Record
from .._query import Query
from .decode import DECODE_ERRORS, INCOMPLETE_BATCH
from .lines import Lines, split_lines
from .selection import BatchPosition, DecodedLines, as_batch_position, decode_line, selection
from .stored import StoredEvent


class BackwardsDecoder:
    """Turns lines, fed from the end of a log to its beginning, into records, newest first.

    Reading may begin inside a batch. Then the events before that position in the batch are yielded.
    """

    def __init__(self, query: Query | None = None) -> None:
        self._selection = selection(None if query is None or query._matches_all else query, True)
        self._may_be_inside_batch = True  # before the first line
        # The position in its batch that the next line (the one before the last line that was fed) must have; None if
        # that line must end a batch or be outside of batches.
        self._expected: BatchPosition | None = None

    def feed(self, lines: Lines) -> Iterator[Record]:
        """The records of lines that end where the previously fed lines began.

        Raises `CorruptLogError` at a line that is not an event, or whose position in a batch is wrong.
        """
        texts = split_lines(lines.data)
        decoded = self._decode_at_once(lines.data, texts)
        if decoded is not None and self._expected is None and not any(line.relevant for line in decoded):
            self._may_be_inside_batch = False
            return
        end = len(lines.data)
        for number in range(len(texts) - 1, -1, -1):
            text = texts[number]
            start = end - len(text)
            if decoded is not None:
                line = decoded[number]
            elif text.strip():
                try:
                    line = decode_line(text)
                except DECODE_ERRORS as error:
                    raise CorruptLogError(lines.path, lines.offset_at(start), f"not an event: {error}") from error
                line = self._selection.select(line)
            else:
                line = None
            if line is not None:
                self._check_position(as_batch_position(line.batch), lines, start)
                if isinstance(line, StoredEvent):
                    yield Record(line, lines.offset_at(start), lines.offset_at(end), text)
            elif self._expected is not None:
                raise CorruptLogError(lines.path, lines.offset_at(start), INCOMPLETE_BATCH)
            end = start

    def _decode_at_once(self, data: bytes, texts: list[bytes]) -> DecodedLines | None:
        """One object for each line, or None if the lines must be decoded one by one."""
        try:
            return self._selection.decode(data, texts)
        except DECODE_ERRORS:
            return None

    def _check_position(self, position: BatchPosition | None, lines: Lines, start: int) -> None:
        """Compares a line's position in a batch with the expected one. Raises `CorruptLogError`."""
        expected, may_be_inside = self._expected, self._may_be_inside_batch
        self._may_be_inside_batch = False
        if position is None:
            is_wrong, self._expected = expected is not None, None
        else:
            index, size = position
            is_wrong = position != expected if expected is not None else not may_be_inside and index != size
            self._expected = (index - 1, size) if index > 1 else None
        # No earlier line can complete a batch at the start of the log.
        if is_wrong or (self._expected is not None and not lines.offset_at(start)):
            raise CorruptLogError(lines.path, lines.offset_at(start), INCOMPLETE_BATCH)
