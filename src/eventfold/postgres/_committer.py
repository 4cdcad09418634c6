"""Appends to the tables: one statement, and one row, for all waiting appends.

The statement moves the head in the log's row, which locks it until the commit has ended, and inserts the lines where
the head was. So all writers take turns, and readers see commits in the order of their offsets, without gaps. A batch
with conditions is judged by the last head that was seen, and written on condition that it still is the head. Otherwise
it is judged again in its turn, with the row locked, so that no other writer, however busy, can keep it from being
written.

A commit has an id, which is unique in the table. If an answer is lost, the same commit is sent again: the server
refuses the second one with the same id, even if the first is still under way.

Promise: a batch is in the log once, or `UnknownOutcomeError` says that it may or may not be.
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
from ._connections import LOST, PASSING, NotSentError, Tries
from ._listener import channel
from ._schema import VERSION, open_log, open_tables
from ._source import Fetch, Session, TableSource

T = TypeVar("T")

# PostgreSQL's own limit of a value is 1 GiB, and its memory for one several times the value.
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
# If this host is lost while it has the row, the server lets the others go on after that time.
_LOCK = """
SELECT "offset", hash, set_config('idle_in_transaction_session_timeout', $2, true) FROM {schema}.eventfold_logs
WHERE log = $1 FOR UPDATE
"""
_FIND = "SELECT start FROM {schema}.eventfold_commits WHERE log = $1 AND id = $2"
# Its commit waits for the synchronous standbys, and so for whatever was committed before it.
_WAIT_FOR_STANDBYS = "UPDATE {schema}.eventfold_logs SET hash = hash WHERE log = $1"


class TableCommitter:
    """A `Committer`. Any number of them may append to one log, in any process on any host. Get it from `open`."""

    batch_size = 16 * 2**20
    is_remote: Literal[True] = True

    def __init__(self, source: TableSource, session: Session) -> None:
        self._source = source
        self._session = session
        # Ids of one committer lie next to each other in the index.
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
            await session.connections.retried(open_, transaction=True)
            await session.head()
            session.version = VERSION
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
        """See `Committer.commit`. Raises `OSError` where the server did not take the commit; nothing was written."""
        return await uninterrupted(UncancellableTask(self._commit(appends), "eventfold commit"))

    async def _commit(self, appends: Sequence[Append]) -> Commit:
        session = self._session
        is_judged = any_required(appends)
        asked = False
        while True:
            head = session.known_head
            recent = await self._lines_needed(appends, head, self._source.fetch) if is_judged else ()
            judgement = judge(appends, head, recent)
            if is_judged and not asked and any(isinstance(outcome, Exception) for outcome in judgement.outcomes):
                # The conflict may be due to something that this process has not seen yet.
                await session.head()
                asked = True
                continue
            if not judgement.data:
                return self._ended(judgement, head.offset)
            conditional = is_judged and any(
                append.requirements is not None and isinstance(outcome, int)
                for append, outcome in zip(appends, judgement.outcomes, strict=True)
            )
            start = await self._write(judgement.data, head if conditional else None)
            if start is None:
                return await self._commit_in_turn(appends)
            return self._ended(judgement, start)

    def _ended(self, judgement: Judgement, start: int) -> Commit:
        """What the appends come to, whose lines now begin at `start`."""
        data = judgement.data
        lines = Lines(self._source.location, start, data)
        head = Head(start + len(data), last_line_hash(data)) if data else judgement.head
        self._session.saw(head)
        return Commit(judgement.outcomes, lines, head)

    async def _lines_needed(self, appends: Sequence[Append], head: Head, fetch: Fetch) -> list[Lines]:
        needed = lines_needed_from(appends)
        if needed is None or needed >= head.offset:
            return []
        return [lines async for lines in self._source.blocks(Head(needed, ""), head.offset, fetch)]

    async def _write(self, data: bytes, expected: Head | None) -> int | None:
        """Writes lines; returns the offset at which they begin, None if the head is not the expected one."""
        run, id_ = self._session.connections.run, self._new_id()
        arguments = self._arguments(data, id_, expected)

        async def attempt(connection: Any) -> int | None:
            row = await connection.fetchrow(self._append, *arguments, timeout=self._timeout)
            return None if row is None else row[0]

        async def own(connection: Any) -> int | None:
            return await self._own(connection, id_)

        async def once(maybe_written: bool) -> int | None:
            try:
                start = await run(attempt)
            except asyncpg.UniqueViolationError as error:
                if (start := await run(own)) is None:
                    raise self._behind_the_head(error) from error
                return start
            return await run(own) if start is None and maybe_written else start

        return await self._until_answered(once)

    async def _commit_in_turn(self, appends: Sequence[Append]) -> Commit:
        """Judges and writes in one transaction, which holds the head's row from its beginning on."""
        session, id_ = self._session, self._new_id()
        sent: Judgement | None = None

        async def attempt(connection: Any) -> tuple[Judgement, int]:
            nonlocal sent

            async def fetch_locked(statement: str, *arguments: Any) -> list[Any]:
                sql = statement.format(schema=session.schema)
                rows: list[Any] = await connection.fetch(sql, session.log, *arguments, timeout=self._timeout)
                return rows

            rows = await fetch_locked(_LOCK, str(round(1000 * self._timeout)))
            if not rows:
                raise self._row_is_gone()
            head = Head(rows[0][0], rows[0][1])
            # An earlier attempt that was sent had the row, so it has ended by now, one way or the other.
            if sent is not None and (start := await self._own(connection, id_)) is not None:
                return sent, start
            judgement = judge(appends, head, await self._lines_needed(appends, head, fetch_locked))
            if judgement.data:
                sent = judgement
                arguments = self._arguments(judgement.data, id_, None)
                if await connection.fetchrow(self._append, *arguments, timeout=self._timeout) is None:
                    raise self._row_is_gone()
            return judgement, head.offset

        async def once(_: bool) -> tuple[Judgement, int]:
            try:
                return await session.connections.run(attempt, transaction=True)
            except asyncpg.UniqueViolationError as error:
                raise self._behind_the_head(error) from error

        return self._ended(*await self._until_answered(once))

    def _new_id(self) -> uuid.UUID:
        return uuid.UUID(bytes=self._prefix + next(self._numbers).to_bytes(8))

    def _arguments(self, data: bytes, id_: uuid.UUID, expected: Head | None) -> tuple[Any, ...]:
        """What `_APPEND` is executed with."""
        if len(data) > _MAX_COMMIT_SIZE:
            raise OSError(errno.EMSGSIZE, f"a commit of {len(data)} bytes; at most {_MAX_COMMIT_SIZE} are possible")
        condition = (None, None) if expected is None else (expected.offset, expected.line_hash)
        log = self._session.log
        arguments = (log, len(data), last_line_hash(data), *condition, id_, data, channel(log))
        if not self._indexes:
            return arguments
        pairs = pairs_of(Lines("", 0, data))
        return *arguments, [key for key, _ in pairs], [position for _, position in pairs]

    async def _until_answered(self, once: Callable[[bool], Awaitable[T]]) -> T:
        """Calls until the server answers, each time with whether an earlier call may have written something."""
        connections = self._session.connections
        tries, maybe_written = Tries(connections), False
        while True:
            try:
                return await once(maybe_written)
            except (*LOST, *PASSING) as error:
                maybe_written = maybe_written or not isinstance(error, (NotSentError, *PASSING))
                await self._wait(tries, error, maybe_written)
            except asyncpg.PostgresError as error:
                refusal = connections.refusal(error)
                raise (self._unknown(refusal) if maybe_written else refusal) from error

    def _row_is_gone(self) -> CorruptLogError:
        why = "its row in eventfold_logs is gone: somebody deleted it"
        return CorruptLogError(self._source.location, self._session.known_head.offset, why)

    def _behind_the_head(self, error: Exception) -> CorruptLogError:
        why = f"there is a commit after the head: {error}"
        return CorruptLogError(self._source.location, self._session.known_head.offset, why)

    async def _own(self, connection: Any, id_: uuid.UUID) -> int | None:
        """Where an earlier attempt was written, once it is as durable as if it had been answered."""
        start: int | None = await connection.fetchval(self._find, self._session.log, id_, timeout=self._timeout)
        if start is not None:
            await connection.execute(self._wait_for_standbys, self._session.log, timeout=self._timeout)
        return start

    async def _wait(self, tries: Tries, error: BaseException, maybe_written: bool) -> None:
        try:
            await tries.wait(error)
        except OSError as timed_out:
            if maybe_written:
                raise self._unknown(timed_out) from error
            raise

    def _unknown(self, error: BaseException) -> EventfoldError:
        return UnknownOutcomeError(
            f"{self._source.location}: the connection was lost during a commit, and its outcome can't be found out "
            f"({error}): the events may or may not be in the log; read it to find out, or append them again on a "
            "condition"
        )

    def begin_closing(self) -> None:
        """See `ClosingCommitter.begin_closing`. An append that waits for its answer waits on."""
        self._source.begin_closing()

    async def aclose(self) -> None:
        """Closes the connections. Idempotent."""
        await self._source.aclose()

    def abandon(self) -> None:
        """See `Committer.abandon`."""
        self._source.abandon()
