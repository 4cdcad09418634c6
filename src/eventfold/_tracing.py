"""The beginning and end of the library's spans. Nothing is traced until `eventfold.telemetry` sets a tracer.

Promise: without a tracer, tracing costs an append no more than the check of a variable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol


class Span(Protocol):
    """A traced operation."""

    def set(self, **attributes: str | int | bool) -> None:
        """Adds attributes."""

    def end(self, error: BaseException | None = None, **attributes: str | int | bool) -> None:
        """Adds attributes and ends the span, with an error if the operation failed."""


class Tracer(Protocol):
    """Starts spans. The names of attributes are given without their prefix `eventfold.`."""

    def start(self, name: str, caused_by: Iterable[Span], attributes: dict[str, Any]) -> Span:
        """Starts a child of the current span, linked to the spans that caused it; the caller must end it."""

    def enter(self, name: str, attributes: dict[str, Any]) -> AbstractContextManager[Span]:
        """Starts a span that is current in a `with` block; an exception of the block is recorded."""


tracer: Tracer | None = None


class _NoSpan:
    def set(self, **attributes: str | int | bool) -> None:
        """Does nothing."""

    def end(self, error: BaseException | None = None, **attributes: str | int | bool) -> None:
        """Does nothing."""


_no_span = _NoSpan()
_no_block: AbstractContextManager[Span] = nullcontext(_no_span)


def start(name: str, caused_by: Iterable[Span] = (), **attributes: str | int | bool) -> Span:
    """Starts a span. The caller must end it, with `Span.end` or `end_with`."""
    return _no_span if tracer is None else tracer.start(name, caused_by, attributes)


def span(name: str, **attributes: str | int | bool) -> AbstractContextManager[Span]:
    """A span for a `with` block."""
    return _no_block if tracer is None else tracer.enter(name, attributes)


def end_with(span: Span, future: asyncio.Future[Any]) -> None:
    """Ends a span when a future is done."""

    def end(future: asyncio.Future[Any]) -> None:
        if future.cancelled():
            span.end(cancelled=True)
        else:
            span.end(future._exception)  # `exception()` would suppress the warning that it was never retrieved

    future.add_done_callback(end)
