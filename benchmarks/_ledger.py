"""The records of the long run: which events were acknowledged or refused, and the resources that the process uses.

Promise: the checks find what they should. Tests show this with a log that lacks an event, or has an event twice or out
of order, and with a count that grows.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

import xxhash

from eventfold import Record

Note = Callable[..., None]


class Batch(NamedTuple):
    """The identity of events that are appended together."""

    run: int
    task: int
    n: int
    size: int

    def data(self) -> list[dict[str, int]]:
        """The data of each event: who appended it, its number there, and the first number and size of its batch."""
        same = {"run": self.run, "task": self.task, "first": self.n, "size": self.size}
        return [{**same, "n": self.n + i} for i in range(self.size)]


class Sum:
    """An order-independent sum of lines: how many there were, which ones, and where the last one ended."""

    def __init__(self) -> None:
        self.events = self.total = self.end = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sum) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"{self.events} events up to {self.end} (sum {self.total:016x})"

    def add(self, end: int, line_hash: int) -> None:
        self.events += 1
        self.total = (self.total + xxhash.xxh64_intdigest(f"{end} {line_hash}".encode())) % 2**64
        self.end = max(self.end, end)


class Ledger:
    """The records about the events of one directory, and the faults that were found."""

    def __init__(self) -> None:
        # (run, task, n): where it ends, and its line's hash.
        self.acknowledged: dict[tuple[int, int, int], tuple[int, int]] = {}
        self.refused: set[tuple[int, int, int]] = set()
        self.faults: list[str] = []
        self._places = {0}  # offsets from which the consumer may continue

    def note(self, kind: str, *numbers: int) -> None:
        """Records the outcome of an append, or what the consumer did."""
        if kind == "acknowledged":
            run, task, n, end, line_hash = numbers
            self.acknowledged[run, task, n] = end, line_hash
        elif kind == "refused":
            run, task, n = numbers
            self.refused.add((run, task, n))
        elif kind == "committing":
            self._places.add(numbers[0])
        elif kind == "committed" or (kind == "begun" and numbers[0] in self._places):
            self._places = {numbers[0]}
        else:
            self.faults.append(f"the consumer: {kind} at {numbers}, committed was one of {self._places}")

    def check(self, records: Iterable[Record], tailed: Sum) -> None:
        """Compares a whole log with the records, and with what a tail yielded."""
        found: dict[tuple[int, int, int], tuple[int, int]] = {}
        last: dict[tuple[int, int], int] = {}
        read, due, offset = Sum(), [], 0
        for record in records:
            data, line_hash = record.event.data, int(record.line_hash, 16)
            key = data["run"], data["task"], data["n"]
            if record.start_offset != offset:
                self.faults.append(f"offset {offset} is followed by {record.start_offset}")
            if data["n"] <= last.get(key[:2], -1):
                self.faults.append(f"event {key} is there twice, or out of order")
            if not due:
                due = list(range(data["first"], data["first"] + data["size"]))
            if data["n"] != due.pop(0):
                self.faults.append(f"event {key} is part of an incomplete batch")
            offset, last[key[:2]], found[key] = record.end_offset, data["n"], (record.end_offset, line_hash)
            read.add(record.end_offset, line_hash)
        if due:
            self.faults.append(f"the last batch is incomplete: {due} are missing")
        for key, place in self.acknowledged.items():
            if found.get(key) != place:
                self.faults.append(f"event {key} was acknowledged at {place}, and is at {found.get(key)}")
        self.faults += [f"event {key} was refused, and is there" for key in self.refused & found.keys()]
        if read != tailed:
            self.faults.append(f"a read yields {read}, the tail yielded {tailed}")


class Sample(NamedTuple):
    """The process's resources at a moment (seconds since the start)."""

    seconds: float
    descriptors: int
    threads: int
    tasks: int
    megabytes: float


def sample(seconds: float) -> Sample:
    """The current resources. Descriptors and memory are known on Linux only, and 0 elsewhere."""
    descriptors, megabytes = 0, 0.0
    if os.path.isdir("/proc/self/fd"):
        descriptors = len(os.listdir("/proc/self/fd"))
        with open("/proc/self/statm") as file:
            megabytes = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return Sample(seconds, descriptors, threading.active_count(), len(asyncio.all_tasks()), megabytes)


# How much the median of each may grow from the first quarter to the last.
TOLERANCE = {"descriptors": 4, "threads": 2, "tasks": 3, "megabytes": 8.0}
# With fewer samples, growth can't be judged.
ENOUGH = 20


class Samples:
    """Samples over time; those of the first `warm_up` seconds are shown, but not judged."""

    def __init__(self, warm_up: float) -> None:
        self.all: list[Sample] = []
        self._warm_up = warm_up

    def take(self, seconds: float) -> None:
        self.all.append(sample(seconds))

    def latest(self) -> str:
        now = self.all[-1]
        return (
            f"{now.seconds:5.0f} s: {now.descriptors} descriptors, {now.threads} threads, {now.tasks} tasks, "
            f"{now.megabytes:.1f} MB"
        )

    def _judged(self) -> list[Sample]:
        return [each for each in self.all if each.seconds >= self._warm_up]

    def table(self) -> list[str]:
        """The median and the maximum of each in each quarter of the time after the warm-up."""
        judged = self._judged()
        if len(judged) < ENOUGH:
            return [self.latest(), f"{len(judged)} samples after the warm-up: too few to judge growth"]
        lines = [f"{'':12}" + "".join(f"{f'quarter {i}':>18}" for i in range(1, 5)) + "   (median, most)"]
        for name in TOLERANCE:
            cells = ""
            for quarter in _quarters(judged):
                values = [getattr(each, name) for each in quarter]
                cells += f"{f'{statistics.median(values):.1f}, {max(values):.1f}':>18}"
            lines.append(f"{name:12}{cells}")
        return lines

    def growth(self) -> list[str]:
        """What has grown beyond tolerance from the first quarter to the last."""
        judged = self._judged()
        if len(judged) < ENOUGH:
            return []
        first, *_, last = _quarters(judged)
        faults = []
        for name, tolerance in TOLERANCE.items():
            before, after = (statistics.median(getattr(each, name) for each in part) for part in (first, last))
            if after > before + tolerance:
                faults.append(f"{name} grew from {before:.1f} to {after:.1f}")
        return faults


def _quarters(samples: list[Sample]) -> list[list[Sample]]:
    size = len(samples) / 4
    return [samples[int(i * size) : int((i + 1) * size)] for i in range(4)]
