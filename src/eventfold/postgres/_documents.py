"""Documents in a table beside the commits: one row each, replaced by one statement.

A document that can be locked has a second row, of the kind `KIND-holder`: the identity of the lock under which the
document may be replaced, and the number of the last replacement. Whoever takes the lock writes its identity there, over
the connection that has the lock, and each replacement moves the number on.

Promise: once a lock was taken over, nothing that its former holder has sent, or sends later, replaces the document;
and of the replacements under one lock, none that arrives late undoes a later one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from .._engine import DocumentKind, DocumentLock, check_name
from .._errors import EventfoldError
from ._connections import Settings
from ._locks import SessionLocks

_STORE = """
INSERT INTO {schema}.eventfold_documents (log, kind, name, data) VALUES ($1, $2, $3, $4)
ON CONFLICT (log, kind, name) DO UPDATE SET data = excluded.data RETURNING 1
"""
# The update also locks the holder's row: whoever takes the lock over waits until this has ended, and reads the result.
_STORE_LOCKED = """
WITH held AS (
    UPDATE {schema}.eventfold_documents SET data = $6
    WHERE log = $1 AND kind = $2 || '-holder' AND name = $3 AND data BETWEEN $5 AND $6 RETURNING log
)
INSERT INTO {schema}.eventfold_documents (log, kind, name, data) SELECT log, $2, $3, $4 FROM held
ON CONFLICT (log, kind, name) DO UPDATE SET data = excluded.data RETURNING 1
"""


class TableDocuments:
    """`LockingDocuments` of one log. `run` runs a statement, with retries, and knows the log's number as `$1`.

    `locks` returns the locks of the running event loop's session.
    """

    def __init__(
        self, settings: Settings, run: Callable[..., Awaitable[Any]], locks: Callable[[], SessionLocks]
    ) -> None:
        self._settings = settings
        self._run = run
        self._locks = locks

    def location(self, kind: DocumentKind, name: str) -> str:
        """Where the document is, for messages."""
        return f"{self._settings.location}, {kind} {name}"

    async def load(self, kind: DocumentKind, name: str) -> bytes | None:
        """See `Documents.load`. Raises `OSError`."""
        rows = await self._run(
            "SELECT data FROM {schema}.eventfold_documents WHERE log = $1 AND kind = $2 AND name = $3", kind, name
        )
        data: bytes | None = rows[0][0] if rows else None
        return data

    async def store(self, kind: DocumentKind, name: str, data: bytes) -> None:
        """See `Documents.store`. Raises `OSError`; cancelled, it is stored or not.

        Raises `EventfoldError` if this process has the document's lock, but another one has taken it over.
        """
        lock = self._locks().held(kind, check_name(kind, name))
        if lock is None:
            rows = await self._run(_STORE, kind, name, data)
        else:
            await lock.claim()
            rows = await self._run(_STORE_LOCKED, kind, name, data, *lock.next_number())
        if rows is None:
            raise EventfoldError(f"{self._settings.location}: there is no such log yet: open it for appending first")
        if not rows and lock is not None:
            lock.lost = True
            raise EventfoldError(
                f"{self.location(kind, name)} is another process's now: it took the {kind} over while this process "
                "could not be reached"
            )

    async def delete(self, kind: DocumentKind, name: str) -> None:
        """See `Documents.delete`. Raises `OSError`."""
        await self._run(
            "DELETE FROM {schema}.eventfold_documents WHERE log = $1 AND kind = $2 AND name = $3", kind, name
        )

    async def names(self, kind: DocumentKind) -> list[str]:
        """See `Documents.names`. Raises `OSError`."""
        rows = await self._run("SELECT name FROM {schema}.eventfold_documents WHERE log = $1 AND kind = $2", kind)
        return sorted(row[0] for row in rows or ())

    async def lock(self, kind: DocumentKind, name: str) -> DocumentLock | None:
        """See `LockingDocuments.lock`. Raises `OSError`."""
        return await self._locks().lock(kind, name)
