"""Group commit: one task takes what has queued up, has the engine commit it in one go, and resolves the appends.

The task lives while there is work, and the next append starts it again.

Promises: each append is resolved once, in the order of the queue, with its result or an error; after a failure that
leaves the log unknown nothing more is committed, and all that wait get the error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import islice
from time import perf_counter

from . import _tracing
from ._aio import UncancellableTask
from ._checks import Checks
from ._engine import Commit, Committer
from ._errors import EventfoldError, UnknownOutcomeError, WriterFailedError, copy_error
from ._judge import Append, DuplicateIdError
from ._logging import ERROR, log_event
from ._queue import AppendQueue, resolve
from ._stats import WriterCounters

# So many appends are resolved in one turn of the loop: whoever waits for one runs in the next, and others want to run
# too.
RESOLVED_AT_ONCE = 100


class GroupCommit:
    """Commits what is put into its `queue`. Calls `on_commit` after each commit that wrote something.

    `checks` looks up what a batch must not have in common with the log; None where there is no index to ask.
    """

    def __init__(self, committer: Committer, on_commit: Callable[[Commit], object]) -> None:
        self._committer = committer
        self._on_commit = on_commit
        self._location = str(committer.source.location)
        self.queue = AppendQueue(self._changed, self._location)
        self.counters = WriterCounters()
        self.checks: Checks | None = None
        self.failure: EventfoldError | None = None
        self._task: UncancellableTask[None] | None = None
        self._drained: asyncio.Future[None] | None = None

    def check(self) -> None:
        """Raises what it has failed with."""
        if self.failure is not None:
            raise copy_error(self.failure)

    async def place(self) -> None:
        """Waits for room in the queue. Raises what it has failed with meanwhile."""
        await self.queue.place()
        self.check()

    async def drain(self) -> None:
        """Waits until everything that was put, or waits for a place, is resolved. Put nothing new from now on."""
        self._drained = asyncio.get_running_loop().create_future()
        self._changed()
        await self._drained

    def fail(self, error: BaseException) -> EventfoldError:
        """After this nothing is committed any more, and all that wait get the error, which is returned."""
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
        """Starts the task if there is work for it, and tells `drain` when there is none any more."""
        if self._task is not None:
            return
        if len(self.queue):
            self._start()
        elif self._drained is not None and self.queue.idle and not self._drained.done():
            self._drained.set_result(None)

    def _start(self) -> None:
        self._task = UncancellableTask(self._run(), "eventfold writer")

    async def _run(self) -> None:
        batch: list[Append] = []
        try:
            while batch := self.queue.take(self._committer.batch_size):
                if self.checks is not None:
                    batch = await self.checks.check(batch)
                outcomes, offset_at = await self._commit(batch)
                if self.checks is not None:
                    judged = zip(batch, outcomes, strict=True)
                    await self.checks.check_ids([append for append, why in judged if isinstance(why, DuplicateIdError)])
                judged = zip(batch, outcomes, strict=True)
                for _ in range(0, len(batch), RESOLVED_AT_ONCE):
                    for append, outcome in islice(judged, RESOLVED_AT_ONCE):
                        resolve(append, outcome, offset_at)
                    # Those that were resolved run now: what they append at once is in the next batch.
                    await asyncio.sleep(0)
        except BaseException as error:
            self.fail(error)
            for append in batch:
                resolve(append, self.failure or error, _no_offset)
            raise
        finally:
            self._task = None
            self._changed()

    async def _commit(self, batch: Sequence[Append]) -> tuple[Sequence[int | BaseException], Callable[[int], int]]:
        """What became of each append of the batch, and what gives the offset of a position in what was committed."""
        if self.failure is not None:
            return [self.failure] * len(batch), _no_offset
        begun = perf_counter()
        calls = (append.span for append in batch if append.span is not None)
        span = _tracing.start("eventfold.commit", calls, log=self._location)
        try:
            commit = await self._committer.commit(batch)
            committed = sum([outcome.__class__ is int for outcome in commit.outcomes])  # faster than a generator
            self.counters.add(committed, len(batch) - committed, perf_counter() - begun)
            span.end(appends=committed, refused=len(batch) - committed, bytes=len(commit.lines.data))
            if commit.lines.data:
                self._on_commit(commit)
        except Exception as error:
            span.end(error, appends=0, refused=len(batch))
            self.counters.add(0, len(batch), perf_counter() - begun)
            if isinstance(error, OSError | UnknownOutcomeError):
                return [error] * len(batch), _no_offset
            return [self.fail(error)] * len(batch), _no_offset
        lines = commit.lines
        # The addition itself, where offsets are bytes: a call for each line would take as long as all the rest.
        return commit.outcomes, lines.offset_at if lines.marks else lines.start_offset.__add__


def _no_offset(position: int) -> int:
    """Stands for the offsets of a batch that was not committed, of which nobody asks for one."""
    raise AssertionError("nothing was committed")
