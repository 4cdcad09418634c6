"""Calls of asyncpg that would lose a timeout or an error otherwise.

A timeout of asyncpg cancels the task that connects, or that acquires a connection from a pool. That has no effect on an
`UncancellableTask`, such as the one of a commit, which would then wait forever for a server that does not answer. So
connecting gets its own task.

A pool takes a connection back as soon as it is lost. After that, every method of the connection raises
`InterfaceError`, even those that ask whether it is lost, or close it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any

import asyncpg

from .._aio import cancel_until_done


async def connected(connecting: Awaitable[Any]) -> Any:
    """The connection that a call opens or acquires. If cancelled, the connection is closed.

    Raises what the call raises, and `ConnectionAbortedError` if only the call's own task was cancelled, as by
    `asyncio.run` at its end.
    """
    task = asyncio.ensure_future(connecting)
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        await cancel_until_done(task)
        if not task.cancelled() and task.exception() is None:
            terminate(task.result())
        raise
    if task.cancelled():
        raise ConnectionAbortedError("connecting was cancelled")
    return task.result()


def is_closed(connection: Any) -> bool:
    """Whether a connection was lost or closed, as far as is known."""
    try:
        return bool(connection.is_closed())
    except asyncpg.InterfaceError:
        return True


def terminate(connection: Any) -> None:
    """Closes a connection without waiting for the server. Idempotent."""
    with suppress(asyncpg.InterfaceError):
        connection.terminate()
