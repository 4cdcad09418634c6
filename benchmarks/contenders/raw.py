"""The raw limit: what the machine allows a program that does the minimum.

Each append of a pre-encoded line is one `os.write` and one `os.fdatasync`, without an event loop or, in the simplest
way that keeps an event loop free, in a thread. A replay decodes each line of the file into a plain `msgspec.Struct` and
passes it to the reducer, without checks or offsets, and with nothing else running. A rotation compresses chunks of
4 MiB and syncs once, at the end.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from time import perf_counter, process_time
from typing import Any, Union

import msgspec

from benchmarks._events import (
    TYPES,
    BatchedEvent,
    Order,
    PlainEvent,
    Totals,
    add,
    add_typed,
    add_wanted,
    batch_lines,
    blocks,
    sample_fields,
    sample_lines,
)
from benchmarks._probe import growth, watch_loop

from . import _raw_tails
from ._serve import Answer, Unsupported, percentiles, serve, time_together

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PIECE = 4 * 2**20
# The number of lines that are decoded at once.
SOME = 300


def open_new(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def write_lines(dir: Path, events: int, distinct: int | None, batch: int = 1) -> None:
    """The sample events in `app.jsonl`, in the form that single appends or batches give them."""
    if batch > 1:
        with open(dir / "app.jsonl", "wb") as file:
            for first in range(0, events, batch):
                file.writelines(batch_lines(min(batch, events - first), first))
        return
    with open(dir / "app.jsonl", "wb") as file:
        known: dict[int, bytes] = {}
        for start, count in blocks(events, distinct):
            lines = known.get(start) or b"".join(sample_lines(count, start))
            if distinct is not None and start + count <= distinct:
                known[start] = lines
            file.write(lines)


def typed_decoder() -> msgspec.json.Decoder[Any]:
    """A decoder that decodes each type of event into its own class, whose data is an object."""
    fields = [("data", Order), ("ts", int), ("id", str), ("actor", str)]
    kinds = [msgspec.defstruct("Typed", fields, tag_field="type", tag=type) for type in TYPES]
    return msgspec.json.Decoder(Union[tuple(kinds)])  # noqa: UP007 (of classes that are made here)


def fold(
    dir: Path,
    reducer: Callable[[Totals, Any], Totals],
    views: int,
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(PlainEvent),  # noqa: B008
) -> Totals:
    states = [Totals() for _ in range(views)]
    if views == 1:
        state = states[0]
        with open(dir / "app.jsonl", "rb") as file:
            for line in file:
                state = reducer(state, decoder.decode(line))
        return state
    with open(dir / "app.jsonl", "rb") as file:
        for line in file:
            event = decoder.decode(line)
            for number in range(views):
                states[number] = reducer(states[number], event)
    return states[-1]


class Raw:
    say: Any

    async def append(self, dir: str, tasks: int, count: int, batch: int) -> Answer:
        if tasks > 1:
            raise Unsupported
        lines = sample_lines(count * batch)
        if batch > 1:
            lines = [b"".join(lines[first : first + batch]) for first in range(0, len(lines), batch)]
        fd = open_new(Path(dir, "raw.jsonl"))
        try:
            begun = perf_counter()
            for line in lines:
                os.write(fd, line)
                os.fdatasync(fd)
            return {"seconds": perf_counter() - begun}
        finally:
            os.close(fd)

    async def append_in_thread(self, dir: str, tasks: int, count: int, batch: int) -> Answer:
        """Appends with each write and its sync in a thread, which keeps the event loop free."""
        if (tasks, batch) != (1, 1):
            raise Unsupported
        loop = asyncio.get_running_loop()
        jobs: SimpleQueue[tuple[bytes, asyncio.Future[None]] | None] = SimpleQueue()

        def work() -> None:
            while (job := jobs.get()) is not None:
                line, done = job
                try:
                    os.write(fd, line)
                    os.fdatasync(fd)
                except OSError as error:
                    loop.call_soon_threadsafe(done.set_exception, error)
                else:
                    loop.call_soon_threadsafe(done.set_result, None)

        lines, thread = sample_lines(count), Thread(target=work)
        fd = open_new(Path(dir, "raw.jsonl"))
        thread.start()
        try:
            begun = perf_counter()
            for line in lines:
                jobs.put((line, done := loop.create_future()))
                await done
            return {"seconds": perf_counter() - begun}
        finally:
            jobs.put(None)
            thread.join()
            os.close(fd)

    async def append_together(
        self,
        dir: str,
        tasks: int,
        start: str,
        seconds: float,
        shared: bool | None,
        conditional: bool,
        max_log_size: int,
    ) -> Answer:
        if tasks > 1 or conditional or max_log_size:
            raise Unsupported
        lines = cycle(sample_lines(1_000))
        fd = open_new(Path(dir, "raw.jsonl"))

        async def append() -> None:
            os.write(fd, next(lines))
            os.fdatasync(fd)

        try:
            return await time_together(self.say, append, tasks, start, seconds)
        finally:
            os.close(fd)

    async def write(self, dir: str, events: int, distinct: int | None) -> Answer:
        write_lines(Path(dir), events, distinct)
        return {}

    async def replay(self, dir: str, views: int, types: list[str] | None) -> Answer:
        if types not in (None, [TYPES[0]]):
            raise Unsupported
        begun = perf_counter()
        state = fold(Path(dir), add if types is None else add_wanted, views)
        return {"seconds": perf_counter() - begun, **msgspec.structs.asdict(state)}

    async def typed(self, dir: str, views: int, types: list[str] | None) -> Answer:
        """Replays with objects as the events' data."""
        begun = perf_counter()
        state = fold(Path(dir), add_typed, 1, typed_decoder())
        return {"seconds": perf_counter() - begun, **msgspec.structs.asdict(state)}

    async def replay_batches(self, dir: str, batch: int) -> Answer:
        """Decodes some hundred lines or a whole batch at once, as a batch's events are valid only if it is complete.

        The sizes are determined beforehand, so that only reading, decoding and folding are measured.
        """
        decoder, state, sizes = msgspec.json.Decoder(BatchedEvent), Totals(), []
        with open(Path(dir, "app.jsonl"), "rb") as file:
            while size := sum(map(len, islice(file, max(batch, SOME)))):
                sizes.append(size)
        begun = perf_counter()
        with open(Path(dir, "app.jsonl"), "rb", buffering=0) as file:
            for size in sizes:
                for event in decoder.decode_lines(file.read(size)):
                    state = add(state, event)
        return {"seconds": perf_counter() - begun, **msgspec.structs.asdict(state)}

    async def refresh(self, dir: str, new: int, bytes: int) -> Answer:
        """Awaits a method that does nothing: the least that a refresh can do."""
        if new:
            raise Unsupported

        class Stateful:
            state = 0

            async def refresh(self) -> int:
                return self.state

        stateful, calls = Stateful(), 10_000
        begun = perf_counter()
        for _ in range(calls):
            await stateful.refresh()
        return {"seconds": (perf_counter() - begun) / calls, "written": 0}

    async def refresh_alone(self, dir: str, bytes: int) -> Answer:
        """Looks at a file: the least that a reader can do to find out whether it has grown."""
        path, seconds = Path(dir, "raw.jsonl"), []
        path.touch()
        for _ in range(1_000):
            begun = perf_counter()
            os.stat(path)
            seconds.append(perf_counter() - begun)
        return {"seconds": percentiles(seconds)["p50"], "written": 0}

    async def listen(self, dir: str, tails: int, count: int) -> Answer:
        return await _raw_tails.listen(dir, tails, count, lambda: self.say({"ready": True}))

    async def send(self, dir: str, count: int, interval: float) -> Answer:
        return await _raw_tails.send(dir, count, interval)

    async def idle(self, dir: str, logs: int, seconds: float) -> Answer:
        if logs:
            raise Unsupported
        used = process_time()
        await asyncio.sleep(seconds)
        return {"seconds": process_time() - used}

    async def rotate(self, dir: str, tasks: int) -> Answer:
        if tasks:
            raise Unsupported
        path = Path(dir, "app.jsonl")
        begun = perf_counter()
        self.compress(path)
        return {"seconds": perf_counter() - begun, "bytes": path.stat().st_size}

    def compress(self, path: Path) -> None:
        options: dict[int, int] = {
            zstd.CompressionParameter.compression_level: 3,
            zstd.CompressionParameter.checksum_flag: 1,
        }
        fd = open_new(path.with_name("raw.zst"))
        try:
            with open(path, "rb") as file:
                while piece := file.read(PIECE):
                    os.write(fd, zstd.compress(piece, options=options))
            os.fdatasync(fd)
        finally:
            os.close(fd)

    async def peak(self, dir: str, what: str) -> Answer:
        works: dict[str, Callable[[], Any]] = {
            "replay": lambda: fold(Path(dir), add, 1),
            "rotate": lambda: self.compress(Path(dir, "app.jsonl")),
        }
        if what not in works:
            raise Unsupported
        with growth() as peak:
            works[what]()
        return {"bytes": peak()}

    async def grow(self, dir: str, what: str, times: int) -> Answer:
        if what == "replay":
            with growth() as peak:
                return {**await self.replay(dir, 1, None), "bytes": peak()}
        if what != "append":
            raise Unsupported
        fd, seconds = os.open(Path(dir, "app.jsonl"), os.O_WRONLY | os.O_APPEND), []
        try:
            for line in sample_lines(times, 10**11):
                begun = perf_counter()
                os.write(fd, line)
                os.fdatasync(fd)
                seconds.append(perf_counter() - begun)
        finally:
            os.close(fd)
        return {"seconds": percentiles(seconds)["p50"]}

    async def hold(self, dir: str, what: str, seconds: float) -> Answer:
        """Watches an idle loop, or one whose program has another thread that computes."""
        if what == "nothing":
            async with watch_loop() as watched:
                await asyncio.sleep(seconds)
        elif what == "a computing thread":

            def compute(until: float) -> None:
                while perf_counter() < until:
                    msgspec.json.encode(sample_fields(1))

            async with watch_loop() as watched:
                await asyncio.to_thread(compute, perf_counter() + seconds)
        else:
            raise Unsupported
        return watched.answer()


if __name__ == "__main__":
    serve(Raw())
