"""Appends to the tables: one statement, and one row, for everything that waits.

The statement moves the head in the log's row, which locks it until the commit has ended, and inserts the lines where
the head was. So all writers come one after the other, and readers see commits in the order of their offsets, without
gaps. A batch with conditions is judged by the last head that was seen, and written on condition that it still is the
head; otherwise it is judged again, by the newer one.

A commit has an id, which is unique in the table. Where an answer is lost, the same commit is sent again: of two of the
same id the server refuses the second, also where the first one was still under way.

Promise: a batch is in the log once, or `UnknownOutcomeError` says that it may or may not be.
"""

from __future__ import annotations

import errno
import itertools
import uuid
from collections.abc import Sequence
from typing import Any

import asyncpg

from .._aio import UncancellableTask, uninterrupted
from .._codec.lines import Lines, last_line_hash
from .._engine import Commit
from .._errors import CorruptLogError, EventfoldError, UnknownOutcomeError
from .._event import Head
from .._judge import Append, judge, lines_needed_from
from ._connections import LOST, PASSING, NotSentError, Tries
from ._listener import channel
from ._schema import open_log, open_tables
from ._source import Session, TableSource

# PostgreSQL's own limit of a value is 1 GiB, and its memory for one several times the value.
_MAX_COMMIT_SIZE = 256 * 2**20

_APPEND = """
WITH head AS (
    UPDATE {schema}.eventfold_logs SET "offset" = "offset" + $2, hash = $3
    WHERE log = $1 AND ($4::bigint IS NULL OR ("offset" = $4 AND hash = $5))
    RETURNING "offset"
), written AS (
    INSERT INTO {schema}.eventfold_commits (log, start, "end", id, lines)
    SELECT $1, "offset" - $2, "offset", $6, $7 FROM head
    RETURNING start
)
SELECT start, pg_notify($8, '') FROM written
"""
_FIND = "SELECT start FROM {schema}.eventfold_commits WHERE log = $1 AND id = $2"
# Its commit waits for the synchronous standbys, and so for whatever was committed before it.
_WAIT_FOR_STANDBYS = "UPDATE {schema}.eventfold_logs SET hash = hash WHERE log = $1"


class TableCommitter:
    """A `Committer`. Any number of them may append to one log, in any process on any host. Get it from `open`."""

    batch_size = 16 * 2**20

    def __init__(self, source: TableSource, session: Session) -> None:
        self._source = source
        self._session = session
        # Ids of one committer lie next to each other in the index.
        self._prefix = uuid.uuid4().bytes[:8]
        self._numbers = itertools.count()
        schema = session.schema
        self._append, self._find = _APPEND.format(schema=schema), _FIND.format(schema=schema)
        self._wait_for_standbys = _WAIT_FOR_STANDBYS.format(schema=schema)

    @classmethod
    async def open(cls, source: TableSource) -> TableCommitter:
        """Creates or checks the tables and the log. Closes the source where that fails or is cancelled."""
        session = source.session()

        async def open_(connection: Any) -> None:
            await open_log(connection, session.settings, await open_tables(connection, session.settings))

        try:
            await session.connections.retried(open_, transaction=True)
            await session.head()
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

    async def commit(self, appends: Sequence[Append]) -> Commit:
        """See `Committer.commit`. Raises `OSError` where the server did not take the commit; nothing was written."""
        return await uninterrupted(UncancellableTask(self._commit(appends), "eventfold commit"))

    async def _commit(self, appends: Sequence[Append]) -> Commit:
        session = self._session
        needed = lines_needed_from(appends)
        asked = False
        while True:
            head = session.known_head
            recent = []
            if needed is not None and needed < head.offset:
                recent = [lines async for lines in self._source.blocks(Head(needed, ""), head.offset)]
            judgement = judge(appends, head, recent)
            if not asked and any(isinstance(outcome, Exception) for outcome in judgement.outcomes):
                # The conflict may only be with what this process has not seen yet.
                await session.head()
                asked = True
                continue
            if not judgement.data:
                return Commit(judgement.outcomes, Lines(self._source.location, head.offset, b""), head)
            conditional = any(
                append.is_judged and isinstance(outcome, int)
                for append, outcome in zip(appends, judgement.outcomes, strict=True)
            )
            start = await self._write(judgement.data, head if conditional else None)
            if start is None:
                await session.head()
                asked = True
                continue
            new_head = Head(start + len(judgement.data), last_line_hash(judgement.data))
            session.saw(new_head)
            return Commit(judgement.outcomes, Lines(self._source.location, start, judgement.data), new_head)

    async def _write(self, data: bytes, expected: Head | None) -> int | None:
        """Writes lines; the offset at which they begin, None where the head is not the expected one."""
        session = self._session
        if len(data) > _MAX_COMMIT_SIZE:
            raise OSError(errno.EMSGSIZE, f"a commit of {len(data)} bytes; at most {_MAX_COMMIT_SIZE} are possible")
        id_ = uuid.UUID(bytes=self._prefix + next(self._numbers).to_bytes(8))
        condition = (None, None) if expected is None else (expected.offset, expected.line_hash)
        arguments = (session.log, len(data), last_line_hash(data), *condition, id_, data, channel(session.log))
        maybe_written = False

        async def attempt(connection: Any) -> int | None:
            timeout = session.settings.attempt_timeout
            row = await connection.fetchrow(self._append, *arguments, timeout=timeout)
            return None if row is None else row[0]

        tries = Tries(session.connections)
        while True:
            try:
                try:
                    start = await session.connections.run(attempt)
                    if start is not None or not maybe_written:
                        return start
                    return await session.connections.run(lambda connection: self._own(connection, id_))
                except asyncpg.UniqueViolationError as error:
                    start = await session.connections.run(lambda connection: self._own(connection, id_))
                    if start is None:
                        raise CorruptLogError(
                            self._source.location,
                            session.known_head.offset,
                            f"a commit stands behind the head: {error}",
                        ) from error
                    return start
            except (*LOST, *PASSING) as error:
                maybe_written = maybe_written or not isinstance(error, (NotSentError, *PASSING))
                await self._wait(tries, error, maybe_written)
            except asyncpg.PostgresError as error:
                refusal = session.connections.refusal(error)
                raise (self._unknown(refusal) if maybe_written else refusal) from error

    async def _own(self, connection: Any, id_: uuid.UUID) -> int | None:
        """Where an earlier attempt was written, once it is as durable as if it had been answered."""
        timeout = self._session.settings.attempt_timeout
        start: int | None = await connection.fetchval(self._find, self._session.log, id_, timeout=timeout)
        if start is not None:
            await connection.execute(self._wait_for_standbys, self._session.log, timeout=timeout)
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

    async def aclose(self) -> None:
        """Lets go of the connections. Idempotent."""
        await self._source.aclose()

    def abandon(self) -> None:
        """See `Committer.abandon`."""
        self._source.abandon()
