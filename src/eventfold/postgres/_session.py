"""What all sources of one log in one event loop share: connections, locks, a listener and what is known of the log.

It is closed with the last of these sources.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from .._codec.lines import SLICE_SIZE, Lines
from .._errors import CorruptLogError
from .._event import Head
from .._waiters import Waiters
from ._connections import Connections, Settings
from ._listener import Listener
from ._locks import SessionLocks
from ._schema import find_schema

# Executes a statement with the log's number as `$1`, and further arguments; None if there is no such log.
Fetch: TypeAlias = Callable[..., Awaitable[list[Any] | None]]

_RECENT = "SELECT lines FROM {schema}.eventfold_commits WHERE log = $1 AND start >= $2 AND start < $3 ORDER BY start"


class Session:
    """The session of one log in one event loop. Get it from `TableSource.session`.

    `schema`, `version`, `log` and `identity` are valid once `find` has returned true.

    `known_head` is the newest head that any of the sources has seen.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.connections = Connections(settings)
        self.locks = SessionLocks(self)
        self.users = 0
        self.schema = ""
        self.version = 0
        self.log = 0
        self.identity = ""
        self.known_head = Head(0, "")
        self.listener: Listener | None = None
        self.waiters = Waiters(self._new_listener, watch_beside_writer=True)

    def _new_listener(self) -> Listener:
        self.listener = Listener(self)
        return self.listener

    def note_head(self, head: Head) -> None:
        """Updates `known_head`."""
        if head.offset > self.known_head.offset:
            self.known_head = head

    async def find(self) -> bool:
        """Finds the log in the database; returns whether it exists."""
        return bool(self.log) or await self.connections.run_with_retries(self._find)

    async def _find(self, connection: Any) -> bool:
        schema, version = await find_schema(connection, self.settings)
        if not version:
            return False
        row = await connection.fetchrow(
            f"SELECT log, identity FROM {schema}.eventfold_logs WHERE name = $1",  # noqa: S608
            self.settings.log,
        )
        if row is None:
            return False
        self.schema, self.version, self.identity, self.log = schema, version, str(row[1]), row[0]
        return True

    async def fetch(self, statement: str, *arguments: Any) -> list[Any] | None:
        """The rows of a statement, which has the log's number as `$1`; None if there is no such log."""
        if not await self.find():
            return None
        sql = statement.format(schema=self.schema)

        async def call(connection: Any) -> list[Any]:
            rows: list[Any] = await connection.fetch(sql, self.log, *arguments, timeout=self.settings.attempt_timeout)
            return rows

        return await self.connections.run_with_retries(call)

    async def head(self) -> Head:
        """The head, from the server."""
        rows = await self.fetch('SELECT "offset", hash FROM {schema}.eventfold_logs WHERE log = $1')
        if rows is None:
            return Head(0, "")
        if not rows:
            raise self.row_missing()
        head = Head(rows[0][0], rows[0][1])
        self.note_head(head)
        return head

    def row_missing(self) -> CorruptLogError:
        """The error if the log's row in `eventfold_logs` has been deleted."""
        return CorruptLogError(
            self.settings.location, self.known_head.offset, "its row in eventfold_logs is missing: somebody deleted it"
        )

    async def recent_lines(self, start: Head, end: Head) -> Lines | None:
        """The lines between two heads, if they are few."""
        if not 0 < end.offset - start.offset <= SLICE_SIZE:
            return None
        rows = await self.fetch(_RECENT, start.offset, end.offset)
        data = b"".join(row[0] for row in rows or ())
        is_complete = len(data) == end.offset - start.offset
        return Lines(self.settings.location, start.offset, data) if is_complete else None

    async def aclose(self) -> None:
        self.connections.closed = True
        if self.listener is not None:
            self.listener.stop()
            await self.listener.stopped()
        await self.locks.aclose()
        await self.connections.aclose()
