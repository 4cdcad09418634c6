"""`TableSource`: a log in the tables, for reading.

Promise: if the log or the tables don't exist yet, the log is empty.
"""

from __future__ import annotations

import asyncio
import errno
import sys
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from .._codec.lines import Lines, last_line_hash
from .._errors import CorruptLogError, LogClosedError
from .._event import Head
from .._waiters import Waiters
from ._connections import Settings
from ._documents import TableDocuments
from ._keys import TableKeys
from ._session import Fetch, Session

# Seconds for which closing a log waits for an unreachable server, in addition to the time that appends wait.
CLOSING_TIMEOUT = 5.0

# The maximum size of what one query fetches, in bytes of lines and in rows.
_BLOCK_SIZE, _BLOCK_ROWS = 2 * 2**20, 1000
# After how many iterations of the loop a task has acquired a connection from the pool, and sent its query.
_ITERATIONS_TO_SEND = 5

_BLOCK = """
SELECT start, "end", lines FROM (
    SELECT start, "end", lines, sum("end" - start) OVER (ORDER BY start) - ("end" - start) AS before FROM (
        SELECT start, "end", lines FROM {schema}.eventfold_commits
        WHERE log = $1 AND start >= $2 AND start < $3 ORDER BY start LIMIT $4
    ) AS next
) AS block WHERE before < $5 ORDER BY start
"""


# The maximum size in bytes of what one query fetches when the log is read from its end to its beginning.
_BACKWARD_BLOCK_SIZE = 256 * 1024

_BLOCK_BEFORE = """
SELECT start, "end", lines FROM (
    SELECT start, "end", lines, sum("end" - start) OVER (ORDER BY start DESC) - ("end" - start) AS after FROM (
        SELECT start, "end", lines FROM {schema}.eventfold_commits
        WHERE log = $1 AND start < $2 ORDER BY start DESC LIMIT $3
    ) AS previous
) AS block WHERE after < $4 ORDER BY start
"""


# How many bytes are fetched of each single line at first, and how many if that was not the whole line.
_LINE_SIZE, _MAX_LINE_SIZE = 4096, 2**30

# For each line: its offset, its position in its commit, its bytes with the byte before them, which the first line of a
# commit does not have, and whether the commit has the right size.
_LINES_AT = """
SELECT wanted.at, wanted.at - start, substring(lines FROM (wanted.at - start)::int FOR $3),
    "end" - start = octet_length(lines)
FROM unnest($2::bigint[]) AS wanted (at) CROSS JOIN LATERAL (
    SELECT start, "end", lines FROM {schema}.eventfold_commits
    WHERE log = $1 AND start <= wanted.at ORDER BY start DESC LIMIT 1
) AS written
WHERE wanted.at < "end"
"""


def _ignore_outcome(task: asyncio.Task[Any]) -> None:
    """Keeps asyncio from logging an exception that nothing else will retrieve."""
    if not task.cancelled():
        task.exception()


_sessions: dict[tuple[Any, ...], Session] = {}


class TableSource:
    """A `Source`. It can be used in several event loops, and has a session in each."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._own_sessions: dict[asyncio.AbstractEventLoop, Session] = {}
        self._closed = False
        self._closing = False
        self._server_unreachable = False  # set while closing
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
        session = self._own_sessions.get(loop)
        if session is None:
            if self._closed:
                raise LogClosedError(f"the log in {self.location} is closed")
            for key in [key for key in _sessions if key[0].is_closed()]:
                del _sessions[key]
            session = _sessions.setdefault((loop, *self._settings.key), Session(self._settings))
            session.users += 1
            self._own_sessions[loop] = session
        return session

    async def fetch(self, statement: str, *arguments: Any) -> list[Any] | None:
        """See `Session.fetch`.

        During closing, only one call waits for an unreachable server, for up to `CLOSING_TIMEOUT` seconds.
        """
        if not self._closing:
            return await self.session().fetch(statement, *arguments)
        if not self._server_unreachable:
            # Never cancelled, since asyncpg would then ask that server to cancel the query. It ends with the session.
            fetching = asyncio.create_task(self.session().fetch(statement, *arguments))
            fetching.add_done_callback(_ignore_outcome)
            if (await asyncio.wait([fetching], timeout=CLOSING_TIMEOUT))[0]:
                return fetching.result()
            self._server_unreachable = True
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
        """See `Source.line_hash_before`; `fetch` replaces the method `fetch`. Raises `OSError`."""
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
                    raise CorruptLogError(self.location, offset - position, "this commit was altered")
                if position and not data.startswith(b"\n"):
                    raise ValueError(f"offset {offset} is not where a line begins")
                first = 1 if position else 0
                if end := data.find(b"\n", first) + 1:
                    found[offset] = Lines(self.location, offset, data[first:end])
        for offset in missing:
            if offset not in found:
                if offset >= self.session().known_head.offset:
                    raise ValueError(f"no line begins at offset {offset}: the log ends before it")
                raise CorruptLogError(self.location, offset, "a commit is missing here, or was altered")
        return [found[offset] for offset in offsets]

    async def block_before(self, offset: int) -> Lines:
        """See `Source.block_before`. Raises `OSError`."""
        rows = await self.fetch(_BLOCK_BEFORE, offset, _BLOCK_ROWS, _BACKWARD_BLOCK_SIZE)
        start = rows[0][0] if rows else 0
        data = self._joined(rows or [], start)[: offset - start]
        if start + len(data) < offset:
            raise CorruptLogError(self.location, start + len(data), f"the commits end here, not at {offset}")
        if not data.endswith(b"\n"):
            raise ValueError(f"offset {offset} is not where a line ends")
        return Lines(self.location, start, data)

    async def blocks(self, start: Head, end: int, fetch: Fetch | None = None) -> AsyncGenerator[Lines, None]:
        """See `Source.blocks`; `fetch` replaces the method `fetch`. Raises `OSError`."""
        run = fetch or self.fetch
        if start.offset:
            found = await self.line_hash_before(start.offset, run)
            if start.line_hash and found != start.line_hash:
                raise CorruptLogError(self.location, start.offset, "a different line ended at this offset before")
        offset, last = start.offset, min(end, sys.maxsize)
        rows = await run("SELECT max(start) FROM {schema}.eventfold_commits WHERE log = $1 AND start <= $2", offset)
        commit_start = (rows[0][0] or 0) if rows else 0

        def fetch_rows(commit_start: int) -> asyncio.Future[list[Any] | None]:
            return asyncio.ensure_future(run(_BLOCK, commit_start, last, _BLOCK_ROWS, _BLOCK_SIZE))

        next_rows = fetch_rows(commit_start)
        try:
            while rows := await next_rows:
                next_rows = fetch_rows(rows[-1][1])
                for _ in range(_ITERATIONS_TO_SEND):
                    await asyncio.sleep(0)  # sends the query now: the server answers while this block is decoded
                data = self._joined(rows, commit_start)
                commit_end = commit_start + len(data)
                data = data[offset - commit_start : len(data) - max(0, commit_end - last)]
                commit_start = commit_end
                if data:
                    yield Lines(self.location, offset, data)
                    offset += len(data)
        finally:
            if not next_rows.done():
                next_rows.cancel()
            await asyncio.wait([next_rows])
            if not next_rows.cancelled():
                next_rows.exception()
        if offset < last and end < sys.maxsize:
            raise CorruptLogError(self.location, offset, f"the commits end here, but the log continues to {end}")

    def _joined(self, rows: list[Any], start: int) -> bytes:
        """The lines of rows, each of which must begin where the previous one ends."""
        expected_start = start
        for row_start, row_end, lines in rows:
            if row_start != expected_start or row_end != row_start + len(lines) or not lines.endswith(b"\n"):
                raise CorruptLogError(self.location, expected_start, "a commit is missing here, or was altered")
            expected_start = row_end
        return b"".join(row[2] for row in rows)

    async def aclose(self) -> None:
        """Closes the running event loop's session, unless other sources use it. Idempotent."""
        self._closed = True
        session = self._own_sessions.pop(asyncio.get_running_loop(), None)
        if session is not None:
            session.users -= 1
            if session.users == 0:
                _remove(session)
                await session.aclose()

    def abandon(self) -> None:
        """See `Committer.abandon`. Does not contact the server."""
        self._closed = True
        for session in self._own_sessions.values():
            session.connections.closed = True
            _remove(session)
        self._own_sessions.clear()


def _remove(session: Session) -> None:
    for key in [key for key, value in _sessions.items() if value is session]:
        del _sessions[key]
