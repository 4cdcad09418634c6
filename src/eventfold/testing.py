"""Helpers for the tests of applications: a temporary log, and given/when/then for reducers and decisions.

They work with any test framework. For pytest, there is also the fixture `eventfold_log`.

Promises: the log is a real one in a temporary directory, except that it is not synced to disk; reducers get events that
were encoded and decoded, as they would be read from a log; a failed assertion shows the difference.
"""

from __future__ import annotations

import asyncio
import copy
import difflib
import re
import tempfile
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from pprint import pformat
from types import CoroutineType
from typing import Any, Generic, TypeVar

import anyio
import msgspec

from . import Event, EventLog, SyncMode, View

__all__ = ["Folded", "Given", "Outcome", "given", "log"]

S = TypeVar("S")
E = TypeVar("E", bound=BaseException)


@asynccontextmanager
async def log(*, views: Iterable[View[Any]] = (), **options: Any) -> AsyncIterator[EventLog]:
    """Opens a log in a new temporary directory, which is removed at the end, even after an error or a cancellation.

    Args:
        views: The views to register.
        options: The options of `EventLog.open`. `sync` is `SyncMode.OS` by default, since the log need not survive the
            test.

    Yields:
        The log. A test can open a reader or a second log in its directory, `log.dir`.

    Raises:
        EventfoldError: As for `EventLog.open`, which also lists all other errors.
    """
    options.setdefault("sync", SyncMode.OS)
    directory = await asyncio.to_thread(tempfile.TemporaryDirectory, prefix="eventfold-")
    try:
        async with EventLog.open(directory.name, views=views, **options) as opened:
            yield opened
    finally:
        with anyio.CancelScope(shield=True):
            await asyncio.shield(asyncio.to_thread(directory.cleanup))


def given(*events: Event) -> Given:
    """Starts a test with the events that have happened so far.

        given(added("milk")).fold(reduce_todos, list).gives(["milk"])
        given(added("milk")).fold(reduce_todos, list).when(adding("tea")).then(added("tea"))
        given(added("milk")).fold(reduce_todos, list).when(adding("milk")).raises(AlreadyThere)

    Args:
        events: The events, in order; none for an empty log.

    Raises:
        TypeError: An argument is not an `Event`, or an event can't be encoded as JSON.
    """
    return Given(events)


class Given:
    """The events that have happened so far; created by `given`."""

    def __init__(self, events: Iterable[Event]) -> None:
        self.events = _as_events(events, "given() takes")

    def fold(self, reducer: Callable[[S, Event], S], initial: S | Callable[[], S]) -> Folded[S]:
        """Folds the events, each as it would be read from a log.

        Args:
            reducer: A plain function of the state and an event that returns the new state.
            initial: The state before the first event: a value, which is copied, or a callable that returns it, as for
                `View`.

        Returns:
            The state, for an assertion or a decision.

        Raises:
            TypeError: The reducer returned None or a coroutine instead of the new state.
            Exception: Whatever the reducer raised, with a note that names the event.
        """
        first: Any = initial() if callable(initial) else copy.deepcopy(initial)
        state: Any = first
        for number, event in enumerate(self.events, 1):
            where = f"event {number} of {len(self.events)}: {event!r}"
            try:
                state = reducer(state, _as_from_a_log(event))
            except Exception as error:
                error.add_note(f"while the reducer folded {where}")
                raise
            if type(state) is CoroutineType:
                state.close()
                raise TypeError("the reducer returned a coroutine: it must be a plain function, not an async one")
            if state is None and first is not None:
                raise TypeError(f"the reducer returned None: it must return the new state; it folded {where}")
        return Folded(state)


class Folded(Generic[S]):
    """A state into which events were folded; created by `Given.fold`."""

    def __init__(self, state: S) -> None:
        self.state = state

    def gives(self, expected: S) -> None:
        """Asserts that the state is equal to `expected`.

        Args:
            expected: The expected state.

        Raises:
            AssertionError: The states differ. The message shows the difference.
        """
        __tracebackhide__ = True
        if self.state != expected:
            raise AssertionError(f"the states differ\n{_difference(expected, self.state)}")

    def when(self, decide: Callable[[S], Event | Iterable[Event] | None]) -> Outcome:
        """Makes a decision based on the state.

        Args:
            decide: A plain function that takes the state and returns an event, several events or none, or raises.

        Returns:
            The outcome. Check it with `then` or `raises`; an error that `decide` raised is not raised before that.

        Raises:
            TypeError: `decide` returned something else.
        """
        try:
            decided: Any = decide(self.state)
            if not isinstance(decided, Event | None) and isinstance(decided, Iterable):
                decided = list(decided)  # the code of a generator runs only now
        except Exception as error:
            return Outcome((), error)
        if type(decided) is CoroutineType:
            decided.close()
            raise TypeError("decide returned a coroutine: it must be a plain function, not an async one")
        if decided is None:
            decided = ()
        elif isinstance(decided, Event) or not isinstance(decided, list):
            decided = (decided,)
        return Outcome(_as_events(decided, "decide must return"), None)


class Outcome:
    """The outcome of a decision; created by `Folded.when`."""

    def __init__(self, events: tuple[Event, ...], error: Exception | None) -> None:
        self._events = events
        self._error = error

    @property
    def events(self) -> tuple[Event, ...]:
        """The events that `decide` returned. Raises what `decide` raised."""
        if self._error is not None:
            raise self._error
        return self._events

    def then(self, *events: Event, ignore: Collection[str] = ("ts",)) -> None:
        """Asserts that `decide` returned exactly these events, in this order.

        Args:
            events: The expected events; none if nothing should be appended.
            ignore: The names of the fields that are not compared; by default only `ts`.

        Raises:
            AssertionError: `decide` returned different events, and the message shows the difference; or it raised an
                error, which is the cause.
            ValueError: `ignore` contains a name that is not that of a field of `Event`.
            TypeError: An argument is not an `Event`, or an event can't be encoded as JSON.
        """
        __tracebackhide__ = True
        ignore = {ignore} if isinstance(ignore, str) else set(ignore)
        unknown = sorted(ignore - set(Event.__struct_fields__))
        if unknown:
            raise ValueError(f"ignore must name fields of Event ({', '.join(Event.__struct_fields__)}), not {unknown}")
        expected = [_fields(event, ignore) for event in _as_events(events, "then() takes")]
        if self._error is not None:
            raise AssertionError(f"expected {len(expected)} events, but decide raised {self._error!r}") from self._error
        actual = [_fields(event, ignore) for event in self._events]
        if actual != expected:
            raise AssertionError(f"decide returned different events\n{_difference(expected, actual)}")

    def raises(self, error: type[E] | tuple[type[E], ...], *, match: str | None = None) -> E:
        """Asserts that `decide` raised an error.

        Args:
            error: The class of the error, or a tuple of classes.
            match: A regular expression that must be found in the message of the error.

        Returns:
            The error.

        Raises:
            AssertionError: `decide` returned events, or it raised a different error, which is the cause.
        """
        __tracebackhide__ = True
        classes = error if isinstance(error, tuple) else (error,)
        names = " or ".join(each.__name__ for each in classes)
        if self._error is None:
            decided = pformat([_fields(event, ("ts",)) for event in self._events], width=100, sort_dicts=False)
            raise AssertionError(f"expected {names}, but decide raised nothing and returned\n{decided}")
        if not isinstance(self._error, classes):
            raise AssertionError(f"expected {names}, but decide raised {self._error!r}") from self._error
        if match is not None and not re.search(match, str(self._error)):
            raise AssertionError(f"the message does not match {match!r}: {str(self._error)!r}") from self._error
        return self._error


def _as_events(events: Iterable[Any], what: str) -> tuple[Event, ...]:
    events = tuple(events)
    for event in events:
        if not isinstance(event, Event):
            raise TypeError(f"{what} events, not {event!r}")
        _as_from_a_log(event)
    return events


def _as_from_a_log(event: Event) -> Event:
    """A copy of an event that was encoded and decoded, so that a reducer that changes it has no other effect."""
    try:
        return msgspec.json.decode(msgspec.json.encode(event), type=Event)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{event!r} can't be appended to a log: {error}") from error


def _fields(event: Event, ignore: Collection[str]) -> dict[str, Any]:
    """The fields of an event that are compared, without empty ones."""
    from_a_log = _as_from_a_log(event)
    values = {name: getattr(from_a_log, name) for name in Event.__struct_fields__ if name not in ignore}
    return {name: value for name, value in values.items() if value is not None and value != ()}


def _difference(expected: object, actual: object) -> str:
    """A comparison line by line: a line with `-` is missing, a line with `+` is unexpected."""
    before, after = (pformat(value, width=60, sort_dicts=False).splitlines() for value in (expected, actual))
    if before == after:
        return f"both print as {actual!r}, but they are not equal ({type(expected)} and {type(actual)})"
    lines = difflib.unified_diff(before, after, "expected", "actual", n=10**6, lineterm="")
    return "\n".join(line for line in lines if not line.startswith("@@"))
