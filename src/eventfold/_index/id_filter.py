"""Which ids may be in the log: a filter in memory, for when the index can't be used. It reads each line once.

Promises: an id that is in the log is never ruled out; the filter takes the same memory for a log of any size.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import aclosing

from .._aio import LoopBreaks
from .._codec.keys import headers_of, key_of_id
from .._codec.lines import last_line_hash
from .._event import Head
from .._reader import EventReader

# 8 MiB. If five million ids are in the log, one in 200 ids that are not in it can't be ruled out.
_SIZE_IN_BITS = 2**26
# How many bits are set for each id.
_BITS_PER_ID = 4


class IdFilter:
    """A Bloom filter of the ids in the log that `reader` reads."""

    def __init__(self, reader: EventReader) -> None:
        self._reader = reader
        self._bits = bytearray(_SIZE_IN_BITS // 8)
        self._known = Head(0, "")

    async def possible(self, ids: Collection[str]) -> tuple[int, set[str]]:
        """Returns the offset of the current head, and the ids that may occur before that offset.

        Concurrent calls are allowed. Raises what reading raises.
        """
        async with aclosing(self._reader._lines(self._known, None)) as blocks:
            pause = LoopBreaks()
            async for lines in blocks:
                for _, header in headers_of(lines):
                    if header.id is not None:
                        for bit in _bits_of(header.id):
                            self._bits[bit >> 3] |= 1 << (bit & 7)
                if lines.end_offset > self._known.offset:
                    self._known = Head(lines.end_offset, last_line_hash(lines.data))
                await pause()
        possible = {id for id in ids if all(self._bits[bit >> 3] >> (bit & 7) & 1 for bit in _bits_of(id))}
        return self._known.offset, possible


def _bits_of(id: str) -> list[int]:
    """The numbers of the bits of an id, from the two halves of its key."""
    key = key_of_id(id)
    first, step = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF | 1
    return [(first + number * step) % _SIZE_IN_BITS for number in range(_BITS_PER_ID)]
