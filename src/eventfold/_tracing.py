"""Where the library's spans begin and end. Nothing is traced until `eventfold.telemetry` sets a tracer.

Promise: while there is none, an append costs one look at a variable more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol


class Span(Protocol):
    """Something that the library does, from its start to its end."""

    def set(self, **attributes: str | int | bool) -> None:
        """Adds details."""

    def end(self, error: BaseException | None = None, **attributes: str | int | bool) -> None:
        """Ends it, with an error where it failed."""


class Tracer(Protocol):
    """What begins spans. Attributes are named without the prefix `eventfold.`."""

    def start(self, name: str, caused_by: Iterable[Span], attributes: dict[str, Any]) -> Span:
        """A span below the current one, linked to others, and ended by its caller."""

    def enter(self, name: str, attributes: dict[str, Any]) -> AbstractContextManager[Span]:
        """The same as the current span of a block of code, whose exception it records."""


tracer: Tracer | None = None


class _NoSpan:
    def set(self, **attributes: str | int | bool) -> None:
        """Does nothing."""

    def end(self, error: BaseException | None = None, **attributes: str | int | bool) -> None:
        """Does nothing."""


_no_span = _NoSpan()
_no_block: AbstractContextManager[Span] = nullcontext(_no_span)


def start(name: str, caused_by: Iterable[Span] = (), **attributes: str | int | bool) -> Span:
    """Begins a span that `end` or `end_with` ends."""
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
