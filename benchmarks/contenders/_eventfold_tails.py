"""The time from the call of append until a record reaches the tails, in the writer's process and in another one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import monotonic_ns, process_time

from benchmarks._events import sample_fields
from eventfold import Event, EventReader, EventWriter, LockMode

from ._serve import Answer, percentiles

# Seconds after which started tails are waiting.
SETTLE = 0.2


class Deliveries:
    """The latency of each delivery to `tails` tails, in seconds."""

    def __init__(self, tails: int) -> None:
        self.latencies: list[float] = []
        self._tails = tails
        self._all_of_them = asyncio.Event()

    def got(self, sent: int) -> None:
        self.latencies.append((monotonic_ns() - sent) / 1e9)
        if len(self.latencies) % self._tails == 0:
            self._all_of_them.set()

    async def next(self) -> None:
        """Waits until every tail has received the last event."""
        await self._all_of_them.wait()
        self._all_of_them.clear()


@asynccontextmanager
async def tailing(readers: Sequence[EventReader]) -> AsyncIterator[Deliveries]:
    """A tail of each of the readers, which may be the same one; each has received all existing events."""
    deliveries = Deliveries(len(readers))

    async def follow(reader: EventReader) -> None:
        async for record in reader.tail(0):
            deliveries.got(record.event.data["at"])

    tasks = [asyncio.create_task(follow(reader)) for reader in readers]
    await asyncio.sleep(SETTLE)
    try:
        yield deliveries
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def append_timed(log: EventWriter, number: int) -> float:
    """Appends an event with the time of the call; returns the seconds that the append took."""
    fields = sample_fields(number)
    sent = monotonic_ns()
    fields["data"]["at"] = sent
    await log.append(Event(**fields))
    return (monotonic_ns() - sent) / 1e9


async def tail(dir: str, tails: int, count: int) -> Answer:
    appends = []
    async with EventWriter.open(dir) as log, tailing([log.reader()] * tails) as deliveries:
        for number in range(count):
            appends.append(await append_timed(log, number))
            await deliveries.next()
    return {**percentiles(deliveries.latencies), "append": percentiles(appends)["p50"]}


async def idle(dir: str, logs: int, seconds: float) -> Answer:
    """Tails `logs` logs in a process without a writer."""
    paths = [Path(dir, str(number)) for number in range(logs)]
    for path in paths:
        async with EventWriter.open(path) as log:
            await append_timed(log, 0)
    async with tailing([EventReader(path) for path in paths]):
        used = process_time()
        await asyncio.sleep(seconds)
        return {"seconds": process_time() - used}


async def listen(dir: str, tails: int, count: int, shared: bool, ready: Callable[[], None]) -> Answer:
    """Tails a log in a process that only reads or, if `shared`, also writes."""
    async with AsyncExitStack() as stack:
        reader = EventReader(dir)
        if shared:
            writer = await stack.enter_async_context(EventWriter.open(dir, lock=LockMode.SHARED))
            reader = writer.reader()
        deliveries = await stack.enter_async_context(tailing([reader] * tails))
        ready()
        while len(deliveries.latencies) < tails * count:
            await deliveries.next()
    return percentiles(deliveries.latencies)


async def send(dir: str, count: int, interval: float, shared: bool) -> Answer:
    appends = []
    async with EventWriter.open(dir, lock=LockMode.SHARED if shared else LockMode.FLOCK) as log:
        await asyncio.sleep(SETTLE)
        for number in range(count):
            appends.append(await append_timed(log, number))
            await asyncio.sleep(interval)
    return {"append": percentiles(appends)["p50"]}
