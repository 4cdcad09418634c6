"""One of several writers that share a log, without an event loop or threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eventfold import Head
from eventfold._files import operations, shared_rotation
from eventfold._files.paths import Layout
from eventfold._files.rotation import Rotation
from eventfold._files.shared_log import SharedLog
from eventfold._files.turn import Turn
from eventfold._judge import Append


class Peer:
    """One writer, which closes its files at the end of a `with`. It offers what `tests.crash.oracle.Opened` does."""

    def __init__(self, directory: Path) -> None:
        self.layout = Layout(directory)
        operations.make_dir(directory)
        self.turn = Turn(self.layout)
        self.log: SharedLog | None = None
        self._old: list[int] = []
        try:
            self.log, left = shared_rotation.open_shared(self.layout, self.turn, 0)
            if left is not None:
                self._finish(left)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for fd in self._old:
            os.close(fd)
        if self.log is not None:
            self.log.close()
        self.turn.close()

    @property
    def active(self) -> Peer:
        """The committer: the peer itself, since a shared log commits in its turn."""
        return self

    @property
    def head(self) -> Head:
        return self.log.head

    @property
    def base(self) -> int:
        return self.log.base

    def commit(self, data: bytes, head: Head, sync: bool) -> None:
        """Appends complete lines, after which the head must be `head`."""
        self.append(data, sync)
        assert self.head == head

    def sync(self) -> None:
        self.log.sync()

    def append(self, data: bytes, sync: bool = True) -> int:
        """Appends these lines; returns the offset at which they were acknowledged to begin."""
        future: Any = None
        before, judgement = self.log.commit_judged([Append(data, future)], sync)
        return before.offset + judgement.outcomes[0]

    def look(self) -> Head:
        """Returns the true head, looked up in a turn."""
        with self.turn:
            self.log.ensure_current()
        return self.head

    def rotate(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Rotates until everything that is in the log now is archived; first finishes an interrupted rotation."""
        goal = self.log.head.offset
        while (begun := shared_rotation.begin(self.layout, self.log, goal)) is not None:
            self._finish(begun, meanwhile)

    def _finish(self, begun: Rotation, meanwhile: Callable[[], object] = lambda: None) -> None:
        try:
            begun.archive(self.log)
            meanwhile()
            begun.catch_up(self.log)
            self._old.append(shared_rotation.switch(begun, self.log))
        finally:
            begun.close()
