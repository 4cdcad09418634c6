"""The commands that fold events: `state --reducer`, `diff` and `rebuild`; and the views that `verify` compares."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from .._errors import EventfoldError
from .._log import EventLog
from .._reader import EventReader
from .._round_trip import difference
from .._verify import offset_at_time, state_at
from .._view import View
from ..snapshot import encode_state
from ._output import print_json
from ._run import FAILED, progress, reading
from ._select import parse_time

# Seconds between two progress reports.
_WATCH_INTERVAL = 0.1


def load_view(name: str, view: str | None = None, initial: str | None = None) -> View[Any]:
    """Loads a view by `name`, which is `MODULE:NAME` and names a `View` or a reducer.

    For a reducer, `view` is the view's name, and `initial` its initial state as JSON. Python looks for the module in
    the current directory first. Raises `ValueError` if there is no such view or reducer.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"{name!r} must be MODULE:NAME, such as app:todos_view")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name} can't be loaded: {error}") from error
    if isinstance(found, View):
        return found
    if not callable(found):
        raise ValueError(f"{name} is neither a View nor a reducer, but {found!r}")
    if initial is None:
        raise ValueError(f"{name} is a reducer, which needs the state before the first event, such as --initial '{{}}'")
    try:
        state = msgspec.json.decode(initial)
    except msgspec.MsgspecError as error:
        raise ValueError(f"--initial is not JSON: {error}") from error
    return View(view or attribute.rpartition(".")[2], found, state, state_type=Any)


async def offset_of(reader: EventReader, at: str | None, at_time: str | None) -> int:
    """Returns the offset that the options name; for a time, the offset of the first event since. Default: the head."""
    if at is not None and at_time is not None:
        raise ValueError("--at and --at-time were both given")
    if at is not None:
        if not (at.isascii() and at.isdigit()):
            raise ValueError(f"an offset is a whole number, not {at!r}")
        return int(at)
    if at_time is not None:
        return await offset_at_time(reader, parse_time(at_time))
    return (await reader.head()).offset


async def _moment(reader: EventReader, text: str) -> int:
    """Returns the offset that a text names, which is an offset or a time."""
    if text.isascii() and text.isdigit():
        return int(text)
    try:
        time = parse_time(text)
    except ValueError:
        raise ValueError(f"{text!r} is neither an offset nor a time, such as 2026-01-31T12:00") from None
    return await offset_at_time(reader, time)


async def state(address: str, view: View[Any], at: str | None, at_time: str | None) -> None:
    """Prints a view's state, folded up to an offset or a time."""
    async with reading(address) as reader:
        folded = await state_at(reader, view, await offset_of(reader, at, at_time))
    encoded = _encoded(folded)
    sys.stdout.buffer.write((msgspec.json.format(encoded, indent=2) if sys.stdout.isatty() else encoded) + b"\n")


async def diff(address: str, view: View[Any], before: str, after: str) -> int:
    """Prints a view's states at two moments, and where they first differ; returns the exit status."""
    async with reading(address) as reader:
        states = [await state_at(reader, view, await _moment(reader, at)) for at in (before, after)]
    found = difference(states[0], states[1])
    encoded = [msgspec.Raw(_encoded(state)) for state in states]
    print_json({"differs": found, "before": encoded[0], "after": encoded[1]})
    return 0 if found is None else FAILED


def _encoded(state: Any) -> bytes:
    try:
        return encode_state(state)
    except TypeError as error:
        raise EventfoldError(f"the state can't be printed: {error}") from error


async def rebuild(address: str, view: View[Any]) -> None:
    """Rebuilds a view's snapshot from the whole log."""
    async with reading(address), EventLog.open(address, views=[view]) as log:
        with progress("rebuild") as report_progress:
            watching = (
                None if report_progress is None else asyncio.create_task(_watch(view, log.head.offset, report_progress))
            )
            try:
                await log.rebuild(view)
            finally:
                if watching is not None:
                    watching.cancel()
        print_json({"view": view.name, "offset": view.offset})


async def _watch(view: View[Any], end: int, report_progress: Callable[[int, int], object]) -> None:
    """Reports the progress of a view until cancelled."""
    while True:
        report_progress(view.offset, end)
        await asyncio.sleep(_WATCH_INTERVAL)


def views_of(reducers: Iterable[str]) -> list[View[Any]]:
    """Returns the views that `verify` compares. Raises `EventfoldError` for a reducer, which has no version."""
    views = []
    for name in reducers:
        try:
            views.append(load_view(name))
        except ValueError as error:
            raise EventfoldError(f"{error} (verify needs a View: its version and query are compared too)") from error
    return views
