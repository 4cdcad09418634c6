"""`View`: a state derived from the log by folding a reducer over its events.

Promises: the state is always that of the log up to `offset`, even after a failure or a cancellation; each event is
folded once; if the snapshot can't be used, the view is rebuilt, and a warning says why; a state that a reducer may have
left partly changed is never saved.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

from . import _tracing
from ._documents import check_name
from ._errors import CorruptLogError, EventfoldError
from ._event import Event, Head
from ._fold import Fold, fold_together
from ._query import Query, query_of
from ._reader import EventReader
from ._round_trip import accepts_none
from ._view_snapshot import ViewSnapshot

S = TypeVar("S")
# A view never takes a state after its creation, so a `View[int]` is a `View[object]`.
S_co = TypeVar("S_co", covariant=True)
ReduceFn: TypeAlias = Callable[[S, Event], S]


class View(Generic[S_co]):
    """A named state that `reducer` produces from the log up to `offset`.

    Register the view with a log (`EventLog.open(dir, views=[view])`), or bring it up to date yourself with `refresh`. A
    view belongs to one log at a time.

    Args:
        name: The view's name, which its snapshot has too: 1 to 128 characters of `A-Z a-z 0-9 . _ -`, not starting
            with a dot.
        reducer: A plain function of the state and an event that returns the new state. It may change the state in place
            and return it.
        initial: The state before the first event: either a value, which is copied for each (re)build, or a callable
            without arguments that returns the value, such as a class.
        state_type: The type into which a stored state is decoded; by default that of the initial state.
        version: Stored with the state. A snapshot with a different version is not used, and the view is rebuilt. Change
            the version whenever the reducer or the shape of the state changes.
        event_types: Short for a query of these types (None: every event; empty: none).
        query: Which events the reducer gets; None for all. If the type or the text of the tags shows that an event does
            not match, the event is not decoded. Stored with the state: a snapshot of a different query is not used.
        shares_events: Promises that the reducer never changes the content of an event, and never keeps it in a state
            that is changed later. Views that promise this get the same event objects, which makes several of them
            faster.

    Raises:
        ValueError: The name is not allowed, or `event_types` is a string or given together with `query`.
        TypeError: `query` is not a `Query`, the reducer is not a plain function, or `initial` takes arguments, perhaps
            because `reducer` and `initial` were swapped.
    """

    def __init__(
        self,
        name: str,
        reducer: ReduceFn[S_co],
        initial: S_co | Callable[[], S_co],
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
            raise ValueError(f"view {name!r}: event_types and query were both given; put the types into the query")
        self._name = check_name("view", name)
        _check_reducer(name, reducer)
        self._initial = initial
        try:
            state = self._new_state()
        except TypeError:
            # Checked only after a failure, since looking at a signature takes as long as opening a file.
            _check_takes_no_arguments(name, initial)
            raise
        if state_type is None and state is not None:
            state_type = type(state)
        self._fold: Fold[S_co] = Fold(
            name,
            reducer,
            state,
            query_of(query, event_types),
            accepts_none=state_type is None or accepts_none(state_type),
            shares_events=shares_events,
        )
        self._snapshot: ViewSnapshot[S_co] = ViewSnapshot(name, state_type, version, self._fold.query)
        self._loaded = False
        self._lock = asyncio.Lock()
        self._log: Callable[[], object] = _no_log
        self._log_name = ""

    def __repr__(self) -> str:
        return f"<View {self._name!r} at offset {self.offset}>"

    @property
    def name(self) -> str:
        """The view's name, which its snapshot has too."""
        return self._name

    @property
    def state(self) -> S_co:
        """The state up to `offset`. No I/O. After a `ReducerError`, the state may be partly changed."""
        return self._fold.state

    @property
    def offset(self) -> int:
        """The offset (bytes in the whole log) up to which the events are folded."""
        return self._fold.position.offset

    @property
    def event_types(self) -> frozenset[str] | None:
        """The types of which an event must have one to be folded; None for any type."""
        return None if self._fold.query is None else self._fold.query.types

    @property
    def query(self) -> Query | None:
        """Which events are folded; None for all."""
        return self._fold.query

    def _new_state(self) -> S_co:
        initial: Any = self._initial
        state: S_co = initial() if callable(initial) else copy.deepcopy(initial)
        return state

    def _attach(self, log: object, name: str) -> None:
        """Registers the view with a log, which messages call `name`. Raises `EventfoldError` if it has another log."""
        if self._log() is not None:
            raise EventfoldError(
                f"view {self._name!r} can't be registered with the log in {name}: it is registered with the open log "
                f"in {self._log_name}; create a View object for each log"
            )
        if self._log_name not in ("", name):
            self._loaded = False  # the state is that of another log
            self._fold.start(self._new_state(), Head(0, ""))
        self._log, self._log_name = weakref.ref(log), name
        self._lock = asyncio.Lock()  # the event loop may differ from that of the previous log

    def _detach(self, log: object) -> None:
        """Ends the registration of the view, if it is with this log."""
        if self._log() is log:
            self._log = _no_log

    async def refresh(self, reader: EventReader) -> S_co:
        """Folds all new events; the first refresh starts from the snapshot.

        If cancelled, the events that were folded stay folded.

        Args:
            reader: A reader of the log.

        Returns:
            The state as of the head.

        Raises:
            ReducerError: The reducer raised. The view stops before that event. The next refresh starts from the last
                snapshot, or from the beginning, and tries that event again.
            CorruptLogError: The log is damaged, or is no longer the one that was folded.
            OSError: The log could not be read.
        """
        if self._loaded and not self._fold.suspect and await reader.head() == self._fold.position:
            return self.state
        await refresh_together([self], reader)
        return self.state

    async def rebuild(self, reader: EventReader) -> S_co:
        """Folds the whole log from the beginning, without the snapshot, and replaces the snapshot.

        If cancelled, the events that were folded stay folded.

        Args:
            reader: A reader of the log.

        Returns:
            The state as of the head.

        Raises:
            ReducerError: The reducer raised. The view stops before that event.
            CorruptLogError: The log is damaged.
            OSError: The log could not be read.
        """
        await self._refold(reader)
        await self.save(reader)
        return self.state

    async def _refold(self, reader: EventReader) -> None:
        """Does the same as `rebuild`, but leaves the snapshot as it is."""
        with _tracing.span("eventfold.rebuild", log=str(reader._source.location), view=self._name) as span:
            async with self._lock:
                self._loaded = True
                self._snapshot.forget()
                self._fold.start(self._new_state(), Head(0, ""))
            await refresh_together([self], reader, save=False)
            span.set(offset=self.offset)

    async def save(self, reader: EventReader) -> None:
        """Writes the snapshot of the current state, unless it is on disk already, or the reducer raised.

        A failure is only logged as a warning, since a missing snapshot costs nothing but the time to rebuild the state.
        If cancelled, the snapshot may or may not be written.

        Args:
            reader: A reader of the log that was folded.
        """
        async with self._lock:
            await self._save(reader)

    async def _load(self, reader: EventReader) -> None:
        """Starts from the snapshot or, if it can't be used, from the beginning."""
        self._fold.start(*(await self._snapshot.load(reader) or (self._new_state(), Head(0, ""))))
        self._loaded = True

    async def _save(self, reader: EventReader) -> None:
        """Does the same as `save`. The caller holds the lock, so the state does not change."""
        if self.offset and not self._fold.suspect:
            await self._snapshot.save(self.state, self._fold.position, reader)


def _no_log() -> None:
    return None


def _check_reducer(name: str, reducer: Any) -> None:
    if not callable(reducer):
        raise TypeError(
            f"view {name!r}: the reducer must be a function, not {reducer!r}; the order is View(name, reducer, initial)"
        )
    if inspect.iscoroutinefunction(reducer) or inspect.iscoroutinefunction(getattr(reducer, "__call__", None)):  # noqa: B004
        raise TypeError(
            f"view {name!r}: the reducer is an async function, but it must be a plain function: folding never awaits"
        )


def _check_takes_no_arguments(name: str, initial: Any) -> None:
    if not callable(initial):
        return
    try:
        inspect.signature(initial).bind()
    except ValueError:  # a class or function in C without a signature
        return
    except TypeError:
        raise TypeError(
            f"view {name!r}: initial must be a value or a callable without arguments, not {initial!r}; the order is "
            "View(name, reducer, initial)"
        ) from None


async def refresh_together(views: Iterable[View[Any]], reader: EventReader, *, save: bool = True) -> None:
    """Refreshes several views; when all are done, raises the first error that `refresh_each` returns."""
    for error in await refresh_each(views, reader, save=save):
        raise error


async def refresh_each(views: Iterable[View[Any]], reader: EventReader, *, save: bool = True) -> list[Exception]:
    """Refreshes several views; those with the same offset share one pass over the log.

    With `save`, also saves the snapshots that are worth saving. An error of one view does not stop any other view; all
    errors are returned.
    """
    views = list(views)
    locked: list[View[Any]] = []
    errors: list[Exception] = []
    try:
        for view in sorted(views, key=lambda view: view.name):  # in the same order everywhere, to avoid deadlocks
            await view._lock.acquire()
            locked.append(view)
        failed_at = {view: view.offset for view in views if view._fold.suspect}
        unloaded = [view for view in views if not view._loaded or view in failed_at]
        if unloaded:
            load_errors = await _load_each(unloaded, reader)
            errors += load_errors.values()
            views = [view for view in views if view not in load_errors]
        head = await reader.head()
        if save:
            for view in views:
                if view in failed_at:
                    await _save_before_failure(view, failed_at[view], head.offset, reader)
        for group in _by_offset(views, head.offset):
            try:
                if group[0].offset > head.offset:
                    raise CorruptLogError(
                        reader._source.location,
                        head.offset,
                        f"the log ends here, but it continued to {group[0].offset}",
                    )
                errors += await fold_together([view._fold for view in group], reader, head)
            except Exception as error:
                errors.append(error)
        for view in views:
            if save and view._snapshot.worth_saving(view.offset):
                await view._save(reader)
    finally:
        for view in locked:
            view._lock.release()
    return errors


async def _load_each(views: Sequence[View[Any]], reader: EventReader) -> dict[View[Any], Exception]:
    """Loads several views at the same time; returns the errors of those that could not be loaded."""
    errors: dict[View[Any], Exception] = {}

    async def load(view: View[Any]) -> None:
        try:
            await view._load(reader)
        except Exception as error:
            errors[view] = error

    if len(views) == 1:
        await load(views[0])  # creating a task would take longer than loading a small state
    else:
        async with asyncio.TaskGroup() as group:
            for view in views:
                group.create_task(load(view))
    return errors


async def _save_before_failure(view: View[Any], offset: int, head: int, reader: EventReader) -> None:
    """Saves the state before an event whose reducer raised, so that the next attempt starts there."""
    if view.offset < offset <= head and view._snapshot.may_save:
        try:
            await fold_together([view._fold], reader, Head(offset, ""))
        except (CorruptLogError, OSError):
            return  # the pass up to the head will find the same problem and report it
        await view._save(reader)


def _by_offset(views: Iterable[View[Any]], head: int) -> list[list[View[Any]]]:
    groups: dict[int, list[View[Any]]] = {}
    for view in views:
        if view.offset != head:
            groups.setdefault(view.offset, []).append(view)
    return list(groups.values())
