"""The methods of `EventLog` that append events, or objects of the catalog's classes, with or without a condition."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from .._errors import ConditionalAppendError
from .._event import AppendResult, Event, Head
from .._query import Query
from .._rotator import ViewOps
from .._view import View
from .unregistered import UnregisteredSnapshots
from .viewing import ViewingLog

S = TypeVar("S")


class AppendingLog(ViewingLog):
    """The methods of a log that write to it."""

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
        """Appends one event. Once it returns, the event is on disk, as the sync mode promises.

        If cancelled while waiting in the queue, the event is not in the log; if cancelled later, it is.

        Args:
            event: The event, or an object of a class in the log's catalog.
            ts: With an object: whole seconds since the Unix epoch; now if not given.
            id: With an object: the event's id.
            actor: With an object: who caused it.
            meta: With an object: any JSON value.
            tags: With an object: tags in addition to those from its class.

        Returns:
            Where the event is in the log, in bytes, and the hash of its line.

        Raises:
            InvalidEventError: The event can't be written as JSON that reads back the same. Nothing was written.
            TypeError: An option was given together with an `Event`, which has its own.
            OSError: The event could not be written. It is not in the log, and the log can still be used.
            WriterFailedError: It is unknown what is on disk: open the log again.
            LogClosedError: The log is closed.
            EventfoldError: The log is read-only, or was opened by another process.
        """
        writer = self._writer
        if ts is None and id is None and actor is None and meta is None and not tags:
            encoded: Any = event if self._catalog is None else self._catalog.encoded(event)
        elif self._catalog is None or isinstance(event, Event):
            raise TypeError(
                "ts, id, actor, meta and tags are for an object of a class in the catalog: give them to the Event"
            )
        else:
            encoded = self._catalog.to_event(event, ts=ts, id=id, actor=actor, meta=meta, tags=tags)
        return await writer._put(encoded)

    def _encoded(self, event: Any) -> Event:
        """The event as the writer takes it; without a catalog, the event itself."""
        encoded: Event = event if self._catalog is None else self._catalog.encoded(event)
        return encoded

    def _all_encoded(self, events: Iterable[Any]) -> Iterable[Event]:
        return events if self._catalog is None else map(self._catalog.encoded, events)

    async def append_many(self, events: Iterable[object]) -> list[AppendResult]:
        """Appends several events, all of them or none, even after a crash.

        A cancellation has the same effect as for `append`, on all events at once.

        Args:
            events: The events, or objects of the catalog's classes, in order.

        Returns:
            One result for each event.

        Raises:
            EventfoldError: As for `append`, which also says when an `OSError` is raised.
        """
        return await self._writer.append_many(self._all_encoded(events))

    async def append_unless(self, events: Iterable[object], query: Query, *, after: int = 0) -> list[AppendResult]:
        """Appends events, all of them or none, unless an event at or after an offset matches a query.

        The condition is checked when the append's turn comes, against everything before it: nothing can come in
        between.

        Args:
            events: What to append: events, or objects of the catalog's classes.
            query: Which events prevent the append.
            after: The offset from which events count: the end of what the decision was based on.

        Returns:
            Where the events are in the log.

        Raises:
            ConditionalAppendError: An event matches; `conflict.offset` says where it is. Nothing was written.
            TypeError: The query is not a `Query`.
            ValueError: The offset is negative, beyond the head, or not where a line begins.

        Otherwise it raises what `append` raises. If cancelled before its turn, nothing is appended.
        """
        return await self._writer.append_unless(self._all_encoded(events), query, after=after)

    async def append_if(self, event: object, expected_offset: int, expected_hash: str) -> AppendResult:
        """Appends one event if the head is the expected one when its turn comes. A cancellation has the same effect as
        for `append`.

        Args:
            event: The event, or an object of one of the catalog's classes.
            expected_offset: The head's offset, in bytes of the whole log.
            expected_hash: The hash of the last line; "" for an empty log. `append_if(event, *log.head)` has both.

        Returns:
            Where the event is in the log.

        Raises:
            ConditionalAppendError: The head is a different one, which `conflict` has. Nothing was written.
            EventfoldError: As for `append`, which also says when an `OSError` is raised.
        """
        return await self._writer.append_if(self._encoded(event), expected_offset, expected_hash)

    async def decide(
        self,
        view: View[S] | str,
        decide: Callable[[S], object],
        *,
        query: Query | None = None,
        attempts: int = 10,
    ) -> list[AppendResult]:
        """Lets a function decide on a view's newest state, and appends what it returns if that still holds.

        Brings the view up to the head, calls `decide(state)`, and appends its events if nothing relevant was appended
        in between. Otherwise it tries again, with the newer state.

        Args:
            view: The registered view, or its name.
            decide: Takes the state, which it must not change, and returns an event, several, or none; it may raise.
            query: Which events are relevant to the decision; without it, any event.
            attempts: How often it is tried.

        Returns:
            Where the events are in the log; empty if `decide` returned none.

        Raises:
            ConditionalAppendError: The last attempt failed too.
            UnknownViewError: No such view is registered.
            ValueError: `attempts` is less than 1.

        Otherwise it raises what `decide`, `wait_until` and `append` raise. If cancelled, the events may or may not be
        in the log.
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

    async def rotate(self, views: Iterable[ViewOps] | None = None) -> None:
        """Moves the whole active log into the archive, while appends continue.

        The registered views are brought up to date first, and the snapshots are rewritten, since their offsets for the
        Rust crate change their meaning. If cancelled, the rotation continues.

        Args:
            views: The views whose snapshots are rewritten; None for the registered ones.

        Raises:
            OSError: The disk failed. Nothing is lost, and the next rotation continues where this one stopped.
            CorruptLogError: The files contradict each other.
            EventfoldError: The log can't be written to, as for `append`.
        """
        writer = self._writer
        if views is None:
            await self._catch_up()
            views = self._views.values()
        await writer.rotate([*views, UnregisteredSnapshots(self._views)])

    @property
    def head(self) -> Head:
        """The durable head: the offset after the last acknowledged event, and the hash of its line. No I/O.

        Raises `EventfoldError` for a read-only log, which needs I/O to find it: use `await log.reader().head()`.
        """
        return self._writer.head
