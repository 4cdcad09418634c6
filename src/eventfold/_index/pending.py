"""Pairs of a key and an offset that are not in the file of the index yet."""

from __future__ import annotations

from collections.abc import Iterable

from .._codec.keys import pairs_of
from .._codec.lines import Lines
from .store import OffsetsByKey


class PendingPairs:
    """The pairs that wait to be written, and those that are being written. `count` is the number of waiting pairs."""

    def __init__(self) -> None:
        self.count = 0
        # The offset of each key, or a list of several. Most keys have one, and the garbage collector ignores numbers.
        self._waiting: dict[int, int | list[int]] = {}
        self._in_flight: dict[int, int | list[int]] = {}

    def add(self, lines: Lines) -> None:
        """Adds the pairs of some lines."""
        waiting = self._waiting
        pairs = pairs_of(lines)
        self.count += len(pairs)
        for key, offset in pairs:
            if waiting.setdefault(key, offset) is not offset:  # the key had an offset already
                _append(waiting, key, offset)

    def find(self, wanted: Iterable[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
        """Returns, for each pair of a key and a start offset, the offsets from the start on, if there are any."""
        found: dict[tuple[int, int], list[int]] = {}
        for pairs in (self._in_flight, self._waiting):
            for pair in wanted:
                if pair[0] in pairs and (offsets := [offset for offset in _list(pairs[pair[0]]) if offset >= pair[1]]):
                    found[pair] = found[pair] + offsets if pair in found else offsets
        return found

    def begin_write(self) -> OffsetsByKey:
        """Returns the waiting pairs, which `find` still finds until `end_write`."""
        self._in_flight, self._waiting, self.count = self._waiting, {}, 0
        return self._in_flight

    def end_write(self, *, written: bool) -> None:
        """Drops the pairs of `begin_write` or, if they could not be written, lets them wait again."""
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
