"""Uses logs in every way at once for a long time, and checks that nothing was lost and no resource leaked.

There are two logs. The *steady* log stays open in this process, with appends, rotations, a tail, a watch, a consumer
and a view. The *stormy* log is used in rounds, either by this process, which closes it cleanly or in the middle of the
work, or by another process, which is killed with SIGKILL. After each round, the stormy log is opened, read, and
compared with everything that was acknowledged, while a tail of this process follows it throughout. From time to time,
a new stormy directory is started, so that reading it does not take long.

After each round, this process's descriptors, threads, tasks and memory are counted, which must not grow. The exit
status is 1 after any loss, unexpected error or growth. `--seed` repeats the random choices, but not their timing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import random
import shutil
import sys
import tempfile
import traceback
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

from eventfold import ConditionalAppendError, Event, EventLog, EventReader, LogClosedError, View

from ._harness import file_system
from ._ledger import Batch, Ledger, Note, Samples, Sum

TASKS = 12
MAX_LOG_SIZE = 20_000  # bytes
EVENTS_PER_DIRECTORY = 8_000
# Seconds: a rotated file is kept open for a minute, so the count of descriptors is level only after that.
WARM_UP = 75.0
# Seconds to wait for what is certain to happen; a machine under load takes its time.
PATIENCE = 120.0


def counts() -> View[dict[str, int]]:
    """The view of both logs: how many events there are of each type."""

    def count(state: dict[str, int], event: Event) -> dict[str, int]:
        state[event.type] = state.get(event.type, 0) + 1
        return state

    return View("counts", count, dict)


async def work(log: EventLog, run: int, task: int, dice: random.Random, note: Note) -> None:
    """Appends in all ways until the log is closed, and records the outcome of each append."""
    n = 0
    while True:
        size = dice.choice((1, 1, 1, 1, 1, 2, 3, 8))
        kind = dice.choice(("single", "single", "if", "cancelled")) if size == 1 else "batch"
        text = "x" * dice.randrange(200)
        batch = Batch(run, task, n, size)
        events = [Event(kind, {**data, "text": text}) for data in batch.data()]
        n += size
        try:
            if kind == "batch":
                results = await log.append_many(events)
            elif kind == "if":
                results = [await log.append_if(events[0], *log.head)]
            elif kind == "single":
                results = [await log.append(events[0])]
            else:
                append = asyncio.create_task(log.append(events[0]))
                await asyncio.sleep(dice.random() * 0.002)
                append.cancel()
                results = [await append]
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():
                raise
            continue  # in the log or not
        except LogClosedError:
            note("refused", run, task, batch.n)
            return
        except ConditionalAppendError:
            note("refused", run, task, batch.n)
            continue
        for i, result in enumerate(results):
            note("acknowledged", run, task, batch.n + i, result.end_offset, int(result.line_hash, 16))
        if dice.random() < 0.05:
            await asyncio.sleep(dice.random() * 0.02)


async def consume(log: EventLog, dice: random.Random, note: Note) -> None:
    """Continues where this consumer was, and commits now and then."""
    reached = None
    async for record in (consumer := log.consumer("consumer")):
        if reached is None:
            note("begun", record.start_offset)
        elif record.start_offset != reached:
            note("skipped", reached)
        reached = record.end_offset
        if dice.random() < 0.02:
            note("committing", reached)
            await consumer.commit(record)
            note("committed", reached)


async def disturb(log: EventLog, dice: random.Random) -> None:
    """Rotates and refreshes at random moments, until the log is closed."""
    with suppress(LogClosedError):
        while True:
            await asyncio.sleep(dice.random() * 0.2)
            await (log.rotate() if dice.random() < 0.5 else log.refresh_all())


async def watch(log: EventLog) -> None:
    """Follows the view, as a live page would."""
    async for _ in log.watch("counts"):
        pass


def busy(log: EventLog, run: int, dice: random.Random, note: Note) -> list[asyncio.Task[None]]:
    """The tasks of one round."""
    jobs = [work(log, run, task, random.Random(dice.random()), note) for task in range(TASKS)]
    jobs += [consume(log, random.Random(dice.random()), note), disturb(log, random.Random(dice.random())), watch(log)]
    return [asyncio.create_task(job) for job in jobs]


async def child(directory: str, run: int, seed: float) -> None:
    """The process that is killed; reports its records on standard output."""

    def tell(*note: Any) -> None:
        os.write(1, (" ".join(map(str, note)) + "\n").encode())

    async with EventLog.open(directory, views=[counts()], max_log_size=MAX_LOG_SIZE) as log:
        await asyncio.gather(*busy(log, run, random.Random(seed), tell))


class Follower:
    """A tail that runs throughout; `sum` is the sum of all records that it yielded."""

    def __init__(self, reader: EventReader | EventLog) -> None:
        self.sum = Sum()
        self._reader = reader
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async with aclosing(self._reader.tail(0)) as tail:
            async for record in tail:
                if record.start_offset != self.sum.end:
                    raise AssertionError(f"the tail went from {self.sum.end} to {record.start_offset}")
                self.sum.add(record.end_offset, int(record.line_hash, 16))

    async def reach(self, offset: int) -> None:
        """Waits until it has yielded everything before an offset."""
        until = monotonic() + PATIENCE
        while self.sum.end < offset:
            if self._task.done():
                self._task.result()
                raise AssertionError("a tail ended on its own")
            if monotonic() > until:
                raise AssertionError(f"a tail is stuck at {self.sum.end}, but the log continues to {offset}")
            await asyncio.sleep(0.01)

    async def end(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class Storm:
    """One stormy directory with its ledger and its tail. End it."""

    def __init__(self, directory: Path) -> None:
        self.dir = directory
        self.ledger = Ledger()
        self.follower = Follower(EventReader(directory))

    async def own_round(self, run: int, dice: random.Random) -> str:
        """Works in this process and closes the log, half of the time in the middle of the work."""
        gentle = dice.random() < 0.5
        log = await EventLog.open(self.dir, views=[counts()], max_log_size=MAX_LOG_SIZE)
        try:
            tasks = busy(log, run, dice, self.ledger.note)
            await asyncio.sleep(dice.random() * 2)
            if gentle:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
        finally:
            await log.aclose()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
        return "closed cleanly" if gentle else "closed in the middle of the work"

    async def killed_round(self, run: int, dice: random.Random) -> str:
        """Lets another process work, and kills it."""
        command = ["-m", "benchmarks.soak", "0", "--child", str(self.dir), str(run), str(dice.random())]
        process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=PIPE, limit=2**24)
        try:
            if dice.random() < 0.2:
                await asyncio.sleep(dice.random())  # it may not even have opened the log
            else:
                for _ in range(dice.randrange(1, 1500)):
                    if not await self._hear(process.stdout):
                        raise AssertionError("the other process ended on its own")
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            while await self._hear(process.stdout):
                pass
            await process.wait()
        return "killed"

    async def _hear(self, stream: asyncio.StreamReader) -> bool:
        """Reads one record of the other process; false if there are no more."""
        line = await asyncio.wait_for(stream.readline(), PATIENCE)
        if not line.endswith(b"\n"):
            return False
        kind, *numbers = line.decode().split()
        self.ledger.note(kind, *map(int, numbers))
        return True

    async def check(self) -> int:
        """Opens and reads the log, and adds faults to the ledger; returns the number of events."""
        async with EventLog.open(self.dir, views=[counts()]) as log:
            found = [record async for record in log.read_full()]
            await self.follower.reach(log.head.offset)
            state: dict[str, int] = {}
            for record in found:
                state[record.event.type] = state.get(record.event.type, 0) + 1
            if state != log.view("counts"):
                self.ledger.faults.append(f"the view is {log.view('counts')}, a replay gives {state}")
        self.ledger.check(found, self.follower.sum)
        return len(found)


class Steady:
    """The log that stays open all the time. Use it in `async with steady(…)`."""

    def __init__(self, log: EventLog) -> None:
        self.log = log
        self.appended = Sum()
        self.follower = Follower(log)
        self.faults: list[str] = []
        self.stopped = False

    async def work(self, task: int) -> None:
        n = 0
        while not self.stopped:
            result = await self.log.append(Event(f"task-{task}", {"n": n, "text": "y" * (n % 100)}))
            self.appended.add(result.end_offset, int(result.line_hash, 16))
            n += 1
            await asyncio.sleep(0.02)

    async def commit(self) -> None:
        async for record in (consumer := self.log.consumer("steady")):
            if record.event.data["n"] % 100 == 0:
                await consumer.commit(record)

    async def check(self) -> None:
        """Compares what was acknowledged, what the tail yielded and what a replay yields."""
        await self.follower.reach(self.log.head.offset)
        read = Sum()
        async for record in self.log.read_full():
            read.add(record.end_offset, int(record.line_hash, 16))
        await self.log.refresh_all()
        if not (self.appended == self.follower.sum == read):
            self.faults.append(f"steady: acknowledged {self.appended}, tailed {self.follower.sum}, read {read}")
        if sum(self.log.view("counts").values()) != read.events:
            self.faults.append(f"steady: the view has {self.log.view('counts')}, the log {read.events} events")


@asynccontextmanager
async def steady(directory: Path) -> AsyncIterator[Steady]:
    """The steady log, checked and closed at the end."""
    async with EventLog.open(directory, views=[counts()], max_log_size=MAX_LOG_SIZE) as log:
        state = Steady(log)
        appending = [asyncio.create_task(state.work(task)) for task in range(4)]
        others = [asyncio.create_task(job) for job in (state.commit(), watch(log))]
        try:
            yield state
        finally:
            state.stopped = True
            ended = await asyncio.gather(*appending, return_exceptions=True)
            await state.check()
            for task in others:
                task.cancel()
            ended += await asyncio.gather(*others, return_exceptions=True)
            state.faults += [f"steady: {error!r}" for error in ended if isinstance(error, Exception)]
            await state.follower.end()


async def soak(seconds: float, seed: int, parent: Path) -> list[str]:
    """Runs for `seconds`, prints what it did, and returns the faults."""
    dice, samples, faults = random.Random(seed), Samples(WARM_UP), []
    started, told, run, acknowledged, read, directories = monotonic(), 0.0, 0, 0, 0, 1
    done: dict[str, int] = {}
    async with steady(parent / "steady") as calm:
        storm = Storm(parent / "storm-1")
        samples.take(0)
        while not run or monotonic() - started < seconds:
            round_ = storm.own_round if dice.random() < 0.6 else storm.killed_round
            run += 1
            try:
                how = await round_(run, dice)
                events = await storm.check()
            except Exception as error:
                traceback.print_exc()
                faults.append(f"round {run}, {storm.dir.name}: {error!r}")
                break
            done[how] = done.get(how, 0) + 1
            read += events
            if storm.ledger.faults:
                faults += [f"round {run} ({how}), {storm.dir.name}: {fault}" for fault in storm.ledger.faults]
                storm.ledger.faults.clear()
            samples.take(monotonic() - started)
            if monotonic() - told > 30:
                told = monotonic()
                print(f"{samples.latest()}, {run} rounds, steady {calm.appended.events:,} events", flush=True)
            if events > EVENTS_PER_DIRECTORY:
                acknowledged += len(storm.ledger.acknowledged)
                await storm.follower.end()
                await asyncio.to_thread(shutil.rmtree, storm.dir)
                directories += 1
                storm = Storm(parent / f"storm-{directories}")
        acknowledged += len(storm.ledger.acknowledged)
        await storm.follower.end()
    faults += calm.faults
    rounds = ", ".join(f"{count} {how}" for how, count in sorted(done.items()))
    print(f"{run} rounds ({rounds}) in {directories} directories, {monotonic() - started:.0f} s")
    print(f"{acknowledged:,} events acknowledged in them, {read:,} read and compared")
    print(f"{calm.appended.events:,} events acknowledged in the steady log")
    print("\n".join(samples.table()))
    return faults + samples.growth()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("minutes", type=float, help="how long to run")
    parser.add_argument(
        "--seed", type=int, default=None, help="repeat the random choices of the run that printed this seed"
    )
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where to create a temporary directory")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        directory, run, seed = chosen.child
        asyncio.run(child(directory, int(run), float(seed)))
        return 0
    seed = random.randrange(2**32) if chosen.seed is None else chosen.seed
    where = f"Python {platform.python_version()}, {os.cpu_count()} cores, {file_system(chosen.dir)}"
    print(f"{chosen.minutes:g} minutes, --seed {seed}, {where}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-", dir=chosen.dir) as parent:
        faults = asyncio.run(soak(chosen.minutes * 60, seed, Path(parent)))
    for fault in faults[:50]:
        print(f"FAULT: {fault}")
    print(f"{len(faults)} faults" if faults else "no faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
