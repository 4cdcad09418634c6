"""`View`: a state derived from the log by folding a reducer over its events.

Promises: the state is always that of the log up to `offset`, whatever fails or is cancelled; each event is folded once;
a snapshot is believed only where the log before it is still the same and the view still selects the same events, else
the view is rebuilt, with a warning that says why; a snapshot never holds a state that would read back as another, nor
one that a reducer may have left half changed.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
import weakref
from collections.abc import Callable, Collection, Iterable
from time import monotonic
from typing import Any, Generic, TypeAlias, TypeVar

from ._aio import in_thread
from ._engine import LockingDocuments, check_name
from ._errors import CorruptLogError, EventfoldError
from ._event import Event, Head
from ._fold import Fold, fold_together
from ._query import Query, query_of
from ._reader import EventReader
from ._state import difference, takes_none
from .snapshot import NOWHERE, BadSnapshotError, Snapshot, decode_state, encode, encode_state, parse

logger = logging.getLogger("eventfold")

S = TypeVar("S")
ReduceFn: TypeAlias = Callable[[S, Event], S]

# Bytes of log after which a refresh saves a snapshot; for a state that is larger when encoded, as many as it has.
SAVE_AFTER = 64 * 1024
# Seconds before a refresh tries again to save what could not be saved; each further failure doubles them.
RETRY_INTERVAL, LAST_RETRY_INTERVAL = 1.0, 300.0

# How often, and after how many seconds, to try while another process is saving a snapshot.
_LOCK_ATTEMPTS, _LOCK_INTERVAL = 200, 0.01


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
        self._state_type = type(state) if state_type is None and state is not None else state_type
        self._version = version
        self._fold: Fold[S] = Fold(
            name,
            reducer,
            state,
            query_of(query, event_types),
            takes_none=self._state_type is None or takes_none(self._state_type),
            shares_events=shares_events,
        )
        # As it stands in the snapshot: alternatives, of which an event must match one; None for every event.
        self._query = None if self._fold.query is None else _as_json(self._fold.query)
        self._loaded = False
        self._saved: Head | None = None
        self._saved_offset: int | None = None  # what the snapshot on disk tells the Rust crate
        self._saved_size = 0
        self._next_try, self._retry_interval = 0.0, RETRY_INTERVAL
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
        async with self._lock:
            self._loaded, self._saved = True, None
            self._fold.start(self._new_state(), Head(0, ""))
        await refresh_together([self], reader, save=False)

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
        state, place = self._new_state(), Head(0, "")
        self._saved = None
        try:
            snapshot = await self._stored(reader)
            if snapshot is not None:
                place = await self._place_of(snapshot, reader)
                state = self._decode(snapshot.state)
                self._saved, self._saved_offset, self._saved_size = place, snapshot.offset, len(snapshot.state)
        except (BadSnapshotError, CorruptLogError, OSError) as error:
            place = Head(0, "")
            logger.warning("view %r is rebuilt, its snapshot is not used: %s", self._name, error)
        self._fold.start(state, place)
        self._loaded = True

    async def _stored(self, reader: EventReader) -> Snapshot | None:
        """The stored snapshot, its state still encoded; None if there is none. Raises `BadSnapshotError`, `OSError`."""
        data = await reader.documents.load("view", self._name)
        return None if data is None else parse(data)

    def _decode(self, state: bytes) -> S:
        kind = Any if self._state_type is None else self._state_type
        try:
            decoded: S = decode_state(state, kind)
        except Exception as error:
            raise BadSnapshotError(
                f"its state can't be decoded into {getattr(kind, '__qualname__', kind)}: {error} "
                "(give the view another version when the shape of its state changes)"
            ) from error
        return decoded

    async def _place_of(self, snapshot: Snapshot, reader: EventReader) -> Head:
        """Where in the whole log a snapshot stands, if the log before it is the one that it was made of."""
        if snapshot.version != self._version:
            raise BadSnapshotError(f"it is of version {snapshot.version!r}, the view of version {self._version!r}")
        if snapshot.query != self._query:
            raise BadSnapshotError(
                f"it was made of {_selected(snapshot.query)}, and the view selects {_selected(self._query)}"
            )
        position, expected = snapshot.position, snapshot.position_hash
        if position is None:
            if snapshot.offset <= 0:
                raise BadSnapshotError("it was written elsewhere, and does not tell where in the log it stands")
            position, expected = await reader.base() + snapshot.offset, snapshot.hash
        try:
            found = await reader.read_line_hash_before(position)
        except ValueError as error:
            raise BadSnapshotError(f"it is not of this log: {error}") from error
        if (found or "") != expected:
            raise BadSnapshotError(f"the log before offset {position} is not the one that it was made of")
        return Head(position, found or "")

    async def _save(self, reader: EventReader) -> None:
        place = self._fold.place
        if self._fold.suspect or not place.offset:
            return
        try:
            base = await reader.base()
            offset = offset_for_the_crate(place.offset, base)
            if place == self._saved and offset == self._saved_offset:
                return
            if not place.line_hash:
                place = Head(place.offset, await reader.read_line_hash_before(place.offset) or "")
            # In one go, and under the lock: the state can't change.
            state = encode_state(self.state)
            await in_thread(self._check_reads_back, state)
            line_hash = place.line_hash if 0 < offset < NOWHERE else ""
            snapshot = Snapshot(
                None, offset, line_hash, place.offset, place.line_hash, self._version, query=self._query
            )
            await self._store(encode(snapshot, state), reader)
            self._saved, self._saved_offset, self._saved_size = place, offset, len(state)
            self._retry_interval = RETRY_INTERVAL
        except Exception as error:
            self._next_try = monotonic() + self._retry_interval
            self._retry_interval = min(2 * self._retry_interval, LAST_RETRY_INTERVAL)
            logger.warning("the snapshot of view %r could not be written: %s", self._name, error)

    async def _store(self, data: bytes, reader: EventReader) -> None:
        """Replaces the snapshot, unless another process has saved one of a later place in the log."""
        documents = reader.documents
        lock = None
        if isinstance(documents, LockingDocuments):
            for _ in range(_LOCK_ATTEMPTS):
                lock = await documents.lock("view", self._name)
                if lock is not None:
                    break
                await asyncio.sleep(_LOCK_INTERVAL)
            else:
                raise BlockingIOError("another process has been saving a snapshot for seconds")
        try:
            if not await self._is_older(reader):
                await documents.store("view", self._name, data)
        finally:
            if lock is not None:
                lock.release()

    async def _is_older(self, reader: EventReader) -> bool:
        """Whether this view stands before the stored snapshot, which it could start from."""
        try:
            found = await self._stored(reader)
            if found is None or (found.position or 0) <= self.offset:
                return False
            await self._place_of(found, reader)
        except (BadSnapshotError, CorruptLogError):
            return False
        return found.offset == offset_for_the_crate(found.position or 0, await reader.base())

    def _check_reads_back(self, encoded: bytes) -> None:
        read = decode_state(encoded, Any if self._state_type is None else self._state_type)
        found = difference(self.state, read)
        if found is not None:
            raise ValueError(f"its state would read back as another one ({found}); give the view a fitting state_type")

    def _worth_saving(self) -> bool:
        if monotonic() < self._next_try:
            return False
        if self._saved is None:
            return self.offset > 0
        return self.offset - self._saved.offset >= max(SAVE_AFTER, self._saved_size)


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


def _as_json(query: Query) -> list[dict[str, list[str]]]:
    named = ({"types": sorted(item.types), "tags": sorted(item.tags)} for item in query.items)
    return [{name: values for name, values in item.items() if values} for item in named]


def _selected(query: Any) -> str:
    if query is None:
        return "all events"
    try:
        if any("tags" in part for part in query):
            return "events that match " + " | ".join(str(part) for part in query)
        return "events of the types " + ", ".join(repr(type) for part in query for type in part["types"])
    except (TypeError, KeyError):
        return f"the query {query!r}"


def offset_for_the_crate(position: int, base: int) -> int:
    """The offset in the active log that tells the Rust crate where a snapshot stands.

    To the crate, the whole active log is still to be read where the snapshot ends at its base; what lies before that
    can't be told in its terms.
    """
    return NOWHERE if position < base else position - base


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
        if unloaded:
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
            if save and view._worth_saving():
                await view._save(reader)
    finally:
        for view in locked:
            view._lock.release()
    return errors


async def _save_before_failure(view: View[Any], offset: int, head: int, reader: EventReader) -> None:
    """Saves the state before an event whose reducer raised, so that the next attempt begins there."""
    if view.offset < offset <= head and monotonic() >= view._next_try:
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
