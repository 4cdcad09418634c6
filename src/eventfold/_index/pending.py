"""What the index knows and its file does not hold yet: pairs of a key and an offset, in memory."""

from __future__ import annotations

from .._codec.keys import key_of_id, key_of_tag, keys_of
from .._codec.lines import Lines
from .store import Pair


class PendingPairs:
    """Pairs that wait to be written, and those that are being written. `count` is the number of those that wait."""

    def __init__(self) -> None:
        self.count = 0
        # Offsets by key.
        self._waiting: dict[int, list[int]] = {}
        self._in_flight: dict[int, list[int]] = {}

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
                    waiting[key].append(offset)
                else:
                    waiting[key] = [offset]

    def find(self, key: int, start: int) -> list[int]:
        """The offsets of a key, from one offset on."""
        found = [*self._in_flight.get(key, ()), *self._waiting.get(key, ())]
        return [offset for offset in found if offset >= start] if found else found

    def begin_write(self) -> list[Pair]:
        """Takes the pairs that wait. They are still found, until `end_write`."""
        self._in_flight, self._waiting, self.count = self._waiting, {}, 0
        return [(key, offset) for key, offsets in self._in_flight.items() for offset in offsets]

    def end_write(self, *, written: bool) -> None:
        """Forgets what was taken, or, where it could not be written, has it wait again."""
        if not written:
            for key, offsets in self._waiting.items():
                self._in_flight.setdefault(key, []).extend(offsets)
            self._waiting = self._in_flight
            self.count = sum(map(len, self._waiting.values()))
        self._in_flight = {}
