"""One connection to the servers of one stream, shared by all who use that stream in an event loop.

Promises: a request is repeated until it is answered or `timeout` seconds are over; the stream's configuration is
checked when the connection is made and after each time that it was lost, and what is wrong then is raised by the next
request.
"""

from __future__ import annotations

import asyncio
import base64
import errno
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import nats
from nats.aio.client import Client
from nats.errors import Error as NatsError

from .._errors import CorruptLogError, EventfoldError, LogClosedError
from .._logging import DEBUG, ERROR, INFO, log_event
from ._configuration import check_server, check_stream, stream_configuration

_NO_STREAM, _NO_MESSAGE, _NO_LEADER = 10059, 10037, 10008
_STREAM_EXISTS = 10058
_RETRY_DELAY = 0.05  # seconds


class Message(NamedTuple):
    """A message as the stream has it."""

    sequence: int
    headers: Mapping[str, str]
    data: bytes


class Settings(NamedTuple):
    """Which stream on which servers, and how to reach it; times are in seconds."""

    servers: tuple[str, ...]
    log: str
    replicas: int
    create: bool
    timeout: float
    attempt_timeout: float
    compression: str
    connect: Mapping[str, Any]

    @property
    def stream(self) -> str:
        return self.log

    @property
    def subject(self) -> str:
        return f"eventfold.{self.log}"

    @property
    def location(self) -> str:
        hosts = ",".join(server.rpartition("@")[2].rpartition("/")[2] for server in self.servers)
        return f"nats://{hosts}/{self.log}"


class Connection:
    """A connection that is made when it is first needed. Call `aclose` when it is not needed any more."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.location = settings.location
        self.closed = False
        self._client: Client | None = None
        self._connecting = asyncio.Lock()
        self._fault: EventfoldError | None = None
        self._checks: set[asyncio.Task[None]] = set()

    async def client(self) -> Client:
        """The connected client. Raises `OSError` where no server answers, `EventfoldError` for a refused stream."""
        if self._fault is not None:
            raise self._fault
        if self.closed:
            raise LogClosedError(f"{self.location} is closed")
        if self._client is None:
            async with self._connecting:
                if self._client is None:
                    self._client = await self._connect()
        return self._client

    async def _connect(self) -> Client:
        options: dict[str, Any] = {
            "max_reconnect_attempts": -1,
            "reconnect_time_wait": 0.2,
            "connect_timeout": 2,
            "ping_interval": 1,
            "max_outstanding_pings": 2,
            "pending_size": 64 * 2**20,
            **self.settings.connect,
            "error_cb": self._log_error,
            "reconnected_cb": self._reconnected,
            "allow_reconnect": True,
        }
        cancellations = _cancellation_count()
        try:
            async with asyncio.timeout(self.settings.timeout):
                client = await nats.connect(list(self.settings.servers), **options)
        except (NatsError, OSError, TimeoutError) as error:
            raise OSError(errno.ECONNREFUSED, f"no server answers: {error!r}", self.location) from error
        try:
            _raise_lost_cancellation(cancellations)
            await self._check(client, create=self.settings.create)
        except BaseException:
            await client.close()
            raise
        return client

    async def _log_error(self, error: Exception) -> None:
        log_event(INFO, "jetstream.error", "%(location)s: %(error)s", location=self.location, error=repr(error))

    async def _reconnected(self) -> None:
        task = asyncio.get_running_loop().create_task(self._check_again(), name="eventfold stream check")
        self._checks.add(task)
        task.add_done_callback(self._checks.discard)

    async def _check_again(self) -> None:
        assert self._client is not None
        try:
            await self._check(self._client, create=False)
        except EventfoldError as error:
            log_event(
                ERROR,
                "jetstream.unusable",
                "%(location)s can't be used any more: %(error)s",
                location=self.location,
                error=error,
            )
            self._fault = error
        except OSError as error:
            log_event(
                INFO,
                "jetstream.check_failed",
                "%(location)s could not be checked: %(error)s",
                location=self.location,
                error=error,
            )

    async def check(self) -> None:
        """Checks the stream's configuration now. Raises what `client` raises."""
        await self._check(await self.client(), create=False)

    async def _check(self, client: Client, *, create: bool) -> None:
        settings = self.settings
        version = client.connected_server_version
        check_server(self.location, (version.major, version.minor), str(version))
        info = await self._repeated(client, f"$JS.API.STREAM.INFO.{settings.stream}", b"")
        if _code(info) == _NO_STREAM and create:
            wanted = stream_configuration(settings.stream, settings.subject, settings.replicas, settings.compression)
            created = await self._repeated(
                client, f"$JS.API.STREAM.CREATE.{settings.stream}", msgspec.json.encode(wanted)
            )
            if "error" in created and _code(created) != _STREAM_EXISTS:
                raise EventfoldError(f"{self.location}: the stream can't be made: {created['error']['description']}")
            info = await self._repeated(client, f"$JS.API.STREAM.INFO.{settings.stream}", b"")
        if _code(info) == _NO_STREAM:
            raise EventfoldError(f"{self.location}: there is no stream {settings.stream!r}")
        if "error" in info:
            raise EventfoldError(f"{self.location}: {info['error']['description']}")
        check_stream(self.location, settings.subject, info["config"], info["state"])

    async def request(self, subject: str, payload: Any = None) -> dict[str, Any]:
        """The API's answer, which may hold an `error`. Raises `OSError` (ETIMEDOUT) where none comes in time."""
        data = b"" if payload is None else msgspec.json.encode(payload)
        return await self._repeated(await self.client(), subject, data)

    async def _repeated(self, client: Client, subject: str, data: bytes) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        until = loop.time() + self.settings.timeout
        cancellations = _cancellation_count()
        while True:
            _raise_lost_cancellation(cancellations)
            if self.closed:
                raise LogClosedError(f"{self.location} is closed")
            try:
                reply = await client.request(subject, data, timeout=self.settings.attempt_timeout)
                _raise_lost_cancellation(cancellations)
                answer: dict[str, Any] = msgspec.json.decode(reply.data)
                if (answer.get("error") or {}).get("code") != 503:
                    return answer
                problem: object = answer["error"]["description"]
            except (NatsError, TimeoutError, msgspec.DecodeError) as error:
                problem = repr(error)
            if loop.time() >= until:
                raise OSError(errno.ETIMEDOUT, f"no answer for {self.settings.timeout:g} s: {problem}", self.location)
            await asyncio.sleep(_RETRY_DELAY)

    async def last_message(self) -> Message | None:
        """The stream's last message, as its leader has it; None for an empty stream."""
        message = await self._message({"last_by_subj": self.settings.subject})
        if message is None:
            # Empty, or purged in spite of its settings: an error then, and never silence.
            await self.check()
        return message

    async def message(self, sequence: int) -> Message | None:
        """A message by its sequence, as the leader has it; None if there is none."""
        return await self._message({"seq": sequence})

    async def _message(self, which: Mapping[str, Any]) -> Message | None:
        answer = await self.request(f"$JS.API.STREAM.MSG.GET.{self.settings.stream}", which)
        if _code(answer) == _NO_MESSAGE:
            return None
        if _code(answer) == _NO_STREAM:
            raise CorruptLogError(self.location, 0, "the stream was deleted")
        if "error" in answer:
            raise EventfoldError(f"{self.location}: {answer['error']['description']}")
        message = answer["message"]
        headers = base64.b64decode(message.get("hdrs") or "").decode()
        pairs = dict(line.split(": ", 1) for line in headers.split("\r\n") if ": " in line)
        return Message(message["seq"], pairs, base64.b64decode(message.get("data") or ""))

    async def aclose(self) -> None:
        """Closes the connection; idempotent."""
        self.closed = True
        for task in self._checks:
            task.cancel()
        client, self._client = self._client, None
        if client is not None:
            try:
                await client.close()
            except (NatsError, OSError) as error:
                log_event(
                    DEBUG,
                    "jetstream.close_failed",
                    "%(location)s: the connection was lost before it was closed: %(error)s",
                    location=self.location,
                    error=repr(error),
                )
                # The library stops at the lost connection, and leaves the socket open.
                if (transport := client._transport) is not None:
                    transport.close()  # type: ignore[no-untyped-call]


def _cancellation_count() -> int:
    """The number of times that the current task has been cancelled."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


def _raise_lost_cancellation(before: int) -> None:
    """Raises `CancelledError` if the current task has been cancelled more than `before` times.

    The client library uses `asyncio.wait_for`. Before Python 3.12, it swallows a cancellation that arrives in the same
    iteration of the event loop as the result: https://github.com/python/cpython/issues/86296.
    """
    if _cancellation_count() > before:
        raise asyncio.CancelledError


def _code(answer: Mapping[str, Any]) -> int:
    code: int = (answer.get("error") or {}).get("err_code", 0)
    return code
