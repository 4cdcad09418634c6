"""Spans for OpenTelemetry: what a log does, how long it takes, and for which caller. Needs the extra `otel`.

Nothing is traced until `instrument` is called. The spans, with their attributes, are listed in docs/operations.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from . import _tracing
from ._consumer import Consumer
from ._event import Record

try:
    from opentelemetry import propagate, trace
except ImportError as _error:
    raise ImportError("eventfold.telemetry needs opentelemetry-api: pip install 'eventfold[otel]'") from _error

__all__ = ["handling", "instrument", "uninstrument"]


def instrument(tracer_provider: trace.TracerProvider | None = None) -> None:
    """Makes the logs of this process create spans from now on, including logs that are already open.

    Args:
        tracer_provider: The provider of the tracer; None for OpenTelemetry's global provider, even if that is set only
            later.
    """
    _tracing.tracer = _Tracer(trace.get_tracer("eventfold", tracer_provider=tracer_provider))


def uninstrument() -> None:
    """Makes the logs of this process create no more spans."""
    _tracing.tracer = None


@contextmanager
def handling(consumer: Consumer, record: Record) -> Iterator[trace.Span]:
    """Creates a span for a consumer's work on a record; use it in a `with` block.

    Spans that are created inside the block are children of this span. If the event's `meta` has a trace context, such
    as `meta["traceparent"]`, the span is linked to the span of that context.

    Args:
        consumer: The consumer.
        record: The record that the consumer yielded.

    Yields:
        The span, to which you can add attributes; an invalid span if `instrument` was not called.
    """
    tracer = _tracing.tracer
    if not isinstance(tracer, _Tracer):
        yield trace.INVALID_SPAN
        return
    meta = record.event.meta
    carrier = {key: value for key, value in meta.items() if isinstance(value, str)} if isinstance(meta, Mapping) else {}
    origin = trace.get_current_span(propagate.extract(carrier)).get_span_context() if carrier else None
    with tracer.otel.start_as_current_span(
        "eventfold.handle",
        kind=trace.SpanKind.CONSUMER,
        links=[trace.Link(origin)] if origin is not None and origin.is_valid else [],
        attributes=_named(
            {
                "log": str(consumer._checkpoint.reader._source.location),
                "consumer": consumer.name,
                "type": record.event.type,
                "offset": record.start_offset,
            }
        ),
    ) as span:
        yield span


def _named(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {f"eventfold.{name}": value for name, value in attributes.items()}


class _Span:
    """Implements the library's `Span` with one of OpenTelemetry's."""

    def __init__(self, otel: trace.Span) -> None:
        self.otel = otel

    def set(self, **attributes: str | int | bool) -> None:
        self.otel.set_attributes(_named(attributes))

    def end(self, error: BaseException | None = None, **attributes: str | int | bool) -> None:
        self.set(**attributes)
        if error is not None:
            self.otel.record_exception(error)
            self.otel.set_status(trace.Status(trace.StatusCode.ERROR, f"{type(error).__name__}: {error}"))
        self.otel.end()


class _Tracer:
    """Implements the library's `Tracer` with one of OpenTelemetry's."""

    def __init__(self, otel: trace.Tracer) -> None:
        self.otel = otel

    def start(self, name: str, caused_by: Iterable[_tracing.Span], attributes: dict[str, Any]) -> _Span:
        links = [trace.Link(span.otel.get_span_context()) for span in caused_by if isinstance(span, _Span)]
        return _Span(self.otel.start_span(name, links=links, attributes=_named(attributes)))

    @contextmanager
    def enter(self, name: str, attributes: dict[str, Any]) -> Iterator[_Span]:
        with self.otel.start_as_current_span(name, attributes=_named(attributes)) as span:
            yield _Span(span)
