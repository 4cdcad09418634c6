"""`JetStream`: the stream and the servers that store a log, and how to reach them."""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from nats.aio.client import Client

from .._options import address_parts, check_flag, check_seconds, refuse_options
from ._committer import StreamCommitter
from ._configuration import MAX_TIMEOUT
from ._settings import Settings
from ._stream import Stream

_LOG_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_streams: dict[tuple[asyncio.AbstractEventLoop, Settings], Stream] = {}


class JetStream:
    """A log in a JetStream stream; pass it to `EventLog.open` or `EventReader`.

    Args:
        servers: One or more addresses, such as `nats://host:4222`. The first server that answers is used, and another
            one if it no longer answers. Or a connected `nats.aio.client.Client` of the application, which is neither
            configured nor closed here.
        log: The log's name, which is also the stream's name and the end of its subject: 1 to 128 of `A-Z a-z 0-9 _ -`.
        replicas: How many servers store a new stream: 1, 3 or 5.
        create: Whether to create the stream and the bucket of documents if they don't exist.
        timeout: Seconds after which an unanswered call fails, at most 100: an append with `UnknownOutcomeError`, or
            with `OSError` if it was never sent; everything else with `OSError`.
        attempt_timeout: Seconds after which one unanswered request is sent again.
        compression: `"none"` or `"s2"`, for a new stream.
        **connect: Further options for `nats.connect`, such as `user_credentials` or `tls`.

    Raises:
        ValueError: A name or a number is not allowed.
    """

    # Offsets are not byte positions, so a copy from another engine gets other offsets.
    counts_bytes = False

    def __init__(
        self,
        servers: str | Sequence[str] | Client,
        log: str,
        *,
        replicas: int = 1,
        create: bool = True,
        timeout: float = 30.0,
        attempt_timeout: float = 2.0,
        compression: str = "none",
        **connect: Any,
    ) -> None:
        if not isinstance(log, str) or not _LOG_NAME.fullmatch(log):
            raise ValueError(f"log name {log!r}: it must be 1 to 128 characters of A-Z a-z 0-9 _ -")
        if not isinstance(replicas, int) or isinstance(replicas, bool) or replicas not in (1, 3, 5):
            raise ValueError(f"replicas must be 1, 3 or 5, not {replicas!r}")
        check_flag("create", create)
        check_seconds("timeout", timeout, check_range=False)
        check_seconds("attempt_timeout", attempt_timeout, check_range=False)
        if not 0 < attempt_timeout <= timeout <= MAX_TIMEOUT:
            raise ValueError(
                f"timeout is {timeout!r} and attempt_timeout is {attempt_timeout!r}: they must be more than 0 and at "
                f"most {MAX_TIMEOUT:g} seconds, and attempt_timeout must not be the longer one"
            )
        if compression not in ("none", "s2"):
            raise ValueError(f"compression must be 'none' or 's2', not {compression!r}")
        client: Client | None = None
        if isinstance(servers, Client):
            client, addresses = servers, tuple(server.netloc for server in servers.servers)
            if connect:
                raise ValueError(f"{', '.join(sorted(connect))}: the client was connected without these options")
        else:
            addresses = _checked([servers] if isinstance(servers, str) else servers)
        self._settings = Settings(
            addresses, client, log, replicas, create, timeout, attempt_timeout, compression, _Options(connect)
        )

    @classmethod
    def from_address(cls, address: str) -> JetStream:
        """The engine that an address names: `nats://host1:4222,host2:4222/LOG`, optionally with `?replicas=3`.

        Raises:
            ValueError: The address names no host or no log, or has an option that doesn't exist.
        """
        parts = address_parts(address)
        log = unquote(parts.path.strip("/"))
        if not parts.netloc or not log:
            # The address is not shown, since it may contain a password.
            raise ValueError("the address must have a host and the log's name, as in nats://host:4222/orders")
        user, _, hosts = parts.netloc.rpartition("@")
        options = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        replicas = options.pop("replicas", "1")
        if options:
            raise ValueError(
                f"the address has the unknown options {', '.join(sorted(options))}: only replicas is possible; other "
                "options, such as timeout, are arguments of JetStream"
            )
        if not replicas.isdecimal():
            raise ValueError(f"replicas must be 1, 3 or 5, not {replicas!r}")
        prefix = f"{parts.scheme}://{user}@" if user else f"{parts.scheme}://"
        return cls([prefix + host for host in hosts.split(",")], log, replicas=int(replicas))

    def __repr__(self) -> str:
        return f"<JetStream {self._settings.location}>"

    def existing(self) -> JetStream:
        """The same log, with `create=False`."""
        engine = copy.copy(self)
        engine._settings = self._settings._replace(create=False)
        return engine

    def source(self) -> Stream:
        """The log, for reading. Call it in the event loop that reads. No I/O."""
        key = (asyncio.get_running_loop(), self._settings)
        for other, stream in list(_streams.items()):
            if other[0].is_closed() or stream.connection.closed:
                del _streams[other]
        if key not in _streams:
            _streams[key] = Stream(self._settings)
        _streams[key].acquire()
        return _streams[key]

    async def open_committer(self, **options: Any) -> StreamCommitter:
        """Opens the log for appending; creates or checks the stream and the bucket.

        Raises:
            ValueError: This engine does not have one of the options.
            OSError: No server answers.
            EventfoldError: The servers or the stream are configured so that events could be lost; the message says what
                to change.

        If cancelled, it opens nothing; the stream and the bucket may have been created.
        """
        refuse_options(options, "JetStream")
        stream = self.source()
        try:
            await stream.head()
            await stream.documents.open()
        except BaseException:
            await stream.aclose()
            raise
        return StreamCommitter(stream)


def _checked(servers: Any) -> tuple[str, ...]:
    """Checks that the client library can use the addresses. Raises `ValueError`, without showing a password."""
    if not isinstance(servers, Iterable) or not all(isinstance(server, str) for server in servers):
        raise ValueError(f"servers must be addresses or a nats.aio.client.Client, not {type(servers).__name__}")
    addresses = tuple(servers)
    if not addresses:
        raise ValueError("servers must name at least one address")
    for address in addresses:
        scheme, separator, rest = address.rpartition("://")
        if separator and scheme not in ("nats", "tls", "ws", "wss"):
            raise ValueError(f"a server's address must begin with nats:// or tls://, not {scheme}://")
        host = address_parts(f"nats://{rest}").netloc.rpartition("@")[2]
        try:
            valid = bool(urlsplit(f"//{host}").hostname) and urlsplit(f"//{host}").port != 0
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(f"a server's address must look like nats://host:4222, which {host!r} does not")
    return addresses


class _Options(dict[str, Any]):
    """Options of `nats.connect`. They are hashable: two of them are equal if both are empty, or the same object."""

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self) if self else 0

    def __eq__(self, other: object) -> bool:
        return self is other or (not self and isinstance(other, _Options) and not other)
