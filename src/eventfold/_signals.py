"""Ends open streams when a signal stops a server.

A web server waits for open responses before it ends the application, but a response that follows a tail never ends. So
the signal must end the tails.

Promises: the previous handlers are called, and are restored at the end; a signal without a handler keeps its default
action; outside the main thread, which alone receives signals, nothing happens.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ._log import EventLog

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def end_streams_on_stop(log: EventLog) -> Iterator[None]:
    """Ends the log's tails, watches and waits on SIGINT and SIGTERM, before the server handles the signal.

    Use it during the lifespan of an application, inside the block of its log:

        async with EventLog.open("data") as log:
            with end_streams_on_stop(log):
                yield {"log": log}

    Tails and watches end in the same way as when the log is closed, and calls that wait for events raise
    `LogClosedError`. Appends and reads work until the log is closed. The signal is then passed to the handler that was
    installed before. A signal without a handler keeps its default action. Outside the main thread, for example in a
    test client, this does nothing.

    Args:
        log: An open log.

    Raises:
        RuntimeError: No event loop is running.
    """
    loop = asyncio.get_running_loop()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    active = True

    def with_ending(previous: Callable[[int, FrameType | None], object]) -> Callable[[int, FrameType | None], None]:
        def stop(number: int, frame: FrameType | None) -> None:
            # A handler that replaced this one may call it after the block, when the loop is closed.
            if active:
                loop.call_soon_threadsafe(log.reader().end_waits)
            previous(number, frame)

        return stop

    installed = []
    try:
        for number in STOP_SIGNALS:
            previous = signal.getsignal(number)
            # Otherwise, it is SIG_DFL, SIG_IGN, or a handler that was not installed from Python.
            if callable(previous):
                handler = with_ending(previous)
                signal.signal(number, handler)
                installed.append((number, handler, previous))
        yield
    finally:
        active = False
        for number, handler, previous in installed:
            if signal.getsignal(number) is handler:
                signal.signal(number, previous)
