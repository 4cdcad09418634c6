"""One of several programs that append to a log and tail it while a test harms the server.

Arguments: the address, the program's number, the number of tasks. Each task appends events numbered by the program, the
first of every ten on a condition, and tells on standard output what became of it. When standard input ends, it appends
its last event, number -1, and tells what its tail has seen up to there.
"""

from __future__ import annotations

import asyncio
import itertools
import sys

from eventfold import ConditionalAppendError, Event, EventLog, UnknownOutcomeError
from eventfold.postgres import Postgres


async def append_until(
    stop: asyncio.Event, log: EventLog, program: int, numbers: itertools.count[int], conditional: bool
) -> None:
    while not stop.is_set():
        n = next(numbers)
        event = Event("counted", {"program": program, "n": n})
        try:
            await (log.append_if(event, *log.head) if conditional else log.append(event))
        except ConditionalAppendError:
            continue
        except UnknownOutcomeError:
            print("unknown", program, n, flush=True)
        else:
            print("acknowledged", program, n, flush=True)


async def tail_to_the_end(log: EventLog, program: int) -> list[tuple[int, int]]:
    seen = []
    async for record in log.tail(0):
        seen.append((record.event.data["program"], record.event.data["n"]))
        if seen[-1] == (program, -1):
            break
    return seen


async def main() -> None:
    address, program, tasks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    stop, numbers = asyncio.Event(), itertools.count()
    async with EventLog.open(Postgres.from_address(address)) as log:
        tailing = asyncio.create_task(tail_to_the_end(log, program))
        async with asyncio.TaskGroup() as group:
            for task in range(tasks):
                group.create_task(append_until(stop, log, program, numbers, task % 10 == 0))
            await asyncio.to_thread(sys.stdin.read)
            stop.set()
        await log.append(Event("counted", {"program": program, "n": -1}))
        seen = await tailing
    for number, n in seen:
        print("seen", number, n)


asyncio.run(main())
