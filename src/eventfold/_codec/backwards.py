"""Decodes lines into events, newest first.

Promise: `BackwardsDecoder` yields every matching event of the lines that it is fed; at a bad line or an incomplete
batch, it yields all events after it, and then says where it begins.
"""

from __future__ import annotations

from collections.abc import Iterator

from .._errors import CorruptLogError
from .._event import Record
from .._query import Query
from .decode import BAD_LINE
from .lines import Lines, texts_of
from .selection import BatchPlace, Found, decode_line, place_of, selection
from .stored import StoredEvent


class BackwardsDecoder:
    """Turns lines, fed from the end of a log to its beginning, into records, newest first.

    Reading may begin inside a batch: then the events before that position in the batch are yielded.
    """

    def __init__(self, query: Query | None = None) -> None:
        self._selection = selection(None if query is None or query.matches_all else query, True)
        self._nothing_seen = True
        # The position in its batch that the next line, which comes before the last one, must have; None if it must be
        # the end of a batch or in none.
        self._due: BatchPlace | None = None

    def feed(self, lines: Lines) -> Iterator[Record]:
        """The records of lines that end where those before began.

        Raises `CorruptLogError` at a line that is not an event, or that is not in the batch in which it must be.
        """
        texts = texts_of(lines.data)
        found = self._decode_at_once(lines.data, texts)
        if found is not None and self._due is None and not any(line.matters for line in found):
            self._nothing_seen = False
            return
        end = len(lines.data)
        for number in range(len(texts) - 1, -1, -1):
            text = texts[number]
            begin = end - len(text)
            if found is not None:
                line = found[number]
            elif text.strip():
                try:
                    line = decode_line(text)
                except BAD_LINE as error:
                    raise CorruptLogError(lines.path, lines.offset_at(begin), f"no event: {error}") from error
                line = self._selection.look(line)
            else:
                line = None
            if line is not None:
                self._follow(place_of(line.batch), lines, begin)
                if isinstance(line, StoredEvent):
                    yield Record(line, lines.offset_at(begin), lines.offset_at(end), text)
            elif self._due is not None:
                raise CorruptLogError(lines.path, lines.offset_at(begin), "a batch breaks off here")
            end = begin

    def _decode_at_once(self, data: bytes, texts: list[bytes]) -> Found | None:
        """One object for each line, or None if the lines must be decoded one by one."""
        try:
            return self._selection.decode(data, texts)
        except BAD_LINE:
            return None

    def _follow(self, place: BatchPlace | None, lines: Lines, begin: int) -> None:
        due, first = self._due, self._nothing_seen
        self._nothing_seen = False
        if place is None:
            broken, self._due = due is not None, None
        else:
            index, size = place
            broken = place != due if due is not None else not first and index != size
            self._due = (index - 1, size) if index > 1 else None
        if broken or (self._due is not None and not lines.offset_at(begin)):
            raise CorruptLogError(lines.path, lines.offset_at(begin), "a batch breaks off here")
