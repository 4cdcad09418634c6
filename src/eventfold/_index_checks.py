"""Looks up the ids and conditions of a group of appends in the index, right before the group is committed.

One lookup serves the whole group. Later appends, and those of the group itself, are checked when the group is judged.

Promises: at most one append with a given id is in the log, no matter which process made it and whether the index file
can be used; an append of events that are in the log already returns the results of the first append, even if its own
condition no longer holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ._errors import InvalidEventError, copy_error
from ._event import AppendResult, Event
from ._index import Index
from ._judge import Append, UniqueIds, conflict_with


class NotIndexedError(Exception):
    """The index has no answer for a condition: the caller must read the log and append again."""


def ids_of(events: Iterable[Event]) -> UniqueIds | None:
    """The ids of events that are appended together; None if no event has an id.

    Raises `InvalidEventError` if two events have the same id.
    """
    ids = [event.id for event in events if isinstance(event.id, str)]
    if len(set(ids)) < len(ids):
        twice = next(id for number, id in enumerate(ids) if id in ids[:number])
        raise InvalidEventError(f"two events of the batch have the id {twice!r}, but ids must be unique in this log")
    return UniqueIds(tuple(ids)) if ids else None


class IndexChecks:
    """Looks up the appends of a group in the index."""

    def __init__(self, index: Index) -> None:
        self._index = index

    async def check(self, appends: Sequence[Append]) -> list[Append]:
        """Resolves the appends that must not be committed, and returns all others.

        In the requirements of the others, it sets the offset up to which their ids and conditions were checked.
        """
        await self.check_ids(appends)
        await self._check_conditions(appends)
        return [append for append in appends if not append.future.done()]

    async def check_ids(self, appends: Sequence[Append]) -> None:
        """Resolves the appends whose ids are in the log already."""
        required = [(append, append.requirements) for append in appends if append.requirements is not None]
        unique = [(append, required.unique) for append, required in required if required.unique is not None]
        if not unique:
            return
        try:
            known, results = await self._index.results_of({id for _, ids in unique for id in ids.ids})
        except Exception as error:
            _fail([append for append, _ in unique], error)
            return
        for append, ids in unique:
            ids.checked = known
            try:
                found = _results(ids, append.events, results)
            except InvalidEventError as error:
                _fail([append], error)
            else:
                if found is not None and not append.future.done():
                    append.future.set_result(found[0] if append.lines is None else found)

    async def results_of(self, ids: UniqueIds | None, count: int) -> list[AppendResult] | None:
        """The results of an append of `count` events if all of them are in the log already; None if none of them is.

        Raises `InvalidEventError` if only some of them are, and what reading the log raises.
        """
        if ids is None:
            return None
        _, results = await self._index.results_of(ids.ids)
        return _results(ids, count, results)

    async def _check_conditions(self, appends: Sequence[Append]) -> None:
        required = [(append, append.requirements) for append in appends if append.requirements is not None]
        waiting = [
            (append, needed.condition)
            for append, needed in required
            if needed.condition is not None and needed.condition.checked is None and not append.future.done()
        ]
        if not waiting:
            return
        try:
            known, candidates = await self._index.candidates(
                [condition.query for _, condition in waiting], [condition.after for _, condition in waiting]
            )
            for (append, condition), offsets in zip(waiting, candidates, strict=True):
                if append.future.done():
                    continue
                if offsets is None:
                    append.future.set_exception(NotIndexedError())
                    continue
                condition.checked = max(known, condition.after)
                if offsets and (found := await self._index.first_match(condition.query, offsets)) is not None:
                    _fail([append], conflict_with(condition.after, known, found))
        except Exception as error:
            _fail([append for append, _ in waiting], error)


def _fail(appends: Iterable[Append], error: Exception) -> None:
    for append in appends:
        if not append.future.done():
            append.future.set_exception(copy_error(error))


def _results(unique: UniqueIds, count: int, results: dict[str, AppendResult]) -> list[AppendResult] | None:
    """The results of an append of `count` events if all of them are in the log already; None if none of them is.

    Raises `InvalidEventError` if only some of them are.
    """
    found = [results[id] for id in unique.ids if id in results]
    if found and len(found) < count:
        listed = ", ".join(repr(id) for id in unique.ids if id in results)
        raise InvalidEventError(
            f"{len(found)} of the {count} events of the batch are in the log already (ids {listed}), so nothing was "
            "appended: append the other events without them"
        )
    return found or None
