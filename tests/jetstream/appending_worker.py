"""A process whose tasks append while servers are harmed, until its standard input ends.

Arguments: the servers' addresses, separated by commas; the worker's name; the number of tasks. Task 0 appends on
condition that it knows the head. Each outcome is a line on standard output: `acknowledged`, `unknown`, `refused` or
`unsent`, the task and the number of the event, and the offset of the last acknowledged event. A task repeats an event
that is `unsent`, and otherwise goes on with the next number.
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
        number, offset = 0, -1
        while not stopping.is_set():
            event = Event("counted", {"worker": name, "task": task, "number": number})
            try:
                if task == 0:
                    result = await log.append_if(event, *await log.reader().head())
                else:
                    result = await log.append(event)
                outcome, offset = "acknowledged", result.start_offset
            except ConditionalAppendError:
                outcome = "refused"
            except UnknownOutcomeError:
                outcome = "unknown"
            except OSError:
                outcome = "unsent"
            print(outcome, task, number, offset, flush=True)
            number += outcome != "unsent"  # This one is tried again.

    async with EventLog.open(engine) as log, asyncio.TaskGroup() as group:
        print("ready", 0, 0, 0, flush=True)
        for task in range(tasks):
            group.create_task(append(task))
        with contextlib.suppress(EOFError):
            await asyncio.to_thread(sys.stdin.read)
        stopping.set()


asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
