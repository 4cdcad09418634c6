"""Notices what other processes append, while anything waits for it: by `LISTEN`, and by a poll every second.

A notification is only a hint, since it may be lost with its connection, and does not pass some poolers. The poll finds
what was missed.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import asyncpg

from .._errors import EventfoldError
from .._event import Head
from .._logging import INFO, log_event
from ._calls import is_closed, terminate
from ._connections import CLOSE_TIMEOUT, CONNECTION_LOST, FIRST_RETRY_DELAY, MAX_RETRY_DELAY

if TYPE_CHECKING:
    from ._session import Session

POLL_INTERVAL = 1.0  # seconds


def channel(log: int) -> str:
    """The channel of the notifications about a log's commits."""
    return f"eventfold_{log}"


class Listener:
    """A `Watcher`. It belongs to the event loop in which it is created."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.head: Head | None = None
        self._loop = asyncio.get_running_loop()
        self._notified = asyncio.Event()
        self._task = self._loop.create_task(self._run(), name="eventfold listener")

    def stop(self) -> None:
        """Stops watching."""
        if self._loop is asyncio._get_running_loop():
            self._task.cancel()
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._task.cancel)

    async def stopped(self) -> None:
        """Waits until the listener has stopped and released its connection."""
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        polling = asyncio.ensure_future(self._poll())
        listening = asyncio.ensure_future(self._keep_listening())
        try:
            await asyncio.wait([polling, listening])
        finally:
            polling.cancel()
            listening.cancel()
            await asyncio.wait([polling, listening])

    async def _poll(self) -> None:
        """Polls on every notification, and every second."""
        session = self._session
        while True:
            try:
                previous, self._notified = self.head, asyncio.Event()
                head = await session.head()
                if head != previous:
                    lines = None if previous is None else await session.recent_lines(previous, head)
                    self.head = head
                    session.waiters.notify(head, previous, lines, watcher=self)
            except (OSError, EventfoldError) as error:
                session.waiters.notify(error, watcher=self)
            try:
                async with asyncio.timeout(POLL_INTERVAL):
                    await self._notified.wait()
            except TimeoutError:
                pass

    async def _keep_listening(self) -> None:
        """Listens, and continues on another connection when one is lost."""
        delay = FIRST_RETRY_DELAY
        while True:
            try:
                if await self._session.find():
                    dedicated = self._session.connections.dedicated
                    connection = await dedicated.acquire()
                    try:
                        delay = FIRST_RETRY_DELAY
                        await self._listen(connection)
                    finally:
                        dedicated.release(connection)
                delay = MAX_RETRY_DELAY
            except (*CONNECTION_LOST, asyncpg.PostgresError, EventfoldError) as error:
                log_event(
                    INFO,
                    "postgres.listener_lost",
                    "the connection that listens to %(location)s was lost, and is reopened: %(error)s",
                    location=self._session.settings.location,
                    error=repr(error),
                )
            await asyncio.sleep(delay)
            delay = min(2 * delay, MAX_RETRY_DELAY)

    async def _listen(self, connection: Any) -> None:
        """Listens until the connection is lost."""
        lost = asyncio.Event()
        name = channel(self._session.log)

        def notified(*_: object) -> None:
            self._notified.set()

        def terminated(_: object) -> None:
            lost.set()

        run = self._session.connections.dedicated.run
        async with asyncio.timeout(self._session.settings.attempt_timeout):
            await run(lambda: connection.add_listener(name, notified))
        connection.add_termination_listener(terminated)
        try:
            self._notified.set()  # for what was appended before it listened
            await lost.wait()
        finally:
            if not is_closed(connection):
                connection.remove_termination_listener(terminated)
                try:
                    async with asyncio.timeout(CLOSE_TIMEOUT):
                        await run(lambda: connection.remove_listener(name, notified))
                except (*CONNECTION_LOST, asyncpg.PostgresError):
                    terminate(connection)
