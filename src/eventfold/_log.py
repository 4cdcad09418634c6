"""`EventLog`: the writer, the reader and the views of one directory together; what most programs use.

Promise: nothing here but their composition; what a method promises is what the part that it belongs to promises.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from ._address import Address
from ._aio import AsyncOpener, UncancellableTask, uninterrupted
from ._codec.decode import Slice
from ._consumer import Consumer
from ._engine import LockMode, SyncMode
from ._errors import EventfoldError, UnknownViewError
from ._event import AppendResult, Event, Head, Record
from ._reader import EventReader, WaitResult
from ._view import ReduceFn, View, refresh_together
from ._writer import EventWriter, ViewOps

S = TypeVar("S")


class EventLog:
    """A log with its views. Open it with `EventLog.open` or `EventLog.builder`.

    It has everything of `EventWriter` and of `EventReader`, which say what is raised and what a cancellation does.
    Offsets are bytes in the whole log.
    """

    def __init__(self, reader: EventReader, writer: EventWriter | None, views: Mapping[str, View[Any]]) -> None:
        self._reader = reader
        self._writer_or_none = writer
        self._views = MappingProxyType(dict(views))

    @classmethod
    def open(
        cls,
        dir: Address,
        *,
        views: Iterable[View[Any]] = (),
        read_only: bool = False,
        max_log_size: int = 0,
        lock: LockMode = LockMode.FLOCK,
        sync: SyncMode = SyncMode.ALWAYS,
        max_event_size: int = 16 * 2**20,
    ) -> AsyncOpener[EventLog]:
        """Opens the directory and brings the views up to date. Await it, or use it in `async with`.

        The other options are those of `EventWriter.open`. With `read_only` there is no writer: views, tails and watches
        work beside another process that writes, and whatever would write raises `EventfoldError`.

        Raises what `EventWriter.open` and `refresh_all` raise, and `ValueError` for two views of one name.
        """
        registered: dict[str, View[Any]] = {}
        for view in views:
            if view.name in registered:
                raise ValueError(f"two views are named {view.name!r}")
            registered[view.name] = view
        opening = EventWriter.open(dir, lock=lock, sync=sync, max_log_size=max_log_size, max_event_size=max_event_size)

        async def open_() -> EventLog:
            writer = None if read_only else await opening
            log = cls(EventReader(dir) if writer is None else writer.reader(), writer, registered)
            try:
                await log.refresh_all()
            except BaseException:
                await uninterrupted(UncancellableTask(log.aclose(), "eventfold close"))
                raise
            if writer is not None:
                writer.attach(registered.values())
            return log

        return AsyncOpener(open_)

    @classmethod
    def builder(cls, dir: Address) -> EventLogBuilder:
        """The same, said step by step."""
        return EventLogBuilder(dir)

    def __repr__(self) -> str:
        return f"<EventLog of {str(self._reader._source.location)!r}, views: {', '.join(self._views) or 'none'}>"

    async def aclose(self) -> None:
        """Closes the log: see `EventWriter.aclose`; the snapshots are saved first. Tails and watches end."""
        if self._writer_or_none is not None:
            await self._writer_or_none.aclose()
        else:
            self._reader.end_waits()

    @property
    def _writer(self) -> EventWriter:
        if self._writer_or_none is None:
            raise EventfoldError(f"the log in {self.dir} was opened read-only")
        return self._writer_or_none

    # Views

    @property
    def views(self) -> Mapping[str, View[Any]]:
        """The registered views by name."""
        return self._views

    def _view(self, name: str) -> View[Any]:
        try:
            return self._views[name]
        except KeyError:
            raise UnknownViewError(name) from None

    def view(self, name: str) -> Any:
        """The state of a view as of its last refresh. No I/O. Raises `UnknownViewError`."""
        return self._view(name).state

    async def refresh_all(self) -> None:
        """Brings all views up to the head, in one pass where they stand at the same offset.

        Raises the first `ReducerError` once all others are done; see `View.refresh`.
        """
        await refresh_together(self._views.values(), self._reader, save=self._writer_or_none is not None)

    async def rebuild(self, name: str) -> Any:
        """Makes a view's state anew from the whole log. Raises `UnknownViewError`, and what `View.rebuild` raises."""
        view = self._view(name)
        if self._writer_or_none is not None:
            return await view.rebuild(self._reader)
        await view.refold(self._reader)
        return view.state

    async def wait_until(self, name: str, offset: int) -> Any:
        """A view's state as soon as it includes everything before `offset`: read your own writes.

        Raises `UnknownViewError`, `LogClosedError` when the log is closed first, and what `View.refresh` raises.
        """
        view = self._view(name)
        while view.offset < offset:
            await self._refresh(view)
            if view.offset < offset:
                await self._reader.wait_for_events(view.offset)
        return view.state

    async def watch(self, name: str) -> AsyncIterator[Any]:
        """A view's state now, then each newer one, until the log is closed; who is slow sees only the latest.

        Raises `UnknownViewError`, and what `View.refresh` raises.
        """
        view = self._view(name)
        seen = None
        async for _ in self._reader.head_changes():
            await self._refresh(view)
            if view.folded != seen:
                seen = view.folded
                yield view.state

    async def _refresh(self, view: View[Any]) -> None:
        await refresh_together([view], self._reader, save=self._writer_or_none is not None)

    # The writer's

    @property
    def dir(self) -> Path:
        """The data directory."""
        return self._reader.dir

    @property
    def log_path(self) -> Path:
        """The active log, `app.jsonl`."""
        return self._reader.log_path

    @property
    def archive_path(self) -> Path:
        """The archive, `archive.jsonl.zst`; it may not exist yet."""
        return self._reader.archive_path

    @property
    def views_dir(self) -> Path:
        """Where the snapshots are; it may not exist yet."""
        return self._reader.views_dir

    def reader(self) -> EventReader:
        """A reader of this directory, whose tails and waits end when this log is closed."""
        return self._reader

    async def append(self, event: Event) -> AppendResult:
        """See `EventWriter.append`."""
        return await self._writer.append(event)

    async def append_many(self, events: Iterable[Event]) -> list[AppendResult]:
        """See `EventWriter.append_many`."""
        return await self._writer.append_many(events)

    async def append_if(self, event: Event, expected_offset: int, expected_hash: str) -> AppendResult:
        """See `EventWriter.append_if`."""
        return await self._writer.append_if(event, expected_offset, expected_hash)

    async def rotate(self, views: Iterable[ViewOps] | None = None) -> None:
        """See `EventWriter.rotate`; rewrites the snapshots of the registered views."""
        await self._writer.rotate(self._views.values() if views is None else views)

    @property
    def head(self) -> Head:
        """See `EventWriter.head`. A read-only log has none without I/O: ask its `reader().head()`."""
        return self._writer.head

    # The reader's

    def read_from(self, offset: int = 0) -> AsyncIterator[Record]:
        """See `EventReader.read_from`."""
        return self._reader.read_from(offset)

    def read_full(self) -> AsyncIterator[Record]:
        """See `EventReader.read_full`."""
        return self._reader.read_full()

    def read_slices(
        self, offset: int = 0, *, types: Collection[str] | None = None, after: str = ""
    ) -> AsyncGenerator[Slice, None]:
        """See `EventReader.read_slices`."""
        return self._reader.read_slices(offset, types=types, after=after)

    def tail(self, offset: int | None = None) -> AsyncIterator[Record]:
        """See `EventReader.tail`."""
        return self._reader.tail(offset)

    def consumer(self, name: str, *, start: int | None = 0) -> Consumer:
        """A named reader whose place is kept on disk; without a commit yet it begins at `start` (None: now).

        Raises `ValueError` for a name that can't be a file's.
        """
        return Consumer(self._reader, name, start=start)

    async def wait_for_events(self, offset: int, timeout: float | None = None) -> WaitResult:
        """See `EventReader.wait_for_events`."""
        return await self._reader.wait_for_events(offset, timeout)

    async def has_new_events(self, offset: int) -> bool:
        """See `EventReader.has_new_events`."""
        return await self._reader.has_new_events(offset)

    async def active_log_size(self) -> int:
        """See `EventReader.active_log_size`."""
        return await self._reader.active_log_size()

    async def read_line_hash_before(self, offset: int) -> str | None:
        """See `EventReader.read_line_hash_before`."""
        return await self._reader.read_line_hash_before(offset)


class EventLogBuilder:
    """The options of `EventLog.open`, one call each; every call returns the builder."""

    def __init__(self, dir: Address) -> None:
        self._dir = dir
        self._views: list[View[Any]] = []
        self._max_log_size = 0
        self._lock = LockMode.FLOCK
        self._sync = SyncMode.ALWAYS

    def __repr__(self) -> str:
        return f"<EventLogBuilder of {str(self._dir)!r}>"

    def view(
        self,
        name: str,
        reducer: ReduceFn[S],
        initial: S | Callable[[], S],
        *,
        state_type: Any = None,
        version: int | str = 0,
        event_types: Collection[str] | None = None,
    ) -> EventLogBuilder:
        """Registers a view; the arguments are those of `View`."""
        self._views.append(
            View(name, reducer, initial, state_type=state_type, version=version, event_types=event_types)
        )
        return self

    def max_log_size(self, size: int) -> EventLogBuilder:
        """The size in bytes of `app.jsonl` above which it is rotated by itself; 0 for never."""
        self._max_log_size = size
        return self

    def lock_mode(self, mode: LockMode) -> EventLogBuilder:
        """How others are kept from writing."""
        self._lock = mode
        return self

    def sync_mode(self, mode: SyncMode) -> EventLogBuilder:
        """When an append is on disk."""
        self._sync = mode
        return self

    def open(self) -> AsyncOpener[EventLog]:
        """Opens the log: see `EventLog.open`."""
        return EventLog.open(
            self._dir, views=self._views, max_log_size=self._max_log_size, lock=self._lock, sync=self._sync
        )
