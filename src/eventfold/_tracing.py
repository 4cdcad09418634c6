"""Where the library's spans begin and end. Nothing is traced until `eventfold.telemetry` sets a tracer.

Promise: without one, tracing costs an append a single check of a variable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol


class Span(Protocol):
    """An operation of the library, from its start to its end."""

    def set(self, **attributes: str | int | bool) -> None:
        """Adds details."""

    def end(self, error: BaseException | None = None, **attributes: str | int | bool) -> None:
        """Ends the span, with an error if the operation failed."""


class Tracer(Protocol):
    """Starts spans. Attributes are named without the prefix `eventfold.`."""

    def start(self, name: str, caused_by: Iterable[Span], attributes: dict[str, Any]) -> Span:
        """Starts a child of the current span, linked to others; the caller ends it."""

    def enter(self, name: str, attributes: dict[str, Any]) -> AbstractContextManager[Span]:
        """Starts a span that is current in a block of code, whose exception it records."""


tracer: Tracer | None = None


class _NoSpan:
    def set(self, **attributes: str | int | bool) -> None:
        """Does nothing."""

    def end(self, error: BaseException | None = None, **attributes: str | int | bool) -> None:
        """Does nothing."""


_no_span = _NoSpan()
_no_block: AbstractContextManager[Span] = nullcontext(_no_span)


def start(name: str, caused_by: Iterable[Span] = (), **attributes: str | int | bool) -> Span:
    """Starts a span that `end` or `end_with` ends."""
    return _no_span if tracer is None else tracer.start(name, caused_by, attributes)


def span(name: str, **attributes: str | int | bool) -> AbstractContextManager[Span]:
    """A span around a block of code."""
    return _no_block if tracer is None else tracer.enter(name, attributes)


def end_with(span: Span, future: asyncio.Future[Any]) -> None:
    """Ends a span when a future is done."""

    def end(future: asyncio.Future[Any]) -> None:
        if future.cancelled():
            span.end(cancelled=True)
        else:
            span.end(future._exception)  # `exception()` would hide that nobody has looked at it

    future.add_done_callback(end)
