"""One of several processes that append to a log at the same time, or an exclusive writer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

from eventfold import ConditionalAppendError, EventWriter, LockMode

from ._eventfold_states import sample_events
from ._serve import Answer, time_together

# Events to append repeatedly.
EVENTS = 5_000


async def append(
    say: Callable[[Answer], None],
    dir: str,
    tasks: int,
    start: str,
    seconds: float,
    shared: bool,
    conditional: bool,
    max_log_size: int,
) -> Answer:
    events = cycle(sample_events(EVENTS))
    lock = LockMode.SHARED if shared else LockMode.FLOCK
    async with EventWriter.open(dir, lock=lock, max_log_size=max_log_size) as log:

        async def plainly() -> None:
            await log.append(next(events))

        async def on_the_head() -> None:
            event = next(events)
            while True:
                try:
                    await log.append_if(event, *log.head)
                    return
                except ConditionalAppendError:
                    pass

        return await time_together(say, on_the_head if conditional else plainly, tasks, start, seconds)
