"""The methods of `EventLog` for its views: their current, future and past states."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from datetime import datetime
from typing import Any, TypeVar, overload

import msgspec

from .._errors import ReducerError
from .._logging import WARNING, log_event
from .._stats import LogStats, ViewStats, WriterCounters
from .._verify import state_at
from .._view import View, refresh_each, refresh_together
from .base import LogBase
from .views import Views

S = TypeVar("S")


class ViewingLog(LogBase):
    """The methods of a log for its views."""

    @property
    def views(self) -> Views:
        """The registered views by name. `views[view]`, with a `View` object as the key, has the type of that view."""
        return self._views

    @overload
    def view(self, name: View[S]) -> S: ...
    @overload
    def view(self, name: str) -> Any: ...
    def view(self, name: str | View[Any]) -> Any:
        """The state of a view as of its last refresh. No I/O.

        Args:
            name: The view's name, or the `View` object, which gives the result its type.

        Returns:
            The state, which you must not change.

        Raises:
            UnknownViewError: No such view is registered.
            ReducerError: The view's reducer raised at the last refresh. The last state is `views[name].state`.
        """
        view = self._views[name]
        view._fold.raise_error()
        return view.state

    async def refresh_all(self) -> None:
        """Brings all views up to the head. Views with the same offset share one pass over the log.

        If cancelled, the events that were folded stay folded.

        Raises:
            ReducerError: A reducer raised. All other views are up to date; if several reducers raised, this is the
                first error.
            CorruptLogError: The log is damaged, or is no longer the one that was folded.
            OSError: The log could not be read.
        """
        await self._refresh(*self._views.values())

    async def _refresh(self, *views: View[Any]) -> None:
        await refresh_together(views, self._reader, save=self._saves_snapshots)

    async def _catch_up(self) -> None:
        """Refreshes all views. Errors of reducers are logged, all others are raised."""
        for error in await refresh_each(self._views.values(), self._reader, save=self._saves_snapshots):
            if not isinstance(error, ReducerError):
                raise error
            log_event(
                WARNING,
                "view.reducer_failed",
                "view '%(view)s' is not up to date: %(error)s",
                view=error.view,
                offset=error.offset,
                error=error,
            )

    @overload
    async def rebuild(self, name: View[S]) -> S: ...
    @overload
    async def rebuild(self, name: str) -> Any: ...
    async def rebuild(self, name: str | View[Any]) -> Any:
        """Folds the whole log again for one view, without its snapshot, and replaces the snapshot.

        If cancelled, the events that were folded stay folded.

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
        if self._saves_snapshots:
            return await view.rebuild(self._reader)
        await view._refold(self._reader)
        return view.state

    @overload
    async def wait_until(self, name: View[S], offset: int | None = None) -> S: ...
    @overload
    async def wait_until(self, name: str, offset: int | None = None) -> Any: ...
    async def wait_until(self, name: str | View[Any], offset: int | None = None) -> Any:
        """Waits until a view includes all events before `offset`, and returns its state.

        With the `end_offset` of an append, the state includes that event. If cancelled, the events that were folded
        stay folded.

        Args:
            name: The view's name, or the `View` object, which gives the result its type.
            offset: In bytes of the whole log; None for the current head.

        Returns:
            The state of the view.

        Raises:
            UnknownViewError: No such view is registered.
            ReducerError: The reducer raised.
            LogClosedError: The log was closed before that.
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
        """Yields a view's current state, then each newer one, until the log is closed.

        A slow caller sees only the latest state. A cancelled iteration leaves nothing behind.

        Args:
            name: The view's name, or the `View` object, which gives the states their type.

        Returns:
            An async iterator over the states.

        Raises:
            UnknownViewError: No such view is registered.
            ReducerError: The reducer raised. This error, like the following ones, is raised during the iteration.
            CorruptLogError: The log is damaged.
            OSError: The log could not be read.
        """
        return self._watch(self._views[name])

    async def _watch(self, view: View[S]) -> AsyncGenerator[S, None]:
        seen = None
        async for _ in self._reader._head_changes():
            await self._refresh(view)
            if view._fold.changes != seen:
                seen = view._fold.changes
                yield view.state

    @overload
    async def state_at(self, name: View[S], at: int | datetime) -> S: ...
    @overload
    async def state_at(self, name: str, at: int | datetime) -> Any: ...
    async def state_at(self, name: str | View[Any], at: int | datetime) -> Any:
        """Folds a view's state as of an earlier offset or time, from the beginning. The view itself is not changed.

        A cancelled call leaves nothing behind.

        Args:
            name: The view's name, or the `View` object, which gives the result its type.
            at: An offset, in bytes of the whole log, to fold all events before it. Or a time, to fold all events before
                the first event whose `ts` is that time or later. A batch that continues beyond that point is left out
                completely.

        Returns:
            The state.

        Raises:
            UnknownViewError: No such view is registered.
            ValueError: The offset is negative, beyond the head, or not where a line begins.
            ReducerError: The reducer raised.
            CorruptLogError: The log is damaged.
            OSError: The log could not be read.
        """
        return await state_at(self._reader, self._views[name], at)

    def stats(self) -> LogStats:
        """Counters of what the log has done since it was opened, and of what waits. No I/O: it can be called often."""
        writer = self._writer_or_none
        counters = WriterCounters() if writer is None else writer._commits.counters
        head = None if writer is None else writer.head.offset
        return LogStats(
            **msgspec.structs.asdict(counters),
            head=head,
            queued=0 if writer is None else len(writer._queue),
            waiting_for_place=0 if writer is None else writer._queue.waiting,
            waiting=self._reader._scope.pending_waits,
            views={
                view.name: ViewStats(view.offset, 0 if head is None else max(head - view.offset, 0))
                for view in self._views.values()
            },
        )
