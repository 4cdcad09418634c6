"""The snapshot of one view: whether it can be used, and when it should be written.

Promises: a snapshot is used only if the log before it is still the same and the view still selects the same events; one
is written only if its state reads back the same; one of an earlier place in the log never replaces a later one,
whichever process saved that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Any, Generic, TypeVar

from ._engine import LockingDocuments
from ._errors import CorruptLogError
from ._event import Head
from ._logging import WARNING, log_event
from ._parts import PART, Pause
from ._query import Query
from ._reader import EventReader
from ._state import difference
from ._threads import in_thread
from .snapshot import NOWHERE, BadSnapshotError, Snapshot, decode_state, encode_whole, parse

S = TypeVar("S")

# Bytes of log after which a refresh saves a snapshot; for a state that is larger when encoded, its size.
SAVE_AFTER = 64 * 1024
# Seconds before a refresh tries again to save what could not be saved; each further failure doubles them.
RETRY_INTERVAL, LAST_RETRY_INTERVAL = 1.0, 300.0

# How often, and after how many seconds, to try while another process is saving a snapshot.
_LOCK_ATTEMPTS, _LOCK_INTERVAL = 200, 0.01


class ViewSnapshot(Generic[S]):
    """The stored snapshot of a view, whose state is of `state_type` (None: any), from events that `query` selects."""

    def __init__(self, name: str, state_type: Any, version: int | str, query: Query | None) -> None:
        self._name = name
        self._state_type = Any if state_type is None else state_type
        self._version = version
        # As in the snapshot: alternatives, of which an event must match one; None for every event.
        self._query = None if query is None else _as_json(query)
        self._next_try, self._retry_interval = 0.0, RETRY_INTERVAL
        self.forget()

    def forget(self) -> None:
        """Forgets what is stored, since the view has a different state from now on."""
        self._saved: Head | None = None
        self._saved_offset: int | None = None  # the offset for the Rust crate in the snapshot on disk
        self._saved_size = 0

    def worth_saving(self, offset: int) -> bool:
        """Whether a refresh up to an offset should save a snapshot there."""
        if not self.may_save:
            return False
        if self._saved is None:
            return offset > 0
        return offset - self._saved.offset >= max(SAVE_AFTER, self._saved_size)

    @property
    def may_save(self) -> bool:
        """Whether the last attempt to save it succeeded, or is long enough ago to try again."""
        return monotonic() >= self._next_try

    async def load(self, reader: EventReader) -> tuple[S, Head] | None:
        """The stored state, and its place in the log; None if there is none that can be used."""
        self.forget()
        try:
            snapshot = await self._stored(reader)
            if snapshot is None:
                return None
            place = await self._place_of(snapshot, reader)
            encoded = snapshot.state
            state = self.decode(encoded) if len(encoded) < PART else await in_thread(self.decode, encoded, Pause())
        except (BadSnapshotError, CorruptLogError, OSError) as error:
            log_event(
                WARNING,
                "snapshot.rejected",
                "view '%(view)s' is rebuilt, its snapshot is not used: %(error)s",
                view=self._name,
                error=error,
            )
            return None
        self._saved, self._saved_offset, self._saved_size = place, snapshot.offset, len(snapshot.state)
        return state, place

    def is_of_this_view(self, snapshot: Snapshot) -> bool:
        """Whether a snapshot is of the same version and was made from the same events."""
        return snapshot.version == self._version and snapshot.query == self._query

    def decode(self, state: bytes | memoryview, pause: Callable[[], object] = lambda: None) -> S:
        """A state that was stored. Raises `BadSnapshotError`. `pause` is called between the parts of a large one."""
        kind = self._state_type
        try:
            decoded: S = decode_state(state, kind, pause)
        except Exception as error:
            raise BadSnapshotError(
                f"its state can't be decoded into {getattr(kind, '__qualname__', kind)}: {error} "
                "(change the view's version when the shape of its state changes)"
            ) from error
        return decoded

    async def save(self, state: S, place: Head, reader: EventReader) -> None:
        """Writes the snapshot of a state at a place in the log, unless it is there already.

        The caller makes sure that the state does not change meanwhile. A failure is logged as a warning.
        """
        try:
            base = await reader.base()
            offset = offset_for_the_crate(place.offset, base)
            if place == self._saved and offset == self._saved_offset:
                return
            if not place.line_hash:
                place = Head(place.offset, await reader.read_line_hash_before(place.offset) or "")
            line_hash = place.line_hash if 0 < offset < NOWHERE else ""
            snapshot = Snapshot(
                None, offset, line_hash, place.offset, place.line_hash, self._version, query=self._query
            )
            data, size = await in_thread(self._encode, state, snapshot)
            await self._store(data, place.offset, reader)
            self._saved, self._saved_offset, self._saved_size = place, offset, size
            self._retry_interval = RETRY_INTERVAL
        except Exception as error:
            self._next_try = monotonic() + self._retry_interval
            self._retry_interval = min(2 * self._retry_interval, LAST_RETRY_INTERVAL)
            log_event(
                WARNING,
                "snapshot.write_failed",
                "the snapshot of view '%(view)s' could not be written: %(error)s",
                view=self._name,
                error=error,
            )

    async def _stored(self, reader: EventReader) -> Snapshot | None:
        """The stored snapshot, its state still encoded; None if there is none. Raises `BadSnapshotError`, `OSError`."""
        data = await reader.documents.load("view", self._name)
        if data is None:
            return None
        return parse(data) if len(data) < PART else await in_thread(parse, data)

    async def _place_of(self, snapshot: Snapshot, reader: EventReader) -> Head:
        """A snapshot's place in the whole log, if the log before it is the one from which it was made."""
        if snapshot.version != self._version:
            raise BadSnapshotError(f"it is of version {snapshot.version!r}, the view of version {self._version!r}")
        if snapshot.query != self._query:
            raise BadSnapshotError(
                f"it was made from {_selected(snapshot.query)}, but the view selects {_selected(self._query)}"
            )
        position, expected = snapshot.position, snapshot.position_hash
        if position is None:
            if snapshot.offset <= 0:
                raise BadSnapshotError("it was written elsewhere, and has no offset in the whole log")
            position, expected = await reader.base() + snapshot.offset, snapshot.hash
        try:
            found = await reader.read_line_hash_before(position)
        except ValueError as error:
            raise BadSnapshotError(f"it is not of this log: {error}") from error
        if (found or "") != expected:
            raise BadSnapshotError(f"the log before offset {position} is not the one from which it was made")
        return Head(position, found or "")

    async def _store(self, data: bytes, position: int, reader: EventReader) -> None:
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
            if not await self._is_later(position, reader):
                await documents.store("view", self._name, data)
        finally:
            if lock is not None:
                lock.release()

    async def _is_later(self, position: int, reader: EventReader) -> bool:
        """Whether the stored snapshot is of a later place in the log, and the view could start from it."""
        try:
            found = await self._stored(reader)
            if found is None or (found.position or 0) <= position:
                return False
            await self._place_of(found, reader)
        except (BadSnapshotError, CorruptLogError):
            return False
        return found.offset == offset_for_the_crate(found.position or 0, await reader.base())

    def _encode(self, state: S, snapshot: Snapshot) -> tuple[bytes, int]:
        """Encodes the file, in a thread; returns it, and how many bytes of it are the state.

        Raises if the state would read back differently.
        """
        pause = Pause()
        data, encoded = encode_whole(snapshot, state, pause)
        found = difference(state, decode_state(encoded, self._state_type, pause), pause)
        if found is not None:
            raise ValueError(f"its state would not read back the same ({found}); give the view a fitting state_type")
        return data, len(encoded)


def offset_for_the_crate(position: int, base: int) -> int:
    """The offset in the active log from which the Rust crate continues.

    For a snapshot at the base, the crate still has to read the whole active log; an earlier place can't be expressed in
    its terms.
    """
    return NOWHERE if position < base else position - base


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
