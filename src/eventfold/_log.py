"""`EventLog`: the writer, the reader and the views of one directory together; what most programs use.

Promise: nothing here but their composition; what a method promises is what the part that it belongs to promises.
"""

from __future__ import annotations

import errno
import inspect
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, overload

import msgspec

from ._address import Address
from ._aio import AsyncOpener, UncancellableTask, in_thread, uninterrupted
from ._backup import backup
from ._catalog import Catalog, OnMismatch, Typing
from ._codec.decode import Slice
from ._consumer import Consumer
from ._engine import LockMode, SyncMode
from ._errors import ConditionalAppendError, EventfoldError, ReducerError, UnknownViewError
from ._event import AppendResult, Event, Head, Record
from ._info import LogInfo, info
from ._query import Query
from ._reader import EventReader, WaitResult
from ._verify import state_at
from ._view import ReduceFn, View, offset_for_the_crate, refresh_each, refresh_together
from ._writer import EventWriter, ViewOps
from .snapshot import NOWHERE, BadSnapshotError, encode, parse

logger = logging.getLogger("eventfold")

S = TypeVar("S")


class Views(Mapping[str, View[Any]]):
    """The views of a log, by name; asked with a `View` object, it gives that view with its type."""

    def __init__(self, views: Mapping[str, View[Any]]) -> None:
        self._views = dict(views)

    def __repr__(self) -> str:
        return f"<Views: {', '.join(self._views) or 'none'}>"

    @overload
    def __getitem__(self, name: View[S]) -> View[S]: ...
    @overload
    def __getitem__(self, name: str) -> View[Any]: ...
    def __getitem__(self, name: str | View[Any]) -> View[Any]:
        """The view; raises `UnknownViewError`, which is a `KeyError`, if it is not registered."""
        view = self._views.get(name.name if isinstance(name, View) else name)
        if view is None or (isinstance(name, View) and view is not name):
            raise UnknownViewError(name.name if isinstance(name, View) else name, tuple(self._views))
        return view

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)


class EventLog:
    """A log with its views: it appends, reads, waits, and keeps the views' states.

    Open it with `EventLog.open` or `EventLog.builder`; it belongs to the event loop and the process that opened it. It
    is an async context manager, which closes it. Offsets are bytes in the whole log.
    """

    _reader: EventReader
    _writer_or_none: EventWriter | None
    _views: Views
    _catalog: Catalog | None = None

    def __init__(self, *args: object, **options: object) -> None:
        raise TypeError(
            "EventLog(...) can't open a log, since that takes I/O: write `log = await EventLog.open(dir)` or "
            "`async with EventLog.open(dir) as log:`"
        )

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
        catalog: Catalog | None = None,
        on_mismatch: OnMismatch = "raise",
    ) -> AsyncOpener[EventLog]:
        """Opens the directory and brings the views up to date. Await it, or use it in `async with`.

        Cancelled, it opens nothing. A reducer that raises does not keep the log from being opened: a warning is logged,
        and `view`, `wait_until` and `refresh_all` raise its `ReducerError`.

        Args:
            dir: The data directory, which is created if need be (not with `read_only`); or an address, or an engine.
            views: The views to register. A `View` object belongs to one open log at a time.
            read_only: Opens no writer: views, tails and watches work beside another process that writes, and whatever
                would write raises `EventfoldError`.
            max_log_size: The size of `app.jsonl` in bytes above which it is rotated automatically; 0 for never.
            lock: How others are kept from writing.
            sync: When an append is on disk.
            max_event_size: The most bytes that the line of an event may have.
            catalog: The classes of the events' data: objects of them can be appended, and are the data of what is read.
            on_mismatch: What becomes of an event whose data does not fit its class: "raise" a `SchemaError`, or "skip"
                it with a warning.

        Raises:
            SchemaError: An event that a view selects does not fit its class in the catalog.
            LogLockedError: Another writer has the directory open.
            CorruptLogError: The files are damaged or contradict each other.
            EventfoldError: A view is registered with another open log.
            OSError: The directory can't be made, read or written; `NotADirectoryError` if it is a file.
            TypeError: `views` is not a collection of `View` objects, or a class in the catalog can't be decoded into.
            ValueError: Two views have one name, an option is out of its range, or the catalog lacks an upcaster.
        """
        registered = _by_name(views)
        typing = _typing(catalog, on_mismatch)
        opening = EventWriter.open(dir, lock=lock, sync=sync, max_log_size=max_log_size, max_event_size=max_event_size)

        async def open_() -> EventLog:
            log = object.__new__(cls)
            log._views, log._reader, log._writer_or_none = Views(registered), EventReader(dir), None
            try:
                for view in registered.values():
                    view._attach(log, log._location)
                if not read_only:
                    log._writer_or_none = await opening
                    unused, log._reader = log._reader, log._writer_or_none.reader()
                    await unused.aclose()
                log._catalog, log._reader._typing = catalog, typing
                await log._catch_up()
            except BaseException as error:
                await uninterrupted(UncancellableTask(log.aclose(), "eventfold close"))
                if isinstance(error, OSError) and isinstance(dir, str | os.PathLike):
                    await _check_not_a_file(dir, error)
                raise
            if log._writer_or_none is not None:
                log._writer_or_none.attach([*registered.values(), _UnregisteredSnapshots(registered)])
            return log

        return AsyncOpener(open_)

    @classmethod
    def builder(cls, dir: Address) -> EventLogBuilder:
        """The same as `open`, with one call for each option.

        Args:
            dir: The data directory, an address or an engine.

        Returns:
            A builder; end with its `open`.
        """
        return EventLogBuilder(dir)

    def __repr__(self) -> str:
        return f"<EventLog of {self._location!r}, views: {', '.join(self._views) or 'none'}>"

    @property
    def _location(self) -> str:
        return str(self._reader._source.location)

    async def __aenter__(self) -> EventLog:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the log; idempotent.

        New appends are refused, those that were called and a rotation are finished, the snapshots of the views are
        saved, tails and watches end, and the lock is released. Cancelled, the closing goes on.
        """
        try:
            if self._writer_or_none is not None:
                await self._writer_or_none.aclose()
            else:
                await self._reader.aclose()
        finally:
            for view in self._views.values():
                view._detach(self)

    @property
    def _writer(self) -> EventWriter:
        if self._writer_or_none is None:
            raise EventfoldError(
                f"the log in {self._location} was opened read-only: open it without read_only to write"
            )
        return self._writer_or_none

    # Views

    @property
    def views(self) -> Views:
        """The registered views by name. `views[view]`, with a `View` object, has that view's type."""
        return self._views

    @overload
    def view(self, name: View[S]) -> S: ...
    @overload
    def view(self, name: str) -> Any: ...
    def view(self, name: str | View[Any]) -> Any:
        """The state of a view as of its last refresh. No I/O.

        Args:
            name: The view's name, or the `View` object, which gives the result its type.

        Raises:
            UnknownViewError: No such view is registered.
            ReducerError: The view's reducer raised at the last refresh; the last state is `views[name].state`.
        """
        view = self._views[name]
        view._fold.raise_error()
        return view.state

    async def refresh_all(self) -> None:
        """Brings all views up to the head, in one pass where they stand at the same offset.

        Cancelled, the views keep what they have folded.

        Raises:
            ReducerError: A reducer raised; the first error, once all other views are up to date.
            CorruptLogError: The log is damaged, or no longer the one that was folded.
            OSError: The log could not be read.
        """
        await self._refresh(*self._views.values())

    async def _refresh(self, *views: View[Any]) -> None:
        await refresh_together(views, self._reader, save=self._writer_or_none is not None)

    async def _catch_up(self) -> None:
        """Refreshes all views, and logs where a reducer raised."""
        for error in await refresh_each(self._views.values(), self._reader, save=self._writer_or_none is not None):
            if not isinstance(error, ReducerError):
                raise error
            logger.warning("view %r is not up to date: %s", error.view, error)

    @overload
    async def rebuild(self, name: View[S]) -> S: ...
    @overload
    async def rebuild(self, name: str) -> Any: ...
    async def rebuild(self, name: str | View[Any]) -> Any:
        """Makes a view's state anew from the whole log, without its snapshot, and replaces that.

        Cancelled, the view keeps what it has folded.

        Args:
            name: The view's name, or the `View` object, which gives the result its type.

        Returns:
            The state as of the head.

        Raises:
            UnknownViewError: No such view is registered.
            ReducerError: The reducer raised.
            CorruptLogError: The log is damaged.
            OSError: The log could not be read.
        """
        view = self._views[name]
        if self._writer_or_none is not None:
            return await view.rebuild(self._reader)
        await view._refold(self._reader)
        return view.state

    @overload
    async def wait_until(self, name: View[S], offset: int | None = None) -> S: ...
    @overload
    async def wait_until(self, name: str, offset: int | None = None) -> Any: ...
    async def wait_until(self, name: str | View[Any], offset: int | None = None) -> Any:
        """A view's state as soon as it includes everything before `offset`.

        With the `end_offset` of an append: read your own writes. Cancelled, the view keeps what it has folded.

        Args:
            name: The view's name, or the `View` object, which gives the result its type.
            offset: In bytes of the whole log; None for the head as it is when this is called.

        Raises:
            UnknownViewError: No such view is registered.
            ReducerError: The reducer raised.
            LogClosedError: The log was closed first.
            CorruptLogError: The log is damaged.
            OSError: The log could not be read.
        """
        view = self._views[name]
        if offset is None:
            offset = (await self._reader.head()).offset
        while view.offset < offset or view._fold.suspect:
            await self._refresh(view)
            if view.offset < offset:
                await self._reader.wait_for_events(view.offset)
        return view.state

    @overload
    def watch(self, name: View[S]) -> AsyncGenerator[S, None]: ...
    @overload
    def watch(self, name: str) -> AsyncGenerator[Any, None]: ...
    def watch(self, name: str | View[Any]) -> AsyncGenerator[Any, None]:
        """A view's state now, then each newer one, until the log is closed; who is slow sees only the latest.

        Args:
            name: The view's name, or the `View` object, which gives the states their type.

        Raises:
            UnknownViewError: No such view is registered.
            ReducerError: The reducer raised; so for the next errors, at a step of the iteration.
            CorruptLogError: The log is damaged.
            OSError: The log could not be read.
        """
        return self._watch(self._views[name])

    async def _watch(self, view: View[S]) -> AsyncGenerator[S, None]:
        seen = None
        async for _ in self._reader.head_changes():
            await self._refresh(view)
            if view._fold.folded != seen:
                seen = view._fold.folded
                yield view.state

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

    async def append(
        self,
        event: object,
        *,
        ts: int | None = None,
        id: str | None = None,
        actor: str | None = None,
        meta: Any = None,
        tags: Iterable[str] = (),
    ) -> AppendResult:
        """Appends one event. Once it returns, the event is on disk, as far as the sync mode says.

        Cancelled while it waits in the queue, the event is not in the log; cancelled later, it is.

        Args:
            event: The event, or an object of a class in the log's catalog.
            ts: With an object: whole seconds since the Unix epoch; now if not given.
            id: With an object: the event's id.
            actor: With an object: who caused it.
            meta: With an object: any JSON value.
            tags: With an object: tags beside those that its class gives.

        Returns:
            Where the event stands in the log, in bytes, and the hash of its line.

        Raises:
            InvalidEventError: The event can't be written as JSON that reads back the same; nothing was written.
            TypeError: An option was given with an `Event`, which has all of them itself.
            OSError: It could not be written; it is not in the log, and the log goes on.
            WriterFailedError: What is on disk is unknown; open the log again.
            LogClosedError: The log is closed.
            EventfoldError: The log is read-only, or was opened by another process.
        """
        writer = self._writer
        if ts is not None or id is not None or actor is not None or meta is not None or tags:
            if self._catalog is None or isinstance(event, Event):
                raise TypeError(
                    "ts, id, actor, meta and tags are for an object of a class in the catalog: give them to the Event"
                )
            return await writer.append(self._catalog.to_event(event, ts=ts, id=id, actor=actor, meta=meta, tags=tags))
        return await writer.append(self._encoded(event))

    def _encoded(self, event: Any) -> Event:
        """An event as the writer takes it; without a catalog, what it is given."""
        encoded: Event = event if self._catalog is None else self._catalog.encoded(event)
        return encoded

    async def append_many(self, events: Iterable[object]) -> list[AppendResult]:
        """Appends several events, all or none of them, also after a crash.

        Is cancelled as `append` is, all events at once.

        Args:
            events: The events, or objects of the catalog's classes, in the order in which they are to stand.

        Returns:
            One result for each event.

        Raises:
            EventfoldError: As for `append`, which also says when an `OSError` is raised.
        """
        return await self._writer.append_many(map(self._encoded, events))

    async def append_unless(self, events: Iterable[object], query: Query, *, after: int = 0) -> list[AppendResult]:
        """Appends events, all or none of them, unless an event at or behind an offset matches a query.

        It is judged when its turn comes, against everything before it: nothing can come in between.

        Args:
            events: What to append: events, or objects of the catalog's classes.
            query: Which events are in the way.
            after: The offset from which on events count: the end of what the decision was based on.

        Returns:
            Where the events are in the log.

        Raises:
            ConditionalAppendError: An event is in the way; `conflict.offset` says where. Nothing was written.
            TypeError: The query is not a `Query`.
            ValueError: The offset is negative, beyond the head, or not where a line begins.

        Else it raises what `append` raises. Cancelled before its turn, nothing is appended.
        """
        return await self._writer.append_unless(map(self._encoded, events), query, after=after)

    async def decide(
        self,
        view: View[S] | str,
        decide: Callable[[S], object],
        *,
        query: Query | None = None,
        attempts: int = 10,
    ) -> list[AppendResult]:
        """Lets a function decide on a view's newest state, and appends what it returns if that still holds.

        Brings the view up to the head, calls `decide(state)`, and appends its events on condition that nothing which
        matters came in between. Otherwise it tries again, with the newer state.

        Args:
            view: The registered view, or its name.
            decide: Takes the state, which it must not change, and returns an event, several, or none; it may raise.
            query: Which events matter to the decision; without it, any event that came in between.
            attempts: How often it is tried.

        Returns:
            Where the events are in the log; empty if `decide` returned none.

        Raises:
            ConditionalAppendError: The last attempt was in vain, too.
            UnknownViewError: No such view is registered.
            ValueError: `attempts` is less than 1.

        Else it raises what `decide`, `wait_until` and `append` raise. Cancelled, the events are in the log or not.
        """
        if attempts < 1:
            raise ValueError(f"attempts must be 1 or more, not {attempts!r}")
        registered: View[Any] = self._views[view]
        while True:
            state = await self.wait_until(registered)
            offset = registered.offset
            decided = decide(state)
            if inspect.iscoroutine(decided):
                decided.close()
                raise TypeError(f"{decide!r} is a coroutine function; a decision must be a plain function")
            events = self._decided(decided)
            if not events:
                return []
            try:
                return await self.append_unless(events, Query() if query is None else query, after=offset)
            except ConditionalAppendError:
                attempts -= 1
                if not attempts:
                    raise

    def _decided(self, decided: Any) -> list[object]:
        """The events of a decision: several, one, or none."""
        # Asked first, since a pydantic model can be iterated over.
        if isinstance(decided, Event) or (self._catalog is not None and self._catalog.knows(decided)):
            return [decided]
        return [] if decided is None else list(decided)

    async def append_if(self, event: object, expected_offset: int, expected_hash: str) -> AppendResult:
        """Appends one event if the head is the expected one when its turn comes. Is cancelled as `append` is.

        Args:
            event: The event, or an object of one of the catalog's classes.
            expected_offset: The head's offset, in bytes of the whole log.
            expected_hash: The hash of the last line; "" for an empty log. `append_if(event, *log.head)` has both.

        Returns:
            Where the event stands in the log.

        Raises:
            ConditionalAppendError: The head is another one, which its `conflict` tells; nothing was written.
            EventfoldError: As for `append`, which also says when an `OSError` is raised.
        """
        return await self._writer.append_if(self._encoded(event), expected_offset, expected_hash)

    async def rotate(self, views: Iterable[ViewOps] | None = None) -> None:
        """Moves the whole active log into the archive, while appends go on.

        The registered views are brought up to date first, and the snapshots are rewritten, since their offsets for the
        Rust crate change their meaning. Cancelled, the rotation goes on.

        Args:
            views: The views whose snapshots are rewritten; None for the registered ones.

        Raises:
            OSError: The disk failed; nothing is lost, and the next rotation goes on where this one stopped.
            CorruptLogError: The files contradict each other.
            EventfoldError: The log can't be written to, as for `append`.
        """
        writer = self._writer
        if views is None:
            await self._catch_up()
            views = self._views.values()
        await writer.rotate([*views, _UnregisteredSnapshots(self._views)])

    @property
    def head(self) -> Head:
        """The durable head: the offset after the last acknowledged event, and the hash of its line. No I/O.

        Raises `EventfoldError` for a read-only log, which knows it only by I/O: ask its `reader().head()`.
        """
        return self._writer.head

    # The reader's

    def read_from(
        self, offset: int = 0, *, query: Query | None = None, until: int | None = None
    ) -> AsyncIterator[Record]:
        """The events from `offset` up to the head as it is when reading begins.

        Args:
            offset: Where to begin, in bytes of the whole log; a line must begin there.
            query: Which events to give; None for all.
            until: Where to end, in bytes of the whole log; a line must end there. Beyond the head, or None: the head.

        Raises:
            ValueError: The offset is negative, beyond the head, or not where a line begins; `until` lies before it, or
                inside a line.
            CorruptLogError: The log is damaged; raised after all events before the damage.
            OSError: The log could not be read.
        """
        return self._reader.read_from(offset, query=query, until=until)

    def read_back(self, offset: int | None = None, *, query: Query | None = None) -> AsyncIterator[Record]:
        """The events before `offset`, the newest first; it begins at once, however large the log is.

        Args:
            offset: Where to begin, in bytes of the whole log; a line must end there. None for the head of now.
            query: Which events to give; None for all.

        Raises:
            ValueError: The offset is negative, beyond the head, or not where a line ends.
            CorruptLogError: The log is damaged; raised after all events behind the damage.
            OSError: The log could not be read.
        """
        return self._reader.read_back(offset, query=query)

    def read_full(self) -> AsyncIterator[Record]:
        """All events up to the head as it is when reading begins; raises what `read_from` does."""
        return self._reader.read_full()

    def read_slices(
        self,
        offset: int = 0,
        *,
        query: Query | None = None,
        types: Collection[str] | None = None,
        after: str = "",
    ) -> AsyncGenerator[Slice, None]:
        """The same events as `read_from`, some hundred at a time and several times as fast.

        Args:
            offset: Where to begin, in bytes of the whole log; a line must begin there.
            query: Which events to give; None for all. Of a line that can't hold one only the shape is checked.
            types: Short for a query of these types alone (empty: no event).
            after: The hash of the line that ended at `offset` when it was read, if known: another log that has taken
                its place since is a `CorruptLogError`.

        Raises:
            ValueError: The offset is negative, beyond the head, or not where a line begins.
            CorruptLogError: The log is damaged; raised after all events before the damage.
            OSError: The log could not be read.
        """
        return self._reader.read_slices(offset, query=query, types=types, after=after)

    def tail(self, offset: int | None = None, *, query: Query | None = None) -> AsyncIterator[Record]:
        """The events from `offset`, then each new one, until the log is closed. Cancelling it leaves nothing behind.

        Args:
            offset: Where to begin, in bytes of the whole log; None for the head of now.
            query: Which events to give; None for all.

        Raises:
            ValueError: The offset is negative, beyond the head, or not where a line begins.
            CorruptLogError: The log is damaged, or no longer the one that was read.
            OSError: The log could not be read.
        """
        return self._reader.tail(offset, query=query)

    def consumer(self, name: str, *, start: int | None = 0, query: Query | None = None) -> Consumer:
        """A named reader whose committed offset is kept on disk.

        Args:
            name: 1 to 128 characters of `A-Z a-z 0-9 . _ -`, not starting with a dot.
            start: Where it begins without a commit yet, in bytes of the whole log; None for the head of now.
            query: Which events to give; None for all. It is not kept on disk.

        Raises:
            ValueError: The name can't be a file's.
        """
        return Consumer(self._reader, name, start=start, query=query)

    async def wait_for_events(self, offset: int, timeout: float | None = None) -> WaitResult:
        """Waits until the head lies beyond `offset`. Cancelling it leaves nothing behind.

        Args:
            offset: In bytes of the whole log.
            timeout: In seconds; None to wait for as long as it takes.

        Returns:
            Whether new events came, which is also its truth value, and the head's offset.

        Raises:
            LogClosedError: The log was closed meanwhile.
            ValueError: The offset is negative.
            CorruptLogError: The log is damaged.
            OSError: The log could not be read.
        """
        return await self._reader.wait_for_events(offset, timeout)

    async def has_new_events(self, offset: int) -> bool:
        """Whether events stand at or behind `offset` (bytes in the whole log).

        Raises:
            ValueError: The offset is negative or beyond the head.
            CorruptLogError: The log is damaged.
            OSError: The log could not be read.
        """
        return await self._reader.has_new_events(offset)

    async def active_log_size(self) -> int:
        """The size of `app.jsonl` in bytes; 0 if there is none. Raises `OSError`."""
        return await self._reader.active_log_size()

    async def read_line_hash_before(self, offset: int) -> str | None:
        """The hash of the line that ends at `offset` (bytes in the whole log); None at 0.

        Raises:
            ValueError: The offset is negative, beyond the head, or not where a line begins.
            CorruptLogError: The log is damaged.
            OSError: The log could not be read.
        """
        return await self._reader.read_line_hash_before(offset)

    # For whoever operates it

    async def info(self) -> LogInfo:
        """The log at a glance: head, sizes, views and consumers with their lag, who holds the lock.

        Raises:
            CorruptLogError: The head can't be told.
            OSError: The log could not be read.
        """
        return await info(self._reader)

    async def backup(self, dir: str | os.PathLike[str], progress: Callable[[int, int], object] | None = None) -> Head:
        """Copies the log, while it goes on, so that the copy opens at once; an older copy is brought up to date.

        Cancelled, it stops soon, and leaves what was there, or a copy of a part of the log; copy again to finish it.

        Args:
            dir: The directory of the copy: not there yet, empty, or an older copy of this log.
            progress: Is called again and again with the bytes copied and the bytes that are to be copied.

        Returns:
            The head of the copy.

        Raises:
            EventfoldError: The log is not kept in files, or `dir` holds something else than an older copy of it.
            LogLockedError: The copy is open for writing.
            CorruptLogError: The log or the copy is damaged.
            OSError: A file could not be read or written.
        """
        return await backup(self._reader, dir, progress)

    @overload
    async def state_at(self, name: View[S], offset: int) -> S: ...
    @overload
    async def state_at(self, name: str, offset: int) -> Any: ...
    async def state_at(self, name: str | View[Any], offset: int) -> Any:
        """What the state of a view was at an earlier offset, folded anew; the view stays as it is.

        Args:
            name: The view's name, or the `View` object, which gives the result its type.
            offset: In bytes of the whole log; everything before it is folded.

        Raises:
            UnknownViewError: No such view is registered.
            ValueError: The offset is negative, beyond the head, or not where a line begins.
            ReducerError: The reducer raised.
            CorruptLogError: The log is damaged.
            OSError: The log could not be read.
        """
        return await state_at(self._reader, self._views[name], offset)


class EventLogBuilder:
    """The options of `EventLog.open`, one call each; every call returns the builder."""

    def __init__(self, dir: Address) -> None:
        self._dir = dir
        self._views: list[View[Any]] = []
        self._max_log_size = 0
        self._lock = LockMode.FLOCK
        self._sync = SyncMode.ALWAYS
        self._catalog: Catalog | None = None
        self._on_mismatch: OnMismatch = "raise"

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

    def max_log_size(self, size: int) -> EventLogBuilder:
        """The size in bytes of `app.jsonl` above which it is rotated automatically; 0 for never."""
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

    def catalog(self, catalog: Catalog, *, on_mismatch: OnMismatch = "raise") -> EventLogBuilder:
        """The classes of the events' data, and what becomes of an event that does not fit its class."""
        self._catalog, self._on_mismatch = catalog, on_mismatch
        return self

    def open(self) -> AsyncOpener[EventLog]:
        """Opens the log: see `EventLog.open`."""
        return EventLog.open(
            self._dir,
            views=self._views,
            max_log_size=self._max_log_size,
            lock=self._lock,
            sync=self._sync,
            catalog=self._catalog,
            on_mismatch=self._on_mismatch,
        )


def _typing(catalog: Catalog | None, on_mismatch: OnMismatch) -> Typing | None:
    if on_mismatch not in ("raise", "skip"):
        raise ValueError(f'on_mismatch must be "raise" or "skip", not {on_mismatch!r}')
    if catalog is None:
        return None
    if not isinstance(catalog, Catalog):
        raise TypeError(f"catalog must be a Catalog, not {catalog!r}")
    catalog.check()
    return Typing(catalog, on_mismatch)


def _by_name(views: Iterable[View[Any]]) -> dict[str, View[Any]]:
    if isinstance(views, View | str | Mapping) or not isinstance(views, Iterable):
        raise TypeError(f"views must be a list of View objects, such as views=[View(...)], not {views!r}")
    registered: dict[str, View[Any]] = {}
    for view in views:
        if not isinstance(view, View):
            raise TypeError(f"views must be a list of View objects, and {view!r} in it is not one")
        if view.name in registered:
            raise ValueError(f"two views are named {view.name!r}")
        registered[view.name] = view
    return registered


async def _check_not_a_file(dir: str | os.PathLike[str], error: OSError) -> None:
    """Raises the error again as one that says so, if the directory is a file."""
    if await in_thread(os.path.isfile, dir):
        reason = "this is a file, where the data directory of a log is needed"
        raise NotADirectoryError(errno.ENOTDIR, reason, os.fspath(dir)) from error


class _UnregisteredSnapshots:
    """The snapshots of the views that are not registered, to be rewritten with those that are.

    After a rotation their `offset` would mislead the Rust crate: they get one beyond any file, and the crate rebuilds.
    """

    name = "snapshots of unregistered views"
    offset = 0

    def __init__(self, registered: Collection[str]) -> None:
        self._registered = registered

    async def refresh(self, reader: EventReader) -> None:
        """Nothing is to be folded."""

    async def rebuild(self, reader: EventReader) -> None:
        """Nothing is to be folded."""

    async def save(self, reader: EventReader) -> None:
        """Rewrites those that tell the crate a wrong offset; a failure is logged."""
        try:
            for name in await reader.documents.names("view"):
                if name not in self._registered:
                    await self._correct(name, reader)
        except Exception as error:
            logger.warning("the snapshots of views that are not registered could not be corrected: %s", error)

    async def _correct(self, name: str, reader: EventReader) -> None:
        data = await reader.documents.load("view", name)
        try:
            found = None if data is None else parse(data)
        except BadSnapshotError:
            return  # the crate does not believe it either, and the view's own program says so
        if found is None or found.position is None or found.offset == NOWHERE:
            return
        if found.offset != offset_for_the_crate(found.position, await reader.base()):
            moved = msgspec.structs.replace(found, state=None, offset=NOWHERE, hash="")
            await reader.documents.store("view", name, encode(moved, found.state))
