"""Appends to the tables: one statement, and one row, for all waiting appends.

The statement advances the head in the log's row, which stays locked until the commit has ended, and inserts the lines
at the previous head. So there is one order for all writers, and readers see commits in the order of their offsets,
without gaps. A group with conditions is judged by the last known head, and written on condition that it is still the
head. If it is not, the group is judged again with the row locked: a busy writer can't keep others from writing.

A commit has an id, which is unique in the table. If an answer is lost, the same commit is sent again. The server then
refuses the second commit with the same id, even if the first one has not ended yet.

Promise: a group is written exactly once, or `UnknownOutcomeError` says that it may or may not be in the log.
"""

from __future__ import annotations

import errno
import itertools
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, TypeVar

import asyncpg

from .._aio import UncancellableTask, uninterrupted
from .._codec.keys import pairs_of
from .._codec.lines import Lines, last_line_hash
from .._engine import Commit
from .._errors import CorruptLogError, EventfoldError, UnknownOutcomeError
from .._event import Head
from .._judge import Append, Judgement, any_required, judge, lines_needed_from
from ._connections import CONNECTION_LOST, TRANSIENT, NotSentError, Retries
from ._listener import channel
from ._schema import VERSION, open_log, open_tables
from ._session import Fetch, Session
from ._source import TableSource

T = TypeVar("T")

# In bytes. PostgreSQL allows values of up to 1 GiB, but needs several times a value's size in memory.
_MAX_COMMIT_SIZE = 256 * 2**20

_APPEND = """
WITH head AS (
    UPDATE {schema}.eventfold_logs SET {indexed}"offset" = "offset" + $2, hash = $3
    WHERE log = $1 AND ($4::bigint IS NULL OR ("offset" = $4 AND hash = $5))
    RETURNING "offset"
), written AS (
    INSERT INTO {schema}.eventfold_commits (log, start, "end", id, lines)
    SELECT $1, "offset" - $2, "offset", $6, $7 FROM head
    RETURNING start
){keys}
SELECT start, pg_notify($8, '') FROM written
"""
_INDEXED = 'indexed = CASE WHEN indexed = "offset" THEN indexed + $2 ELSE indexed END, '
_KEYS = """, keys AS (
    INSERT INTO {schema}.eventfold_keys (log, key, "offset")
    SELECT $1, pair.key, written.start + pair.at FROM written, unnest($9::bigint[], $10::bigint[]) AS pair (key, at)
    ON CONFLICT DO NOTHING
)"""
# With the timeout, the server unlocks the row if this host dies while it has locked it.
_LOCK = """
SELECT "offset", hash, set_config('idle_in_transaction_session_timeout', $2, true) FROM {schema}.eventfold_logs
WHERE log = $1 FOR UPDATE
"""
_FIND = "SELECT start FROM {schema}.eventfold_commits WHERE log = $1 AND id = $2"
# This commit waits until the synchronous standbys have everything that was committed before it.
_WAIT_FOR_STANDBYS = "UPDATE {schema}.eventfold_logs SET hash = hash WHERE log = $1"


class TableCommitter:
    """A `Committer`. Any number of them may append to one log, in any process on any host. Get it from `open`."""

    max_commit_size = 16 * 2**20
    is_remote: Literal[True] = True

    def __init__(self, source: TableSource, session: Session) -> None:
        self._source = source
        self._session = session
        # The ids of one committer are adjacent in the database's index.
        self._prefix = uuid.uuid4().bytes[:8]
        self._numbers = itertools.count()
        self._timeout = session.settings.attempt_timeout
        self._indexes = False
        schema = session.schema
        self._append = _APPEND.format(schema=schema, indexed="", keys="")
        self._find = _FIND.format(schema=schema)
        self._wait_for_standbys = _WAIT_FOR_STANDBYS.format(schema=schema)

    @classmethod
    async def open(cls, source: TableSource) -> TableCommitter:
        """Creates or checks the tables and the log. Closes the source if that fails or is cancelled."""
        session = source.session()

        async def open_(connection: Any) -> None:
            await open_log(connection, session.settings, await open_tables(connection, session.settings))

        try:
            await session.connections.run_with_retries(open_, transaction=True)
            await session.head()
            session.version = VERSION  # `session.head` does not look again if the log was found before a migration
        except BaseException:
            await uninterrupted(UncancellableTask(source.aclose(), "eventfold close"))
            raise
        return cls(source, session)

    @property
    def source(self) -> TableSource:
        return self._source

    @property
    def head(self) -> Head:
        return self._session.known_head

    def begin_indexing(self) -> None:
        """See `IndexingCommitter.begin_indexing`."""
        schema = self._session.schema
        self._append = _APPEND.format(schema=schema, indexed=_INDEXED, keys=_KEYS.format(schema=schema))
        self._indexes = True

    async def commit(self, appends: Sequence[Append]) -> Commit:
        """See `Committer.commit`. Raises `OSError` if the server refused the commit; nothing was written then."""
        return await uninterrupted(UncancellableTask(self._commit(appends), "eventfold commit"))

    async def _commit(self, appends: Sequence[Append]) -> Commit:
        session = self._session
        has_conditions = any_required(appends)
        head, judgement = await self._judge(appends)
        if has_conditions and any(isinstance(outcome, Exception) for outcome in judgement.outcomes):
            # The known head may be out of date, which must not be a reason to refuse an append.
            await session.head()
            head, judgement = await self._judge(appends)
        if not judgement.data:
            return self._result(judgement, head.offset)
        # A refusal may have offsets of this group's events, so they must not be written elsewhere either.
        start = await self._write(judgement.data, head if has_conditions else None)
        if start is None:
            return await self._commit_locked(appends)
        return self._result(judgement, start)

    async def _judge(self, appends: Sequence[Append]) -> tuple[Head, Judgement]:
        """Judges appends by the known head, which is returned too."""
        head = self._session.known_head
        return head, judge(appends, head, await self._lines_needed(appends, head, self._source.fetch))

    def _result(self, judgement: Judgement, start: int) -> Commit:
        """The result of a judgement whose lines have been written at `start`."""
        data = judgement.data
        lines = Lines(self._source.location, start, data)
        head = Head(start + len(data), last_line_hash(data)) if data else judgement.head
        self._session.note_head(head)
        return Commit(judgement.outcomes, lines, head)

    async def _lines_needed(self, appends: Sequence[Append], head: Head, fetch: Fetch) -> list[Lines]:
        needed = lines_needed_from(appends)
        if needed is None or needed >= head.offset:
            return []
        return [lines async for lines in self._source.blocks(Head(needed, ""), head.offset, fetch)]

    async def _write(self, data: bytes, expected: Head | None) -> int | None:
        """Writes lines; returns the offset at which they begin, or None if the head is not the expected one."""
        run, commit_id = self._session.connections.run, self._new_id()
        arguments = self._arguments(data, commit_id, expected)

        async def attempt(connection: Any) -> int | None:
            row = await connection.fetchrow(self._append, *arguments, timeout=self._timeout)
            return None if row is None else row[0]

        async def find(connection: Any) -> int | None:
            return await self._find_commit(connection, commit_id)

        async def attempt_or_find(maybe_written: bool) -> int | None:
            try:
                start = await run(attempt)
            except asyncpg.UniqueViolationError as error:
                if (start := await run(find)) is None:
                    raise self._commit_after_head(error) from error
                return start
            return await run(find) if start is None and maybe_written else start

        return await self._retry_until_answered(attempt_or_find)

    async def _commit_locked(self, appends: Sequence[Append]) -> Commit:
        """Judges and writes in one transaction, which begins by locking the log's row."""
        session, commit_id = self._session, self._new_id()
        sent: Judgement | None = None

        async def attempt(connection: Any) -> tuple[Judgement, int]:
            nonlocal sent

            async def fetch_locked(statement: str, *arguments: Any) -> list[Any]:
                sql = statement.format(schema=session.schema)
                rows: list[Any] = await connection.fetch(sql, session.log, *arguments, timeout=self._timeout)
                return rows

            rows = await fetch_locked(_LOCK, str(round(1000 * self._timeout)))
            if not rows:
                raise session.row_missing()
            head = Head(rows[0][0], rows[0][1])
            # An earlier attempt had locked the row when it was sent, so it has ended by now, committed or not.
            if sent is not None and (start := await self._find_commit(connection, commit_id)) is not None:
                return sent, start
            judgement = judge(appends, head, await self._lines_needed(appends, head, fetch_locked))
            if judgement.data:
                sent = judgement
                arguments = self._arguments(judgement.data, commit_id, None)
                if await connection.fetchrow(self._append, *arguments, timeout=self._timeout) is None:
                    raise session.row_missing()
            return judgement, head.offset

        async def attempt_in_transaction(_: bool) -> tuple[Judgement, int]:
            try:
                return await session.connections.run(attempt, transaction=True)
            except asyncpg.UniqueViolationError as error:
                raise self._commit_after_head(error) from error

        return self._result(*await self._retry_until_answered(attempt_in_transaction))

    def _new_id(self) -> uuid.UUID:
        return uuid.UUID(bytes=self._prefix + next(self._numbers).to_bytes(8))

    def _arguments(self, data: bytes, commit_id: uuid.UUID, expected: Head | None) -> tuple[Any, ...]:
        """The arguments of `_APPEND`."""
        if len(data) > _MAX_COMMIT_SIZE:
            raise OSError(errno.EMSGSIZE, f"a commit has {len(data)} bytes; at most {_MAX_COMMIT_SIZE} are possible")
        condition = (None, None) if expected is None else (expected.offset, expected.line_hash)
        log = self._session.log
        arguments = (log, len(data), last_line_hash(data), *condition, commit_id, data, channel(log))
        if not self._indexes:
            return arguments
        pairs = pairs_of(Lines("", 0, data))
        return *arguments, [key for key, _ in pairs], [position for _, position in pairs]

    async def _retry_until_answered(self, attempt: Callable[[bool], Awaitable[T]]) -> T:
        """Repeats an attempt until it is answered. Its argument is whether an earlier one may have written lines."""
        connections = self._session.connections
        retries, maybe_written = Retries(connections), False
        while True:
            try:
                return await attempt(maybe_written)
            except (*CONNECTION_LOST, *TRANSIENT) as error:
                maybe_written = maybe_written or not isinstance(error, (NotSentError, *TRANSIENT))
                await self._wait(retries, error, maybe_written)
            except asyncpg.PostgresError as error:
                caller_error = connections.caller_error(error)
                raise (self._unknown(caller_error) if maybe_written else caller_error) from error

    def _commit_after_head(self, error: Exception) -> CorruptLogError:
        problem = f"there is a commit after the head: {error}"
        return CorruptLogError(self._source.location, self._session.known_head.offset, problem)

    async def _find_commit(self, connection: Any, commit_id: uuid.UUID) -> int | None:
        """The start of a commit whose answer was lost, once it is as durable as an answered one; None if not found."""
        start: int | None = await connection.fetchval(self._find, self._session.log, commit_id, timeout=self._timeout)
        if start is not None:
            await connection.execute(self._wait_for_standbys, self._session.log, timeout=self._timeout)
        return start

    async def _wait(self, retries: Retries, error: BaseException, maybe_written: bool) -> None:
        try:
            await retries.wait(error)
        except OSError as timed_out:
            if maybe_written:
                raise self._unknown(timed_out) from error
            raise

    def _unknown(self, error: BaseException) -> EventfoldError:
        return UnknownOutcomeError(
            f"{self._source.location}: the connection was lost during a commit, whose outcome could not be determined "
            f"({error}): the events may or may not be in the log; read it to find out, or append them again on a "
            "condition"
        )

    def begin_closing(self) -> None:
        """See `ClosingCommitter.begin_closing`. An append that has been sent still waits for its answer."""
        self._source.begin_closing()

    async def aclose(self) -> None:
        """Closes the connections. Idempotent."""
        await self._source.aclose()

    def abandon(self) -> None:
        """See `Committer.abandon`."""
        self._source.abandon()
