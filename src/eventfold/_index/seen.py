"""Which ids may be in the log, for when the index has no answer: a filter in memory that reads each line once.

Promises: an id that is in the log is never ruled out; the memory is the same however long the log is.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import aclosing

from .._aio import LoopBreaks
from .._codec.keys import headers_of, key_of_id
from .._codec.lines import last_line_hash
from .._event import Head
from .._reader import EventReader

# 8 MiB. With five million ids in the log, one in 200 other ids can't be ruled out.
_BITS = 2**26
# Bits that are set for an id.
_BITS_OF_AN_ID = 4


class SeenIds:
    """A Bloom filter of the ids in the log that `reader` reads."""

    def __init__(self, reader: EventReader) -> None:
        self._reader = reader
        self._bits = bytearray(_BITS // 8)
        self._known = Head(0, "")

    async def not_ruled_out(self, ids: Collection[str]) -> tuple[int, set[str]]:
        """Returns the ids that may occur before the offset that is returned first, the current head.

        Several calls may be under way. Raises what reading raises.
        """
        async with aclosing(self._reader._lines(self._known, None)) as blocks:
            pause = LoopBreaks()
            async for lines in blocks:
                for _, keys in headers_of(lines):
                    if keys.id is not None:
                        for place in _places(keys.id):
                            self._bits[place >> 3] |= 1 << (place & 7)
                if lines.end_offset > self._known.offset:
                    self._known = Head(lines.end_offset, last_line_hash(lines.data))
                await pause()
        return self._known.offset, {
            id for id in ids if all(self._bits[place >> 3] >> (place & 7) & 1 for place in _places(id))
        }


def _places(id: str) -> list[int]:
    """Returns the bits of an id."""
    key = key_of_id(id)
    first, step = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF | 1
    return [(first + number * step) % _BITS for number in range(_BITS_OF_AN_ID)]
