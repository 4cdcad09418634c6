"""One of several programs that append to a log and tail it while a test harms the server.

Arguments: the address, the program's number, the number of tasks. Programs with an even number use the index. Each task
appends events that are numbered by the program; of every ten tasks, one expects the head and one appends unless its tag
is there. Each prints the result. When standard input ends, the program appends its last event, number -1, and prints
what its tail has seen up to there.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Iterator

from eventfold import ConditionalAppendError, Event, EventLog, Query, UnknownOutcomeError
from eventfold.postgres import Postgres


async def append(log: EventLog, task: int, event: Event) -> None:
    if task % 10 == 0:
        await log.append_if(event, *log.head)
    elif task % 10 == 1:
        await log.append_unless([event], Query(tags=event.tags), after=log.head.offset)
    else:
        await log.append(event)


async def append_until(stop: asyncio.Event, log: EventLog, program: int, task: int, numbers: Iterator[int]) -> None:
    while not stop.is_set():
        n = next(numbers)
        try:
            await append(log, task, Event("counted", {"program": program, "n": n}, tags=(f"{program}:{n}",)))
        except ConditionalAppendError:
            assert task % 10 == 0
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
    async with EventLog.open(Postgres.from_address(address), index=program % 2 == 0) as log:
        tailing = asyncio.create_task(tail_to_the_end(log, program))
        async with asyncio.TaskGroup() as group:
            for task in range(tasks):
                group.create_task(append_until(stop, log, program, task, numbers))
            await asyncio.to_thread(sys.stdin.read)
            stop.set()
        await log.append(Event("counted", {"program": program, "n": -1}))
        seen = await tailing
    for number, n in seen:
        print("seen", number, n)


asyncio.run(main())
