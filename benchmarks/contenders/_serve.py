"""The contender's side of the protocol (see `benchmarks.contenders`), and what the built-in ones share.

A contender is a class with a coroutine method for each request that it can do, whose keyword arguments are the
request's fields and which returns the answer. All run on one event loop, one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from time import monotonic_ns, perf_counter
from typing import Any, Protocol

Answer = dict[str, Any]


class Unsupported(Exception):  # noqa: N818
    """Raised by a method for a variant of the request that the contender can't do."""


class Appender(Protocol):
    """An open log. Both calls return when their events, in the contender's own form, are on disk."""

    async def append(self, event: Any) -> object: ...

    async def append_many(self, events: Sequence[Any]) -> object: ...


async def time_appends(
    opening: AbstractAsyncContextManager[Appender], events: Sequence[Any], tasks: int, batch: int
) -> Answer:
    """Appends the events from `tasks` tasks, each of which appends its share one by one or in batches.

    The events are distributed in turn, so that they are used roughly in their order in memory, as in a real program.
    """
    start = asyncio.Event()

    async def work(log: Appender, mine: Sequence[Any]) -> None:
        await start.wait()
        if batch == 1:
            for event in mine:
                await log.append(event)
        else:
            for first in range(0, len(mine), batch):
                await log.append_many(mine[first : first + batch])

    async with opening as log:
        working = [asyncio.create_task(work(log, events[i::tasks])) for i in range(tasks)]
        await asyncio.sleep(0)
        begun = perf_counter()
        start.set()
        await asyncio.gather(*working)
        return {"seconds": perf_counter() - begun}


async def time_conditional(attempt: Callable[[], Awaitable[bool]], tasks: int, count: int) -> Answer:
    """Lets each task call `attempt` until `count` of its attempts have succeeded."""

    async def work() -> None:
        for _ in range(count):
            while not await attempt():
                pass

    begun = perf_counter()
    await asyncio.gather(*(work() for _ in range(tasks)))
    return {"seconds": perf_counter() - begun}


async def time_together(
    say: Callable[[Answer], None], append: Callable[[], Awaitable[object]], tasks: int, start: str, seconds: float
) -> Answer:
    """The answer to `append_together`: each task calls `append` repeatedly for `seconds`.

    Only calls that return within that time count. The file `start` appears when all processes are ready, and contains
    the time to begin.
    """
    say({"ready": True})
    while not os.path.exists(start):
        await asyncio.sleep(0.002)
    begin = int(Path(start).read_text())
    end = begin + int(seconds * 1e9)
    waits: list[int] = []

    async def work() -> None:
        await asyncio.sleep((begin - monotonic_ns()) / 1e9)
        while (called := monotonic_ns()) < end:
            await append()
            if (now := monotonic_ns()) <= end:
                waits.append(now - called)

    await asyncio.gather(*(work() for _ in range(tasks)))
    # If no call returned in time, calls take longer than that.
    return {"events": len(waits), "p99": percentiles(waits)["p99"] / 1e9 if waits else seconds}


async def reading_times(begun: float, events_of: Callable[[str], Awaitable[int]], tags: Sequence[int]) -> Answer:
    """The answer to `read_tagged`: reads and counts the events of each tag; the first is timed from `begun`."""
    first, *others = tags
    events, times = await events_of(f"entity:{first}"), []
    opened = perf_counter() - begun
    for tag in others:
        begun = perf_counter()
        if await events_of(f"entity:{tag}") != events:
            raise AssertionError(f"entity:{tag} has not as many events as entity:{first}")
        times.append(perf_counter() - begun)
    return {"open": opened, "p50": percentiles(times)["p50"] if times else 0.0, "events": events}


def percentiles(times: Sequence[float]) -> Answer:
    """The median, the 99th percentile and the maximum."""
    ordered = sorted(times)
    return {"p50": at(ordered, 0.5), "p99": at(ordered, 0.99), "max": ordered[-1]}


def at(ordered: Sequence[float], share: float) -> float:
    """The smallest figure that is not exceeded by this share of the sorted figures."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "uvloop":
        import uvloop

        return uvloop.new_event_loop
    return asyncio.new_event_loop


def serve(contender: Any) -> None:
    """Answers requests until the input ends."""
    parser = argparse.ArgumentParser(description=sys.modules[type(contender).__module__].__doc__)
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="asyncio", help="the event loop")
    chosen = parser.parse_args()
    # Output that libraries print must not be mistaken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: Answer) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    contender.say = say
    with asyncio.Runner(loop_factory=loop_factory(chosen.loop)) as runner:
        for line in sys.stdin:
            request = json.loads(line)
            method = getattr(contender, request.pop("do"), None)
            gc.collect()
            try:
                say({"unsupported": True} if method is None else runner.run(method(**request)))
            except Unsupported:
                say({"unsupported": True})
            except Exception as error:
                say({"error": repr(error)})
                raise
