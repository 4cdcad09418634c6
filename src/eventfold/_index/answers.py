"""`Answers`: what readers and writers ask of an index, wherever it is stored.

Promise: an answer has every event up to the offset that it names. An event that only shares a key with the requested
one is checked in the log and left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import aclosing

from .._codec.keys import key_of_id, key_of_tag
from .._event import AppendResult, Record
from .._query import Query
from .._reader import EventReader
from .seen import SeenIds
from .store import StoredOffsets

# How many events are checked one by one; if a tag has more of them, reading the log is not slower.
MAX_CANDIDATES = 1000
_NOTHING = StoredOffsets([], True)


class Answers:
    """Answers from keys and offsets. A subclass looks up the keys, and `reader` reads the log."""

    def __init__(self, reader: EventReader) -> None:
        self._reader = reader
        # Created when the index can't answer for an id.
        self._seen: SeenIds | None = None

    async def aclose(self) -> None:
        """Closes the index; idempotent. A failure is logged."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Does the same at once, without an event loop and without waiting."""
        raise NotImplementedError

    async def _find(
        self, wanted: Collection[tuple[int, int]]
    ) -> tuple[int, dict[tuple[int, int], StoredOffsets]] | None:
        """Returns the offsets of each key from an offset on, if any; complete up to the offset that comes first.

        Returns None if the index can't be used now. Raises what reading raises.
        """
        raise NotImplementedError

    async def candidates(
        self, queries: Sequence[Query], starts: Sequence[int]
    ) -> tuple[int, Sequence[Sequence[int] | None]]:
        """Returns for queries and offsets the offsets, from the given one on, of the events that the query may match.

        They are complete up to the offset that is returned first. Returns None for a query that the index can't answer:
        one of its items has no tags, or too many events have them, or the file failed. Raises what reading raises.
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
        if not found and all([query.has_tags for query in queries]):  # noqa: C419 (a generator takes twice as long)
            return known, [()] * len(queries)
        return known, [_candidates(query, start, found) for query, start in zip(queries, starts, strict=True)]

    async def first_match(self, query: Query, offsets: Iterable[int]) -> int | None:
        """Returns the first of these offsets whose event the query matches."""
        async with aclosing(self._reader.events_at(list(offsets), query)) as found:  # type: ignore[type-var]
            async for records in found:
                for record in records:
                    return record.start_offset
        return None

    async def results_of(self, ids: Iterable[str]) -> tuple[int, dict[str, AppendResult]]:
        """Returns where the first event with each id is, if there is one before the offset that is returned first."""
        ids = set(ids)
        answer = await self._find({(key_of_id(id), 0) for id in ids})
        if answer is None or not all(stored.complete for stored in answer[1].values()):
            return await self._read_results_of(ids)
        known, found = answer
        if not found:
            return known, {}
        offsets = sorted({offset for stored in found.values() for offset in stored.offsets})
        async with aclosing(self._reader.events_at(offsets)) as events:  # type: ignore[type-var]
            return known, _first_with_ids([record async for records in events for record in records], ids)

    async def _read_results_of(self, ids: Collection[str]) -> tuple[int, dict[str, AppendResult]]:
        """Does the same without the file: reads the log once, and again only for an id that may be in it."""
        if self._seen is None:
            self._seen = SeenIds(self._reader)
        known, missing = await self._seen.not_ruled_out(ids)
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
