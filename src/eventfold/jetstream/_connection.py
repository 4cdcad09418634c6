"""One connection to the servers of one stream, shared by all who use that stream in an event loop.

Promises: a request is repeated until it is answered or `timeout` seconds are over, if need be by another server; a
client that can't be used any more is replaced. The stream's configuration is checked when the connection is made, after
each time that it was lost, and every few seconds; what is wrong then is raised by whatever is asked for next. While the
log is being closed, all requests together wait for at most `timeout` seconds without an answer.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import msgspec
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError

from .._errors import CorruptLogError, EventfoldError, LogClosedError
from .._logging import ERROR, INFO, WARNING, log_event
from ._calls import called
from ._client import close, connect, is_dead, why_unanswered
from ._codes import NO_MESSAGE, NO_PEERS, NO_STREAM, STREAM_EXISTS, error_code, is_unavailable
from ._configuration import check_server, check_stream, stream_configuration

_HEADERS_SIZE = 4096  # bytes that are kept for them in a message
_RETRY_DELAY = 0.05  # seconds
_CHECK_INTERVAL = 10.0  # seconds
# Seconds until a check that failed is repeated. After a check, a consumer's holder answers through a new connection;
# other processes take its name over if it does not answer for a while.
_RETRY_INTERVAL = 0.5
_UNANSWERED_BEFORE_CHANGE = 4.0  # seconds without any answer, after which another server is tried


class Message(NamedTuple):
    """A message of the stream."""

    sequence: int
    headers: Mapping[str, str]
    data: bytes


class Settings(NamedTuple):
    """Which stream on which servers, and how to reach it; times are in seconds.

    `client` is a connection of the application, used instead of one of our own.
    """

    servers: tuple[str, ...]
    client: Client | None
    log: str
    replicas: int
    create: bool
    timeout: float
    attempt_timeout: float
    compression: str
    connect: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"<Settings of {self.location}>"  # the addresses and the options may contain a password

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


class UnansweredError(Exception):
    """A request was not answered. With `sent`, the server may have received it anyway."""

    def __init__(self, problem: str, *, sent: bool) -> None:
        super().__init__(problem)
        self.sent = sent


class Connection:
    """A connection that is opened when it is first needed. Call `aclose` when it is no longer needed.

    `on_fault` is called with what is wrong with the stream, whenever a check finds something; otherwise `after_check`.
    """

    def __init__(self, settings: Settings, on_fault: Callable[[EventfoldError], None]) -> None:
        self.settings = settings
        self.location = settings.location
        self.closed = False
        self.after_check: Callable[[], Awaitable[None]] | None = None
        self._on_fault = on_fault
        self._client: Client | None = None
        self._connecting = asyncio.Lock()
        self._fault: EventfoldError | None = None
        self._created: str | None = None
        self._checking: asyncio.Task[None] | None = None
        self._check_now = asyncio.Event()
        self._unanswered_since: float | None = None
        self._answered = 0.0  # when, in the event loop's time
        self._closing_since: float | None = None
        self._max_data = 0

    @property
    def max_data(self) -> int:
        """How much a message may hold, in bytes, as the servers said last; 0 before the first connection."""
        if self._client is not None:
            self._max_data = self._client.max_payload - _HEADERS_SIZE
        return self._max_data

    def begin_closing(self, begun: bool = True) -> None:
        """From now on nobody waits for `timeout` seconds anew; or again, where others go on."""
        self._closing_since = asyncio.get_running_loop().time() if begun else None

    @property
    def given_up(self) -> bool:
        """Whether closing has waited for `timeout` seconds already, so that nothing waits any longer."""
        if self._closing_since is None:
            return False
        silent = asyncio.get_running_loop().time() - max(self._closing_since, self._answered)
        return silent >= self.settings.timeout

    async def client(self) -> Client:
        """The client; it may be about to reconnect.

        Raises `OSError` where no server answers, `EventfoldError` for a refused stream.
        """
        if self._fault is not None:
            raise self._fault
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
        before, self._client = self._client, None
        if before is not None:
            log_event(
                WARNING,
                "jetstream.connection_lost",
                "%(location)s: the connection ended for good (%(error)s): connecting again",
                location=self.location,
                error=repr(before.last_error),
            )
            await self._close(before)
        client = self.settings.client or Client()
        try:
            if self.settings.client is None:
                await connect(
                    client,
                    self.settings.servers,
                    self.settings.connect,
                    timeout=self.settings.timeout,
                    location=self.location,
                    on_reconnect=self._check_now.set,
                    is_first=self._created is None,
                )
            elif client.is_closed or client._status == Client.DISCONNECTED:
                raise OSError(errno.ENOTCONN, "the client that the engine was given is not connected", self.location)
            await self._check(client, create=self.settings.create)
            if self.closed:
                raise LogClosedError(f"{self.location} is closed")
        except BaseException:
            await self._close(client)
            raise
        self._client = client
        if self._checking is not None:
            self._check_now.set()
        else:
            self._checking = asyncio.get_running_loop().create_task(self._keep_checking(), name="eventfold checks")

    async def _keep_checking(self) -> None:
        failing = False
        while True:
            try:
                async with asyncio.timeout(_RETRY_INTERVAL if failing else _CHECK_INTERVAL):
                    await self._check_now.wait()
            except TimeoutError:
                pass
            self._check_now.clear()
            try:
                await self._check(await self._live_client(), create=False)
                self._fault = None
                if self.after_check is not None:
                    await self.after_check()
                failing = False
            except EventfoldError as error:
                if self.closed:
                    return
                if self._fault is None:
                    log_event(
                        ERROR,
                        "jetstream.unusable",
                        "%(location)s can't be used any more: %(error)s",
                        location=self.location,
                        error=error,
                    )
                self._fault = error
                self._on_fault(error)
            except OSError as error:
                if not failing:
                    log_event(
                        INFO,
                        "jetstream.check_failed",
                        "%(location)s could not be checked: %(error)s",
                        location=self.location,
                        error=error,
                    )
                failing = True

    async def check(self) -> None:
        """Checks the stream's configuration now. Raises what `client` raises."""
        await self._check(await self.client(), create=False)

    async def _check(self, client: Client, *, create: bool) -> None:
        settings = self.settings
        if client.is_connected:
            version = client.connected_server_version
            check_server(self.location, (version.major, version.minor), str(version), client.max_payload)
        info = await self._stream_info(client, settings.stream)
        if error_code(info) == NO_STREAM and create and self._created is None:
            wanted = stream_configuration(settings.stream, settings.subject, settings.replicas, settings.compression)
            await self._make_stream(client, wanted)
            info = await self._stream_info(client, settings.stream)
        if error_code(info) == NO_STREAM:
            if self._created is not None:
                raise CorruptLogError(self.location, 0, "the stream was deleted")
            raise EventfoldError(f"{self.location}: there is no stream {settings.stream!r}")
        if "error" in info:
            raise EventfoldError(f"{self.location}: {info['error']['description']}")
        if self._created not in (None, info["created"]):
            raise CorruptLogError(
                self.location, 0, f"the stream was deleted and made anew at {info['created']}: open the log again"
            )
        if self._created is None and info["config"]["num_replicas"] < settings.replicas:
            log_event(
                WARNING,
                "jetstream.fewer_replicas",
                "%(location)s was created before, and is kept on fewer servers than asked for: %(found)d instead of "
                "%(wanted)d; change it with `nats stream edit %(stream)s --replicas=%(wanted)d`",
                location=self.location,
                stream=settings.stream,
                found=info["config"]["num_replicas"],
                wanted=settings.replicas,
            )
        self._created = info["created"]
        check_stream(self.location, settings.subject, info["config"], info["state"])

    async def _stream_info(self, client: Client, stream: str) -> dict[str, Any]:
        return await self._repeated(client, f"$JS.API.STREAM.INFO.{stream}", b"")

    async def _make_stream(self, client: Client, configuration: Mapping[str, Any]) -> None:
        name, loop = configuration["name"], asyncio.get_running_loop()
        until = loop.time() + self.settings.timeout
        while True:
            answer = await self._repeated(client, f"$JS.API.STREAM.CREATE.{name}", msgspec.json.encode(configuration))
            if "error" not in answer or error_code(answer) == STREAM_EXISTS:
                return
            # The servers of a cluster that has just been started may not know of each other yet.
            if error_code(answer) != NO_PEERS or loop.time() >= until:
                description = answer["error"]["description"]
                raise EventfoldError(f"{self.location}: the stream {name} can't be made: {description}")
            await asyncio.sleep(_RETRY_DELAY)

    async def other_stream(self, configuration: Mapping[str, Any]) -> Mapping[str, Any]:
        """The configuration that another stream has; it is made if it may be and is not there."""
        client, name = await self.client(), configuration["name"]
        info = await self._stream_info(client, name)
        if error_code(info) == NO_STREAM and self.settings.create:
            await self._make_stream(client, configuration)
            info = await self._stream_info(client, name)
        if "error" in info:
            raise EventfoldError(f"{self.location}: the stream {name}: {info['error']['description']}")
        found: Mapping[str, Any] = info["config"]
        return found

    async def request(
        self, subject: str, payload: Any = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """A server's answer, which may contain an `error`; `payload` is bytes, or is encoded as JSON.

        Raises `OSError` (ETIMEDOUT) where no answer comes in time, and (EMSGSIZE) where it is too large for a message.
        """
        data = payload if isinstance(payload, bytes) else b"" if payload is None else msgspec.json.encode(payload)
        return await self._repeated(await self.client(), subject, data, headers)

    async def _repeated(
        self, client: Client, subject: str, data: bytes, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        until = loop.time() + self.settings.timeout
        while True:
            if self.closed:
                raise LogClosedError(f"{self.location} is closed")
            try:
                return await self._asked(client, subject, data, headers)
            except UnansweredError as error:
                problem = error
            if loop.time() >= until or self.given_up:
                raise OSError(errno.ETIMEDOUT, f"no answer for {self.settings.timeout:g} s: {problem}", self.location)
            await asyncio.sleep(_RETRY_DELAY)
            if client is self._client:
                client = await self._live_client()

    async def ask(self, subject: str, data: bytes, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        """What a server answers to one request, which may hold an `error`. It is not repeated.

        Raises `UnansweredError`; `OSError` (EMSGSIZE), with nothing sent, where it is too large for a message; and what
        `client` raises, with nothing sent either.
        """
        return await self._asked(await self.client(), subject, data, headers)

    async def _asked(
        self, client: Client, subject: str, data: bytes, headers: Mapping[str, str] | None
    ) -> dict[str, Any]:
        if not client.is_connected:
            raise UnansweredError(f"there is no connection ({client.last_error!r})", sent=False)
        if self.given_up:
            raise UnansweredError("the log is being closed", sent=False)
        try:
            timeout, sent = self.settings.attempt_timeout, dict(headers) if headers else None
            reply = await called(client.request(subject, data, timeout=timeout, headers=sent), timeout)
            answer: dict[str, Any] = msgspec.json.decode(reply.data)
        except MaxPayloadError as error:
            message = f"a message of {len(data)} bytes; the servers' max_payload is {client.max_payload}"
            raise OSError(errno.EMSGSIZE, message, self.location) from error
        except (NatsError, OSError, msgspec.DecodeError) as error:
            await self._note_unanswered(client)
            raise UnansweredError(why_unanswered(error, client), sent=True) from error
        if is_unavailable(answer):
            await self._note_unanswered(client)
            raise UnansweredError(answer["error"]["description"], sent=True)
        self._unanswered_since = None
        self._answered = asyncio.get_running_loop().time()
        return answer

    async def _note_unanswered(self, client: Client) -> None:
        """Changes to another server after a while: this one may be cut off from the others."""
        now = asyncio.get_running_loop().time()
        if self._unanswered_since is None:
            self._unanswered_since = now
        elif now - self._unanswered_since > _UNANSWERED_BEFORE_CHANGE and client is not self.settings.client:
            self._unanswered_since = None
            log_event(
                INFO,
                "jetstream.unanswered",
                "%(location)s: the server does not answer; another one is tried",
                location=self.location,
            )
            with contextlib.suppress(NatsError, OSError):  # whoever asked knows already that there was no answer
                await called(client.force_reconnect(), self.settings.attempt_timeout)

    async def last_message(self) -> Message | None:
        """The stream's last message, as its leader has it; None for an empty stream."""
        message = await self.get(self.settings.stream, {"last_by_subj": self.settings.subject})
        if message is None:
            # Empty, or purged in spite of its settings: an error then, and never silence.
            await self.check()
        return message

    async def message(self, sequence: int) -> Message | None:
        """A message by its sequence, as the leader has it; None if there is none."""
        return await self.get(self.settings.stream, {"seq": sequence})

    async def get(self, stream: str, which: Mapping[str, Any]) -> Message | None:
        """A message of any stream, as its leader has it; None if there is none."""
        answer = await self.request(f"$JS.API.STREAM.MSG.GET.{stream}", which)
        if error_code(answer) == NO_MESSAGE:
            return None
        if error_code(answer) == NO_STREAM:
            raise CorruptLogError(self.location, 0, f"the stream {stream} was deleted")
        if "error" in answer:
            raise EventfoldError(f"{self.location}: {answer['error']['description']}")
        message = answer["message"]
        headers = base64.b64decode(message.get("hdrs") or "").decode()
        pairs = dict(line.split(": ", 1) for line in headers.split("\r\n") if ": " in line)
        return Message(message["seq"], pairs, base64.b64decode(message.get("data") or ""))

    async def aclose(self) -> None:
        """Closes the connection, unless it is the application's; idempotent."""
        self.closed = True
        if self._checking is not None:
            self._checking.cancel()
        client, self._client = self._client, None
        if client is not None:
            await self._close(client)

    async def _close(self, client: Client) -> None:
        if client is not self.settings.client:
            await close(client, self.location)
