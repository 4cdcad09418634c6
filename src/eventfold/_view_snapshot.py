"""The snapshot of one view: when it can be used, and when it is written.

Promises: a snapshot is used only if the log before its offset is still the same and the view still selects the same
events; it is written only if its state reads back the same; it never replaces a snapshot with a later offset, no matter
which process wrote that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Any, Generic, TypeVar

from msgspec import structs

from ._chunks import CHUNK_SIZE, Pause
from ._documents import LockingDocuments
from ._errors import CorruptLogError
from ._event import Head
from ._logging import WARNING, log_event
from ._query import Query
from ._reader import EventReader
from ._round_trip import difference
from ._threads import in_thread
from .snapshot import BEYOND_ANY_FILE, BadSnapshotError, Snapshot, decode_state, encode, encode_whole, parse

S = TypeVar("S")

# A refresh saves a snapshot after this number of bytes of the log, or after the number of bytes of the encoded state if
# that is larger.
SAVE_AFTER = 64 * 1024
# Seconds before a refresh tries again to save a snapshot after a failure. Each further failure doubles the interval, up
# to the second value.
RETRY_INTERVAL, MAX_RETRY_INTERVAL = 1.0, 300.0

# How many times the lock is tried while another process holds it, and the seconds between two attempts.
_LOCK_ATTEMPTS, _LOCK_INTERVAL = 200, 0.01


class ViewSnapshot(Generic[S]):
    """The stored snapshot of a view. The state is of `state_type` (None: any), folded from the events of `query`."""

    def __init__(self, name: str, state_type: Any, version: int | str, query: Query | None) -> None:
        self._name = name
        self._state_type = Any if state_type is None else state_type
        self._version = version
        # In the form that a snapshot contains.
        self._query = None if query is None else _as_json(query)
        self._next_try, self._retry_interval = 0.0, RETRY_INTERVAL
        self.forget()

    def forget(self) -> None:
        """Forgets what is stored, because the view starts from a different state."""
        # The head up to which the state in the stored snapshot was folded, its offset for the Rust crate, and the size
        # of the encoded state.
        self._saved: Head | None = None
        self._saved_crate_offset: int | None = None
        self._saved_size = 0

    def worth_saving(self, offset: int) -> bool:
        """Whether a refresh should save a snapshot of the state up to this offset."""
        if not self.may_save:
            return False
        if self._saved is None:
            return offset > 0
        return offset - self._saved.offset >= max(SAVE_AFTER, self._saved_size)

    @property
    def may_save(self) -> bool:
        """Whether the last attempt to save the snapshot succeeded, or was made long enough ago to try again."""
        return monotonic() >= self._next_try

    async def load(self, reader: EventReader) -> tuple[S, Head] | None:
        """The stored state, and the head up to which it was folded; None if there is no snapshot that can be used."""
        self.forget()
        try:
            snapshot = await self._stored(reader)
            if snapshot is None:
                return None
            head = await self._check(snapshot, reader)
            encoded = snapshot.state
            state = (
                self.decode(encoded) if len(encoded) < CHUNK_SIZE else await in_thread(self.decode, encoded, Pause())
            )
        except (BadSnapshotError, CorruptLogError, OSError) as error:
            log_event(
                WARNING,
                "snapshot.rejected",
                "view '%(view)s' is rebuilt, since its snapshot can't be used: %(error)s",
                view=self._name,
                error=error,
            )
            return None
        self._saved, self._saved_crate_offset, self._saved_size = head, snapshot.offset, len(snapshot.state)
        return state, head

    def is_of_this_view(self, snapshot: Snapshot) -> bool:
        """Whether a snapshot has the view's version and was made from the events that the view selects."""
        return snapshot.version == self._version and snapshot.query == self._query

    def decode(self, state: bytes | memoryview, pause: Callable[[], object] = lambda: None) -> S:
        """Decodes a stored state. Raises `BadSnapshotError`. `pause` is called after each chunk of a large state."""
        kind = self._state_type
        try:
            decoded: S = decode_state(state, kind, pause)
        except Exception as error:
            raise BadSnapshotError(
                f"its state can't be decoded into {getattr(kind, '__qualname__', kind)}: {error} "
                "(change the view's version when the shape of its state changes)"
            ) from error
        return decoded

    async def save(self, state: S, head: Head, reader: EventReader) -> None:
        """Writes the snapshot of a state that was folded up to a head, unless that snapshot is stored already.

        The state must not change until this returns. A failure is logged as a warning.
        """
        try:
            offset = crate_offset(head.offset, await reader._base())
            if head == self._saved and offset == self._saved_crate_offset:
                return
            if not head.line_hash:
                head = Head(head.offset, await reader.read_line_hash_before(head.offset) or "")
            line_hash = head.line_hash if 0 < offset < BEYOND_ANY_FILE else ""
            snapshot = Snapshot(None, offset, line_hash, head.offset, head.line_hash, self._version, query=self._query)
            data, size = await in_thread(self._encode, state, snapshot)
            await self._store(data, head.offset, reader)
            self._saved, self._saved_crate_offset, self._saved_size = head, offset, size
            self._retry_interval = RETRY_INTERVAL
        except Exception as error:
            self._next_try = monotonic() + self._retry_interval
            self._retry_interval = min(2 * self._retry_interval, MAX_RETRY_INTERVAL)
            log_event(
                WARNING,
                "snapshot.write_failed",
                "the snapshot of view '%(view)s' could not be written: %(error)s",
                view=self._name,
                error=error,
            )

    async def _stored(self, reader: EventReader) -> Snapshot | None:
        """The stored snapshot, its state still encoded; None if there is none. Raises `BadSnapshotError`, `OSError`."""
        data = await reader._documents.load("view", self._name)
        if data is None:
            return None
        return parse(data) if len(data) < CHUNK_SIZE else await in_thread(parse, data)

    async def _check(self, snapshot: Snapshot, reader: EventReader) -> Head:
        """Returns the head up to which a snapshot was folded, if the log before that head is still the same.

        Raises `BadSnapshotError` if it is not, or if the snapshot is not of this view.
        """
        if snapshot.version != self._version:
            raise BadSnapshotError(f"it has version {snapshot.version!r}, but the view has version {self._version!r}")
        if snapshot.query != self._query:
            raise BadSnapshotError(
                f"it was made from {_selected(snapshot.query)}, but the view selects {_selected(self._query)}"
            )
        position, expected = snapshot.position, snapshot.position_hash
        if position is None:
            if snapshot.offset <= 0:
                raise BadSnapshotError("another program wrote it, without an offset in the whole log")
            position, expected = await reader._base() + snapshot.offset, snapshot.hash
        try:
            found = await reader.read_line_hash_before(position)
        except ValueError as error:
            raise BadSnapshotError(f"it is not of this log: {error}") from error
        if (found or "") != expected:
            raise BadSnapshotError(f"the log before offset {position} is not the one from which it was made")
        return Head(position, found or "")

    async def _store(self, data: bytes, position: int, reader: EventReader) -> None:
        """Replaces the stored snapshot, unless another process has stored one with a later offset."""
        documents = reader._documents
        lock = None
        if isinstance(documents, LockingDocuments):
            for _ in range(_LOCK_ATTEMPTS):
                lock = await documents.lock("view", self._name)
                if lock is not None:
                    break
                await asyncio.sleep(_LOCK_INTERVAL)
            else:
                raise BlockingIOError("another process has been saving a snapshot of this view for seconds")
        try:
            if not await self._has_later(position, reader):
                await documents.store("view", self._name, data)
        finally:
            if lock is not None:
                lock.release()

    async def _has_later(self, position: int, reader: EventReader) -> bool:
        """Whether a snapshot with a later offset is stored, and the view could start from it."""
        try:
            found = await self._stored(reader)
            if found is None or (found.position or 0) <= position:
                return False
            await self._check(found, reader)
        except (BadSnapshotError, CorruptLogError):
            return False
        return found.offset == crate_offset(found.position or 0, await reader._base())

    def _encode(self, state: S, snapshot: Snapshot) -> tuple[bytes, int]:
        """Encodes a snapshot with a state. Also returns the number of bytes of the encoded state. Blocks.

        Raises `ValueError` if the state would read back differently.
        """
        pause = Pause()
        data, encoded = encode_whole(snapshot, state, pause)
        found = difference(state, decode_state(encoded, self._state_type, pause), pause)
        if found is not None:
            raise ValueError(f"its state would not read back the same ({found}); give the view a state_type that fits")
        return data, len(encoded)


def crate_offset(position: int, base: int) -> int:
    """The offset in the active log from which the Rust crate continues, for a state folded up to `position`.

    At the base, it is 0: the crate reads the whole active log. A position before the base has no offset in the active
    log.
    """
    return BEYOND_ANY_FILE if position < base else position - base


def with_base(snapshot: Snapshot, base: int) -> bytes:
    """Encodes a snapshot, whose state is encoded already, for a copy of the log in which `app.jsonl` begins at `base`.

    Raises `BadSnapshotError` if the Rust crate wrote the snapshot, which then has no position in the whole log.
    """
    if snapshot.position is None:
        raise BadSnapshotError("another program wrote it, without an offset in the whole log")
    offset = crate_offset(snapshot.position, base)
    hash = snapshot.position_hash if 0 < offset < BEYOND_ANY_FILE else None
    return encode(structs.replace(snapshot, state=None, offset=offset, hash=hash or ""), snapshot.state)


def _as_json(query: Query) -> list[dict[str, list[str]]]:
    named = ({"types": sorted(item.types), "tags": sorted(item.tags)} for item in query.items)
    return [{name: values for name, values in item.items() if values} for item in named]


def _selected(query: Any) -> str:
    """Describes the events that the query in a snapshot selects."""
    if query is None:
        return "all events"
    try:
        if any("tags" in item for item in query):
            return "events that match " + " | ".join(str(item) for item in query)
        return "events of the types " + ", ".join(repr(type) for item in query for type in item["types"])
    except (TypeError, KeyError):
        return f"the query {query!r}"
