"""Calls of the client library: no time-out and no cancellation is lost, whatever task makes them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from eventfold._aio import UncancellableTask
from eventfold.jetstream._calls import run_isolated


async def _give_up_inside() -> None:
    """Does what `asyncio.wait_for` does from Python 3.12 on."""
    async with asyncio.timeout(0.05):
        await asyncio.sleep(100)


async def _stubborn() -> None:
    """Swallows the first cancellation, as the library does while it flushes."""
    try:
        await asyncio.sleep(100)
    except asyncio.CancelledError:
        await asyncio.sleep(100)


@pytest.mark.parametrize("make", [asyncio.create_task, lambda call: UncancellableTask(call, "test")])
@pytest.mark.parametrize(
    ("call", "timeout"), [(_give_up_inside, None), (lambda: asyncio.sleep(100), 0.05), (_stubborn, 0.05)]
)
async def test_a_call_that_takes_too_long_is_abandoned(
    make: Callable[[Any], Any], call: Callable[[], Coroutine[Any, Any, None]], timeout: float | None
) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(make(run_isolated(call(), timeout)), 5)


async def test_a_call_cancelled_by_another_task_raises_an_error_and_no_cancellation() -> None:
    """At the end of `asyncio.run`, for example, the caller must be able to continue."""
    begun: list[asyncio.Task[Any]] = []

    async def call() -> None:
        begun.append(asyncio.current_task())  # type: ignore[arg-type]
        await asyncio.sleep(100)

    calling = UncancellableTask(run_isolated(call()), "test")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    begun[0].cancel()

    with pytest.raises(ConnectionAbortedError):
        await asyncio.wait_for(calling, 5)


async def test_a_cancelled_caller_waits_for_the_end_of_the_call() -> None:
    ended: list[bool] = []

    async def call() -> None:
        try:
            await _stubborn()
        finally:
            ended.append(True)

    calling = asyncio.ensure_future(run_isolated(call()))
    await asyncio.sleep(0.01)
    calling.cancel()

    with pytest.raises(asyncio.CancelledError):
        await calling
    assert ended == [True]
