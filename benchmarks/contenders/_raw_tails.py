"""The limit for waking tails in another process: a written line, an event from inotify, and tasks that run.

Nothing is checked, and a process follows one file. A thread blocks in inotify and reads the new lines. Then the event
loop runs one task per tail, each of which decodes the line.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from time import monotonic_ns, perf_counter

import msgspec

from benchmarks._events import PlainEvent, sample_fields

from ._serve import Answer, Unsupported, percentiles

FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND


async def listen(dir: str, tails: int, count: int, ready: Callable[[], None]) -> Answer:
    if sys.platform != "linux":
        raise Unsupported
    from inotify_simple import INotify, flags

    loop, decoder = asyncio.get_running_loop(), msgspec.json.Decoder(PlainEvent)
    lines: list[bytes] = []
    latencies: list[float] = []
    news = loop.create_future()

    def notice(data: bytes) -> None:
        nonlocal news
        lines.extend(data.splitlines())
        old, news = news, loop.create_future()
        old.set_result(None)

    async def follow() -> None:
        for number in range(count):
            while number == len(lines):
                await news
            latencies.append((monotonic_ns() - decoder.decode(lines[number]).data["at"]) / 1e9)

    def wait() -> None:
        found = 0
        while found < count:
            inotify.read()
            data = os.read(fd, 2**20)
            found += data.count(b"\n")
            loop.call_soon_threadsafe(notice, data)

    path = Path(dir, "raw.jsonl")
    fd = os.open(path, FLAGS)
    try:
        with INotify() as inotify:
            inotify.add_watch(path, flags.MODIFY)
            thread = Thread(target=wait, daemon=True)
            thread.start()
            ready()
            await asyncio.gather(*(follow() for _ in range(tails)))
            thread.join()
    finally:
        os.close(fd)
    return percentiles(latencies)


async def send(dir: str, count: int, interval: float) -> Answer:
    fd, seconds = os.open(Path(dir, "raw.jsonl"), FLAGS), []
    try:
        for number in range(count):
            fields = sample_fields(number)
            begun = perf_counter()
            fields["data"]["at"] = monotonic_ns()
            os.write(fd, msgspec.json.encode(PlainEvent(**fields)) + b"\n")
            os.fdatasync(fd)
            seconds.append(perf_counter() - begun)
            await asyncio.sleep(interval)
    finally:
        os.close(fd)
    return {"append": percentiles(seconds)["p50"]}
