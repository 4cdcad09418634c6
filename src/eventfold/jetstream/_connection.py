"""One connection to the servers of one stream, shared by everything in an event loop that uses the stream.

Promises: a request is repeated, through another server if necessary, until it is answered or `timeout` seconds have
passed; a client that can't reconnect is replaced. If a check finds that something is wrong with the stream (see
`_monitor`), the next request raises it. While the log is being closed, all requests together wait for an answer for at
most `timeout` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError

from .._errors import EventfoldError, LogClosedError
from .._logging import INFO, WARNING, log_event
from ._calls import run_isolated
from ._client import close, connect, is_dead, why_unanswered
from ._codes import NO_SPACE, error_code, is_unavailable
from ._monitor import StreamMonitor
from ._settings import Settings

_HEADERS_SIZE = 4096  # bytes of a message that are reserved for its headers
_RETRY_DELAY = 0.05  # seconds
_SWITCH_AFTER = 4.0  # seconds without an answer after which another server is tried


def _max_data_of(client: Client) -> int:
    """The maximum size in bytes of a message's data, as the client's server said."""
    return client.max_payload - _HEADERS_SIZE


class UnansweredError(Exception):
    """A request was not answered. With `sent`, the server may have received it anyway; with `no_space`, it is full."""

    def __init__(self, problem: str, *, sent: bool, no_space: bool = False) -> None:
        super().__init__(problem)
        self.sent = sent
        self.no_space = no_space


class Connection:
    """A connection that is opened on demand. Call `aclose` when it is no longer needed.

    `on_fault` is called with what a check finds to be wrong with the stream.
    """

    def __init__(self, settings: Settings, on_fault: Callable[[EventfoldError], None]) -> None:
        self.settings = settings
        self.location = settings.location
        self.closed = False
        self.monitor = StreamMonitor(settings, self._live_client, self._request, on_fault)
        self._client: Client | None = None
        self._connecting = asyncio.Lock()
        self._unanswered_since: float | None = None
        self._last_answer = 0.0  # in the event loop's time
        self._closing_since: float | None = None
        self._max_data = 0

    @property
    def max_data(self) -> int:
        """The maximum size of a message's data in bytes, as the server said last; 0 before the first connection."""
        if self._client is not None:
            self._max_data = _max_data_of(self._client)
        return self._max_data

    def begin_closing(self) -> None:
        """From now on, all requests together wait for an answer for at most `timeout` seconds."""
        self._closing_since = asyncio.get_running_loop().time()

    def cancel_closing(self) -> None:
        """Undoes `begin_closing`, since the connection still has other users."""
        self._closing_since = None

    @property
    def given_up(self) -> bool:
        """Whether requests have waited for `timeout` seconds since `begin_closing`, so that none waits any longer."""
        if self._closing_since is None:
            return False
        unanswered = asyncio.get_running_loop().time() - max(self._closing_since, self._last_answer)
        return unanswered >= self.settings.timeout

    async def client(self) -> Client:
        """The client; it may be about to reconnect.

        Raises `OSError` if no server answers, `EventfoldError` if something is wrong with the server or the stream.
        """
        if self.monitor.fault is not None:
            raise self.monitor.fault
        return await self._live_client()

    async def _live_client(self) -> Client:
        if self.closed:
            raise LogClosedError(f"{self.location} is closed")
        if self._client is None or is_dead(self._client):
            async with self._connecting:
                if self._client is None or is_dead(self._client):
                    await self._connect()
        assert self._client is not None
        return self._client

    async def _connect(self) -> None:
        if self.given_up:
            raise OSError(errno.ETIMEDOUT, "no server answers, and the log is being closed", self.location)
        dead, self._client = self._client, None
        if dead is not None:
            log_event(
                WARNING,
                "jetstream.connection_lost",
                "%(location)s: the connection ended for good (%(error)s): connecting again",
                location=self.location,
                error=repr(dead.last_error),
            )
            await self._close(dead)
        client = self.settings.client or Client()
        try:
            if self.settings.client is None:
                await connect(
                    client,
                    self.settings.servers,
                    self.settings.connect,
                    timeout=self.settings.timeout,
                    location=self.location,
                    on_reconnect=self.monitor.check_soon,
                    is_first=not self.monitor.found_stream,
                )
            elif client.is_closed:
                raise EventfoldError(
                    f"{self.location}: the client that the engine was given is closed: close it after the log"
                )
            elif client._status == Client.DISCONNECTED:
                raise OSError(errno.ENOTCONN, "the client that the engine was given is not connected", self.location)
            await self.monitor.check(client, create=self.settings.create)
            if self.closed:
                raise LogClosedError(f"{self.location} is closed")
        except BaseException:
            await self._close(client)
            raise
        self._client = client
        self._max_data = _max_data_of(client)
        self.monitor.start()

    async def check(self) -> None:
        """Checks the stream now. Raises what `client` raises."""
        await self.monitor.check(await self.client(), create=False)

    async def request(
        self, subject: str, payload: Any = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """A server's answer, which may contain an `error`; a payload other than bytes is encoded as JSON.

        Raises `OSError`: ETIMEDOUT if no answer comes in time, EMSGSIZE if the payload is too large for a message.
        """
        return await self._request(await self.client(), subject, payload, headers)

    async def _request(
        self, client: Client, subject: str, payload: Any, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """See `request`. If the client dies, it is replaced, but never a client that is not connected yet."""
        data = payload if isinstance(payload, bytes) else b"" if payload is None else msgspec.json.encode(payload)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.settings.timeout
        while True:
            if self.closed:
                raise LogClosedError(f"{self.location} is closed")
            try:
                return await self._request_once(client, subject, data, headers)
            except UnansweredError as error:
                problem = error
            if loop.time() >= deadline or self.given_up:
                raise OSError(errno.ETIMEDOUT, f"no answer for {self.settings.timeout:g} s: {problem}", self.location)
            await asyncio.sleep(_RETRY_DELAY)
            if client is self._client:
                client = await self._live_client()

    async def request_once(self, subject: str, data: bytes, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        """A server's answer, which may contain an `error`. The request is not repeated.

        Raises `UnansweredError`; and, with nothing sent, `OSError` (EMSGSIZE) if the data is too large for a message,
        and what `client` raises.
        """
        return await self._request_once(await self.client(), subject, data, headers)

    async def _request_once(
        self, client: Client, subject: str, data: bytes, headers: Mapping[str, str] | None
    ) -> dict[str, Any]:
        if not client.is_connected:
            raise UnansweredError(f"there is no connection ({client.last_error!r})", sent=False)
        if self.given_up:
            raise UnansweredError("the log is being closed", sent=False)
        try:
            timeout, own_headers = self.settings.attempt_timeout, dict(headers) if headers else None
            reply = await run_isolated(client.request(subject, data, timeout=timeout, headers=own_headers), timeout)
            answer: dict[str, Any] = msgspec.json.decode(reply.data)
        except MaxPayloadError as error:
            message = f"a message has {len(data)} bytes; the servers' max_payload is {client.max_payload}"
            raise OSError(errno.EMSGSIZE, message, self.location) from error
        except (NatsError, OSError, msgspec.DecodeError) as error:
            await self._note_unanswered(client)
            raise UnansweredError(why_unanswered(error, client), sent=True) from error
        if is_unavailable(answer):
            await self._note_unanswered(client)
            no_space = error_code(answer) in NO_SPACE
            raise UnansweredError(answer["error"]["description"], sent=not no_space, no_space=no_space)
        self._unanswered_since = None
        self._last_answer = asyncio.get_running_loop().time()
        return answer

    async def _note_unanswered(self, client: Client) -> None:
        """Switches to another server after a while, since this one may be cut off from the others."""
        now = asyncio.get_running_loop().time()
        if self._unanswered_since is None:
            self._unanswered_since = now
        elif now - self._unanswered_since > _SWITCH_AFTER and client is not self.settings.client:
            self._unanswered_since = None
            log_event(
                INFO,
                "jetstream.unanswered",
                "%(location)s: the server does not answer; trying another one",
                location=self.location,
            )
            with contextlib.suppress(NatsError, OSError):  # the caller is about to raise that there was no answer
                await run_isolated(client.force_reconnect(), self.settings.attempt_timeout)

    async def aclose(self) -> None:
        """Closes the connection, unless it is the application's; idempotent."""
        self.closed = True
        self.monitor.stop()
        client, self._client = self._client, None
        if client is not None:
            await self._close(client)

    async def _close(self, client: Client) -> None:
        if client is not self.settings.client:
            await close(client, self.location)
