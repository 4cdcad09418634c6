"""Documents in a table beside the commits: one row each, replaced by one statement."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from .._engine import DocumentKind, DocumentLock, check_name
from .._errors import EventfoldError
from ._connections import Settings


class TableDocuments:
    """`LockingDocuments` of one log. `run` runs a statement, with retries, and knows the log's number as `$1`."""

    def __init__(
        self,
        settings: Settings,
        run: Callable[..., Awaitable[Any]],
        lock: Callable[[DocumentKind, str], Awaitable[DocumentLock | None]],
    ) -> None:
        self._settings = settings
        self._run = run
        self._lock = lock

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
        """See `Documents.store`. Raises `OSError`; cancelled, it is stored or not."""
        rows = await self._run(
            "INSERT INTO {schema}.eventfold_documents (log, kind, name, data) VALUES ($1, $2, $3, $4) "
            "ON CONFLICT (log, kind, name) DO UPDATE SET data = excluded.data RETURNING 1",
            kind,
            check_name(kind, name),
            data,
        )
        if rows is None:
            raise EventfoldError(f"{self._settings.location}: there is no such log yet: open it for appending first")

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
        return await self._lock(kind, name)
