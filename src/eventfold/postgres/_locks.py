"""Locks that only one process on any host can hold: advisory locks, which the server ties to a connection.

A lock also has an identity, which is written beside the document while the lock is held; see `_documents`.

Promise: a lock ends with its process. It is lost only with its connection, and `was_lost` reports that, even if the
server can no longer be reached.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import uuid
from typing import TYPE_CHECKING, Any

import asyncpg
import xxhash

from .._aio import UncancellableTask
from .._engine import DocumentKind, DocumentLock, NoLock, acquired
from ._connections import LOST, Tries
from ._schema import find_schema

if TYPE_CHECKING:
    from ._source import Session

# How long a connection is trusted after it has answered, in seconds.
BELIEVED_FOR = 5.0
# How long to wait before asking again for a lock that another process holds, in seconds.
_REFUSED_FOR = 0.5

_CLAIM = """
INSERT INTO {schema}.eventfold_documents (log, kind, name, data) VALUES ($1, $2 || '-holder', $3, $4)
ON CONFLICT (log, kind, name) DO UPDATE SET data = excluded.data
"""


class SessionLocks:
    """The locks of one session. All of them belong to its standing connection."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._held: dict[tuple[DocumentKind, str], Held] = {}
        self._refused: dict[tuple[DocumentKind, str], float] = {}

    def held(self, kind: DocumentKind, name: str) -> Held | None:
        """A document's lock that was taken here and not released; it may be lost. None if there is none."""
        held = self._held.get((kind, name))
        return None if held is None or held.unlocking is not None else held

    async def lock(self, kind: DocumentKind, name: str) -> DocumentLock | None:
        """See `LockingDocuments.lock`. Raises `OSError` if the server can't be reached."""
        settings = self._session.settings
        if kind == "view" or (settings.transaction_pooling and settings.listen_dsn is None):
            # A snapshot is replaced by one statement. A pooler would keep the lock and pass it on to its next client.
            return NoLock()
        key = await self._key(kind, name)
        return await acquired(UncancellableTask(self._lock(kind, name, key), "eventfold lock"))

    async def _key(self, kind: DocumentKind, name: str) -> int:
        session = self._session
        if await session.find():
            schema = session.schema
        else:  # the schema in which it will be created
            schema, _ = await session.connections.retried(lambda connection: find_schema(connection, session.settings))
        text = f"eventfold {schema}.{session.settings.log} {kind} {name}"
        return xxhash.xxh64_intdigest(text.encode()) - 2**63

    async def _lock(self, kind: DocumentKind, name: str, key: int) -> SessionLock | None:
        loop, document = asyncio.get_running_loop(), (kind, name)
        other = self._held.get(document)
        if other is not None and other.unlocking is not None:
            await asyncio.wait([other.unlocking])
        elif other is not None or loop.time() < self._refused.get(document, 0.0):
            return None
        connections = self._session.connections
        standing, tries = connections.standing, Tries(connections)
        while True:
            try:
                connection = await standing.take()
            except (*LOST, asyncpg.TooManyConnectionsError) as error:
                await tries.wait(error)
                continue
            except asyncpg.PostgresError as error:
                raise connections.refusal(error) from error
            try:
                held = Held(self, kind, name, key, connection)
                if await held.fetch("SELECT pg_try_advisory_lock($1)", key):
                    try:
                        await held.claim()
                    except PermissionError:
                        pass  # nothing can be stored either, unless that changes: then it is claimed first
                    self._held[document] = held
                    return SessionLock(held)
            except LOST as error:
                standing.leave(connection)
                await tries.wait(error)
                continue
            standing.leave(connection)
            self._refused[document] = loop.time() + _REFUSED_FOR
            return None

    def forget(self, kind: DocumentKind, name: str, held: Held) -> None:
        """Notes that a lock is no longer held."""
        if self._held.get((kind, name)) is held:
            del self._held[kind, name]

    async def aclose(self) -> None:
        """Releases all locks by closing the connection."""
        await self._session.connections.standing.aclose()
        unlocking = [held.unlocking for held in self._held.values() if held.unlocking is not None]
        if unlocking:
            await asyncio.wait(unlocking)


class SessionLock:
    """A `DocumentLock`. It is also released when the object is collected."""

    def __init__(self, held: Held) -> None:
        self._held = held

    def __del__(self) -> None:
        self.release()

    async def was_lost(self) -> bool:
        """See `DocumentLock.was_lost`."""
        return not await self._held.is_there()

    def release(self) -> None:
        """See `DocumentLock.release`."""
        self._held.release()


class Held:
    """A lock that a connection holds, or held until the connection was lost. `lost` says that another one has it."""

    def __init__(self, locks: SessionLocks, kind: DocumentKind, name: str, key: int, connection: Any) -> None:
        self.lost = False
        self._identity = uuid.uuid4().bytes
        self._numbers = itertools.count(1)
        self._claimed = False
        self._locks = locks
        self._session = locks._session
        self._kind, self._name = kind, name
        self._key = key
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._believed_until = 0.0
        self._released = False
        self.unlocking: asyncio.Task[None] | None = None

    async def fetch(self, statement: str, *arguments: Any) -> Any:
        """Returns the connection's answer. Without one, the connection is given up, and all its locks with it.

        Raises `ConnectionError`, and `PermissionError` for what may not be written.
        """
        timeout = self._session.settings.attempt_timeout

        async def call() -> Any:
            return await self._connection.fetchval(statement, *arguments, timeout=timeout)

        try:
            answer = await self._session.connections.standing.run(call)
        except (asyncpg.InsufficientPrivilegeError, asyncpg.ReadOnlySQLTransactionError) as error:
            number = errno.EROFS if isinstance(error, asyncpg.ReadOnlySQLTransactionError) else errno.EPERM
            raise PermissionError(number, str(error), self._session.settings.location) from error
        except (*LOST, asyncpg.PostgresError) as error:
            self._connection.terminate()
            raise ConnectionError(f"the connection for locks is lost: {error!r}") from error
        self._believed_until = self._loop.time() + BELIEVED_FOR
        return answer

    async def claim(self) -> None:
        """Writes the identity beside the document, if that has not been done and the log exists.

        It is written over the connection that has the lock: so whoever has the lock later writes its own later. Raises
        what `fetch` raises.
        """
        session = self._session
        if self._claimed or not await session.find():
            return
        sql = _CLAIM.format(schema=session.schema)
        await self.fetch(sql, session.log, self._kind, self._name, self._number(0))
        self._claimed = True

    def next_number(self) -> tuple[bytes, bytes]:
        """The number that the lock begins with, and that of the next replacement of the document."""
        return self._number(0), self._number(next(self._numbers))

    def _number(self, number: int) -> bytes:
        return self._identity + number.to_bytes(8)

    async def is_there(self) -> bool:
        """Whether the connection still answers, and no other process is known to have the lock."""
        if self.lost or not self._session.connections.standing.has(self._connection):
            return False
        if self._loop.time() >= self._believed_until:
            try:
                await self.fetch("SELECT 1")
            except ConnectionError:
                return False
        return True

    def release(self) -> None:
        """Begins to release it, in its event loop."""
        if self._released:
            return
        self._released = True
        if self._loop is asyncio._get_running_loop():
            self._begin_unlocking()
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._begin_unlocking)

    def _begin_unlocking(self) -> None:
        self.unlocking = self._loop.create_task(self._unlock(), name="eventfold unlock")

    async def _unlock(self) -> None:
        standing = self._session.connections.standing
        try:
            if standing.has(self._connection):
                await self.fetch("SELECT pg_advisory_unlock($1)", self._key)
        except ConnectionError:
            pass  # the server releases it, as it does whenever a connection ends
        finally:
            standing.leave(self._connection)
            self._locks.forget(self._kind, self._name, self)
