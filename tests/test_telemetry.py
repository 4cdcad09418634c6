"""`eventfold.telemetry`: which spans there are, what they contain, and how they are connected."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from eventfold import ConditionalAppendError, Event, EventLog, Query, View, WriterFailedError, telemetry

from .support import FaultInjector


class Spans:
    """The spans that were recorded, by name."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("test")

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        [span] = self.named(name)
        return span

    @property
    def names(self) -> list[str]:
        return [span.name for span in self._exporter.get_finished_spans()]


@pytest.fixture
def spans() -> Iterator[Spans]:
    """Records spans while the test runs."""
    spans = Spans()
    telemetry.instrument(spans.provider)
    yield spans
    telemetry.uninstrument()


def attributes(span: ReadableSpan) -> dict[str, object]:
    """Returns the span's attributes without the library's prefix."""
    return {name.removeprefix("eventfold."): value for name, value in (span.attributes or {}).items()}


def linked(span: ReadableSpan) -> set[int]:
    """Returns the ids of the spans that it is linked to."""
    return {link.context.span_id for link in span.links}


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


def counting() -> View[int]:
    """A view that counts the events."""
    return View("count", lambda state, event: state + 1, 0)


async def test_the_span_of_an_append_is_a_child_of_its_callers_span(tmp_path: Path, spans: Spans) -> None:
    async with EventLog.open(tmp_path) as log:
        with spans.tracer.start_as_current_span("request") as request:
            result = await log.append(Event("added"))
    span = spans.one("eventfold.append")
    assert span.parent is not None
    assert span.parent.span_id == request.get_span_context().span_id
    assert attributes(span) == {"log": str(tmp_path / "app.jsonl"), "events": 1, "bytes": result.end_offset}
    assert span.status.is_unset


async def test_the_span_of_a_commit_is_linked_to_its_appends_and_has_no_parent(tmp_path: Path, spans: Spans) -> None:
    async with EventLog.open(tmp_path) as log:
        with spans.tracer.start_as_current_span("request"):
            await asyncio.gather(log.append(Event("added")), log.append_many([Event("added"), Event("added")]))
            size = log.head.offset
    commit = spans.one("eventfold.commit")
    assert commit.parent is None
    assert linked(commit) == {id_of(span) for span in spans.named("eventfold.append")}
    assert attributes(commit) == {"log": str(tmp_path / "app.jsonl"), "appends": 2, "refused": 0, "bytes": size}


async def test_a_conflict_is_an_error_of_the_append_and_not_of_the_commit(tmp_path: Path, spans: Spans) -> None:
    async with EventLog.open(tmp_path) as log:
        await log.append(Event("added", tags=("order:7",)))
        with pytest.raises(ConditionalAppendError):
            await log.append_if(Event("added"), 0, "")
        with pytest.raises(ConditionalAppendError):
            await asyncio.gather(
                log.append(Event("added", tags=("order:8",))), log.append_unless([Event("x")], Query(tags=["order:8"]))
            )
    failed = [span for span in spans.named("eventfold.append") if not span.status.is_ok and not span.status.is_unset]
    assert len(failed) == 2
    assert failed[0].status.description is not None
    assert failed[0].status.description.startswith("ConditionalAppendError")
    assert failed[0].events[0].name == "exception"
    assert [attributes(span)["refused"] for span in spans.named("eventfold.commit")] == [0, 1, 1]
    assert all(span.status.is_unset for span in spans.named("eventfold.commit"))


async def test_the_span_of_a_failed_commit_has_the_status_error(
    tmp_path: Path, spans: Spans, faults: FaultInjector
) -> None:
    async with EventLog.open(tmp_path) as log:
        faults.fail("sync")
        with pytest.raises(WriterFailedError):
            await log.append(Event("added"))
    commit = spans.one("eventfold.commit")
    assert commit.status.status_code is trace.StatusCode.ERROR
    assert (attributes(commit)["appends"], attributes(commit)["refused"]) == (0, 1)


async def test_a_cancelled_append_ends_its_span(tmp_path: Path, spans: Spans) -> None:
    async with EventLog.open(tmp_path) as log:
        task = asyncio.create_task(log.append(Event("added")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        assert attributes(spans.one("eventfold.append"))["cancelled"] is True


async def test_the_span_of_a_rotation_says_whether_it_was_automatic(tmp_path: Path, spans: Spans) -> None:
    async with EventLog.open(tmp_path, max_log_size=1) as log:
        with spans.tracer.start_as_current_span("request"):
            await log.append(Event("added"))
    async with EventLog.open(tmp_path) as log:
        with spans.tracer.start_as_current_span("maintenance") as maintenance:
            await log.rotate()
    automatic, asked = spans.named("eventfold.rotate")
    assert (attributes(automatic)["automatic"], automatic.parent) == (True, None)
    assert attributes(asked)["automatic"] is False
    assert asked.parent is not None
    assert asked.parent.span_id == maintenance.get_span_context().span_id


async def test_opening_and_rebuilding_are_spans(tmp_path: Path, spans: Spans) -> None:
    async with EventLog.open(tmp_path, views=[counting()]) as log:
        await log.append(Event("added"))
        await log.rebuild("count")
        size = log.head.offset
    where = str(tmp_path / "app.jsonl")
    assert attributes(spans.one("eventfold.open")) == {"log": where, "read_only": False, "views": 1}
    assert attributes(spans.one("eventfold.rebuild")) == {"log": where, "view": "count", "offset": size}


async def test_the_handling_of_a_record_is_linked_to_the_request_that_appended_it(tmp_path: Path, spans: Spans) -> None:
    async with EventLog.open(tmp_path) as log:
        with spans.tracer.start_as_current_span("request") as request:
            propagate.inject(meta := {})
            result = await log.append(Event("added", meta=meta))
        async for record in (consumer := log.consumer("mailer")):
            with telemetry.handling(consumer, record):
                with spans.tracer.start_as_current_span("mail"):
                    pass
                await consumer.commit(record)
            break
    handle = spans.one("eventfold.handle")
    assert linked(handle) == {request.get_span_context().span_id}
    where = str(tmp_path / "app.jsonl")
    assert attributes(handle) == {"log": where, "consumer": "mailer", "type": "added", "offset": 0}
    commit = spans.one("eventfold.consumer_commit")
    assert attributes(commit) == {"log": where, "consumer": "mailer", "offset": result.end_offset}
    for span in (commit, spans.one("mail")):
        assert span.parent is not None
        assert span.parent.span_id == id_of(handle)


@pytest.mark.parametrize("meta", [None, 7, {"traceparent": 7}, {"traceparent": "nonsense"}])
async def test_an_event_without_a_trace_is_handled_without_a_link(tmp_path: Path, spans: Spans, meta: object) -> None:
    async with EventLog.open(tmp_path) as log:
        await log.append(Event("added", meta=meta))
        async for record in (consumer := log.consumer("mailer")):
            with telemetry.handling(consumer, record):
                break
    assert spans.one("eventfold.handle").links == ()


async def test_nothing_is_traced_before_instrument_and_after_uninstrument(tmp_path: Path, spans: Spans) -> None:
    telemetry.uninstrument()
    async with EventLog.open(tmp_path, views=[counting()]) as log:
        await log.append(Event("added"))
        await log.rebuild("count")
        async for record in (consumer := log.consumer("mailer")):
            with telemetry.handling(consumer, record) as span:
                assert not span.is_recording()
                await consumer.commit(record)
            break
        assert spans.names == []
        telemetry.instrument(spans.provider)
        await log.append(Event("added"))
    assert spans.names == ["eventfold.commit", "eventfold.append"]
