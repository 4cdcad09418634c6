"""A process to be killed, one of several that share a log: each acknowledged event is reported on standard output.

Arguments: the directory, the round, the process's number. It appends from a few tasks until its standard input ends,
then closes the log. Each task's events are numbered from 0; task 0 appends batches of three, and task 1 rotates now and
then.
"""

from __future__ import annotations

import asyncio
import os
import sys

from eventfold import Event, EventLog, LockMode

TASKS = 4
BATCH = 3
ROTATE_EVERY = 200


async def append_until(stop: asyncio.Event, log: EventLog, round: int, process: int, task: int) -> None:
    n = 0
    while not stop.is_set():
        count = BATCH if task == 0 else 1
        events = [
            Event("shared", {"round": round, "process": process, "task": task, "n": n + i, "text": "x" * task})
            for i in range(count)
        ]
        results = await (log.append_many(events) if count > 1 else log.append(events[0]))
        for result in results if count > 1 else [results]:
            os.write(1, f"{round} {process} {task} {n} {result.end_offset}\n".encode())
            n += 1
        if task == 1 and n % ROTATE_EVERY == 0:
            await log.rotate()


async def main() -> None:
    round, process = map(int, sys.argv[2:])
    stop = asyncio.Event()
    opening = EventLog.open(sys.argv[1], lock=LockMode.SHARED, max_log_size=4000)
    async with opening as log, asyncio.TaskGroup() as group:
        for task in range(TASKS):
            group.create_task(append_until(stop, log, round, process, task))
        await asyncio.to_thread(sys.stdin.read)
        stop.set()


asyncio.run(main())
