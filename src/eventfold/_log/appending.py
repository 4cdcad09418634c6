"""The methods of `EventLog` that append events, or objects of the catalog's classes, with or without a condition."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
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
        """Appends one event. When this returns, the event is as durable as the sync mode promises.

        If cancelled while the append waits in the queue, the event is not in the log; if cancelled later, it is.

        Args:
            event: The event, or an object of a class in the log's catalog.
            ts: For an object: the time, in whole seconds since the Unix epoch; the current time if not given.
            id: For an object: the event's id.
            actor: For an object: who or what caused the event.
            meta: For an object: any JSON value.
            tags: For an object: tags in addition to those of its class.

        Returns:
            Where the event is in the log, in bytes, and the hash of its line.

        Raises:
            InvalidEventError: The event can't be written as JSON that reads back the same. Nothing was written.
            TypeError: An option was given together with an `Event`, which has these fields itself.
            OSError: The event could not be written. It is not in the log, and the log can still be used.
            UnknownOutcomeError: The connection to the server was lost: the event may or may not be in the log.
            WriterFailedError: What is on disk is unknown: open the log again.
            LogClosedError: The log is closed.
            EventfoldError: The log is read-only, or was opened in a different process or event loop.
        """
        writer = self._writer
        if ts is None and id is None and actor is None and meta is None and not tags:
            encoded: Any = event if self._catalog is None else self._catalog._encoded(event)
        elif self._catalog is None or isinstance(event, Event):
            raise TypeError(
                "ts, id, actor, meta and tags are only for objects of a class in the catalog: pass them to Event(...)"
            )
        else:
            encoded = self._catalog.to_event(event, ts=ts, id=id, actor=actor, meta=meta, tags=tags)
        return await writer._put(encoded)

    def _encoded(self, event: Any) -> Event:
        """Converts an event or object with the catalog, if there is one, to an event with plain data."""
        encoded: Event = event if self._catalog is None else self._catalog._encoded(event)
        return encoded

    def _is_one_event(self, value: object) -> bool:
        """Whether a value is an event or an object of a class in the catalog, which may be iterable."""
        return isinstance(value, Event) or (self._catalog is not None and self._catalog._knows(value))

    def _all_encoded(self, events: Iterable[Any]) -> Iterable[Event]:
        if self._is_one_event(events):
            raise TypeError(f"events must be a collection, such as [event], not a single event: {events!r}")
        return events if self._catalog is None else map(self._catalog._encoded, events)

    async def append_many(self, events: Iterable[object]) -> list[AppendResult]:
        """Appends several events: either all of them are in the log or none, even after a crash.

        If cancelled while the append waits in the queue, no event is in the log; if cancelled later, all of them are.

        Args:
            events: The events, or objects of the catalog's classes, in order.

        Returns:
            One result for each event.

        Raises:
            TypeError: `events` is a single event.
            EventfoldError: As for `append`.
            OSError: As for `append`.
        """
        return await self._writer.append_many(self._all_encoded(events))

    async def append_unless(self, events: Iterable[object], query: Query, *, after: int = 0) -> list[AppendResult]:
        """Appends several events, all of them or none, unless an event at or after an offset matches a query.

        The condition is checked against all events that precede these in the log: no other event can come in between.
        If cancelled while the append waits in the queue, no event is in the log; if cancelled later, all of them are,
        if the condition held.

        Args:
            events: The events, or objects of the catalog's classes, in order.
            query: Which events prevent the append. Their types are those on disk, before upcasters.
            after: The offset from which events count, in bytes of the whole log: the end of what the decision is based
                on.

        Returns:
            One result for each event.

        Raises:
            ConditionalAppendError: An event matches; `conflict.offset` is its offset. Nothing was written.
            TypeError: `query` is not a `Query`, or `events` is a single event.
            ValueError: The offset is negative, beyond the head, or not where a line begins.
            EventfoldError: As for `append`.
            OSError: As for `append`.
        """
        return await self._writer.append_unless(self._all_encoded(events), query, after=after)

    async def append_if(self, event: object, expected_offset: int, expected_hash: str) -> AppendResult:
        """Appends one event if it directly follows the expected head.

        To expect the current head, write `append_if(event, *log.head)`. If cancelled while the append waits in the
        queue, the event is not in the log; if cancelled later, it is, if the condition held.

        Args:
            event: The event, or an object of one of the catalog's classes.
            expected_offset: The offset of the expected head, in bytes of the whole log.
            expected_hash: The line hash of the expected head; "" for an empty log.

        Returns:
            Where the event is in the log.

        Raises:
            ConditionalAppendError: The head is a different one: see `conflict`. Nothing was written.
            ValueError: The offset is negative, or an argument has the wrong type.
            EventfoldError: As for `append`.
            OSError: As for `append`.
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
        """Makes a decision based on the newest state of a view, and appends the resulting events.

        Brings the view up to the head, calls `decide(state)`, and appends the events that it returns, unless a relevant
        event was appended in between. In that case, it tries again with the newer state. If cancelled, the events may
        or may not be in the log.

        Args:
            view: The registered view, or its name.
            decide: A plain function that takes the state, which it must not change, and returns an event, several
                events or none; it may also raise.
            query: Which events are relevant to the decision; None for all.
            attempts: The maximum number of attempts.

        Returns:
            One result for each event; empty if `decide` returned no event.

        Raises:
            ConditionalAppendError: In every attempt, a relevant event was appended in between. Nothing was written.
            UnknownViewError: No such view is registered.
            ReducerError: The view's reducer raised.
            ValueError: `attempts` is less than 1.
            TypeError: `decide` is an async function.
            CorruptLogError: The log is damaged.
            EventfoldError: As for `append`.
            OSError: As for `append`.
            Exception: Whatever `decide` raises.
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
                raise TypeError(f"{decide!r} is an async function, but decide must be a plain function")
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
        """The events of a decision: several, one, or none. What can't be an event is refused when it is encoded."""
        if decided is None:
            return []
        is_collection = isinstance(decided, Iterable) and not isinstance(decided, str | bytes | Mapping)
        return list(decided) if is_collection and not self._is_one_event(decided) else [decided]

    async def rotate(self, views: Iterable[ViewOps] | None = None) -> None:
        """Moves the whole active log into the archive, while appends continue.

        The registered views are brought up to date first. Afterwards, the snapshots are rewritten, since the rotation
        changes the meaning of the offsets that they contain for the Rust crate. If cancelled, the rotation continues.

        Args:
            views: The views whose snapshots are rewritten; None for the registered views.

        Raises:
            OSError: A file could not be read or written. Nothing is lost, and the next rotation continues where this
                one stopped.
            CorruptLogError: The files contradict each other.
            EventfoldError: The log is not kept in files, or can't be written to: see `append`.
        """
        writer = self._writer
        if views is None:
            await self._catch_up()
            views = self._views.values()
        await writer.rotate([*views, UnregisteredSnapshots(self._views)])

    @property
    def head(self) -> Head:
        """The durable head: the offset after the last acknowledged event, and the hash of its line. No I/O.

        Raises:
            EventfoldError: The log is read-only, so I/O is necessary: use `await log.reader().head()`.
        """
        return self._writer.head
