"""Checks the stream: whether it is still the one that was opened, and configured so that it keeps the log safely.

It is checked when a client has connected, after each reconnect, and every few seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from nats.aio.client import Client

from .._errors import CorruptLogError, EventfoldError, LogClosedError
from .._logging import ERROR, INFO, WARNING, log_event
from ._api import stream_info
from ._client import is_encrypted
from ._codes import NO_STREAM, error_code
from ._configuration import check_server, check_stream, stream_configuration
from ._settings import Settings

_CHECK_INTERVAL = 10.0  # seconds
# Seconds until a failed check is repeated. After a check, the holder of a consumer's lock answers through the new
# connection; if it does not answer for a while, other processes take over its lock.
_RETRY_INTERVAL = 0.5


class StreamMonitor:
    """Checks the stream through the clients of one connection.

    `live_client` returns the current client, and `request` sends a request through a given one. When a check finds that
    something is wrong with the stream, `fault` is set, and `on_fault` is called with it. After each successful check,
    `after_check` is called.
    """

    def __init__(
        self,
        settings: Settings,
        live_client: Callable[[], Awaitable[Client]],
        request: Callable[[Client, str, Any], Awaitable[dict[str, Any]]],
        on_fault: Callable[[EventfoldError], None],
    ) -> None:
        self.fault: EventfoldError | None = None
        self.after_check: Callable[[], Awaitable[None]] | None = None
        self._settings = settings
        self._live_client = live_client
        self._request = request
        self._on_fault = on_fault
        self._created: str | None = None  # when, as the server says: it identifies the stream
        self._task: asyncio.Task[None] | None = None
        self._check_now = asyncio.Event()

    @property
    def found_stream(self) -> bool:
        """Whether a check has found the stream."""
        return self._created is not None

    def start(self) -> None:
        """Begins to check the stream regularly; if it has begun already, checks the stream soon."""
        if self._task is not None:
            self._check_now.set()
        else:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="eventfold checks")

    def check_soon(self) -> None:
        """Makes the next regular check begin now, if `start` was called."""
        self._check_now.set()

    def stop(self) -> None:
        """Ends the regular checks."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        location, failing = self._settings.location, False
        while True:
            try:
                async with asyncio.timeout(_RETRY_INTERVAL if failing else _CHECK_INTERVAL):
                    await self._check_now.wait()
            except TimeoutError:
                pass
            self._check_now.clear()
            try:
                await self.check(await self._live_client(), create=False)
                self.fault = None
                if self.after_check is not None:
                    await self.after_check()
                failing = False
            except LogClosedError:
                return
            except EventfoldError as error:
                if self.fault is None:
                    log_event(
                        ERROR,
                        "jetstream.unusable",
                        "%(location)s can't be used any more: %(error)s",
                        location=location,
                        error=error,
                    )
                self.fault = error
                self._on_fault(error)
            except OSError as error:
                if not failing:
                    log_event(
                        INFO,
                        "jetstream.check_failed",
                        "%(location)s could not be checked: %(error)s",
                        location=location,
                        error=error,
                    )
                failing = True

    async def check(self, client: Client, *, create: bool) -> None:
        """Checks the server and the stream now; with `create`, creates a stream that was never found.

        Raises `OSError` if no server answers, `EventfoldError` if something is wrong.
        """
        settings, location = self._settings, self._settings.location
        if client.is_connected:
            version = client.connected_server_version
            check_server(location, (version.major, version.minor), str(version), client.max_payload)
            if settings.is_encrypted and not is_encrypted(client):
                raise EventfoldError(
                    f"{location}: the connection is not encrypted: enable TLS on the servers, or connect without tls"
                )
        wanted = stream_configuration(settings.stream, settings.subject, settings.replicas, settings.compression)
        info = await stream_info(
            partial(self._request, client), settings, wanted, create=create and not self.found_stream
        )
        if error_code(info) == NO_STREAM:
            if self.found_stream:
                raise CorruptLogError(location, 0, "the stream was deleted")
            raise EventfoldError(f"{location}: there is no stream {settings.stream!r}")
        if "error" in info:
            raise EventfoldError(f"{location}: {info['error']['description']}")
        if self._created not in (None, info["created"]):
            raise CorruptLogError(
                location, 0, f"the stream was deleted and recreated at {info['created']}: open the log again"
            )
        if not self.found_stream and info["config"]["num_replicas"] < settings.replicas:
            log_event(
                WARNING,
                "jetstream.fewer_replicas",
                "%(location)s already exists with fewer replicas than requested, %(found)d instead of %(wanted)d; "
                "to change that, run `nats stream edit %(stream)s --replicas=%(wanted)d`",
                location=location,
                stream=settings.stream,
                found=info["config"]["num_replicas"],
                wanted=settings.replicas,
            )
        self._created = info["created"]
        check_stream(location, settings.subject, info["config"], info["state"])
