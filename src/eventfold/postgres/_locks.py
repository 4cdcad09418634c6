"""Locks that only one process on any host can hold: advisory locks, which the server ties to a connection.

A lock also has an identity, which is recorded beside the document while the lock is held; see `_documents`.

Promise: a lock ends with its process. It is lost only with its connection, and `was_lost` reports the loss, even if the
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
from .._documents import DocumentKind, DocumentLock, NoLock, acquired
from ._calls import terminate
from ._connections import CONNECTION_LOST, Retries
from ._schema import find_schema, unquoted

if TYPE_CHECKING:
    from ._session import Session

# Seconds for which a connection counts as open after it has answered.
TRUST_PERIOD = 5.0
# Seconds before this process tries again to acquire a lock that another process holds.
_RETRY_AFTER = 0.5

_RECORD_HOLDER = """
INSERT INTO {schema}.eventfold_documents (log, kind, name, data) VALUES ($1, $2 || '-holder', $3, $4)
ON CONFLICT (log, kind, name) DO UPDATE SET data = excluded.data
"""


class SessionLocks:
    """The locks of one session. All of them belong to its dedicated connection."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._held: dict[tuple[DocumentKind, str], HeldLock] = {}
        self._refused_until: dict[tuple[DocumentKind, str], float] = {}

    def held(self, kind: DocumentKind, name: str) -> HeldLock | None:
        """A document's lock, which may be lost, if this session has acquired it and not released it; otherwise None."""
        lock = self._held.get((kind, name))
        return None if lock is None or lock.unlocking is not None else lock

    async def lock(self, kind: DocumentKind, name: str) -> DocumentLock | None:
        """See `LockingDocuments.lock`. Raises `OSError` if the server can't be reached."""
        settings = self._session.settings
        if kind == "view" or (settings.transaction_pooling and settings.listen_dsn is None):
            # A snapshot is replaced by one statement. Behind a pooler, another client could get the lock's connection.
            return NoLock()
        key = await self._key(kind, name)
        return await acquired(UncancellableTask(self._lock(kind, name, key), "eventfold lock"))

    async def _key(self, kind: DocumentKind, name: str) -> int:
        session = self._session
        if await session.find():
            schema = session.schema
        else:  # the schema in which the log will be created
            schema, _ = await session.connections.run_with_retries(
                lambda connection: find_schema(connection, session.settings)
            )
        # Whether the schema is quoted depends on how this program or the server's settings name it.
        text = f"eventfold {unquoted(schema)}.{session.settings.log} {kind} {name}"
        return xxhash.xxh64_intdigest(text.encode()) - 2**63

    async def _lock(self, kind: DocumentKind, name: str, key: int) -> SessionLock | None:
        loop, document = asyncio.get_running_loop(), (kind, name)
        present = self._held.get(document)
        if present is not None and present.unlocking is not None:
            await asyncio.wait([present.unlocking])
        elif present is not None or loop.time() < self._refused_until.get(document, 0.0):
            return None
        connections = self._session.connections
        dedicated, retries = connections.dedicated, Retries(connections)
        while True:
            try:
                connection = await dedicated.acquire()
            except (*CONNECTION_LOST, asyncpg.TooManyConnectionsError) as error:
                await retries.wait(error)
                continue
            except asyncpg.PostgresError as error:
                raise connections.caller_error(error) from error
            try:
                lock = HeldLock(self, kind, name, key, connection)
                if await lock.fetch("SELECT pg_try_advisory_lock($1)", key):
                    try:
                        await lock.record_holder()
                    except PermissionError:
                        pass  # without the privilege, nothing can be stored either; `store` will try this again
                    self._held[document] = lock
                    return SessionLock(lock)
            except CONNECTION_LOST as error:
                dedicated.release(connection)
                await retries.wait(error)
                continue
            dedicated.release(connection)
            self._refused_until[document] = loop.time() + _RETRY_AFTER
            return None

    def remove(self, kind: DocumentKind, name: str, lock: HeldLock) -> None:
        """Removes a lock that has been released."""
        if self._held.get((kind, name)) is lock:
            del self._held[kind, name]

    async def aclose(self) -> None:
        """Releases all locks by closing the connection."""
        await self._session.connections.dedicated.aclose()
        unlocking = [lock.unlocking for lock in self._held.values() if lock.unlocking is not None]
        if unlocking:
            await asyncio.wait(unlocking)


class SessionLock:
    """A `DocumentLock`. It is also released when the object is garbage-collected."""

    def __init__(self, held: HeldLock) -> None:
        self._held = held

    def __del__(self) -> None:
        self.release()

    async def was_lost(self) -> bool:
        """See `DocumentLock.was_lost`."""
        return not await self._held.is_alive()

    def release(self) -> None:
        """See `DocumentLock.release`."""
        self._held.release()


class HeldLock:
    """A lock that a connection holds, or held until the connection was lost.

    `lost` says that another process is known to have it.
    """

    def __init__(self, locks: SessionLocks, kind: DocumentKind, name: str, key: int, connection: Any) -> None:
        self.lost = False
        self._identity = uuid.uuid4().bytes
        self._numbers = itertools.count(1)
        self._is_recorded = False
        self._locks = locks
        self._session = locks._session
        self._kind, self._name = kind, name
        self._key = key
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._trusted_until = 0.0
        self._released = False
        self.unlocking: asyncio.Task[None] | None = None

    async def fetch(self, statement: str, *arguments: Any) -> Any:
        """Returns the value that the statement selects. If there is no answer, closes the connection, and so loses its
        locks.

        Raises `ConnectionError`, and `PermissionError` if the role or a read-only server does not allow the statement.
        """
        timeout = self._session.settings.attempt_timeout

        async def call() -> Any:
            return await self._connection.fetchval(statement, *arguments, timeout=timeout)

        try:
            answer = await self._session.connections.dedicated.run(call)
        except (asyncpg.InsufficientPrivilegeError, asyncpg.ReadOnlySQLTransactionError) as error:
            number = errno.EROFS if isinstance(error, asyncpg.ReadOnlySQLTransactionError) else errno.EPERM
            raise PermissionError(number, str(error), self._session.settings.location) from error
        except (*CONNECTION_LOST, asyncpg.PostgresError) as error:
            terminate(self._connection)
            raise ConnectionError(f"the connection for locks was lost: {error!r}") from error
        self._trusted_until = self._loop.time() + TRUST_PERIOD
        return answer

    async def record_holder(self) -> None:
        """Records the identity beside the document, if that has not been done and the log exists.

        The identity is sent over the connection that has the lock, so a later holder records its own identity later.
        Raises what `fetch` raises.
        """
        session = self._session
        if self._is_recorded or not await session.find():
            return
        sql = _RECORD_HOLDER.format(schema=session.schema)
        await self.fetch(sql, session.log, self._kind, self._name, self._fence(0))
        self._is_recorded = True

    def next_fence(self) -> tuple[bytes, bytes]:
        """The first value of this lock in the holder's row, and the one for the next replacement of the document."""
        return self._fence(0), self._fence(next(self._numbers))

    def _fence(self, number: int) -> bytes:
        return self._identity + number.to_bytes(8)

    async def is_alive(self) -> bool:
        """Whether the connection still answers, and no other process is known to have the lock."""
        if self.lost or not self._session.connections.dedicated.is_open(self._connection):
            return False
        if self._loop.time() >= self._trusted_until:
            try:
                await self.fetch("SELECT 1")
            except ConnectionError:
                return False
        return True

    def release(self) -> None:
        """Begins to release the lock, in its event loop."""
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
        dedicated = self._session.connections.dedicated
        try:
            if dedicated.is_open(self._connection):
                await self.fetch("SELECT pg_advisory_unlock($1)", self._key)
        except ConnectionError:
            pass  # the server releases a lock when its connection ends
        finally:
            dedicated.release(self._connection)
            self._locks.remove(self._kind, self._name, self)
