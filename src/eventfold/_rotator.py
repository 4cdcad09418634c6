"""Rotates a log while appends continue: on request, and automatically once the active log is too large.

Promises: there is only one rotation at a time; after an automatic rotation has failed, it is tried again at increasing
intervals; cancelling a caller that waits for a rotation does not stop the rotation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

from . import _tracing
from ._aio import UncancellableTask
from ._engine import RotatingCommitter
from ._errors import WriterFailedError
from ._logging import WARNING, log_event
from ._reader import EventReader

# Seconds before an automatic rotation is tried again after a failure. Each further failure doubles the interval, up to
# the second value.
RETRY_INTERVAL, MAX_RETRY_INTERVAL = 1.0, 60.0


class ViewOps(Protocol):
    """The protocol of objects that can be passed to `EventWriter.rotate` as views; `View` implements it."""

    @property
    def name(self) -> str:
        """The name of the view."""

    @property
    def offset(self) -> int:
        """The offset up to which the events are folded, in bytes of the whole log."""

    async def refresh(self, reader: EventReader) -> Any:
        """Folds all new events; returns the state."""

    async def rebuild(self, reader: EventReader) -> Any:
        """Folds the whole log again; returns the state."""

    async def save(self, reader: EventReader) -> None:
        """Saves the state, for example after a rotation."""


class Rotator:
    """The rotations of one open log. `fail` is called with an error after which the writer can't continue."""

    def __init__(
        self,
        committer: RotatingCommitter,
        location: str | Path,
        new_reader: Callable[[], EventReader],
        fail: Callable[[Exception], object],
    ) -> None:
        self._committer = committer
        self._location = location
        self._new_reader = new_reader
        self._fail = fail
        self._loop = asyncio.get_running_loop()
        self._lock = asyncio.Lock()
        self._not_before = 0.0
        self._retry_interval = RETRY_INTERVAL
        self.running: set[asyncio.Task[None]] = set()

    async def rotate(self, views: Iterable[ViewOps]) -> None:
        """Rotates the log, and rewrites the snapshots of `views`. Raises what the committer's `rotate` raises."""
        task = self._start(list(views))
        await asyncio.wait([task])
        task.result()

    def rotate_if_due(self, views: Iterable[ViewOps]) -> None:
        """Starts a rotation if the active log is too large and none is running."""
        if self._committer.rotation_is_due and not self.running and self._loop.time() >= self._not_before:
            self._start(views, if_due=True).add_done_callback(self._after_automatic_rotation)

    async def drain(self) -> None:
        """Waits until no rotation is running."""
        while self.running:
            await asyncio.wait(list(self.running))

    def _start(self, views: Iterable[ViewOps], if_due: bool = False) -> asyncio.Task[None]:
        task = UncancellableTask(self._rotate(views, if_due), "eventfold rotation")
        _tracing.end_with(_tracing.start("eventfold.rotate", log=str(self._location), automatic=if_due), task)
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        return task

    async def _rotate(self, views: Iterable[ViewOps], if_due: bool) -> None:
        async with self._lock:
            try:
                await self._committer.rotate(if_due=if_due)
            except WriterFailedError as error:
                self._fail(error)
                raise
            async with AsyncExitStack() as stack:  # whatever one of these raises, the others are done too
                for view in reversed(list(views)):
                    stack.push_async_callback(view.save, self._new_reader())

    def _after_automatic_rotation(self, task: asyncio.Task[None]) -> None:
        error = task.exception()
        if error is None:
            self._retry_interval = RETRY_INTERVAL
        else:
            self._not_before = self._loop.time() + self._retry_interval
            self._retry_interval = min(2 * self._retry_interval, MAX_RETRY_INTERVAL)
            log_event(
                WARNING,
                "rotation.failed",
                "%(location)s could not be rotated; the rotation is tried again later: %(error)s",
                location=self._location,
                error=error,
            )
