"""Calls the client library. Every call goes through `run_isolated`, so that no cancellation or timeout is lost.

The library loses cancellations: `asyncio.wait_for`, which it uses, swallows one that arrives in the same iteration of
the event loop as the result (before Python 3.12, https://github.com/python/cpython/issues/86296), and its flushing
swallows any. Its timeouts cancel the task in which they run (since Python 3.12), which has no effect on an
`UncancellableTask`. So each call gets its own task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from .._aio import cancel_until_done

T = TypeVar("T")

# Arguments for `Client.subscribe`. Beyond its limits, the library drops messages, which must then be requested again.
# Here, requests limit how many messages can arrive.
NO_LIMITS: dict[str, Any] = {"pending_msgs_limit": 0, "pending_bytes_limit": 0}


async def run_isolated(call: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
    """The result of a call of the client library, which runs in its own task.

    If the caller is cancelled, or the call takes longer than `timeout` seconds, the call is cancelled, repeatedly if
    necessary, and the error is raised once the call has ended.

    Raises `TimeoutError`, and `ConnectionAbortedError` if only the call's own task was cancelled, as by `asyncio.run`
    at its end.
    """
    task = asyncio.ensure_future(call)
    try:
        await asyncio.wait([task], timeout=timeout)
        if not task.done():
            await cancel_until_done(task)
            if task.cancelled() or task.exception() is not None:
                raise TimeoutError(f"the client library did not return within {timeout:g} s")
    except asyncio.CancelledError:
        await cancel_until_done(task)
        raise
    if task.cancelled():
        raise ConnectionAbortedError("the call was cancelled")
    return task.result()
