"""Probes that a contender puts around its work: how long the event loop was blocked, how much memory was used."""

from __future__ import annotations

import asyncio
import resource
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from time import perf_counter, process_time, thread_time
from typing import Any

PERIOD = 0.001


class Watched:
    """The delays of a timer, in seconds.

    `late` has the whole delays, as other tasks on the loop notice them. They include the timer's resolution, and delays
    by other programs. So `ours` limits each delay to the processor time that this process, in all its threads, has used
    since the timer was set: the part that the program causes itself, and sometimes a little more. `callback` is the
    longest processor time of a single callback in the loop's thread; it is not measured on uvloop.
    """

    def __init__(self) -> None:
        self.late: list[float] = []
        self.ours: list[float] = []
        self.callback = 0.0

    def answer(self) -> dict[str, float]:
        late, ours = sorted(self.late), sorted(self.ours)
        p999 = min(len(late) - 1, int(0.999 * len(late)))
        return {"p999": ours[p999], "max": ours[-1], "late": late[p999], "callback": self.callback}


@asynccontextmanager
async def watch_loop() -> AsyncIterator[Watched]:
    """Watches the running loop while the block runs."""
    loop, watched = asyncio.get_running_loop(), Watched()
    timer: asyncio.TimerHandle | None = None

    def called(due: float, used: float) -> None:
        late = max(0.0, perf_counter() - due)
        watched.late.append(late)
        watched.ours.append(min(late, process_time() - used))
        ask()

    def ask() -> None:
        nonlocal timer
        timer = loop.call_later(PERIOD, called, perf_counter() + PERIOD, process_time())

    handle_class: Any = asyncio.Handle
    run = handle_class._run

    def timed(handle: Any) -> None:
        begun = thread_time()
        run(handle)
        watched.callback = max(watched.callback, thread_time() - begun)

    ask()
    handle_class._run = timed
    try:
        yield watched
        await asyncio.sleep(2 * PERIOD)
    finally:
        handle_class._run = run
        if timer is not None:
            timer.cancel()


def _peak_bytes() -> int:
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def growth() -> Iterator[Callable[[], int]]:
    """Yields a function that returns by how many bytes the peak of the resident memory exceeded the current size.

    If the system can't reset an earlier peak (Linux can), only growth beyond that one is seen.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    before = _peak_bytes()
    yield lambda: _peak_bytes() - before
