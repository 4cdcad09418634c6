"""Every call of the client library goes through `called`, so that no cancellation of the caller is lost.

The library loses cancellations: `asyncio.wait_for`, which it uses, swallows one that arrives in the same iteration of
the event loop as the result (before Python 3.12, https://github.com/python/cpython/issues/86296), and its flushing
swallows any.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from .._aio import UncancellableTask, outlast

T = TypeVar("T")

# For `Client.subscribe`, where what may come is bounded by what was asked for: beyond its limits the library drops
# messages. A reader notices what is missing, but must ask for it again.
NO_LIMITS: dict[str, Any] = {"pending_msgs_limit": 0, "pending_bytes_limit": 0}

_CANCEL_AGAIN = 0.1  # seconds


async def called(call: Coroutine[Any, Any, T]) -> T:
    """The result of a call of the client library.

    The call runs in a task of its own, so that the library never sees a cancellation of the caller. When cancelled,
    this cancels that task, for as often as it takes, and raises once the task is over.
    """
    if isinstance(asyncio.current_task(), UncancellableTask):
        return await call  # in a task of its own it could be cancelled
    task = asyncio.ensure_future(call)
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        await outlast(task, _cancel)
        raise
    return task.result()


async def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait([task], timeout=_CANCEL_AGAIN)
