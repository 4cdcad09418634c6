"""`View`: a state derived from the log by folding a reducer over its events.

Promises: the state is always that of the log up to `offset`, whatever fails or is cancelled; each event is folded once;
where the snapshot can't be believed, the view is rebuilt, with a warning that says why; a state that a reducer may have
left half changed is never saved.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any, Generic, TypeAlias, TypeVar

from . import _tracing
from ._engine import check_name
from ._errors import CorruptLogError, EventfoldError
from ._event import Event, Head
from ._fold import Fold, fold_together
from ._query import Query, query_of
from ._reader import EventReader
from ._state import takes_none
from ._view_snapshot import ViewSnapshot

S = TypeVar("S")
ReduceFn: TypeAlias = Callable[[S, Event], S]


class View(Generic[S]):
    """A named state that `reducer` gives for the log up to `offset`.

    Register it with a log (`EventLog.open(dir, views=[view])`), or bring it up to date by hand with `refresh`. A view
    belongs to one log at a time.

    Args:
        name: The view's name, which is also that of its snapshot: 1 to 128 characters of `A-Z a-z 0-9 . _ -`, not
            starting with a dot.
        reducer: A plain function of the state and an event that returns the new state. It may change the state in
            place, and returns it then.
        initial: The state before the first event: a value, of which every (re)build gets its own copy, or a callable
            without arguments (a class, say) that makes one.
        state_type: What a stored state is decoded into; the type of the initial state if not given.
        version: Stored with the state; a snapshot of another version is not used, and the view is rebuilt. Change it
            whenever the reducer or the shape of the state changes.
        event_types: Short for a query of these types alone (None: every event; empty: none).
        query: Which events the reducer looks at (None: all); others are passed over, without decoding them where their
            type or the text of their tags tells. Stored with the state: a snapshot made of other events is not used.
        shares_events: Says that the reducer never changes what an event holds, nor keeps it in a state that is changed
            later. Such views are given the same event objects, which makes several of them faster.

    Raises:
        ValueError: The name can't be a file's, `event_types` is a string, or given together with `query`.
        TypeError: `query` is no `Query`, the reducer not a plain function, or `initial` takes arguments (were they
            swapped?).
    """

    def __init__(
        self,
        name: str,
        reducer: ReduceFn[S],
        initial: S | Callable[[], S],
        *,
        state_type: Any = None,
        version: int | str = 0,
        event_types: Collection[str] | None = None,
        query: Query | None = None,
        shares_events: bool = False,
    ) -> None:
        if isinstance(event_types, str):
            raise ValueError(f"event_types must be a collection of types, not the string {event_types!r}")
        if event_types is not None and query is not None:
            raise ValueError(f"view {name!r}: event_types and query were both given; write the types into the query")
        self._name = check_name("view", name)
        _check_functions(name, reducer, initial)
        self._initial = initial
        state = self._new_state()
        if state_type is None and state is not None:
            state_type = type(state)
        self._fold: Fold[S] = Fold(
            name,
            reducer,
            state,
            query_of(query, event_types),
            takes_none=state_type is None or takes_none(state_type),
            shares_events=shares_events,
        )
        self._snapshot: ViewSnapshot[S] = ViewSnapshot(name, state_type, version, self._fold.query)
        self._loaded = False
        self._lock = asyncio.Lock()
        self._log: Callable[[], object] = _no_log
        self._log_name = ""

    def __repr__(self) -> str:
        return f"<View {self._name!r} at offset {self.offset}>"

    @property
    def name(self) -> str:
        """The view's name, which is also that of its snapshot."""
        return self._name

    @property
    def state(self) -> S:
        """The state up to `offset`. No I/O. After a `ReducerError` the reducer may have left it half changed."""
        return self._fold.state

    @property
    def offset(self) -> int:
        """The offset (bytes in the whole log) up to which the events are folded."""
        return self._fold.place.offset

    @property
    def event_types(self) -> frozenset[str] | None:
        """The types that an event must have one of to be folded; None if any type may be."""
        return None if self._fold.query is None else self._fold.query.types

    @property
    def query(self) -> Query | None:
        """Which events are folded; None for all."""
        return self._fold.query

    def _new_state(self) -> S:
        initial: Any = self._initial
        state: S = initial() if callable(initial) else copy.deepcopy(initial)
        return state

    def _attach(self, log: object, name: str) -> None:
        """Makes the view that of a log, named `name` in messages. Raises `EventfoldError` if another has it."""
        if self._log() is not None:
            raise EventfoldError(
                f"view {self._name!r} can't be registered with the log in {name}: it belongs to the open log in "
                f"{self._log_name}; make another View object for each log"
            )
        if self._log_name not in ("", name):
            self._loaded = False  # its state is that of another log
            self._fold.start(self._new_state(), Head(0, ""))
        self._log, self._log_name = weakref.ref(log), name
        self._lock = asyncio.Lock()  # this may be another event loop than that of the log before

    def _detach(self, log: object) -> None:
        """Lets the view be registered again, if it belongs to this log."""
        if self._log() is log:
            self._log = _no_log

    async def refresh(self, reader: EventReader) -> S:
        """Folds what is new, from the snapshot on where nothing was folded yet.

        Cancelled, the view keeps what it has folded.

        Args:
            reader: A reader of the log.

        Returns:
            The state as of the head.

        Raises:
            ReducerError: The reducer raised. The view stands before that event; the next refresh starts from the last
                snapshot, or anew, and tries it again.
            CorruptLogError: The log is damaged, or no longer the one that was folded.
            OSError: The log could not be read.
        """
        if self._loaded and not self._fold.suspect and await reader.head() == self._fold.place:
            return self.state
        await refresh_together([self], reader)
        return self.state

    async def rebuild(self, reader: EventReader) -> S:
        """Folds the whole log anew, without the snapshot, and replaces that.

        Takes, returns and raises what `refresh` does, and is cancelled as it is.
        """
        await self._refold(reader)
        await self.save(reader)
        return self.state

    async def _refold(self, reader: EventReader) -> None:
        """The same as `rebuild`, but leaves the snapshot on disk as it is."""
        with _tracing.span("eventfold.rebuild", log=str(reader._source.location), view=self._name) as span:
            async with self._lock:
                self._loaded = True
                self._snapshot.forget()
                self._fold.start(self._new_state(), Head(0, ""))
            await refresh_together([self], reader, save=False)
            span.set(offset=self.offset)

    async def save(self, reader: EventReader) -> None:
        """Writes the snapshot of what is folded, unless it is on disk already, or the reducer raised.

        A failure is logged as a warning: the snapshot is worth only the time to make the state again. Cancelled, it is
        written or not.

        Args:
            reader: A reader of the log that was folded.
        """
        async with self._lock:
            await self._save(reader)

    async def _load(self, reader: EventReader) -> None:
        """Starts from the snapshot, if it can be believed, or anew."""
        self._fold.start(*(await self._snapshot.load(reader) or (self._new_state(), Head(0, ""))))
        self._loaded = True

    async def _save(self, reader: EventReader) -> None:
        """The same as `save`, for who holds the lock: so that the state does not change meanwhile."""
        if self.offset and not self._fold.suspect:
            await self._snapshot.save(self.state, self._fold.place, reader)


def _no_log() -> None:
    return None


def _check_functions(name: str, reducer: Any, initial: Any) -> None:
    if not callable(reducer):
        raise TypeError(
            f"view {name!r}: the reducer must be a function, not {reducer!r}; the order is View(name, reducer, initial)"
        )
    if inspect.iscoroutinefunction(reducer) or inspect.iscoroutinefunction(getattr(reducer, "__call__", None)):  # noqa: B004
        raise TypeError(
            f"view {name!r}: the reducer is an async function; it must be a plain one, since folding never waits"
        )
    if callable(initial):
        try:
            inspect.signature(initial).bind()
        except ValueError:  # a class or function of C that tells no signature
            return
        except TypeError:
            raise TypeError(
                f"view {name!r}: initial must be a value or a callable without arguments, not {initial!r}; the order "
                "is View(name, reducer, initial)"
            ) from None


async def refresh_together(views: Iterable[View[Any]], reader: EventReader, *, save: bool = True) -> None:
    """Refreshes several views; raises the first error of `refresh_each` when all are done."""
    for error in await refresh_each(views, reader, save=save):
        raise error


async def refresh_each(views: Iterable[View[Any]], reader: EventReader, *, save: bool = True) -> list[Exception]:
    """Refreshes several views at once; those that stand at the same offset share one pass over the log.

    With `save`, writes the snapshots that are worth it by now. Returns the errors: a reducer that raises holds up no
    other view.
    """
    views = list(views)
    locked: list[View[Any]] = []
    errors: list[Exception] = []
    try:
        for view in sorted(views, key=lambda view: view.name):  # one order for all, so that nobody waits in a circle
            await view._lock.acquire()
            locked.append(view)
        failed_at = {view: view.offset for view in views if view._fold.suspect}
        unloaded = [view for view in views if not view._loaded or view in failed_at]
        if len(unloaded) == 1:
            await unloaded[0]._load(reader)  # a task of its own would take longer than loading a small state
        elif unloaded:
            await asyncio.gather(*(view._load(reader) for view in unloaded))
        head = (await reader.head()).offset
        if save:
            for view, offset in failed_at.items():
                await _save_before_failure(view, offset, head, reader)
        for group in _by_offset(views, head):
            try:
                if group[0].offset > head:
                    raise CorruptLogError(
                        reader._source.location, head, f"the log ends here, and {group[0]!r} was there"
                    )
                errors += await fold_together([view._fold for view in group], reader)
            except Exception as error:
                errors.append(error)
        for view in views:
            if save and view._snapshot.worth_saving(view.offset):
                await view._save(reader)
    finally:
        for view in locked:
            view._lock.release()
    return errors


async def _save_before_failure(view: View[Any], offset: int, head: int, reader: EventReader) -> None:
    """Saves the state before an event whose reducer raised, so that the next attempt begins there."""
    if view.offset < offset <= head and view._snapshot.may_save:
        try:
            await fold_together([view._fold], reader, offset)
        except (CorruptLogError, OSError):
            return  # the pass to the head meets the same, and tells it
        await view._save(reader)


def _by_offset(views: Iterable[View[Any]], head: int) -> list[list[View[Any]]]:
    groups: dict[int, list[View[Any]]] = {}
    for view in views:
        if view.offset != head:
            groups.setdefault(view.offset, []).append(view)
    return list(groups.values())
