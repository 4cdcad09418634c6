"""One connection outside the pool, for `LISTEN` and for session locks, which last only as long as a connection does.

It is opened when it is first needed, and closed `IDLE_TIMEOUT` seconds after its last user has released it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg

from .._errors import LogClosedError
from ._calls import connected, is_closed, terminate

if TYPE_CHECKING:
    from ._connections import Settings

T = TypeVar("T")

# Seconds for which an unused connection stays open.
IDLE_TIMEOUT = 1.0
# With these settings, the server notices within half a minute that a host has died, and releases its locks.
_KEEPALIVES = {"tcp_keepalives_idle": "10", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "4"}
_SET = "SELECT " + ", ".join(f"set_config('{name}', '{value}', false)" for name, value in _KEEPALIVES.items())


class DedicatedConnection:
    """The connection. It comes from `pool`, or is opened with `options` if that is None."""

    def __init__(self, settings: Settings, pool: Any, options: dict[str, Any]) -> None:
        self._settings = settings
        self._pool = None if settings.listen_dsn is not None else pool
        self._options = options
        self._connecting = asyncio.Lock()
        self._busy = asyncio.Lock()
        self._connection: Any = None
        self._users = 0
        self._closed = False
        self._closing: asyncio.Future[None] | None = None

    async def acquire(self) -> Any:
        """Returns the connection; call `release` afterwards. Raises `LogClosedError`, and what connecting raises."""
        async with self._connecting:
            if self._closed:
                raise LogClosedError(f"the log in {self._settings.location} is closed")
            if self._connection is None or is_closed(self._connection):
                await self._close()
                self._connection = await self._connect()
            self._users += 1
            return self._connection

    def is_open(self, connection: Any) -> bool:
        """Whether an acquired connection is still open, as far as is known."""
        return connection is self._connection and not is_closed(connection)

    def release(self, connection: Any) -> None:
        """Ends one use of an acquired connection."""
        if connection is self._connection:
            self._users -= 1
            if not self._users:
                asyncio.get_running_loop().call_later(IDLE_TIMEOUT, self._begin_closing, connection)

    async def run(self, call: Callable[[], Awaitable[T]]) -> T:
        """Makes a call that uses the connection, after the calls before it have ended."""
        async with self._busy:
            return await call()

    async def aclose(self) -> None:
        """Closes the connection; the server then releases its locks."""
        async with self._connecting:
            self._closed = True
            await self._close()

    async def _connect(self) -> Any:
        timeout = self._settings.attempt_timeout
        if self._pool is not None:
            connection = await connected(self._pool.acquire(timeout=timeout))
        else:
            address = self._settings.listen_dsn or self._settings.target
            connection = await connected(asyncpg.connect(address, **self._options))
        try:
            await connection.execute(_SET, timeout=timeout)
        except BaseException:
            terminate(connection)
            if self._pool is not None:
                await self._pool.release(connection)
            raise
        return connection

    async def _close(self) -> None:
        connection, self._connection, self._users = self._connection, None, 0
        if connection is None:
            return
        if self._pool is None:
            terminate(connection)
            return
        try:
            await self._pool.release(connection)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            pass  # the pool has closed the connection, since it could not be reset

    def _begin_closing(self, connection: Any) -> None:
        self._closing = asyncio.ensure_future(self._close_unused(connection))

    async def _close_unused(self, connection: Any) -> None:
        async with self._connecting:
            if connection is self._connection and not self._users:
                await self._close()
