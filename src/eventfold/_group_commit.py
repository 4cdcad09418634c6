"""Group commit: one task takes all waiting appends as a group, has the engine commit it, and resolves the appends.

The task lives while there is work, and the next append starts it again. If the engine is a server, the next commit
begins when half of the previous group has been resolved, so that the server and this process work at the same time.

Promises: each append is resolved once, in the order of the queue, with its result or an error; after a failure that
leaves the log in an unknown state, nothing more is committed, and all waiting appends get the error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import perf_counter
from typing import TypeAlias

from . import _tracing
from ._aio import UncancellableTask, next_iteration
from ._engine import Commit, Committer, RemoteCommitter
from ._errors import EventfoldError, UnknownOutcomeError, WriterFailedError, copy_error
from ._index_checks import IndexChecks
from ._judge import Append, DuplicateIdError
from ._logging import ERROR, log_event
from ._queue import AppendQueue, resolve
from ._stats import WriterCounters

# How many appends are resolved in one iteration of the loop: their callers run in the next iteration, and other tasks
# must get to run too.
RESOLVED_AT_ONCE = 100

# The outcome of each append of a group, and a function from positions to offsets.
_Outcomes: TypeAlias = tuple[list[int | Exception], Callable[[int], int]]


class GroupCommit:
    """Commits what is put into its `queue`. Calls `on_commit` after each commit that wrote something.

    `checks` looks up the ids and conditions of a group in the index; None without an index.
    """

    def __init__(self, committer: Committer, on_commit: Callable[[Commit], object]) -> None:
        self._committer = committer
        self._on_commit = on_commit
        self._is_remote = isinstance(committer, RemoteCommitter)
        self._location = str(committer.source.location)
        self.queue = AppendQueue(self._changed, self._location)
        self.counters = WriterCounters()
        self.checks: IndexChecks | None = None
        self.failure: EventfoldError | None = None
        self._raised = False  # whether a call has raised the failure
        self._task: UncancellableTask[None] | None = None
        self._drained: asyncio.Future[None] | None = None

    def check(self) -> None:
        """Raises the failure, if there is one."""
        if self.failure is not None:
            self.note_raised()
            raise copy_error(self.failure)

    def note_raised(self) -> None:
        """Notes that a call has raised the failure to the program."""
        self._raised = True

    def has_raised(self, error: EventfoldError) -> bool:
        """Whether a call has raised the failure of which this error, from the committer, is a copy."""
        cause = error.__cause__
        return self._raised and self.failure is not None and cause is not None and cause is self.failure.__cause__

    async def wait_for_room(self) -> None:
        """Waits for room in the queue. Raises the failure, if there is one by then."""
        await self.queue.wait_for_room()
        self.check()

    async def drain(self) -> None:
        """Waits until all appends that are in the queue, or wait for room in it, are resolved. Add none after this."""
        self._drained = asyncio.get_running_loop().create_future()
        self._changed()
        await self._drained

    def fail(self, error: BaseException) -> EventfoldError:
        """Stops committing: all waiting appends get the error, which is returned."""
        if self.failure is None:
            if isinstance(error, EventfoldError):
                self.failure, unexpected = error, None
            else:
                self.failure, unexpected = WriterFailedError(f"the writer failed: {error!r}"), error
            log_event(
                ERROR,
                "writer.failed",
                "the writer of %(location)s failed, and the log must be opened again: %(error)s",
                location=self._location,
                error=self.failure,
                cause=unexpected,
            )
            if self._task is None:
                self._start()
        return self.failure

    def _changed(self) -> None:
        """Starts the task if there is work for it, and wakes `drain` when there is none left."""
        if self._task is not None:
            return
        if len(self.queue):
            self._start()
        elif self._drained is not None and self.queue.idle and not self._drained.done():
            self._drained.set_result(None)

    def _start(self) -> None:
        self._task = UncancellableTask(self._run(), "eventfold writer")

    async def _run(self) -> None:
        group: list[Append] = []
        ahead: list[Append] = []
        committing: UncancellableTask[_Outcomes] | None = None
        try:
            while True:
                if committing is None:
                    group = self.queue.take(self._committer.max_commit_size)
                    if not group:
                        break
                    outcomes, offset_at = await self._commit(group)
                else:
                    outcomes, offset_at = await committing
                    group, ahead, committing = ahead, [], None
                size = len(group)
                while group:
                    for append, outcome in zip(group[:RESOLVED_AT_ONCE], outcomes[:RESOLVED_AT_ONCE], strict=True):
                        resolve(append, outcome, offset_at)
                    # Keeps no future longer than necessary: a thousand old ones beside a thousand new ones would make
                    # the garbage collector run again and again.
                    del group[:RESOLVED_AT_ONCE], outcomes[:RESOLVED_AT_ONCE], append
                    # The resolved callers run now: what they append at once is in the next group.
                    await next_iteration()
                    # A server commits what the first half of them append, while the second half is resolved.
                    if (
                        self._is_remote
                        and committing is None
                        and 0 < len(group) <= size // 2
                        and len(self.queue) >= RESOLVED_AT_ONCE
                    ):
                        ahead = self.queue.take(self._committer.max_commit_size)
                        committing = UncancellableTask(self._commit(ahead), "eventfold commit")
        except BaseException as error:
            self.fail(error)
            if committing is not None:
                await asyncio.wait([committing])
            self._note_raised_to(group + ahead)
            for append in group + ahead:
                resolve(append, self.failure or error, _no_offset)
            raise
        finally:
            self._task = None
            self._changed()

    def _note_raised_to(self, group: list[Append]) -> None:
        """Notes that these appends are about to raise the failure, unless all of them were cancelled."""
        if not all(append.future.done() for append in group):
            self.note_raised()

    async def _commit(self, group: list[Append]) -> _Outcomes:
        """Commits a group, from which it removes the appends that the index resolves; returns the others' outcomes."""
        if self.checks is not None:
            group[:] = await self.checks.check(group)
        if self.failure is not None:
            self._note_raised_to(group)
            return [self.failure] * len(group), _no_offset
        begun = perf_counter()
        span = None
        if _tracing.tracer is not None:
            calls = [append.span for append in group if append.span is not None]
            span = _tracing.start("eventfold.commit", calls, log=self._location)
        try:
            commit = await self._committer.commit(group)
            committed = list(map(type, commit.outcomes)).count(int)
            self.counters.add(committed, len(group) - committed, perf_counter() - begun)
            if span is not None:
                span.end(appends=committed, refused=len(group) - committed, bytes=len(commit.lines.data))
            if commit.lines.data:
                self._on_commit(commit)
        except Exception as error:
            if span is not None:
                span.end(error, appends=0, refused=len(group))
            self.counters.add(0, len(group), perf_counter() - begun)
            if isinstance(error, OSError | UnknownOutcomeError):
                return [error] * len(group), _no_offset
            self._note_raised_to(group)
            return [self.fail(error)] * len(group), _no_offset
        if self.checks is not None:
            # Other writers may have appended the same ids since the check.
            judged = zip(group, commit.outcomes, strict=True)
            await self.checks.check_ids([append for append, why in judged if isinstance(why, DuplicateIdError)])
        lines = commit.lines
        # If offsets are bytes, a method of `int`: a Python call for each line would take as long as everything else.
        return commit.outcomes, lines.offset_at if lines.offset_map else lines.start_offset.__add__


def _no_offset(position: int) -> int:
    """The `offset_at` of a group that was not committed: its outcomes are errors, so nothing calls this."""
    raise AssertionError("nothing was committed")
