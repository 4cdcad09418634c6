"""What a log has done since it was opened, and what is waiting: counters that cost an append next to nothing."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class WriterCounters(msgspec.Struct):
    """What the writer counts, batch by batch; see `LogStats`."""

    appends: int = 0
    refused: int = 0
    batches: int = 0
    largest_batch: int = 0
    commit_seconds: float = 0.0
    slowest_commit_seconds: float = 0.0

    def add(self, committed: int, refused: int, seconds: float) -> None:
        """Counts a batch that was committed."""
        self.appends += committed
        self.refused += refused
        self.batches += 1
        self.commit_seconds += seconds
        if committed + refused > self.largest_batch:
            self.largest_batch = committed + refused
        if seconds > self.slowest_commit_seconds:
            self.slowest_commit_seconds = seconds


class ViewStats(msgspec.Struct, frozen=True):
    """How far a view is: its `offset`, and the `lag` in bytes of log up to the head."""

    offset: int
    lag: int


class LogStats(msgspec.Struct, frozen=True):
    """The result of `EventLog.stats`. Counters start at 0 when the log is opened.

    Attributes:
        head: The offset of the durable head, in bytes of the whole log; None for a read-only log.
        appends: Calls that were acknowledged, each of one event or of a batch.
        refused: Calls that were not: conflicts, and those that failed in the commit.
        batches: Commits, each of all appends that were waiting.
        largest_batch: The largest number of calls in one commit.
        commit_seconds: The total time of all commits, from checking conditions to the end of the sync.
        slowest_commit_seconds: The longest of them.
        queued: Calls that are waiting to be committed.
        waiting_for_place: Calls that are waiting because the queue is full.
        waiting: Tails, watches and waits that are waiting for events of this log in this process.
        views: The registered views by name.
    """

    head: int | None
    appends: int
    refused: int
    batches: int
    largest_batch: int
    commit_seconds: float
    slowest_commit_seconds: float
    queued: int
    waiting_for_place: int
    waiting: int
    views: Mapping[str, ViewStats]
