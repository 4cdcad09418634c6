"""Connects and closes a client of the library `nats`, and finds out whether it can still be used.

Promises: the client reconnects on its own, as often as necessary; it sends nothing late, since it drops what could not
be sent before a connection was lost; no socket is left open.
"""

from __future__ import annotations

import errno
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError

from .._errors import EventfoldError
from .._logging import DEBUG, INFO, WARNING, log_event
from ._calls import run_isolated

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
    """Connects a new client. Close the client if this raises.

    Raises `OSError` if no server answers within `timeout` seconds. If a server refuses the user, or the certificate of
    the only server is not trusted, raises `EventfoldError` at once if `is_first` is true; otherwise, keeps trying until
    the timeout.
    """

    has_warned = False

    async def drop_unsent() -> None:
        # The library would send it after reconnecting, perhaps so much later that the servers no longer recognise a
        # duplicate. The library restores subscriptions itself.
        client._pending.clear()
        client._pending_data_size = 0

    async def reconnected() -> None:
        on_reconnect()

    async def note_error(error: Exception) -> None:
        nonlocal has_warned
        # If the library calls this during `connect`, `connect` raises what this raises.
        log_event(INFO, "jetstream.error", "%(location)s: %(error)s", location=location, error=repr(error))
        if not client.is_connected:
            _abort(client)  # the library leaves the socket open if an attempt to connect has failed
            if is_first and "authorization" in str(error).lower():
                raise EventfoldError(
                    f"{location}: the server refuses the user ({error}): check the user and the password in the "
                    "address, or the credentials"
                )
            if is_first and isinstance(error, ssl.SSLCertVerificationError) and len(servers) == 1:
                raise EventfoldError(
                    f"{location}: the server's certificate is not trusted ({error.verify_message.rstrip('.')}): pass "
                    "an `ssl.SSLContext` that trusts it as `tls`, or replace the certificate"
                )
            if is_first and not has_warned:
                has_warned = True
                log_event(
                    WARNING,
                    "jetstream.waiting",
                    "%(location)s: no server answers yet, trying for up to %(seconds)g s: %(error)s",
                    location=location,
                    seconds=timeout,
                    error=repr(error),
                )

    try:
        await run_isolated(
            client.connect(
                list(servers),
                **{
                    "reconnect_time_wait": 0.2,
                    "connect_timeout": 2,
                    "ping_interval": 1,
                    "max_outstanding_pings": 2,
                    **options,
                    "pending_size": 0,  # nothing is kept to be sent after a reconnect
                    "max_reconnect_attempts": -1,
                    "allow_reconnect": True,
                    "error_cb": note_error,
                    "disconnected_cb": drop_unsent,
                    "reconnected_cb": reconnected,
                },
            ),
            timeout,
        )
        is_first = False  # from now on, the client reconnects after any error
    except FileNotFoundError:
        raise  # the credentials file is missing
    except ImportError as error:
        raise EventfoldError(f"{location}: credentials need another package: pip install 'nats-py[nkeys]'") from error
    except (NatsError, OSError) as error:
        problem = client.last_error or error
        why = getattr(problem, "strerror", None) or str(problem) or "it took too long"
        raise OSError(
            errno.ECONNREFUSED,
            f"no server has answered for {timeout:g} s ({why}): check the address, and that a server is running there",
            location,
        ) from error


def is_dead(client: Client) -> bool:
    """Whether a client will never reconnect on its own.

    It closes for good if a server sends `-ERR`, and receives nothing once its tasks have been cancelled, as by
    `asyncio.run` at its end.
    """
    reading = client._reading_task
    return client.is_closed or (client.is_connected and reading is not None and reading.done())


def is_encrypted(client: Client) -> bool:
    """Whether a connected client uses TLS: the library does not insist on it if the server does not ask for it."""
    writer = getattr(client._transport, "_io_writer", None)
    # A WebSocket has no writer, and its address says whether it is encrypted.
    return writer is None or writer.get_extra_info("ssl_object") is not None


def why_unanswered(error: BaseException, client: Client) -> str:
    """Why a request got no answer, as far as is known."""
    if isinstance(error, NoRespondersError):
        return "JetStream is not enabled for these servers or this account, or has no leader at the moment"
    last_error = str(client.last_error or "")
    return last_error if "permissions violation" in last_error.lower() else repr(error)


async def close(client: Client, location: str) -> None:
    """Closes a client within two seconds, even if the server does not answer."""
    if not hasattr(client, "_flush_queue") or client._flush_queue is None:
        return  # `connect` refused its arguments before it opened anything
    try:
        await run_isolated(client.close(), _CLOSE_TIMEOUT)
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
        for subscription in client._subs.values():  # if closing timed out, these tasks are still running
            if subscription._wait_for_msgs_task is not None:
                subscription._wait_for_msgs_task.cancel()


def _abort(client: Client) -> None:
    """Closes the socket, which the library leaves open if it fails to connect or to close."""
    transport = client._transport
    writer = getattr(transport, "_io_writer", None)
    if writer is not None:
        writer.transport.abort()
    elif transport is not None:
        transport.close()  # type: ignore[no-untyped-call]
