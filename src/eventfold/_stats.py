"""Counters of what a log has done since it was opened. They cost an append almost nothing."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class WriterCounters(msgspec.Struct):
    """The counters of a writer: see `LogStats`."""

    appends: int = 0
    refused: int = 0
    batches: int = 0
    largest_batch: int = 0
    commit_seconds: float = 0.0
    slowest_commit_seconds: float = 0.0

    def add(self, committed: int, refused: int, seconds: float) -> None:
        """Counts a commit."""
        self.appends += committed
        self.refused += refused
        self.batches += 1
        self.commit_seconds += seconds
        if committed + refused > self.largest_batch:
            self.largest_batch = committed + refused
        if seconds > self.slowest_commit_seconds:
            self.slowest_commit_seconds = seconds


class ViewStats(msgspec.Struct, frozen=True):
    """The progress of a view: its `offset`, and its `lag`, the number of bytes from there to the head."""

    offset: int
    lag: int


class LogStats(msgspec.Struct, frozen=True):
    """The result of `EventLog.stats`. The counters start at 0 when the log is opened.

    Attributes:
        head: The offset of the durable head, in bytes of the whole log; None for a read-only log.
        appends: The number of acknowledged calls, each with one event or a batch.
        refused: The number of calls that conflicted, or whose commit failed.
        batches: The number of commits. Each commit takes the calls that are waiting at that time.
        largest_batch: The largest number of calls in one commit.
        commit_seconds: The total time of all commits, from checking the conditions to the end of the sync.
        slowest_commit_seconds: The time of the slowest commit.
        queued: The number of calls that wait for a commit.
        waiting_for_place: The number of calls that wait because the queue is full.
        waiting: The number of tails, watches and other calls that wait for events of this log in this process.
        views: The progress of the registered views, by name.
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
