"""A process to be killed: many tasks append, and each acknowledged event is reported on standard output.

Arguments: the directory, the round. Each task's events are numbered from 0; task 0 appends batches of three.
"""

from __future__ import annotations

import asyncio
import os
import sys

from eventfold import Event, EventLog

TASKS = 12
BATCH = 3


async def append_for_ever(log: EventLog, round: int, task: int) -> None:
    n = 0
    while True:
        count = BATCH if task == 0 else 1
        events = [Event("killed", {"round": round, "task": task, "n": n + i, "text": "x" * task}) for i in range(count)]
        results = await (log.append_many(events) if count > 1 else log.append(events[0]))
        for result in results if count > 1 else [results]:
            os.write(1, f"{round} {task} {n} {result.end_offset}\n".encode())
            n += 1


async def main() -> None:
    async with EventLog.open(sys.argv[1], max_log_size=3000) as log:
        await asyncio.gather(*(append_for_ever(log, int(sys.argv[2]), task) for task in range(TASKS)))


asyncio.run(main())
