"""Connects in a task of its own, so that no timeout is lost.

A timeout of asyncpg cancels the task that connects, or that acquires a connection from a pool. That has no effect on an
`UncancellableTask`, such as the one of a commit, which would then wait forever for a server that does not answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from .._aio import outlast

_CANCEL_INTERVAL = 0.1  # seconds


async def connected(connecting: Awaitable[Any]) -> Any:
    """The connection that a call opens or acquires. If cancelled, the connection is closed.

    Raises what the call raises, and `ConnectionAbortedError` if only the call's own task was cancelled, as by
    `asyncio.run` at its end.
    """
    task = asyncio.ensure_future(connecting)
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        await outlast(task, _cancel)
        if not task.cancelled() and task.exception() is None:
            task.result().terminate()
        raise
    if task.cancelled():
        raise ConnectionAbortedError("connecting was cancelled")
    return task.result()


async def _cancel(task: asyncio.Future[Any]) -> None:
    task.cancel()
    await asyncio.wait([task], timeout=_CANCEL_INTERVAL)
