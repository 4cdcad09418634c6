"""The commands that only read: `info`, `cat`, `tail`, `export`, `state`, `verify`, and the list of consumers."""

from __future__ import annotations

import sys
from contextlib import aclosing, nullcontext
from typing import Any

import msgspec

from .._address import without_password
from .._errors import EventfoldError
from .._export import ExportFormat, export_log
from .._info import LogInfo, PlaceInfo
from .._info import info as info_of
from .._verify import verify as verify_log
from .._view import View
from ..snapshot import BadSnapshotError, parse
from ._output import Format, counted, print_json, print_table, printer
from ._run import FAILED, existing, progress, reading
from ._select import Selection, between, last


async def info(address: str, json: bool) -> None:
    """Prints head, sizes, views and consumers."""
    async with reading(address) as reader:
        found = await info_of(reader)
    if json:
        print_json(found)
        return
    print_table(("", ""), _facts(found))
    places = [("view", place) for place in found.views] + [("consumer", place) for place in found.consumers]
    if places:
        print_table(("", "name", "offset", "lag"), ((kind, place.name, *_place(place)) for kind, place in places))


def _facts(found: LogInfo) -> list[tuple[str, object]]:
    facts: list[tuple[str, object]] = [("log", found.location), ("head", f"{found.head.offset}:{found.head.line_hash}")]
    files = found.files
    if files is not None:
        facts += [
            ("events", "not counted" if files.events is None else files.events),
            ("app.jsonl", f"{files.active_size} bytes, from offset {files.base}"),
            ("archive", f"{files.archive_size} bytes, {counted(files.frames, 'frame')}"),
            ("rotation", "under way" if files.rotating else "none"),
            ("writer", "none, or unknown" if files.writer is None else f"process {files.writer}"),
        ]
    if found.bytes_a_day is not None:
        events = "" if found.events_a_day is None else f", {_rate(found.events_a_day)} events"
        facts.append(("a day", f"{_rate(found.bytes_a_day)} bytes{events}, on average"))
    return facts


def _rate(number: float) -> str:
    return f"{number:.0f}" if number >= 1000 else f"{number:.3g}"


def _place(place: PlaceInfo) -> tuple[object, object]:
    if place.problem is not None:
        return "-", place.problem
    return place.offset, f"{place.lag} bytes"


async def cat(
    address: str,
    start: int,
    end: int | None,
    wanted: Selection,
    count: int | None,
    limit: int | None,
    format: Format | None,
) -> None:
    """Prints the selected events between two offsets, or the last of them."""
    if limit is not None and limit < 1:
        return
    async with reading(address) as reader:
        show = printer(format)
        if count is not None:
            for record in (await last(reader, count, start, end, wanted))[:limit]:
                show(record)
            return
        shown = 0
        events: Any = between(reader, start, end, wanted)
        async with aclosing(events):
            async for record in events:
                show(record)
                shown += 1
                if shown == limit:
                    return


async def tail(
    address: str, start: int | None, wanted: Selection, count: int, follow: bool, format: Format | None
) -> None:
    """Prints the last selected events, or those from an offset onwards; with `follow`, each new one too."""
    async with reading(address) as reader:
        show = printer(format)
        head = (await reader.head()).offset
        if start is None:
            for record in await last(reader, count, 0, head, wanted):
                show(record)
            start = head
        if not follow:
            events: Any = between(reader, start, None, wanted)
            async with aclosing(events):
                async for record in events:
                    show(record)
            return
        sys.stdout.flush()
        records: Any = reader.tail(start)
        async with aclosing(records):
            async for record in records:
                if wanted.matches(record.event):
                    show(record)
                    sys.stdout.flush()


async def export(address: str, format: ExportFormat) -> None:
    """Prints all events, as their exact lines or as rows."""
    if format is ExportFormat.PARQUET and sys.stdout.isatty():
        raise ValueError("Parquet is binary: write it to a file, such as `eventfold export data --format parquet > f`")
    async with reading(address):
        # On a terminal, a progress bar would be printed between the events.
        with nullcontext(None) if sys.stdout.isatty() else progress("export") as report_progress:
            await export_log(address, sys.stdout.buffer, format, progress=report_progress)


async def state(address: str, view: str) -> None:
    """Prints the state in a view's snapshot."""
    async with reading(address) as reader:
        data = await reader._documents.load("view", view)
        if data is None:
            names = ", ".join(await reader._documents.names("view")) or "none"
            raise EventfoldError(
                f"no state of a view {view!r} is stored in {without_password(address)}; stored are: {names}"
            )
        try:
            found = parse(data)
        except BadSnapshotError as error:
            location = reader._documents.location("view", view)
            raise EventfoldError(f"{location}: {error}; delete it, and the view will be rebuilt") from error
    encoded = msgspec.json.format(found.state, indent=2) if sys.stdout.isatty() else bytes(found.state)
    sys.stdout.buffer.write(encoded + b"\n")


async def verify(address: str, json: bool, views: list[View[Any]]) -> int:
    """Prints all problems; returns the exit status."""
    async with reading(address):
        with progress("verify") as report_progress:
            report = await verify_log(existing(address), views=views, progress=report_progress)
    if json:
        print_json(report)
    else:
        for problem in report.problems:
            print(problem)
        found = counted(len(report.problems), "problem") if report.problems else "no problem"
        print(
            f"{found}: {counted(report.events, 'event')}, {counted(report.size, 'byte')}, "
            f"{counted(report.frames, 'archive frame')}, {counted(report.snapshots, 'snapshot')}, "
            f"{counted(report.consumers, 'consumer')}"
        )
    return 0 if report.ok else FAILED


async def consumers(address: str) -> None:
    """Prints the consumers with their offsets."""
    async with reading(address) as reader:
        found = await info_of(reader)
    print_table(("consumer", "offset", "lag"), ((place.name, *_place(place)) for place in found.consumers))
