"""Connections to one database: a pool, retries, and what the server's errors mean.

Promise: a call that is made through `run_with_retries` is answered, or raises an error, `OSError` after the timeout.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import asyncpg

from .._errors import EventfoldError, LogClosedError
from .._logging import WARNING, log_event
from ._calls import connected, terminate
from ._dedicated import DedicatedConnection

T = TypeVar("T")

# Seconds before the first retry; the delay doubles with each further retry, up to the maximum.
FIRST_RETRY_DELAY, MAX_RETRY_DELAY = 0.02, 1.0

# Seconds of retries after which a warning says what a call is waiting for.
_WARN_AFTER = 1.0

# Seconds for which a connection that is no longer needed waits for the server, before it is closed without an answer.
CLOSE_TIMEOUT = 2.0

# There is no answer. The server may have executed what was sent, or may still do so.
CONNECTION_LOST = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.IdleInTransactionSessionTimeoutError,
)
# The server has not executed what was sent, and a retry may succeed.
TRANSIENT = (
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.TooManyConnectionsError,
)


class NotSentError(OSError):
    """There was no connection: nothing was sent to the server."""


@dataclass(frozen=True, eq=False, repr=False)
class Settings:
    """The arguments of `Postgres`, some of which may contain a password."""

    target: Any
    log: str
    schema: str | None
    timeout: float
    attempt_timeout: float
    listen_dsn: str | None
    transaction_pooling: bool
    pool_size: int
    connect: dict[str, Any]

    def __repr__(self) -> str:
        return f"<Settings of {self.location}>"

    @property
    def key(self) -> tuple[Any, ...]:
        """A value that is equal for settings that can share connections."""
        options = tuple(sorted((name, id(value)) for name, value in self.connect.items()))
        target = self.target if isinstance(self.target, str) else id(self.target)
        numbers = (self.timeout, self.attempt_timeout, self.pool_size)
        return (target, self.log, self.schema, self.listen_dsn, self.transaction_pooling, numbers, options)

    @property
    def has_one_host(self) -> bool:
        """Whether the address names at most one server, so that no other one may accept a connection later."""
        return isinstance(self.target, str) and "," not in self.target

    @property
    def location(self) -> str:
        """Where the log is, without the password."""
        if not isinstance(self.target, str):
            return f"postgresql:?log={self.log}"
        parts = urlsplit(self.target)
        user, at, host = parts.netloc.rpartition("@")
        return f"postgresql://{user.partition(':')[0]}{at}{host}{parts.path}?log={self.log}"


class _Connection(asyncpg.Connection):  # type: ignore[misc]
    """A connection of our own pool. It needs no statement that resets it, since we change no session state."""

    def get_reset_query(self) -> str:
        return ""


class Connections:
    """A pool for one event loop, or the application's pool."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._pool: Any = None if isinstance(settings.target, str) else settings.target
        self._owned = self._pool is None
        self._connecting = asyncio.Lock()
        self._largest_size = 0  # the largest number of connections that the pool has had
        self._has_expired = False  # whether connections were expired, so that acquiring one may open another
        self.dedicated = DedicatedConnection(settings, self._pool, self._options)
        self.closed = False

    @property
    def _options(self) -> dict[str, Any]:
        settings = self.settings
        options = {"timeout": settings.attempt_timeout, "command_timeout": settings.attempt_timeout} | settings.connect
        return options | ({"statement_cache_size": 0} if settings.transaction_pooling else {})

    async def _get_pool(self) -> Any:
        if self.closed:
            raise LogClosedError(f"the log in {self.settings.location} is closed")
        if self._pool is None:
            async with self._connecting:
                if self._pool is None:
                    self._pool = await asyncpg.create_pool(
                        self.settings.target,
                        min_size=0,
                        max_size=self.settings.pool_size,
                        connection_class=_Connection,
                        **self._options,
                    )
        return self._pool

    async def run(self, call: Callable[[Any], Awaitable[T]], *, transaction: bool = False) -> T:
        """Makes one call with a connection, once. Raises `NotSentError` if there is no connection.

        With `transaction`, or behind a pooler, the call is made in a transaction of its own.
        """
        try:
            pool = await self._get_pool()
            connection = await self._acquire(pool)
        except ValueError as error:
            if isinstance(error, ssl.SSLCertVerificationError):  # which is an OSError too
                raise self._not_connected(error) from error
            raise ValueError(f"{self.settings.location} can't be used as an address: {error}") from error
        except CONNECTION_LOST as error:
            if self.closed:
                raise LogClosedError(f"the log in {self.settings.location} is closed") from error
            if isinstance(error, asyncpg.InterfaceError) and not self._owned:
                raise EventfoldError(
                    f"{self.settings.location}: {error}: open the pool before the log, and close it after the log"
                ) from error
            raise self._not_connected(error) from error
        except TRANSIENT:
            raise
        except asyncpg.PostgresError as error:
            raise EventfoldError(
                f"{self.settings.location}: the server refuses the connection: {error}{_advice(error)}"
            ) from error
        try:
            if transaction or self.settings.transaction_pooling:
                return await self._run_in_transaction(connection, call)
            return await call(connection)
        except (*CONNECTION_LOST, asyncio.CancelledError) as error:
            # Terminated, since releasing it would wait for the server.
            if self.closed or not isinstance(error, asyncio.CancelledError):
                terminate(connection)
            raise
        finally:
            try:
                await pool.release(connection)
            except CONNECTION_LOST:
                pass  # the pool has closed the connection, since it could not be reset

    async def _acquire(self, pool: Any) -> Any:
        acquiring = pool.acquire(timeout=self.settings.attempt_timeout)
        if self._owned and not self._has_expired and pool.get_size() == self._largest_size and pool.get_idle_size():
            # No connection was lost or expired, so this returns one at once. The task in `connected` would delay each
            # query by several iterations of the loop.
            return await acquiring
        connection = await connected(acquiring)
        self._largest_size = max(self._largest_size, pool.get_size())
        return connection

    async def _run_in_transaction(self, connection: Any, call: Callable[[Any], Awaitable[T]]) -> T:
        """Makes a call in a transaction; the transactions of asyncpg have no timeout on a pool without one."""
        timeout = self.settings.attempt_timeout
        # At the other levels, which may be the default, a call would not see what was committed while it waited.
        await connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED", timeout=timeout)
        try:
            result = await call(connection)
        except BaseException:
            try:
                await connection.execute("ROLLBACK", timeout=timeout)
            except (*CONNECTION_LOST, asyncpg.PostgresError):
                terminate(connection)
            raise
        await connection.execute("COMMIT", timeout=timeout)
        return result

    def _not_connected(self, error: BaseException) -> Exception:
        """The error if connecting has failed: `NotSentError`, unless another attempt would fail in the same way."""
        location = self.settings.location
        if self.settings.has_one_host:
            if isinstance(error, ssl.SSLCertVerificationError):
                return EventfoldError(
                    f"{location}: the server's certificate is not trusted ({error.verify_message.rstrip('.')}): name "
                    "its authority with sslrootcert (or ssl), or replace the certificate"
                )
            if "rejected SSL upgrade" in str(error):
                advice = "enable TLS on the server, or leave sslmode=require (or ssl) out"
                return EventfoldError(f"{location}: {error}: {advice}")
        return NotSentError(errno.ECONNREFUSED, self._unreachable(error), location)

    def _unreachable(self, error: BaseException) -> str:
        seconds = f"{self.settings.attempt_timeout:g} s"
        if isinstance(error, TimeoutError) and not self._owned and self._pool.get_size() == self._pool.get_max_size():
            return f"all connections of the pool were in use for {seconds}: raise its max_size, or check the server"
        # The text of a system error would contain its number, which is of no use.
        why = getattr(error, "strerror", None) or str(error) or f"no answer for {seconds}"
        return f"no connection ({why}): check the address, and that the server is running and accepts this host"

    async def run_with_retries(self, call: Callable[[Any], Awaitable[T]], *, transaction: bool = False) -> T:
        """Makes a call that may be made more than once, until it is answered.

        Raises `OSError` after the timeout, and what `caller_error` returns if no retry would help.
        """
        retries = Retries(self)
        while True:
            try:
                return await self.run(call, transaction=transaction)
            except (*CONNECTION_LOST, *TRANSIENT) as error:
                await retries.wait(error)
            except asyncpg.PostgresError as error:
                raise self.caller_error(error) from error

    async def expire_connections(self) -> None:
        """Makes the next calls use new connections, since a different server may be the primary by now."""
        if self._pool is not None:
            self._has_expired = True
            await self._pool.expire_connections()

    def caller_error(self, error: asyncpg.PostgresError) -> Exception:
        """The error to raise for the server's error, which means that it has not executed what was sent."""
        location = self.settings.location
        if isinstance(error, asyncpg.InsufficientPrivilegeError):
            return PermissionError(errno.EPERM, f"{error}: grant it to the role that connects", location)
        if isinstance(error, asyncpg.QueryCanceledError | asyncpg.LockNotAvailableError):
            return OSError(
                errno.ETIMEDOUT, f"{error}: raise statement_timeout and lock_timeout for this role", location
            )
        if isinstance(error, asyncpg.DiskFullError):
            return OSError(errno.ENOSPC, str(error), location)
        if isinstance(error, asyncpg.InsufficientResourcesError):
            return OSError(errno.EAGAIN, str(error), location)
        if isinstance(
            error, asyncpg.UndefinedTableError | asyncpg.UndefinedColumnError | asyncpg.DatatypeMismatchError
        ):
            return EventfoldError(
                f"{location}: the tables are not as eventfold created them; somebody altered them: {error}"
            )
        return EventfoldError(f"{location}: {error} ({type(error).__name__}, SQLSTATE {error.sqlstate})")

    async def aclose(self) -> None:
        """Closes the pool, if it is ours."""
        self.closed = True
        if self._owned and self._pool is not None:
            pool, self._pool = self._pool, None
            closing = asyncio.ensure_future(pool.close())
            await asyncio.wait([closing], timeout=CLOSE_TIMEOUT)
            pool.terminate()
            await asyncio.wait([closing])
            closing.exception()


def _advice(error: asyncpg.PostgresError) -> str:
    """What to do if the server refuses the connection."""
    if isinstance(error, asyncpg.InvalidAuthorizationSpecificationError):
        return ": check the user and the password in the address (or PGUSER, PGPASSWORD, ~/.pgpass) and pg_hba.conf"
    if isinstance(error, asyncpg.InvalidCatalogNameError):
        return ": create it, or name another one in the address"
    if isinstance(error, asyncpg.UndefinedObjectError):
        return (
            ": in the query of the address, log and schema are for eventfold, and the rest is for asyncpg.connect; "
            "other options, such as timeout, are arguments of Postgres"
        )
    return ""


class Retries:
    """Waits before each retry of one call, longer each time, until the timeout."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._until = self._loop.time() + connections.settings.timeout
        self._delay = FIRST_RETRY_DELAY
        self._warned = False

    async def wait(self, error: BaseException) -> None:
        """Waits before a retry. Raises `OSError` with the last error after the timeout."""
        settings = self._connections.settings
        read_only = isinstance(error, asyncpg.ReadOnlySQLTransactionError)
        if read_only:
            await self._connections.expire_connections()
        why = (error.strerror if isinstance(error, NotSentError) else str(error)) or "no answer in time"
        if self._loop.time() + self._delay >= self._until:
            number = errno.EROFS if read_only else errno.ETIMEDOUT
            raise OSError(number, f"no success within {settings.timeout:g} s: {why}", settings.location) from error
        if not self._warned and self._loop.time() > self._until - settings.timeout + _WARN_AFTER:
            self._warned = True
            log_event(
                WARNING,
                "postgres.waiting",
                "%(location)s: no success yet, retrying for up to %(seconds)g s: %(error)s",
                location=settings.location,
                seconds=settings.timeout,
                error=why,
            )
        await asyncio.sleep(self._delay)
        self._delay = min(2 * self._delay, MAX_RETRY_DELAY)
