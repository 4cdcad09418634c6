"""One connection beside the pool, for what lives as long as a connection does: `LISTEN`, and locks of a session.

It is connected when somebody takes it, and closed a moment after the last one has left it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg

from .._errors import LogClosedError

if TYPE_CHECKING:
    from ._connections import Settings

T = TypeVar("T")

# Seconds for which it is kept while nobody needs it.
LINGER = 1.0
# With these, the server gives up a host that has died, and with it that one's locks, within half a minute.
_KEEPALIVES = {"tcp_keepalives_idle": "10", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "4"}
_SET = "SELECT " + ", ".join(f"set_config('{name}', '{value}', false)" for name, value in _KEEPALIVES.items())


class StandingConnection:
    """The connection, of which there is one at a time. `pool` is the application's, None to connect by `options`."""

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

    async def take(self) -> Any:
        """The connection, which must be left again. Raises `LogClosedError`, and what connecting raises."""
        async with self._connecting:
            if self._closed:
                raise LogClosedError(f"the log in {self._settings.location} is closed")
            if self._connection is None or self._connection.is_closed():
                await self._close()
                self._connection = await self._connect()
            self._users += 1
            return self._connection

    def has(self, connection: Any) -> bool:
        """Whether a connection that was taken is still there, as far as is known."""
        return connection is self._connection and not connection.is_closed()

    def leave(self, connection: Any) -> None:
        """Says that a connection that was taken is not needed any more."""
        if connection is self._connection:
            self._users -= 1
            if not self._users:
                asyncio.get_running_loop().call_later(LINGER, self._begin_closing, connection)

    async def run(self, call: Callable[[], Awaitable[T]]) -> T:
        """Makes a call with the connection, which can't answer two at once."""
        async with self._busy:
            return await call()

    async def aclose(self) -> None:
        """Closes the connection; the server ends what it held."""
        async with self._connecting:
            self._closed = True
            await self._close()

    async def _connect(self) -> Any:
        if self._pool is not None:
            connection = await self._pool.acquire(timeout=self._settings.attempt_timeout)
        else:
            connection = await asyncpg.connect(self._settings.listen_dsn or self._settings.target, **self._options)
        try:
            await connection.execute(_SET)
        except BaseException:
            connection.terminate()
            if self._pool is not None:
                await self._pool.release(connection)
            raise
        return connection

    async def _close(self) -> None:
        connection, self._connection, self._users = self._connection, None, 0
        if connection is None:
            return
        if self._pool is None:
            connection.terminate()
            return
        try:
            await self._pool.release(connection)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            connection.terminate()

    def _begin_closing(self, connection: Any) -> None:
        self._closing = asyncio.ensure_future(self._close_unused(connection))

    async def _close_unused(self, connection: Any) -> None:
        async with self._connecting:
            if connection is self._connection and not self._users:
                await self._close()
