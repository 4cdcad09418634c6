"""A client of the library `nats`: connecting it, closing it, and whether it can still be used.

Promises: the client connects again by itself, for as long as it takes. It sends nothing later than it was meant to:
what could not be sent before a connection was lost is dropped. No socket is left open.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nats.aio.client import Client
from nats.errors import Error as NatsError

from .._logging import DEBUG, INFO, log_event
from ._calls import called

_CLOSE_TIMEOUT = 2.0  # seconds


async def connect(
    client: Client,
    servers: Sequence[str],
    options: Mapping[str, Any],
    *,
    timeout: float,
    location: str,
    on_reconnect: Callable[[], object],
) -> None:
    """Connects a new client. Raises `OSError` where no server answers for `timeout` seconds; close the client then."""

    async def drop_unsent() -> None:
        # The library would send it after the next connection, however much later that is, when the servers may have
        # forgotten that they have it. Subscriptions are made anew by themselves.
        client._pending.clear()
        client._pending_data_size = 0

    async def reconnected() -> None:
        on_reconnect()

    async def note_error(error: Exception) -> None:
        log_event(INFO, "jetstream.error", "%(location)s: %(error)s", location=location, error=repr(error))
        if not client.is_connected:
            _abort(client)  # the library forgets the socket of an attempt to connect that failed

    try:
        await called(
            client.connect(
                list(servers),
                **{
                    "reconnect_time_wait": 0.2,
                    "connect_timeout": 2,
                    "ping_interval": 1,
                    "max_outstanding_pings": 2,
                    **options,
                    "pending_size": 0,  # nothing is kept until the next connection
                    "max_reconnect_attempts": -1,
                    "allow_reconnect": True,
                    "error_cb": note_error,
                    "disconnected_cb": drop_unsent,
                    "reconnected_cb": reconnected,
                },
            ),
            timeout,
        )
    except (NatsError, OSError) as error:
        problem = client.last_error or error
        raise OSError(errno.ECONNREFUSED, f"no server answers: {problem!r}", location) from error


def is_dead(client: Client) -> bool:
    """Whether a client never connects again by itself.

    It closes for good where a server says `-ERR`, and hears nothing any more where somebody cancelled its tasks, as
    `asyncio.run` does at its end.
    """
    reading = client._reading_task
    return client.is_closed or (client.is_connected and reading is not None and reading.done())


async def close(client: Client, location: str) -> None:
    """Closes a client; it takes two seconds at most, whatever the server does."""
    try:
        await called(client.close(), _CLOSE_TIMEOUT)
    except (NatsError, OSError) as error:
        log_event(
            DEBUG,
            "jetstream.close_failed",
            "%(location)s: the connection was lost before it was closed: %(error)s",
            location=location,
            error=repr(error),
        )
    finally:
        _abort(client)
        for subscription in client._subs.values():  # where closing came to no end, the library has not ended these
            if subscription._wait_for_msgs_task is not None:
                subscription._wait_for_msgs_task.cancel()


def _abort(client: Client) -> None:
    """Closes the socket, which the library leaves open where connecting or closing failed."""
    transport = client._transport
    writer = getattr(transport, "_io_writer", None)
    if writer is not None:
        writer.transport.abort()
    elif transport is not None:
        transport.close()  # type: ignore[no-untyped-call]
