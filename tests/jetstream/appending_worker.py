"""A process whose tasks append while servers are harmed, until its standard input ends.

Arguments: the servers' addresses, separated by commas; the worker's name; the number of tasks. Task 0 appends on
condition that it knows the head. Each outcome is a line on standard output: `acknowledged`, `unknown` or `refused`, the
task and the number of the event. A task goes on with the next number only when it knows what became of the one before,
or says that it does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

from eventfold import ConditionalAppendError, Event, EventLog, UnknownOutcomeError
from eventfold.jetstream import JetStream


async def main(addresses: str, name: str, tasks: int) -> None:
    engine = JetStream(addresses.split(","), "faults", replicas=3, timeout=20, attempt_timeout=1)
    stopping = asyncio.Event()

    async def append(task: int) -> None:
        number = 0
        while not stopping.is_set():
            event = Event("counted", {"worker": name, "task": task, "number": number})
            try:
                if task == 0:
                    await log.append_if(event, *await log.reader().head())
                else:
                    await log.append(event)
                outcome = "acknowledged"
            except ConditionalAppendError:
                outcome = "refused"
            except UnknownOutcomeError:
                outcome = "unknown"
            except OSError:
                continue  # it was not written
            print(outcome, task, number, flush=True)
            number += 1

    async with EventLog.open(engine) as log, asyncio.TaskGroup() as group:
        print("ready", 0, 0, flush=True)
        for task in range(tasks):
            group.create_task(append(task))
        with contextlib.suppress(EOFError):
            await asyncio.to_thread(sys.stdin.read)
        stopping.set()


asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
