"""What the index knows and its file does not hold yet: pairs of a key and an offset, in memory."""

from __future__ import annotations

from collections.abc import Iterable

from .._codec.keys import key_of_id, key_of_tag, keys_of
from .._codec.lines import Lines
from .store import OffsetsByKey


class PendingPairs:
    """Pairs that wait to be written, and those that are being written. `count` is the number of those that wait."""

    def __init__(self) -> None:
        self.count = 0
        # The offset of each key, or several in a list. Numbers alone are nothing to the garbage collector.
        self._waiting: dict[int, int | list[int]] = {}
        self._in_flight: dict[int, int | list[int]] = {}

    def add(self, lines: Lines) -> None:
        """Adds the tags and the ids of some lines."""
        waiting = self._waiting
        for offset, keys in keys_of(lines):
            found = [key_of_tag(tag) for tag in keys.tags]
            if keys.id is not None:
                found.append(key_of_id(keys.id))
            self.count += len(found)
            for key in found:
                if key in waiting:
                    _append(waiting, key, offset)
                else:
                    waiting[key] = offset

    def find(self, wanted: Iterable[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
        """For each key and offset, the offsets from that one on, in order; only if there are some."""
        found: dict[tuple[int, int], list[int]] = {}
        for pairs in (self._in_flight, self._waiting):
            for pair in wanted:
                if pair[0] in pairs and (offsets := [offset for offset in _list(pairs[pair[0]]) if offset >= pair[1]]):
                    found[pair] = found[pair] + offsets if pair in found else offsets
        return found

    def begin_write(self) -> OffsetsByKey:
        """Takes the pairs that wait. They are still found, until `end_write`."""
        self._in_flight, self._waiting, self.count = self._waiting, {}, 0
        return self._in_flight

    def end_write(self, *, written: bool) -> None:
        """Forgets what was taken, or, where it could not be written, has it wait again."""
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
