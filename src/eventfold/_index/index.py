"""`Index`: the questions that readers and writers ask of an index, no matter where it is stored.

Promise: an answer is complete up to the offset that comes with it. If a tag or an id of an event only has the same key
as a requested one, this is noticed when the event is read, and the event is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import aclosing

from .._codec.keys import key_of_id, key_of_tag
from .._event import AppendResult, Record
from .._query import Query
from .._reader import EventReader
from .id_filter import IdFilter
from .store import StoredOffsets

# How many events are read one by one. If there are more with the same tag, reading the whole log is not slower.
MAX_CANDIDATES = 1000
_NOTHING = StoredOffsets([], True)


class Index:
    """Answers questions about tags and ids. A subclass looks up the keys, and `reader` reads the log."""

    def __init__(self, reader: EventReader) -> None:
        self._reader = reader
        # Used if the index can't be; created on demand.
        self._id_filter: IdFilter | None = None

    async def aclose(self) -> None:
        """Closes the index; idempotent. A failure is logged."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Closes the index without an event loop and without waiting."""
        raise NotImplementedError

    async def _find(
        self, wanted: Collection[tuple[int, int]]
    ) -> tuple[int, dict[tuple[int, int], StoredOffsets]] | None:
        """Looks up pairs of a key and a start offset.

        Returns the offset up to which the answer is complete, and for each pair the offsets from the start on, if there
        are any. Returns None if the index can't be used at the moment. Raises what reading raises.
        """
        raise NotImplementedError

    async def candidates(
        self, queries: Sequence[Query], starts: Sequence[int]
    ) -> tuple[int, Sequence[Sequence[int] | None]]:
        """Finds the events that each query may match from its start offset on.

        Returns the offset up to which the answer is complete, and the offsets of the events for each query. They are
        None for a query that the index can't answer: one of its items has no tags, too many events have these tags, or
        the index can't be used. Raises what reading raises.
        """
        answer = await self._find(
            {
                (key_of_tag(tag), start)
                for query, start in zip(queries, starts, strict=True)
                for item in query.items
                for tag in item.tags
            }
        )
        if answer is None:
            return 0, [None] * len(queries)
        known, found = answer
        if not found and all([query._has_tags for query in queries]):  # noqa: C419 (a generator takes twice as long)
            return known, [()] * len(queries)
        return known, [_candidates(query, start, found) for query, start in zip(queries, starts, strict=True)]

    async def first_match(self, query: Query, offsets: Iterable[int]) -> int | None:
        """Returns the first of these offsets whose event the query matches; None if it matches none."""
        async with aclosing(self._reader._events_at(list(offsets), query)) as found:  # type: ignore[type-var]
            async for records in found:
                for record in records:
                    return record.start_offset
        return None

    async def results_of(self, ids: Iterable[str]) -> tuple[int, dict[str, AppendResult]]:
        """Finds the first event with each id.

        Returns the offset up to which the answer is complete, and the results by id. Raises what reading raises.
        """
        ids = set(ids)
        answer = await self._find({(key_of_id(id), 0) for id in ids})
        if answer is None or not all(stored.complete for stored in answer[1].values()):
            return await self._read_results_of(ids)
        known, found = answer
        if not found:
            return known, {}
        offsets = sorted({offset for stored in found.values() for offset in stored.offsets})
        async with aclosing(self._reader._events_at(offsets)) as events:  # type: ignore[type-var]
            return known, _first_with_ids([record async for records in events for record in records], ids)

    async def _read_results_of(self, ids: Collection[str]) -> tuple[int, dict[str, AppendResult]]:
        """Like `results_of`, without the index: reads the log once, and again only for ids that may be in it."""
        if self._id_filter is None:
            self._id_filter = IdFilter(self._reader)
        known, missing = await self._id_filter.possible(ids)
        results: dict[str, AppendResult] = {}
        if missing:
            async with aclosing(self._reader.read_from(0, until=known)) as records:  # type: ignore[type-var]
                async for record in records:
                    id = record.event.id
                    if id in missing:
                        results |= _first_with_ids([record], missing)
                        missing.discard(id)
                        if not missing:
                            break
        return known, results


def _candidates(query: Query, start: int, found: Mapping[tuple[int, int], StoredOffsets]) -> list[int] | None:
    """The offsets of the events that have all tags of an item; None if no tag of an item has all its offsets."""
    candidates: set[int] = set()
    for item in query.items:
        offsets = [found.get((key_of_tag(tag), start), _NOTHING) for tag in item.tags]
        complete = [stored.offsets for stored in offsets if stored.complete]
        if not complete:
            return None
        candidates |= set(complete[0]).intersection(*complete[1:])
    return sorted(candidates)


def _first_with_ids(records: Iterable[Record], ids: Collection[str]) -> dict[str, AppendResult]:
    """Returns the result of the first event with each of these ids."""
    results: dict[str, AppendResult] = {}
    for record in records:
        id = record.event.id
        if id is not None and id in ids and id not in results:
            results[id] = AppendResult(record.start_offset, record.end_offset, record.line_hash, duplicate=True)
    return results
