"""A program that uses everything in eventfold, to be run while one of its system calls fails; see `test_system_calls`.

Arguments: "one" or "many" threads for its file work; the lock mode; and three directories: a new one, one whose last
line is torn and whose rotation is half done, and one whose rotation had just begun. Before each step, it prints `will
KEYS`, and after it `did KEYS` with the end of the last event in the log, `refused KEYS`, or `unknown KEYS`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from eventfold import ConditionalAppendError, Event, EventLog, LockMode, View, WriterFailedError, _threads
from eventfold._files import committer, operations, rotation, shared_committer

# If a call fails in each of many threads, a session may fail as often as there are threads.
TRIES = 12


def fold(state: dict[str, int], event: Event) -> dict[str, int]:
    """Counts the events of each type, and adds up their numbers."""
    state[event.type] = state.get(event.type, 0) + 1
    state["sum"] = state.get("sum", 0) + event.data["n"]
    return state


def views() -> list[View[Any]]:
    """Two views that are folded and saved apart from each other."""
    return [View("all", fold, dict), View("batches", fold, dict, event_types={"batch"})]


def report(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def tried(words: str, doing: Awaitable[Any], end: Callable[[Any], object] = lambda _: "") -> None:
    """Runs a step and reports its outcome."""
    report("will", words)
    try:
        result = await doing
    except (WriterFailedError, asyncio.CancelledError):
        report("unknown", words)
    except (OSError, ConditionalAppendError):
        report("refused", words)
    else:
        report("did", words, end(result))


class Session:
    """One log from its opening to its closing; `first` is the number of its first event."""

    def __init__(self, directory: str, lock: LockMode, first: int) -> None:
        self.directory = directory
        self.lock = lock
        self.next = first
        self.read_up_to = 0
        self.begun = asyncio.Event()

    def event(self, type: str = "one") -> Event:
        self.next += 1
        return Event(type, {"n": self.next - 1}, ts=1_700_000_000)

    async def append(self) -> None:
        event = self.event()
        await tried(f"append {event.data['n']}", self.log.append(event), lambda result: result.end_offset)

    async def append_batch(self, count: int) -> None:
        events = [self.event("batch") for _ in range(count)]
        numbers = ",".join(str(event.data["n"]) for event in events)
        await tried(f"append {numbers}", self.log.append_many(events), lambda results: results[-1].end_offset)

    async def append_if(self, offset: int, line_hash: str) -> None:
        event = self.event()
        appending = self.log.append_if(event, offset, line_hash)
        await tried(f"append {event.data['n']}", appending, lambda result: result.end_offset)

    async def appends(self, count: int) -> None:
        """Appends from several tasks at once; one of the appends is a batch."""
        await asyncio.gather(*(self.append() for _ in range(count)), self.append_batch(3))

    async def cancelled_appends(self) -> None:
        """Cancels one append in the queue, and another one when its batch may have been taken."""
        tasks = [asyncio.create_task(self.append()) for _ in range(4)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        for _ in range(3):
            await asyncio.sleep(0)
        tasks[2].cancel()
        await asyncio.wait(tasks)

    async def rotate(self) -> None:
        """Rotates while other tasks append."""
        self.begun.clear()
        rotation = asyncio.create_task(tried("rotate", self.log.rotate()))
        begun = asyncio.create_task(self.begun.wait())
        await asyncio.wait([rotation, begun], return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()
        await self.appends(3)
        await rotation

    async def consume(self, count: int) -> None:
        """Reads `count` events and commits each; returns early if there are no more."""
        try:
            while count and self.read_up_to < self.log.head.offset:
                record = await anext(self.consumer)
                self.read_up_to = record.end_offset
                await tried(f"commit {record.end_offset}", self.consumer.commit(record))
                count -= 1
        except OSError as error:
            report("unread", error)

    async def run(self, all_of_it: bool) -> None:
        async with EventLog.open(self.directory, views=views(), lock=self.lock) as self.log:
            self.consumer = self.log.consumer("mailer")
            await self.appends(4)
            if all_of_it:
                await self.append_if(*self.log.head)
                await self.append_if(1, "0" * 16)
                await self.consume(2)
                await tried("refresh", self.log.refresh_all())
                await self.rotate()
                await self.cancelled_appends()
                await self.consume(2)
            await self.append()


async def run(directory: str, lock: LockMode, first: int, all_of_it: bool) -> None:
    """Runs a session; repeats it if the log can't be opened or its writer failed."""
    session = Session(directory, lock, first)
    on_loop, begin = asyncio.get_running_loop().call_soon_threadsafe, rotation.begin

    def begin_and_tell(*args: Any) -> Any:
        rotation = begin(*args)
        on_loop(session.begun.set)
        return rotation

    rotation.begin = begin_and_tell
    try:
        for _ in range(TRIES):
            report("open", directory)
            try:
                await session.run(all_of_it)
                return
            except (OSError, WriterFailedError) as error:
                report("failed", repr(error))
        raise RuntimeError("the log could not be opened")
    finally:
        rotation.begin = begin


class OneThread:
    """A pool that runs its calls in a writer's thread."""

    def __init__(self) -> None:
        self.thread = _threads.Thread("everything")
        self.thread.end = lambda: None
        self.start = self.thread._jobs.put


async def main(threads: str, mode: str, new: str, left: str, begun: str) -> None:
    lock = LockMode(mode)
    if threads == "one":
        # All system calls on the files are made one after another, so each can be identified by its number.
        _threads._pool = OneThread()
        committer.Thread = shared_committer.Thread = lambda name: _threads._pool.thread
    else:
        # A call fails once in each thread: if each attempt had a new thread, no log could ever be opened.
        writers = itertools.cycle([_threads.Thread(f"writer {n}") for n in range(3)])
        for _ in range(3):
            next(writers).end = lambda: None
        committer.Thread = shared_committer.Thread = lambda name: next(writers)
    # Frames have a few lines, and temporary files have the same names in every run.
    rotation.FRAME_SIZE = 400
    numbers = itertools.count()
    operations.temporary_path = lambda path: path.with_name(f".{path.name}.{next(numbers)}.tmp")
    await run(new, lock, 1000, True)
    await run(new, lock, 2000, True)
    await run(left, lock, 3000, False)
    await run(begun, lock, 4000, False)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
    report("end")
