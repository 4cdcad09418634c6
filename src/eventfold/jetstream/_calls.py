"""Every call of the client library goes through `called`, which keeps cancellations and timeouts from being lost.

The library loses cancellations: `asyncio.wait_for`, which it uses, swallows one that arrives in the same iteration of
the event loop as the result (before Python 3.12, https://github.com/python/cpython/issues/86296), and its flushing
swallows any. Its timeouts cancel the task that they run in (since Python 3.12), which is of no use in an
`UncancellableTask`. So each call runs in a task of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from .._aio import outlast

T = TypeVar("T")

# For `Client.subscribe`, where what may come is bounded by what was asked for: beyond its limits the library drops
# messages. A reader notices what is missing, but must ask for it again.
NO_LIMITS: dict[str, Any] = {"pending_msgs_limit": 0, "pending_bytes_limit": 0}

_CANCEL_AGAIN = 0.1  # seconds


async def called(call: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
    """The result of a call of the client library.

    Raises `TimeoutError` after `timeout` seconds, and `ConnectionAbortedError` where somebody cancelled the call, but
    not its caller, as `asyncio.run` does at its end. When it takes too long, or the caller is cancelled, this cancels
    the call, for as often as it takes, and raises once that is over.
    """
    task = asyncio.ensure_future(call)
    try:
        await asyncio.wait([task], timeout=timeout)
        if not task.done():
            await outlast(task, _cancel)
            if task.cancelled() or task.exception() is not None:
                raise TimeoutError(f"the client library did not return within {timeout:g} s")
    except asyncio.CancelledError:
        await outlast(task, _cancel)
        raise
    if task.cancelled():
        raise ConnectionAbortedError("the call was cancelled")
    return task.result()


async def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait([task], timeout=_CANCEL_AGAIN)
