"""Calls in threads: who makes them, who gets their results, and what a cancellation does."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import anyio
import pytest
from tests.support import no_thread

from eventfold import _threads


async def test_a_call_without_a_thread_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it ran later, it would change files that may belong to somebody else by then."""
    monkeypatch.setattr(_threads, "_pool", _threads.ThreadPool(2))
    made: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(OSError, match="no thread can be started"):
            await _threads.in_thread(made.append, 1)
    await _threads.in_thread(made.append, 2)
    await _threads.in_thread(made.append, 3)

    assert made == [2, 3]


async def test_consecutive_calls_use_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_threads, "_pool", _threads.ThreadPool(8))

    assert len({await _threads.in_thread(threading.get_ident) for _ in range(50)}) == 1


async def test_concurrent_calls_use_as_many_threads_as_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fourth call waits until one of the three threads is free."""
    monkeypatch.setattr(_threads, "_pool", _threads.ThreadPool(3))
    together = threading.Barrier(3, timeout=60)
    calls = [_threads.start_in_thread(together.wait) for _ in range(3)]
    fourth = _threads.start_in_thread(threading.get_ident)
    places = [await call for call in calls]

    assert sorted(places) == [0, 1, 2]
    assert await fourth


async def test_all_awaiting_tasks_that_are_not_cancelled_get_the_result_of_a_call() -> None:
    go_on = threading.Event()
    call = _threads.start_in_thread(lambda: go_on.wait(60))
    waiting = [asyncio.ensure_future(call) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    assert not waiting[0].done(), "it waits for the end of the call"
    go_on.set()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)

    assert isinstance(outcomes[0], asyncio.CancelledError)
    assert outcomes[1:] == [True, True]


async def test_a_call_may_end_before_it_is_awaited() -> None:
    call = _threads.start_in_thread(threading.get_ident)
    while not call.done():
        await asyncio.sleep(0.001)

    assert await call == await call != threading.get_ident()


async def test_a_cancelled_caller_waits_for_the_end_of_the_call() -> None:
    """This holds for a cancellation by asyncio and by an anyio scope, however often it is repeated."""
    go_on = threading.Event()
    call = _threads.start_in_thread(lambda: go_on.wait(60))
    asyncio.get_running_loop().call_later(0.05, go_on.set)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await call
    assert call.result()

    go_on.clear()
    call = _threads.start_in_thread(lambda: go_on.wait(60))
    asyncio.get_running_loop().call_later(0.05, go_on.set)
    with anyio.move_on_after(0.01) as scope:
        await call
    assert scope.cancelled_caught
    assert call.result()


async def test_a_call_can_be_awaited_by_callers_that_a_cancellation_is_to_end_at_once() -> None:
    go_on = threading.Event()
    call = _threads.start_in_thread(lambda: go_on.wait(60))
    with anyio.move_on_after(0.01) as scope:
        await call.interruptible()
    assert scope.cancelled_caught
    assert not call.done()
    go_on.set()

    assert await call


async def test_a_cancellation_is_raised_even_if_the_call_ends_in_the_same_iteration_of_the_loop() -> None:
    call = _threads.ThreadCall[int](asyncio.get_running_loop())
    waiting = asyncio.ensure_future(call)
    await asyncio.sleep(0)
    call.settle(1, None)
    waiting.cancel()

    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert call.result() == 1


async def test_the_first_outcome_of_a_call_counts() -> None:
    """If a log is closed while its turn is stuck, waiting callers get an error; the thread may finish later."""
    call = _threads.ThreadCall[int](asyncio.get_running_loop())
    call.settle(None, OSError("given up"))
    call.settle(1, None)

    with pytest.raises(OSError, match="given up"):
        await call


async def test_an_error_of_a_call_leaves_nothing_for_the_garbage_collector() -> None:
    """Otherwise files, for example, that its traceback refers to would stay open until the next collection."""

    class Held:
        pass

    async def fails() -> weakref.ref[Held]:
        held = Held()

        def call() -> None:
            held  # noqa: B018
            raise OSError("refused")

        try:
            await _threads.start_in_thread(call)
        except OSError:
            pass
        return weakref.ref(held)

    gc.disable()
    try:
        ref = await fails()
        async with asyncio.timeout(10):
            while ref() is not None:  # The call is also referenced by the thread until that is done with it.
                await asyncio.sleep(0.001)
    finally:
        gc.enable()


async def test_a_quick_call_in_a_thread_returns_before_other_tasks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop's thread waits for the call and raises whatever the call raised."""
    monkeypatch.setattr(_threads, "PATIENCE", 60.0)
    turns: list[int] = []
    asyncio.get_running_loop().call_soon(turns.append, 1)
    found = await _threads.quick_in_thread(threading.get_ident)
    with pytest.raises(ZeroDivisionError):
        await _threads.quick_in_thread(lambda: 1 // 0)

    assert found != threading.get_ident()
    assert not turns


async def test_a_call_in_a_thread_that_turns_out_to_be_slow_does_not_block_other_tasks() -> None:
    """Other tasks run meanwhile, and the call may even depend on them; a cancelled caller still waits for the call."""
    go_on, ended = threading.Event(), threading.Event()

    def slow() -> int:
        go_on.wait(60)
        ended.set()
        return 1

    call = asyncio.create_task(_threads.quick_in_thread(slow))
    await asyncio.sleep(0)
    call.cancel()
    asyncio.get_running_loop().call_later(0.01, go_on.set)
    with pytest.raises(asyncio.CancelledError):
        await call

    assert ended.is_set()


async def test_a_result_that_arrives_at_the_time_limit_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller gets the answer, even if the thread finishes just as the loop's thread stops waiting."""
    answers = []
    async with asyncio.timeout(60):
        for n in range(300):
            monkeypatch.setattr(_threads, "PATIENCE", n % 30 * 1e-6)
            answers.append(await _threads.quick_in_thread(lambda n=n: n))  # type: ignore[misc]

    assert answers == list(range(300))
