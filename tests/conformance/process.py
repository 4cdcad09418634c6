"""What a separate process does in a test; it imports as little as possible."""

from __future__ import annotations

import asyncio

from eventfold import Event, EventLog
from eventfold._address import Address


def append_in_process(where: Address, first: int, count: int) -> None:
    """Appends `count` events at once, numbered from `first`."""

    async def append() -> None:
        async with EventLog.open(where) as log:
            await asyncio.gather(*(log.append(Event("counted", {"n": first + n})) for n in range(count)))

    asyncio.run(append())
