"""`end_streams_on_stop`: streams end on a signal, and other signal handlers still work."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support import event, settle

from eventfold import EventLog, Record, end_streams_on_stop, testing

STOPS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """Installs a server's handlers for both signals; yields the list of calls that they get."""
    calls: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: calls.append(number)) for number in STOPS}
    yield calls
    for number, handler in before.items():
        signal.signal(number, handler)


async def follow(log: EventLog) -> list[Record]:
    return [record async for record in log.tail(0)]


@pytest.mark.parametrize("number", STOPS)
async def test_open_streams_end_on_a_signal_and_the_server_receives_it(heard: list[int], number: int) -> None:
    """The tail ends as if the log were closed, but appends still work."""
    async with testing.log() as log:
        await log.append(event(1))
        with end_streams_on_stop(log):
            tail = asyncio.create_task(follow(log))
            await settle()
            assert not tail.done()
            os.kill(os.getpid(), number)
            async with asyncio.timeout(10):
                assert len(await tail) == 1
            await log.append(event(2))

    assert heard == [number]


async def test_two_logs_end_their_streams_on_one_signal(heard: list[int]) -> None:
    """The handlers are chained, and the server's handler is called once."""
    async with testing.log() as one, testing.log() as other:
        with end_streams_on_stop(one), end_streams_on_stop(other):
            tails = [asyncio.create_task(follow(log)) for log in (one, other)]
            await settle()
            os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(10):
                await asyncio.gather(*tails)

    assert heard == [signal.SIGTERM]


async def test_a_handler_of_the_event_loop_is_called_too() -> None:
    """Some servers use asyncio's own way to handle signals."""
    loop, called = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, called.set)
    try:
        async with testing.log() as log:
            with end_streams_on_stop(log):
                tail = asyncio.create_task(follow(log))
                await settle()
                os.kill(os.getpid(), signal.SIGTERM)
                async with asyncio.timeout(10):
                    await tail
                    await called.wait()
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


async def test_the_previous_handlers_are_restored(heard: list[int]) -> None:
    """The handlers are also restored after an error."""
    before = [signal.getsignal(number) for number in STOPS]
    async with testing.log() as log:
        with pytest.raises(RuntimeError, match="of the application"), end_streams_on_stop(log):
            assert [signal.getsignal(number) for number in STOPS] != before
            raise RuntimeError("of the application")

    assert [signal.getsignal(number) for number in STOPS] == before


async def test_a_handler_that_was_installed_later_stays(heard: list[int]) -> None:
    """A handler that replaced ours is not replaced, and it may call ours after the log is closed."""
    later: list[Any] = []
    async with testing.log() as log:
        with end_streams_on_stop(log):
            ours = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda number, frame: (later.append(number), ours(number, frame)))  # type: ignore[operator]
            theirs = signal.getsignal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is theirs
    os.kill(os.getpid(), signal.SIGTERM)

    assert (later, heard) == ([signal.SIGTERM], [signal.SIGTERM])


@pytest.mark.parametrize("action", [signal.SIG_DFL, signal.SIG_IGN])
async def test_a_signal_that_nobody_handles_keeps_its_action(heard: list[int], action: signal.Handlers) -> None:
    """A program without a handler of its own still ends on SIGTERM."""
    signal.signal(signal.SIGTERM, action)
    async with testing.log() as log:
        with end_streams_on_stop(log):
            assert signal.getsignal(signal.SIGTERM) is action


async def test_outside_the_main_thread_no_handler_is_installed(heard: list[int]) -> None:
    """Under a test client, for example, the application runs in a thread."""
    before = [signal.getsignal(number) for number in STOPS]

    async def application() -> list[Any]:
        async with testing.log() as log:
            with end_streams_on_stop(log):
                await log.append(event(1))
                return [signal.getsignal(number) for number in STOPS]

    assert await asyncio.to_thread(asyncio.run, application()) == before


def test_a_handler_that_is_called_after_the_end_of_the_loop_does_nothing(heard: list[int]) -> None:
    """Only the previous handler is called."""

    async def application() -> Any:
        async with testing.log() as log:
            with end_streams_on_stop(log):
                return signal.getsignal(signal.SIGTERM)

    asyncio.run(application())(signal.SIGTERM, None)

    assert heard == [signal.SIGTERM]


SCRIPT = """
import asyncio, sys
from eventfold import EventLog, end_streams_on_stop

async def main():
    async with EventLog.open(sys.argv[1]) as log:
        with end_streams_on_stop(log):
            print("ready", flush=True)
            async for record in log.tail(0):
                pass
            print("ended", flush=True)
            await asyncio.sleep(60)

asyncio.run(main())
"""


def test_ctrl_c_still_ends_a_program_run_by_asyncio_run(tmp_path: Path) -> None:
    """`asyncio.run` has its own handler, which cancels the main task."""
    with subprocess.Popen([sys.executable, "-c", SCRIPT, tmp_path], stdout=-1, stderr=-1, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=20)

    assert errors.rstrip().endswith("KeyboardInterrupt")
