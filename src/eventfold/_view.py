"""`View`: a state derived from the log by folding a reducer over its events.

Promises: the state is always that of the log up to `offset`, whatever fails or is cancelled; each event is folded once;
a snapshot is believed only where the log before it is still the same, else the view is rebuilt, with a warning that
says why; a snapshot never holds a state that would read back as another.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable
from contextlib import aclosing
from dataclasses import fields, is_dataclass
from operator import length_hint
from typing import Any, Generic, TypeAlias, TypeVar

import msgspec

from ._aio import in_thread
from ._codec.decode import Slice
from ._engine import check_name
from ._errors import CorruptLogError, ReducerError
from ._event import Event, Head
from ._reader import EventReader
from .snapshot import NOWHERE, BadSnapshotError, Snapshot, decode_state, encode, encode_state, parse

logger = logging.getLogger("eventfold")

S = TypeVar("S")
ReduceFn: TypeAlias = Callable[[S, Event], S]

# Bytes of log after which a refresh saves a snapshot; for a state that is larger when encoded, as many as it has.
SAVE_AFTER = 64 * 1024


class View(Generic[S]):
    """A named state that `reducer` gives for the log up to `offset`.

    `initial` is the state before the first event: a value, of which every (re)build gets its own copy, or a callable
    without arguments that makes one. `state_type` says what a stored state is decoded into; without it, the type of the
    initial state. `version` is stored with the state: another one means a rebuild. `event_types` names the only types
    that the reducer looks at; events of others are passed over without decoding them.

    Raises `ValueError` for a name that can't be a file's.
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
    ) -> None:
        if isinstance(event_types, str):
            raise ValueError(f"event_types must be a collection of types, not the string {event_types!r}")
        self._name = check_name("view", name)
        self._reducer = reducer
        self._initial = initial
        self._state = self._new_state()
        self._state_type = type(self._state) if state_type is None and self._state is not None else state_type
        self._version = version
        self.event_types = None if event_types is None else frozenset(event_types)
        self._place = Head(0, "")
        self._folded = 0
        self._loaded = False
        self._saved: Head | None = None
        self._saved_offset: int | None = None  # what the snapshot on disk tells the Rust crate
        self._saved_size = 0
        self._lock = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<View {self._name!r} at offset {self.offset}>"

    @property
    def name(self) -> str:
        """The view's name, which is also that of its snapshot."""
        return self._name

    @property
    def state(self) -> S:
        """The state up to `offset`. No I/O."""
        return self._state

    @property
    def offset(self) -> int:
        """The offset (bytes in the whole log) up to which the events are folded."""
        return self._place.offset

    @property
    def folded(self) -> int:
        """How many events this object has folded; the state is another one only where this is."""
        return self._folded

    def _new_state(self) -> S:
        initial: Any = self._initial
        state: S = initial() if callable(initial) else copy.deepcopy(initial)
        return state

    async def refresh(self, reader: EventReader) -> S:
        """Folds what is new, from the snapshot on where nothing was folded yet; the state then.

        Raises `ReducerError` (the view then stands before the event that its reducer could not take), `CorruptLogError`
        and `OSError`. Cancelled, the view keeps what it has folded.
        """
        if self._loaded and await reader.head() == self._place:
            return self._state
        await refresh_together([self], reader)
        return self._state

    async def rebuild(self, reader: EventReader) -> S:
        """Folds the whole log anew, without the snapshot, and replaces that. Raises and is cancelled as `refresh`."""
        await self.refold(reader)
        await self.save(reader)
        return self._state

    async def refold(self, reader: EventReader) -> None:
        """The same as `rebuild`, but leaves the snapshot on disk as it is."""
        async with self._lock:
            self._restart()
        await refresh_together([self], reader, save=False)

    async def save(self, reader: EventReader) -> None:
        """Writes the snapshot of what is folded, unless it is on disk already.

        A failure is logged as a warning: the snapshot is worth only the time to make the state again.
        """
        async with self._lock:
            await self._save(reader)

    def _restart(self) -> None:
        self._state, self._place, self._loaded, self._saved = self._new_state(), Head(0, ""), True, None
        self._folded += 1

    async def _load(self, reader: EventReader) -> None:
        """Starts from the snapshot, if it can be believed."""
        try:
            data = await reader.documents.load("view", self._name)
            snapshot = None if data is None else parse(data)
            if snapshot is not None:
                place = await self._place_of(snapshot, reader)
                try:
                    state = decode_state(snapshot.state, Any if self._state_type is None else self._state_type)
                except Exception as error:
                    raise BadSnapshotError(f"its state is no {self._state_type}: {error}") from error
                self._state, self._place, self._saved = state, place, place
                self._saved_offset, self._saved_size = snapshot.offset, len(snapshot.state)
                self._folded += 1
        except (BadSnapshotError, CorruptLogError, OSError) as error:
            logger.warning("view %r is rebuilt, its snapshot is not used: %s", self._name, error)
        self._loaded = True

    async def _place_of(self, snapshot: Snapshot, reader: EventReader) -> Head:
        """Where in the whole log a snapshot stands, if the log before it is the one that it was made of."""
        if snapshot.version != self._version:
            raise BadSnapshotError(f"it is of version {snapshot.version!r}, the view of version {self._version!r}")
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

    def fold(self, piece: Slice) -> None:
        """Folds a slice that begins where the view stands. Raises `ReducerError`."""
        wanted = self.event_types
        events: list[Any] = piece.events
        if wanted is not None and wanted != piece.types:
            events = [event for event in events if event.type in wanted]
        state, reducer, rest = self._state, self._reducer, iter(events)
        try:
            for event in rest:
                state = reducer(state, event)
        except Exception as error:
            index = len(events) - length_hint(rest) - 1
            records = [record for record in piece.records() if wanted is None or record.event.type in wanted]
            self._state, self._folded = state, self._folded + index
            self._place = Head(records[index].start_offset, "")
            raise ReducerError(self._name, records[index].start_offset) from error
        self._state = state
        self._folded += len(events)
        self._place = Head(piece.end_offset, piece.last_line_hash)

    async def _save(self, reader: EventReader) -> None:
        place = self._place
        try:
            base = await reader.base()
            # To the Rust crate, the whole active log is to be read where its part of the state ends at the base.
            offset = NOWHERE if place.offset < base else place.offset - base
            if not place.offset or (place == self._saved and offset == self._saved_offset):
                return
            if not place.line_hash and place.offset:
                place = Head(place.offset, await reader.read_line_hash_before(place.offset) or "")
            # In one go, and under the lock: the state can't change.
            state = encode_state(self._state)
            await in_thread(self._check_reads_back, state)
            snapshot = Snapshot(
                None,
                offset,
                place.line_hash if 0 < offset < NOWHERE else "",
                place.offset,
                place.line_hash,
                self._version,
            )
            await reader.documents.store("view", self._name, encode(snapshot, state))
            self._saved, self._saved_offset, self._saved_size = place, offset, len(state)
        except Exception as error:
            logger.warning("the snapshot of view %r could not be written: %s", self._name, error)

    def _check_reads_back(self, encoded: bytes) -> None:
        state = decode_state(encoded, Any if self._state_type is None else self._state_type)
        if not _deep_equal(state, self._state):
            raise ValueError("its state would read back as another one; give the view a state_type that fits it")

    def _worth_saving(self) -> bool:
        if self._saved is None:
            return self.offset > 0
        return self.offset - self._saved.offset >= max(SAVE_AFTER, self._saved_size)


def _deep_equal(one: Any, other: Any) -> bool:
    """Whether two states are equal and of the same types all through: a Counter equals a dict, and acts otherwise."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return len(one) == len(other) and all(key in other and _deep_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple | deque):
        if isinstance(one, deque) and one.maxlen != other.maxlen:
            return False
        return len(one) == len(other) and all(map(_deep_equal, one, other))
    if isinstance(one, msgspec.Struct):
        return all(_deep_equal(getattr(one, name), getattr(other, name)) for name in one.__struct_fields__)
    if is_dataclass(one):
        return all(_deep_equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    return bool(one == other)


async def refresh_together(views: Iterable[View[Any]], reader: EventReader, *, save: bool = True) -> None:
    """Refreshes several views at once; those that stand at the same offset share one pass over the log.

    With `save`, writes the snapshots that are worth it by now. Raises the first error when all are done: a reducer that
    raises holds up no other view.
    """
    views = list(views)
    locked: list[View[Any]] = []
    errors: list[Exception] = []
    try:
        for view in sorted(views, key=lambda view: view.name):  # one order for all, so that nobody waits in a circle
            await view._lock.acquire()
            locked.append(view)
        unloaded = [view for view in views if not view._loaded]
        if unloaded:
            await asyncio.gather(*(view._load(reader) for view in unloaded))
        head = (await reader.head()).offset
        for group in _by_offset(views, head):
            try:
                if group[0].offset > head:
                    raise CorruptLogError(
                        reader._source.location, head, f"the log ends here, and {group[0]!r} was there"
                    )
                errors += await _fold(group, reader)
            except Exception as error:
                errors.append(error)
        for view in views:
            if save and view._worth_saving():
                await view._save(reader)
    finally:
        for view in locked:
            view._lock.release()
    if errors:
        raise errors[0]


def _by_offset(views: Iterable[View[Any]], head: int) -> list[list[View[Any]]]:
    groups: dict[int, list[View[Any]]] = {}
    for view in views:
        if view.offset != head:
            groups.setdefault(view.offset, []).append(view)
    return list(groups.values())


async def _fold(views: list[View[Any]], reader: EventReader) -> list[Exception]:
    """One pass over the log for views that stand at one offset; the errors of those whose reducer raised."""
    types: set[str] | None = set()
    for view in views:
        types = None if types is None or view.event_types is None else types | view.event_types
    errors: list[Exception] = []
    going = list(views)
    after = next((view._place.line_hash for view in views if view._place.line_hash), "")
    async with aclosing(reader.read_slices(views[0].offset, types=types, after=after)) as slices:
        async for piece in slices:
            for view in list(going):
                try:
                    view.fold(piece)
                except ReducerError as error:
                    errors.append(error)
                    going.remove(view)
            if not going:
                break
    return errors
