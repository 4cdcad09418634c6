"""The pairs of a key and an offset that the file of the index does not have yet, in memory."""

from __future__ import annotations

from collections.abc import Iterable

from .._codec.keys import pairs_of
from .._codec.lines import Lines
from .store import OffsetsByKey


class PendingPairs:
    """Pairs that wait to be written, and those that are being written. `count` is the number of waiting ones."""

    def __init__(self) -> None:
        self.count = 0
        # The offset of each key, or several in a list. The garbage collector ignores plain numbers.
        self._waiting: dict[int, int | list[int]] = {}
        self._in_flight: dict[int, int | list[int]] = {}

    def add(self, lines: Lines) -> None:
        """Adds the tags and the ids of some lines."""
        waiting = self._waiting
        pairs = pairs_of(lines)
        self.count += len(pairs)
        for key, offset in pairs:
            if waiting.setdefault(key, offset) is not offset:  # there was one before
                _append(waiting, key, offset)

    def find(self, wanted: Iterable[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
        """Returns for each key and offset the offsets from that one onwards, in order, if there are any."""
        found: dict[tuple[int, int], list[int]] = {}
        for pairs in (self._in_flight, self._waiting):
            for pair in wanted:
                if pair[0] in pairs and (offsets := [offset for offset in _list(pairs[pair[0]]) if offset >= pair[1]]):
                    found[pair] = found[pair] + offsets if pair in found else offsets
        return found

    def begin_write(self) -> OffsetsByKey:
        """Takes the waiting pairs and returns them. They are still found until `end_write`."""
        self._in_flight, self._waiting, self.count = self._waiting, {}, 0
        return self._in_flight

    def end_write(self, *, written: bool) -> None:
        """Drops the taken pairs or, if they could not be written, lets them wait again."""
        if not written:
            for key, offsets in self._waiting.items():
                for offset in _list(offsets):
                    _append(self._in_flight, key, offset)
            self._waiting = self._in_flight
            self.count = sum([len(_list(offsets)) for offsets in self._waiting.values()])
        self._in_flight = {}


def _append(pairs: dict[int, int | list[int]], key: int, offset: int) -> None:
    before = pairs.get(key)
    if before is None:
        pairs[key] = offset
    elif isinstance(before, int):
        pairs[key] = [before, offset]
    else:
        before.append(offset)


def _list(offsets: int | list[int]) -> list[int]:
    return [offsets] if isinstance(offsets, int) else offsets
