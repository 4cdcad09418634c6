"""The index in a table: the offset of each event under each of its keys, which are numbers for its tags and its id.

A committer that keeps the index writes the keys in the same statement as the events. The column `indexed` of the log's
row is the offset up to which no key is missing. A commit advances it only if it was at the head. So after an append
without keys, `indexed` does not advance until the missing keys have been added.

Promise: the table has the keys of all events before `indexed`, no matter when a process dies or loses its connection.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from .._codec.keys import pairs_of
from .._codec.lines import Lines
from .._errors import EventfoldError
from .._event import Head

if TYPE_CHECKING:
    from ._session import Session
    from ._source import TableSource

# The first version of the tables that has an index.
_FIRST_VERSION = 2
# How many bytes of lines one statement indexes. Nobody can append meanwhile.
_STEP_SIZE = 256 * 1024
# How many seconds removing all keys may take. Nobody can append meanwhile.
_DROP_TIMEOUT = 600.0

# Like every statement that writes keys, this one locks the log's row first.
_EXTEND = """
WITH advanced AS (
    UPDATE {schema}.eventfold_logs SET indexed = $3 WHERE log = $1 AND indexed >= $2 AND indexed < $3 RETURNING log
), added AS (
    INSERT INTO {schema}.eventfold_keys (log, key, "offset")
    SELECT log, pair.key, pair.at FROM advanced, unnest($4::bigint[], $5::bigint[]) AS pair (key, at)
    ON CONFLICT DO NOTHING
)
SELECT FROM advanced
"""
_FIND = """
SELECT head."offset", head.hash, head.indexed, wanted.number, ARRAY(
    SELECT stored."offset" FROM {schema}.eventfold_keys stored
    WHERE stored.log = $1 AND stored.key = wanted.key AND stored."offset" >= wanted.start
    ORDER BY stored."offset" LIMIT $4
)
FROM {schema}.eventfold_logs head
LEFT JOIN unnest($2::bigint[], $3::bigint[]) WITH ORDINALITY AS wanted (key, start, number) ON true
WHERE head.log = $1 ORDER BY wanted.number
"""
_DROP = """
WITH reset AS (
    UPDATE {schema}.eventfold_logs SET indexed = 0 WHERE log = $1 RETURNING log
), dropped AS (
    DELETE FROM {schema}.eventfold_keys USING reset WHERE eventfold_keys.log = reset.log RETURNING 1
)
SELECT count(*) FROM dropped
"""


class TableKeys:
    """The `EngineKeys` of one log, which must exist."""

    def __init__(self, source: TableSource) -> None:
        self._source = source

    async def extend(self, end: int, progress: Callable[[int], object] | None = None) -> None:
        """See `EngineKeys.extend`. Raises `OSError`."""
        while (indexed := (await self.find([], 1))[0]) < end:
            await self._extend_from(indexed, end, progress)

    async def _extend_from(self, start: int, end: int, progress: Callable[[int], object] | None) -> None:
        """Adds missing keys until another process has added them too, or has dropped all keys."""
        async with aclosing(self._source.blocks(Head(start, ""), end)) as blocks:
            async for block in blocks:
                for lines in block.chunks(_STEP_SIZE):
                    if not await self._add(lines):
                        return
                    if progress is not None:
                        progress(lines.end_offset)

    async def _add(self, lines: Lines) -> bool:
        """Adds the keys of some lines; false if `indexed` is not within the lines."""
        pairs = pairs_of(lines)
        keys, offsets = [key for key, _ in pairs], [offset for _, offset in pairs]
        return bool(await self._source.fetch(_EXTEND, lines.start_offset, lines.end_offset, keys, offsets))

    async def find(self, wanted: Any, limit: int) -> tuple[int, int, list[list[int]]]:
        """See `EngineKeys.find`. Raises `OSError`."""
        keys, starts = [key for key, _ in wanted], [start for _, start in wanted]
        session = await self._session()
        rows = await session.fetch(_FIND, keys, starts, limit)
        if not rows:
            raise session.row_missing()
        offset, line_hash, indexed = rows[0][:3]
        session.note_head(Head(offset, line_hash))
        return indexed, offset, [row[4] for row in rows] if wanted else []

    async def drop(self) -> bool:
        """See `EngineKeys.drop`. Raises `OSError`."""
        session = await self._session()

        async def call(connection: Any) -> int:
            count: int = await connection.fetchval(
                _DROP.format(schema=session.schema), session.log, timeout=_DROP_TIMEOUT
            )
            return count

        return bool(await session.connections.run_with_retries(call))

    async def _session(self) -> Session:
        """Returns the log's session, after checking that its tables can hold an index."""
        session = self._source.session()
        if not await session.find():
            raise EventfoldError(f"{self._source.location}: there is no such log")
        if session.version < _FIRST_VERSION:
            raise EventfoldError(
                f"{self._source.location}: its tables have version {session.version}, which has no index: open the "
                "log for appending, or run `eventfold migrate`"
            )
        return session
