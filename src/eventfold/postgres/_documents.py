"""Documents in a table beside the commits: one row each, replaced by one statement.

A document that can be locked has a second row, of the kind `KIND-holder`, which says under which lock the document may
be replaced: it has the lock's identity and the number of the last replacement. A process that acquires the lock writes
the identity there, over the connection that has the lock. Each replacement increases the number.

Promise: once another process has acquired the lock, nothing that the former holder has sent, or sends later, replaces
the document; and a replacement that arrives late does not undo a later one under the same lock.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from .._documents import DocumentKind, DocumentLock, check_name
from .._errors import EventfoldError
from ._connections import Settings
from ._locks import SessionLocks

_STORE = """
INSERT INTO {schema}.eventfold_documents (log, kind, name, data) VALUES ($1, $2, $3, $4)
ON CONFLICT (log, kind, name) DO UPDATE SET data = excluded.data RETURNING 1
"""
# The update locks the holder's row, so the next holder waits until this statement has ended before it reads anything.
_STORE_LOCKED = """
WITH held AS (
    UPDATE {schema}.eventfold_documents SET data = $6
    WHERE log = $1 AND kind = $2 || '-holder' AND name = $3 AND data BETWEEN $5 AND $6 RETURNING log
)
INSERT INTO {schema}.eventfold_documents (log, kind, name, data) SELECT log, $2, $3, $4 FROM held
ON CONFLICT (log, kind, name) DO UPDATE SET data = excluded.data RETURNING 1
"""


class TableDocuments:
    """`LockingDocuments` of one log. For `fetch`, see `Session.fetch`.

    `locks` returns the locks of the running event loop's session.
    """

    def __init__(
        self, settings: Settings, fetch: Callable[..., Awaitable[Any]], locks: Callable[[], SessionLocks]
    ) -> None:
        self._settings = settings
        self._fetch = fetch
        self._locks = locks

    def location(self, kind: DocumentKind, name: str) -> str:
        """Where the document is, for messages."""
        return f"{self._settings.location}, {kind} {name}"

    async def load(self, kind: DocumentKind, name: str) -> bytes | None:
        """See `Documents.load`. Raises `OSError`."""
        rows = await self._fetch(
            "SELECT data FROM {schema}.eventfold_documents WHERE log = $1 AND kind = $2 AND name = $3", kind, name
        )
        data: bytes | None = rows[0][0] if rows else None
        return data

    async def store(self, kind: DocumentKind, name: str, data: bytes) -> None:
        """See `Documents.store`. If cancelled, the document may or may not be stored.

        Raises `OSError`, and `EventfoldError` if this process has lost the document's lock to another one.
        """
        lock = self._locks().held(kind, check_name(kind, name))
        if lock is None:
            rows = await self._fetch(_STORE, kind, name, data)
        else:
            await lock.record_holder()
            rows = await self._fetch(_STORE_LOCKED, kind, name, data, *lock.next_fence())
        if rows is None:
            raise EventfoldError(f"{self._settings.location}: there is no such log yet: open it for appending first")
        if not rows and lock is not None:
            lock.lost = True
            raise EventfoldError(
                f"{self.location(kind, name)} belongs to another process now, which took over the {kind} while this "
                "process could not be reached"
            )

    async def delete(self, kind: DocumentKind, name: str) -> None:
        """See `Documents.delete`. Raises `OSError`."""
        await self._fetch(
            "DELETE FROM {schema}.eventfold_documents WHERE log = $1 AND kind = $2 AND name = $3", kind, name
        )

    async def names(self, kind: DocumentKind) -> list[str]:
        """See `Documents.names`. Raises `OSError`."""
        rows = await self._fetch("SELECT name FROM {schema}.eventfold_documents WHERE log = $1 AND kind = $2", kind)
        return sorted(row[0] for row in rows or ())

    async def lock(self, kind: DocumentKind, name: str) -> DocumentLock | None:
        """See `LockingDocuments.lock`. Raises `OSError`."""
        return await self._locks().lock(kind, name)
