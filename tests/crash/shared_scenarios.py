"""The scenarios of several writers that share a log, including what one of them leaves when it dies."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.crash import scenarios
from tests.crash.peers import Peer
from tests.crash.recorder import Recorded, Recorder
from tests.crash.scenarios import BATCH, Play
from tests.support import line

from eventfold import LockMode
from eventfold._files import operations


class _DiedError(Exception):
    """Simulates the death of one of the processes: it does nothing more."""


@contextmanager
def dies_at(name: str, number: int, when: Callable[[Any], bool] = lambda _: True) -> Iterator[None]:
    """Makes the writer die that does this operation for the nth time (from 1); `when` checks its first argument."""
    original, count = getattr(operations, name), itertools.count(1)

    def dying(first: Any, *args: Any) -> Any:
        if when(first) and next(count) == number:
            raise _DiedError
        return original(first, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_DiedError):
        patch.setattr(operations, name, dying)
        yield


class Together:
    """Two writers of one log, and the lines that they append."""

    def __init__(self, play: Play, recorder: Recorder) -> None:
        self.play = play
        self._recorder = recorder
        self.one, self.other = Peer(play.dir), Peer(play.dir)

    def close(self) -> None:
        self.one.close()
        self.other.close()

    def add(self, peer: Peer, *lines: bytes) -> None:
        """Has one of them append lines or batches, one commit each."""
        for data in lines:
            self.play.oracle.add(data)
            assert peer.append(data) + len(data) == len(self.play.oracle.data)
            self._recorder.acknowledge(peer.head.offset)

    def see(self, peer: Peer) -> None:
        """Has one of them look up where the log ends; others may rely on what it has seen."""
        self._recorder.acknowledge(peer.look().offset)

    def leave_switched(self) -> None:
        """One rotates, and dies when the new file has its name and some content, before the name is on disk."""
        with dies_at("sync_dir", 1, lambda _: not any(self.play.dir.glob("app.jsonl.next.*"))):
            self.one.rotate(lambda: self.add(self.other, line(9)))

    def leave(self, data: bytes) -> None:
        """One writes lines, and dies in its turn before it updates the mark."""
        self.play.oracle.add(data)
        with dies_at("write_mapped", 2):  # The first operation says who has the turn.
            self.one.append(data)


def _recorded(play: Play, monkeypatch: pytest.MonkeyPatch, act: Callable[[Together], None]) -> Recorded:
    with Peer(play.dir) as peer:
        play.add(peer, *map(line, range(3)))
        peer.rotate()
        play.add(peer, *map(line, range(3, 6)))

    def do(recorder: Recorder) -> None:
        together = Together(play, recorder)
        try:
            act(together)
        finally:
            together.close()

    return play.record(monkeypatch, do)


def both_append(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Two writers append in turn, and one of them relies on lines that the other has not synced yet."""

    def act(together: Together) -> None:
        together.add(together.one, line(10), BATCH)
        together.add(together.other, line(11))
        together.add(together.one, line(12))

    return _recorded(play, monkeypatch, act)


def both_rotate(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Each rotates once, while the other appends and follows the rotation."""

    def act(together: Together) -> None:
        one, other = together.one, together.other
        one.rotate(lambda: together.add(other, line(10)))
        together.add(other, line(11))
        other.rotate(lambda: together.add(one, BATCH))
        together.add(one, line(12))

    return _recorded(play, monkeypatch, act)


def a_death_before_the_mark(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """One dies between its write and its mark; the other finds the lines, and continues."""

    def act(together: Together) -> None:
        together.leave(line(10))
        together.see(together.other)
        together.add(together.other, line(11))

    return _recorded(play, monkeypatch, act)


def a_death_before_the_mark_and_an_opening(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """One dies between its write and its mark, and nobody else has the log open; another writer opens and reads it."""

    def act(together: Together) -> None:
        together.leave(line(10))
        together.close()
        together.other = Peer(play.dir)
        together.see(together.other)

    return _recorded(play, monkeypatch, act)


def a_death_in_the_switch(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """One dies at the end of its rotation; the other follows the rotation and appends."""

    def act(together: Together) -> None:
        together.leave_switched()
        together.add(together.other, line(10))

    return _recorded(play, monkeypatch, act)


def a_death_in_the_switch_and_an_opening(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """One dies at the end of its rotation, and nobody else has the log open."""

    def act(together: Together) -> None:
        together.leave_switched()
        together.close()
        together.other = Peer(play.dir)
        together.add(together.other, line(10))

    return _recorded(play, monkeypatch, act)


def a_death_in_the_archive(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """One dies in its rotation, and the other finishes it."""

    def act(together: Together) -> None:
        with dies_at("sync", 3):
            together.one.rotate()
        together.add(together.other, line(10))
        together.other.rotate()
        together.add(together.other, line(11))

    return _recorded(play, monkeypatch, act)


def a_death_when_a_rotation_has_begun(play: Play, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """One dies before the new rotation's file is on disk; the other undoes that and rotates."""

    def act(together: Together) -> None:
        with dies_at("sync_dir", 1):
            together.one.rotate()
        together.other.rotate(lambda: together.add(together.other, line(10)))
        together.add(together.other, line(11))

    return _recorded(play, monkeypatch, act)


TOGETHER = {
    scenario.__name__: scenario
    for scenario in (
        a_death_before_the_mark_and_an_opening,
        a_death_in_the_switch_and_an_opening,
        a_death_before_the_mark,
        a_death_in_the_switch,
        both_append,
        both_rotate,
        a_death_in_the_archive,
        a_death_when_a_rotation_has_begun,
    )
}
# The scenarios of one writer have the same results with a shared log; these are followed by those of several.
SHARED_SCENARIOS = {**TOGETHER, **scenarios.SCENARIOS}
SharedPlay = functools.partial(Play, lock=LockMode.SHARED)
