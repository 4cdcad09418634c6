"""`EventLog`, the class that most programs use: the writer, the reader and the views of one log together.

Promise: it only combines them, and each method promises the same as the part that it calls.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterable
from types import TracebackType
from typing import Any, TypeVar

from .. import _tracing
from .._address import Address
from .._aio import AsyncOpener, UncancellableTask, uninterrupted
from .._catalog import Catalog, OnMismatch, TypedDecoding, typed_decoding
from .._engine import LockMode, SyncMode
from .._query import Query
from .._reader import EventReader
from .._threads import in_thread
from .._view import ReduceFn, View
from .._writer import EventWriter
from .appending import AppendingLog
from .own_snapshots import OwnSnapshotsReader
from .reading import ReadingLog
from .unregistered import UnregisteredSnapshots
from .views import Views, views_by_name

S = TypeVar("S")


class EventLog(AppendingLog, ReadingLog):
    """A log with its views: appends and reads events, waits for new ones, and keeps the views up to date.

    Open it with `EventLog.open` or `EventLog.builder`, and use it only in the event loop and process that opened it.
    As an async context manager, it closes itself at the end of the block. Offsets are bytes in the whole log.
    """

    def __init__(self, *args: object, **options: object) -> None:
        raise TypeError(
            "EventLog(...) can't open a log, since that needs I/O: write `log = await EventLog.open(dir)` or "
            "`async with EventLog.open(dir) as log:`"
        )

    @classmethod
    def open(
        cls,
        dir: Address,
        *,
        views: Iterable[View[Any]] = (),
        read_only: bool = False,
        snapshots: str | os.PathLike[str] | None = None,
        max_log_size: int = 0,
        lock: LockMode = LockMode.FLOCK,
        sync: SyncMode = SyncMode.ALWAYS,
        max_event_size: int = 16 * 2**20,
        catalog: Catalog | None = None,
        on_mismatch: OnMismatch = "raise",
        index: bool | str | os.PathLike[str] = False,
        unique_ids: bool = False,
    ) -> AsyncOpener[EventLog]:
        """Opens a log and brings its views up to date. Await the result, or use it in `async with`.

        If cancelled, nothing stays open. A reducer that raises does not prevent the opening: a warning is logged, and
        `view`, `wait_until` and `refresh_all` raise the `ReducerError`.

        Args:
            dir: The data directory, which is created if necessary (not with `read_only`), or an address such as
                `postgresql://host/db`, or an engine.
            views: The views to register. A `View` object can be registered with one open log at a time.
            read_only: Opens no writer. Views, tails and watches follow the log while another process writes. Methods
                that would write raise `EventfoldError`.
            snapshots: With `read_only`, a directory for the snapshots of this log's views, which is created if
                necessary. Without this option, the views start from the writer's snapshots at each opening, or are
                rebuilt, and no snapshot is saved.
            max_log_size: The size of `app.jsonl` in bytes above which it is rotated automatically; 0 for never.
            lock: How other writers are kept out.
            sync: When an append is on disk.
            max_event_size: The maximum size of an event's line, in bytes.
            catalog: The classes of the events' data. Objects of these classes can be appended, and the data of an event
                that is read is such an object.
            on_mismatch: What happens to an event whose data does not fit its class: "raise" raises `SchemaError`, and
                "skip" leaves the event out, with a warning.
            index: Whether to keep an index of tags and ids: in `index.sqlite` in the data directory or, on PostgreSQL,
                in a table. A path names a different file. With an index, conditions on tags and reading events by their
                tags take the same time for a log of any size. The results are the same without it, or if it is lost.
            unique_ids: If true, an event whose id is in the log already is not appended again. The result is that of
                the first append, with `duplicate` set. Needs the index.

        Raises:
            SchemaError: An event that a view selects does not fit its class in the catalog.
            LogLockedError: Another writer has the log open.
            CorruptLogError: The files are damaged or contradict each other.
            EventfoldError: A view is registered with another open log, or the packages of the engine are not installed.
            OSError: The directory can't be created, read or written (`NotADirectoryError` if it is a file), or the
                server can't be reached.
            TypeError: `views` is not a collection of `View` objects, or a class in the catalog can't be decoded into.
            ValueError: Two views have the same name, an option is out of range or is not one of this engine, or the
                catalog lacks an upcaster.
        """
        registered = views_by_name(views)
        decoding = typed_decoding(catalog, on_mismatch)
        if read_only and index:
            raise ValueError("index can't be used with read_only=True: only a log that is open for writing keeps one")
        if snapshots is not None and not read_only:
            raise ValueError(
                "snapshots can only be used with read_only=True: a writer keeps the snapshots beside the log"
            )
        opening = EventWriter._open(dir, lock, sync, max_log_size, max_event_size, index=index, unique_ids=unique_ids)

        async def open_() -> EventLog:
            log = object.__new__(cls)
            with _tracing.span("eventfold.open", read_only=read_only, views=len(registered)) as span:
                log._views, log._writer_or_none = Views(registered), None
                log._reader = EventReader(dir) if snapshots is None else OwnSnapshotsReader(dir, snapshots)
                try:
                    await log._open(None if read_only else opening, catalog, decoding)
                except BaseException as error:
                    await uninterrupted(UncancellableTask(log.aclose(), "eventfold close"))
                    if isinstance(error, OSError) and isinstance(dir, str | os.PathLike):
                        await _check_not_a_file(dir, error)
                    raise
                span.set(log=log._location)
            return log

        return AsyncOpener(open_)

    async def _open(
        self, opening: AsyncOpener[EventWriter] | None, catalog: Catalog | None, decoding: TypedDecoding | None
    ) -> None:
        """Opens the writer, unless it is None, and brings the views up to date. After an error, close the log."""
        if isinstance(self._reader, OwnSnapshotsReader):
            await in_thread(self._reader.prepare)
        views = self._views.values()
        for view in views:
            view._attach(self, self._views_location)
        if opening is not None:
            self._writer_or_none = writer = await opening
            unused, self._reader = self._reader, writer.reader()
            await unused.aclose()
        self._catalog, self._reader._typed_decoding = catalog, decoding
        await self._catch_up()
        if self._writer_or_none is not None:
            self._writer_or_none._attach([*views, UnregisteredSnapshots(self._views)])

    @classmethod
    def builder(cls, dir: Address) -> EventLogBuilder:
        """Creates a builder, which has a method for each option of `open`.

        Args:
            dir: The data directory, an address or an engine.

        Returns:
            A builder, whose `open` opens the log.
        """
        return EventLogBuilder(dir)

    def __repr__(self) -> str:
        return f"<EventLog of {self._location!r}, views: {', '.join(self._views) or 'none'}>"

    async def __aenter__(self) -> EventLog:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the log. Idempotent.

        New appends are refused. Pending appends and a rotation are finished, the snapshots of the views are saved,
        tails and watches end, and the lock is released, even if an error is raised. If cancelled, closing continues.

        Raises:
            WriterFailedError: Acknowledged events could not be made durable.
            EventfoldError: The log was opened in a different event loop.
        """
        try:
            if self._writer_or_none is not None:
                await self._writer_or_none.aclose()
                # The writer is part of a reference cycle, so the garbage collector frees it at an arbitrary moment. It
                # must not free a large state then.
                self._writer_or_none._attach(())
            else:
                await uninterrupted(UncancellableTask(self._close_reader(), "eventfold close"))
        finally:
            for view in self._views.values():
                view._detach(self)

    async def _close_reader(self) -> None:
        if self._saves_snapshots and not self._reader._closed:
            for view in self._views.values():
                if view._log() is self:
                    await view.save(self._reader)
        await self._reader.aclose()


class EventLogBuilder:
    """Sets the options of `EventLog.open`, one in each method. Each method except `open` returns the builder."""

    def __init__(self, dir: Address) -> None:
        self._dir = dir
        self._views: list[View[Any]] = []
        self._read_only = False
        self._snapshots: str | os.PathLike[str] | None = None
        self._max_log_size = 0
        self._max_event_size = 16 * 2**20
        self._lock = LockMode.FLOCK
        self._sync = SyncMode.ALWAYS
        self._catalog: Catalog | None = None
        self._on_mismatch: OnMismatch = "raise"
        self._index: bool | str | os.PathLike[str] = False
        self._unique_ids = False

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
        query: Query | None = None,
        shares_events: bool = False,
    ) -> EventLogBuilder:
        """Registers a view; the arguments are those of `View`."""
        view = View(
            name,
            reducer,
            initial,
            state_type=state_type,
            version=version,
            event_types=event_types,
            query=query,
            shares_events=shares_events,
        )
        self._views.append(view)
        return self

    def read_only(self, *, snapshots: str | os.PathLike[str] | None = None) -> EventLogBuilder:
        """Opens the log without a writer. With `snapshots`, the snapshots of the views are kept in that directory."""
        self._read_only, self._snapshots = True, snapshots
        return self

    def max_event_size(self, size: int) -> EventLogBuilder:
        """Sets the maximum size of an event's line, in bytes."""
        self._max_event_size = size
        return self

    def max_log_size(self, size: int) -> EventLogBuilder:
        """Sets the size in bytes of `app.jsonl` above which it is rotated automatically; 0 for never."""
        self._max_log_size = size
        return self

    def lock_mode(self, mode: LockMode) -> EventLogBuilder:
        """Sets how other writers are kept out."""
        self._lock = mode
        return self

    def sync_mode(self, mode: SyncMode) -> EventLogBuilder:
        """Sets when an append is on disk."""
        self._sync = mode
        return self

    def catalog(self, catalog: Catalog, *, on_mismatch: OnMismatch = "raise") -> EventLogBuilder:
        """Sets the classes of the events' data, and what happens to an event that does not fit its class."""
        self._catalog, self._on_mismatch = catalog, on_mismatch
        return self

    def index(self, index: bool | str | os.PathLike[str] = True, *, unique_ids: bool = False) -> EventLogBuilder:
        """Keeps an index of tags and ids. With `unique_ids`, an event whose id is in the log is not appended again."""
        self._index, self._unique_ids = index, unique_ids
        return self

    def open(self) -> AsyncOpener[EventLog]:
        """Opens the log: see `EventLog.open`."""
        return EventLog.open(
            self._dir,
            views=self._views,
            read_only=self._read_only,
            snapshots=self._snapshots,
            max_log_size=self._max_log_size,
            max_event_size=self._max_event_size,
            lock=self._lock,
            sync=self._sync,
            catalog=self._catalog,
            on_mismatch=self._on_mismatch,
            index=self._index,
            unique_ids=self._unique_ids,
        )


async def _check_not_a_file(dir: str | os.PathLike[str], error: OSError) -> None:
    """Raises `NotADirectoryError`, caused by `error`, if the path is that of a file."""
    if await in_thread(os.path.isfile, dir):
        reason = "this is a file, but the data directory of a log is needed"
        raise NotADirectoryError(errno.ENOTDIR, reason, os.fspath(dir)) from error
