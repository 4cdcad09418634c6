"""`TableSource`: a log in the tables, for reading.

All sources of one log in one event loop share their connections and their watcher, until the last of them is closed.

Promise: a log, or tables, that don't exist yet read as an empty log.
"""

from __future__ import annotations

import asyncio
import errno
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, TypeAlias

from .._codec.lines import SLICE_SIZE, Lines, last_line_hash
from .._errors import CorruptLogError, LogClosedError
from .._event import Head
from .._waiters import Waiters
from ._connections import Connections, Settings
from ._documents import TableDocuments
from ._keys import TableKeys
from ._listener import Listener
from ._locks import SessionLocks
from ._schema import find_schema

# Runs a statement, which has the log's number as `$1`, with further arguments; None where there is no such log.
Fetch: TypeAlias = Callable[..., Awaitable[list[Any] | None]]

# Seconds for which a server that is away is waited for when the log is closed, besides what its appends wait for.
CLOSED_WITHIN = 5.0

# Bytes of lines, and rows, that one query fetches at most, while what the one before it fetched is decoded.
_BLOCK_SIZE, _BLOCK_ROWS = 2 * 2**20, 1000

_BLOCK = """
SELECT start, "end", lines FROM (
    SELECT start, "end", lines, sum("end" - start) OVER (ORDER BY start) - ("end" - start) AS before FROM (
        SELECT start, "end", lines FROM {schema}.eventfold_commits
        WHERE log = $1 AND start >= $2 AND start < $3 ORDER BY start LIMIT $4
    ) AS next
) AS block WHERE before < $5 ORDER BY start
"""


# Bytes of lines that one query fetches at most on the way from the end of the log to its beginning.
_BLOCK_BACK_SIZE = 256 * 1024

_BLOCK_BACK = """
SELECT start, "end", lines FROM (
    SELECT start, "end", lines, sum("end" - start) OVER (ORDER BY start DESC) - ("end" - start) AS behind FROM (
        SELECT start, "end", lines FROM {schema}.eventfold_commits
        WHERE log = $1 AND start < $2 ORDER BY start DESC LIMIT $3
    ) AS previous
) AS block WHERE behind < $4 ORDER BY start
"""


# Bytes of a line that are fetched at first, where single lines are; then as many as there are.
_LINE_SIZE, _MAX_LINE_SIZE = 4096, 2**30

# With the byte before each, unless it is the first of its commit; and whether that has as many bytes as it should.
_LINES_AT = """
SELECT wanted.at, wanted.at - start, substring(lines FROM (wanted.at - start)::int FOR $3),
    "end" - start = octet_length(lines)
FROM unnest($2::bigint[]) AS wanted (at) CROSS JOIN LATERAL (
    SELECT start, "end", lines FROM {schema}.eventfold_commits
    WHERE log = $1 AND start <= wanted.at ORDER BY start DESC LIMIT 1
) AS written
WHERE wanted.at < "end"
"""


class Session:
    """What all sources of one log in one event loop share."""

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

    def saw(self, head: Head) -> None:
        """Remembers the newest head."""
        if head.offset > self.known_head.offset:
            self.known_head = head

    async def find(self) -> bool:
        """Whether the log is there; its number and its schema are known then."""
        return bool(self.log) or await self.connections.retried(self._find)

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
        """The rows of a statement, which has the log's number as `$1`; None where there is no such log."""
        if not await self.find():
            return None
        sql = statement.format(schema=self.schema)

        async def call(connection: Any) -> list[Any]:
            rows: list[Any] = await connection.fetch(sql, self.log, *arguments, timeout=self.settings.attempt_timeout)
            return rows

        return await self.connections.retried(call)

    async def head(self) -> Head:
        """The head, from the server."""
        rows = await self.fetch('SELECT "offset", hash FROM {schema}.eventfold_logs WHERE log = $1')
        if rows is None:
            return Head(0, "")
        if not rows:
            raise CorruptLogError(self.settings.location, 0, "its row in eventfold_logs is gone: somebody deleted it")
        head = Head(rows[0][0], rows[0][1])
        self.saw(head)
        return head

    async def recent_lines(self, start: Head, end: Head) -> Lines | None:
        """The lines between two heads, if they are few."""
        if not 0 < end.offset - start.offset <= SLICE_SIZE:
            return None
        rows = await self.fetch(_BLOCK, start.offset, end.offset, _BLOCK_ROWS, SLICE_SIZE)
        data = b"".join(row[2] for row in rows or ())
        whole = len(data) == end.offset - start.offset
        return Lines(self.settings.location, start.offset, data) if whole else None

    async def aclose(self) -> None:
        self.connections.closed = True
        if self.listener is not None:
            self.listener.stop()
            await self.listener.ended()
        await self.locks.aclose()
        await self.connections.aclose()


def _pass_over(task: asyncio.Task[Any]) -> None:
    """Whoever asked is gone."""
    if not task.cancelled():
        task.exception()


_sessions: dict[tuple[Any, ...], Session] = {}


class TableSource:
    """A `Source`. It can be used in any event loop, and has separate connections in each."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._used: dict[asyncio.AbstractEventLoop, Session] = {}
        self._closed = False
        # While it is being closed: whether the server is there, as far as is known.
        self._closing = False
        self._gave_up = False
        self.documents = TableDocuments(settings, self.fetch, lambda: self.session().locks)
        self.keys = TableKeys(self)

    def __repr__(self) -> str:
        return f"<TableSource {self.location}>"

    @property
    def location(self) -> str:
        """The address of the log, without its password."""
        return self._settings.location

    def session(self) -> Session:
        """The session of the running event loop."""
        loop = asyncio.get_running_loop()
        session = self._used.get(loop)
        if session is None:
            if self._closed:
                raise LogClosedError(f"the log in {self.location} is closed")
            for key in [key for key in _sessions if key[0].is_closed()]:
                del _sessions[key]
            session = _sessions.setdefault((loop, *self._settings.key), Session(self._settings))
            session.users += 1
            self._used[loop] = session
        return session

    async def fetch(self, statement: str, *arguments: Any) -> list[Any] | None:
        """The rows of a statement; see `Session.fetch`.

        While it is being closed, a server that is away is waited for once, and shortly.
        """
        if not self._closing:
            return await self.session().fetch(statement, *arguments)
        if not self._gave_up:
            fetching = asyncio.create_task(self.session().fetch(statement, *arguments))
            if (await asyncio.wait([fetching], timeout=CLOSED_WITHIN))[0]:
                return fetching.result()
            # It ends with the session at the latest; a cancellation would have asyncpg ask that server to stop it.
            self._gave_up = True
            fetching.add_done_callback(_pass_over)
        raise OSError(errno.ETIMEDOUT, "the server was not reached while the log was closed", self.location)

    def begin_closing(self) -> None:
        """See `ClosingCommitter.begin_closing`."""
        self._closing = True

    async def identity(self) -> str:
        session = self.session()
        return f"postgresql {session.identity}" if await session.find() else self.location

    async def waiters(self) -> Waiters:
        return self.session().waiters

    async def head(self) -> Head:
        """The head, from the server. Raises `OSError`."""
        return await self.session().head()

    async def base(self) -> int:
        return 0

    async def line_hash_before(self, offset: int, fetch: Fetch | None = None) -> str:
        """See `Source.line_hash_before`; with `fetch`, by means of that. Raises `OSError`."""
        rows = await (fetch or self.fetch)(
            "SELECT start, lines FROM {schema}.eventfold_commits WHERE log = $1 AND start < $2 "
            "ORDER BY start DESC LIMIT 1",
            offset,
        )
        data = b""
        if rows:
            start, lines = rows[0]
            data = lines[: offset - start] if offset <= start + len(lines) else b""
        if not data.endswith(b"\n"):
            raise ValueError(f"offset {offset} is not where a line begins")
        return last_line_hash(data)

    async def lines_at(self, offsets: Sequence[int]) -> list[Lines]:
        """See `SourceOfLines.lines_at`. Raises `OSError`."""
        found: dict[int, Lines] = {}
        for size in (_LINE_SIZE, _MAX_LINE_SIZE):
            missing = sorted({offset for offset in offsets if offset not in found})
            rows = await self.fetch(_LINES_AT, missing, size) if missing else []
            for offset, position, data, is_whole in rows or ():
                if not is_whole:
                    raise CorruptLogError(self.location, offset - position, "a commit is not as it was written")
                if position and not data.startswith(b"\n"):
                    raise ValueError(f"offset {offset} is not where a line begins")
                first = 1 if position else 0
                if end := data.find(b"\n", first) + 1:
                    found[offset] = Lines(self.location, offset, data[first:end])
        for offset in missing:
            if offset not in found:
                if offset >= self.session().known_head.offset:
                    raise ValueError(f"no line begins at offset {offset}: the log ends before it")
                raise CorruptLogError(self.location, offset, "a commit is missing here, or is not as it was written")
        return [found[offset] for offset in offsets]

    async def block_before(self, offset: int) -> Lines:
        """See `Source.block_before`. Raises `OSError`."""
        rows = await self.fetch(_BLOCK_BACK, offset, _BLOCK_ROWS, _BLOCK_BACK_SIZE)
        start = rows[0][0] if rows else 0
        data = self._joined(rows or [], start)[: offset - start]
        if start + len(data) < offset:
            raise CorruptLogError(self.location, start + len(data), f"the commits end here, and not at {offset}")
        if not data.endswith(b"\n"):
            raise ValueError(f"offset {offset} is not where a line ends")
        return Lines(self.location, start, data)

    async def blocks(self, start: Head, end: int, fetch: Fetch | None = None) -> AsyncGenerator[Lines, None]:
        """See `Source.blocks`; with `fetch`, by means of that. Raises `OSError`."""
        run = fetch or self.fetch
        if start.offset:
            found = await self.line_hash_before(start.offset, run)
            if start.line_hash and found != start.line_hash:
                raise CorruptLogError(
                    self.location, start.offset, "a different line ended at this offset when it was read"
                )
        at, last = start.offset, min(end, sys.maxsize)
        rows = await run("SELECT max(start) FROM {schema}.eventfold_commits WHERE log = $1 AND start <= $2", at)
        begin = (rows[0][0] or 0) if rows else 0

        def next_rows(begin: int) -> asyncio.Future[list[Any] | None]:
            return asyncio.ensure_future(run(_BLOCK, begin, last, _BLOCK_ROWS, _BLOCK_SIZE))

        ahead = next_rows(begin)
        try:
            while rows := await ahead:
                ahead = next_rows(rows[-1][1])
                await asyncio.sleep(0)  # it is sent before this block is decoded, and answered meanwhile
                data = self._joined(rows, begin)
                begin += len(data)
                data = data[at - (begin - len(data)) : len(data) - max(0, begin - last)]
                if data:
                    yield Lines(self.location, at, data)
                    at += len(data)
        finally:
            if not ahead.done():
                ahead.cancel()
            await asyncio.wait([ahead])
            if not ahead.cancelled():
                ahead.exception()
        if at < last and end < sys.maxsize:
            raise CorruptLogError(self.location, at, f"the commits end here, but the log continues to {end}")

    def _joined(self, rows: list[Any], begin: int) -> bytes:
        """The lines of rows, which must follow each other."""
        at = begin
        for start, end, lines in rows:
            if start != at or end != start + len(lines) or not lines.endswith(b"\n"):
                raise CorruptLogError(self.location, at, "a commit is missing here, or is not as it was written")
            at = end
        return b"".join(row[2] for row in rows)

    async def aclose(self) -> None:
        """Lets go of what this event loop's session has, if nobody else uses it. Idempotent."""
        self._closed = True
        session = self._used.pop(asyncio.get_running_loop(), None)
        if session is not None:
            session.users -= 1
            if session.users == 0:
                for key in [key for key, value in _sessions.items() if value is session]:
                    del _sessions[key]
                await session.aclose()

    def abandon(self) -> None:
        """Forgets all sessions without contacting the server: they are the parent's, or their event loop has ended."""
        self._closed = True
        for session in self._used.values():
            session.connections.closed = True
            for key in [key for key, value in _sessions.items() if value is session]:
                del _sessions[key]
        self._used.clear()
