"""A client of the library `nats`: connecting it, closing it, and whether it can still be used.

Promises: the client reconnects on its own, for as long as it takes. It sends nothing late: what could not be sent
before a connection was lost is dropped. No socket is left open.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError

from .._errors import EventfoldError
from .._logging import DEBUG, INFO, WARNING, log_event
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
    is_first: bool,
) -> None:
    """Connects a new client. Close it if this raises.

    Raises `OSError` where no server answers for `timeout` seconds, and `EventfoldError` where the first one that does
    refuses the user; if `is_first` is false, that is waited for too.
    """

    waiting: list[Exception] = []

    async def drop_unsent() -> None:
        # The library would send it after the next connection, however much later that is, when the servers may have
        # forgotten that they have it. Subscriptions are made anew by themselves.
        client._pending.clear()
        client._pending_data_size = 0

    async def reconnected() -> None:
        on_reconnect()

    async def note_error(error: Exception) -> None:
        # The library calls this within `connect` too, which then raises what this raises.
        log_event(INFO, "jetstream.error", "%(location)s: %(error)s", location=location, error=repr(error))
        if not client.is_connected:
            _abort(client)  # the library forgets the socket of an attempt to connect that failed
            if is_first and "authorization" in str(error).lower():
                raise EventfoldError(
                    f"{location}: the server refuses the user ({error}): check the user and the password in the "
                    "address, or the credentials"
                )
            if is_first and not waiting:
                waiting.append(error)
                log_event(
                    WARNING,
                    "jetstream.waiting",
                    "%(location)s: no server answers yet, it is tried for up to %(seconds)g s: %(error)s",
                    location=location,
                    seconds=timeout,
                    error=repr(error),
                )

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
        is_first = False  # from now on, the client reconnects, whatever the servers say
    except FileNotFoundError:
        raise  # of the credentials
    except ImportError as error:
        raise EventfoldError(f"{location}: credentials need another package: pip install 'nats-py[nkeys]'") from error
    except (NatsError, OSError) as error:
        problem = client.last_error or error
        why = getattr(problem, "strerror", None) or str(problem) or "it took too long"
        raise OSError(
            errno.ECONNREFUSED,
            f"no server answers for {timeout:g} s ({why}): check the address, and that a server is running there",
            location,
        ) from error


def is_dead(client: Client) -> bool:
    """Whether a client will never reconnect on its own.

    It closes for good where a server says `-ERR`, and hears nothing any more where somebody cancelled its tasks, as
    `asyncio.run` does at its end.
    """
    reading = client._reading_task
    return client.is_closed or (client.is_connected and reading is not None and reading.done())


def why_unanswered(error: BaseException, client: Client) -> str:
    """Why a request got no answer, as far as that can be known."""
    if isinstance(error, NoRespondersError):
        return "JetStream is not enabled for these servers or this account, or has no leader at the moment"
    said = str(client.last_error or "")
    return said if "permissions violation" in said.lower() else repr(error)


async def close(client: Client, location: str) -> None:
    """Closes a client, within two seconds, whatever the server does."""
    if not hasattr(client, "_flush_queue") or client._flush_queue is None:
        return  # it refused its options, and has not begun to connect
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
