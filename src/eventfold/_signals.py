"""Ends open streams when a server is asked to stop.

A web server waits for open responses before it ends the application, and a tail never ends on its own; so the signal
must end the streams too.

Promises: the previous handlers are called, and are restored at the end; a signal that nobody handles keeps its default
action; outside the main thread, where no signal arrives, nothing happens.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ._log import EventLog

STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def end_streams_on_stop(log: EventLog) -> Iterator[None]:
    """Ends the log's tails, watches and waits on SIGINT and SIGTERM, before the server handles the signal.

    For the lifespan of an application, inside that of its log:

        async with EventLog.open("data") as log:
            with end_streams_on_stop(log):
                yield {"log": log}

    Tails and watches end as if the log were closed, and a `wait_until` that still waits raises `LogClosedError`;
    appends and reads continue until the log is closed. The signal is then passed to the handler that was installed
    before. A signal without a handler keeps its default action. Outside the main thread, under a test client for
    example, this does nothing.

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

    def pass_to(previous: Callable[[int, FrameType | None], object]) -> Callable[[int, FrameType | None], None]:
        def stop(number: int, frame: FrameType | None) -> None:
            # Somebody who installed a handler over this one may still call it afterwards, when the loop is closed.
            if active:
                loop.call_soon_threadsafe(log.reader().end_waits)
            previous(number, frame)

        return stop

    installed = []
    try:
        for number in STOPS:
            previous = signal.getsignal(number)
            if callable(
                previous
            ):  # otherwise it is the default action, SIG_IGN, or a handler not installed from Python
                handler = pass_to(previous)
                signal.signal(number, handler)
                installed.append((number, handler, previous))
        yield
    finally:
        active = False
        for number, handler, previous in installed:
            if signal.getsignal(number) is handler:
                signal.signal(number, previous)
