"""What the index tells of a batch of appends, right before it is committed: which ids and which tags are in the log.

The writer asks for a whole batch at once. What came in between, and what stands in the batch itself, is judged at the
append's turn.

Promises: of the appends with one id one at most is in the log, whoever made them, with the index file or without it; an
append of what is in the log gives the results of the first one, also where its condition does not hold any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import aclosing

from ._errors import InvalidEventError, copy_error
from ._event import AppendResult, Event
from ._index import Answers
from ._judge import Append, UniqueIds, conflict_with
from ._query import Query
from ._reader import EventReader


class NotIndexedError(Exception):
    """The index has no answer for a condition: whoever appends must read the log, and call again."""


def ids_of(events: Iterable[Event]) -> UniqueIds | None:
    """The ids of events that are appended together; None if none has one.

    Raises `InvalidEventError` if two have the same.
    """
    ids = [event.id for event in events if isinstance(event.id, str)]
    if len(set(ids)) < len(ids):
        twice = next(id for number, id in enumerate(ids) if id in ids[:number])
        raise InvalidEventError(f"two events of the batch have the id {twice!r}, and ids are to be unique here")
    return UniqueIds(tuple(ids)) if ids else None


async def read_condition(reader: EventReader, query: Query, after: int) -> int:
    """Looks in the log for what is in the way of a condition, so that in the append's turn only the rest is looked at.

    Returns the offset up to which it has looked. Raises `ConditionalAppendError`, and what reading raises.
    """
    checked = max((await reader.head()).offset, after)
    async with aclosing(reader.read_from(after, query=query, until=checked)) as records:  # type: ignore[type-var]
        async for record in records:
            raise conflict_with(after, checked, record.start_offset)
    return checked


class Checks:
    """Looks up the appends of a batch in the index."""

    def __init__(self, index: Answers) -> None:
        self._index = index

    async def check(self, appends: Sequence[Append]) -> list[Append]:
        """Resolves the appends that are not to be committed, and returns the others.

        For these it notes up to where their ids and conditions were looked at.
        """
        await self.check_ids(appends)
        await self._check_conditions(appends)
        return [append for append in appends if not append.future.done()]

    async def check_ids(self, appends: Sequence[Append]) -> None:
        """Resolves those of the appends whose ids are in the log."""
        appends = [append for append in appends if append.unique is not None]
        if not appends:
            return
        unique = [(append, append.unique) for append in appends if append.unique is not None]
        try:
            known, results = await self._index.results_of({id for _, ids in unique for id in ids.ids})
        except Exception as error:
            _fail(appends, error)
            return
        for append, ids in unique:
            ids.checked = known
            try:
                found = _results(ids, append.events, results)
            except InvalidEventError as error:
                _fail([append], error)
            else:
                if found is not None and not append.future.done():
                    append.future.set_result(found[0] if append.count is None else found)

    async def results_of(self, ids: UniqueIds | None, count: int) -> list[AppendResult] | None:
        """The results of an append of `count` events, if all are in the log; None if none is.

        Raises `InvalidEventError` if some of them are, and what reading the log raises.
        """
        if ids is None:
            return None
        _, results = await self._index.results_of(ids.ids)
        return _results(ids, count, results)

    async def _check_conditions(self, appends: Sequence[Append]) -> None:
        waiting = [
            append
            for append in appends
            if append.condition is not None and append.condition.checked is None and not append.future.done()
        ]
        if not waiting:
            return
        conditions = [append.condition for append in waiting if append.condition is not None]
        try:
            known, candidates = await self._index.candidates(
                [condition.query for condition in conditions], [condition.after for condition in conditions]
            )
            for append, condition, offsets in zip(waiting, conditions, candidates, strict=True):
                if append.future.done():
                    continue
                if offsets is None:
                    append.future.set_exception(NotIndexedError())
                    continue
                condition.checked = max(known, condition.after)
                if offsets and (found := await self._index.first_match(condition.query, offsets)) is not None:
                    _fail([append], conflict_with(condition.after, known, found))
        except Exception as error:
            _fail(waiting, error)


def _fail(appends: Iterable[Append], error: Exception) -> None:
    for append in appends:
        if not append.future.done():
            append.future.set_exception(copy_error(error))


def _results(unique: UniqueIds, count: int, results: dict[str, AppendResult]) -> list[AppendResult] | None:
    """The results of an append of `count` events, if all are in the log; None if none is."""
    found = [results[id] for id in unique.ids if id in results]
    if found and len(found) < count:
        listed = ", ".join(repr(id) for id in unique.ids if id in results)
        raise InvalidEventError(
            f"{len(found)} of the {count} events of the batch are in the log already (ids {listed}), and the others "
            "are not: nothing was appended; append those by themselves"
        )
    return found or None
