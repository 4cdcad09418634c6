"""A process whose disk is cut off while tasks append, the log rotates, a view is saved and a consumer commits.

Arguments: the directory, the round, the lock mode, and the operations of `eventfold._files.operations` that must do
nothing. Each task's events are numbered from 0; task 0 appends batches of three. Acknowledged events are reported on
standard output, which must not be on that disk.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from eventfold import Event, EventLog, LockMode, View
from eventfold._files import operations

TASKS = 12
BATCH = 3


def count(state: dict[str, int], event: Event) -> dict[str, int]:
    """Counts the events of each round."""
    key = str(event.data["round"])
    state[key] = state.get(key, 0) + 1
    return state


def counts() -> View[dict[str, int]]:
    """A view that the process saves."""
    return View("counts", count, dict)


def report(*words: Any) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def append_for_ever(log: EventLog, round: int, task: int) -> None:
    n = 0
    while True:
        size = BATCH if task == 0 else 1
        events = [Event("cut", {"round": round, "task": task, "n": n + i, "text": "x" * task}) for i in range(size)]
        for result in await log.append_many(events) if size > 1 else [await log.append(events[0])]:
            report("event", round, task, n, result.end_offset)
            n += 1


async def refresh_for_ever(log: EventLog) -> None:
    async for _ in log.watch("counts"):
        await log.refresh_all()


async def commit_for_ever(log: EventLog) -> None:
    consumer = log.consumer("mailer")
    async for record in consumer:
        await consumer.commit(record)
        report("commit", record.end_offset)


async def main() -> None:
    for name in sys.argv[4:]:
        setattr(operations, name, lambda _: None)
    report("opening")
    lock = LockMode(sys.argv[3])
    async with EventLog.open(sys.argv[1], views=[counts()], max_log_size=3000, lock=lock) as log:
        appends = (append_for_ever(log, int(sys.argv[2]), task) for task in range(TASKS))
        await asyncio.gather(refresh_for_ever(log), commit_for_ever(log), *appends)


if __name__ == "__main__":
    asyncio.run(main())
