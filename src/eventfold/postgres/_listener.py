"""Notices what others append, while somebody waits: `LISTEN`, and a look every second.

A notification is only a hint. It may be lost with its connection, or never come through a pooler: the look makes sure.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import asyncpg

from .._errors import EventfoldError
from .._event import Head
from .._logging import INFO, log_event
from ._connections import CLOSED_WITHIN, FIRST_DELAY, LAST_DELAY, LOST

if TYPE_CHECKING:
    from ._source import Session

LOOK_INTERVAL = 1.0  # seconds


def channel(log: int) -> str:
    """The name under which the commits of a log are notified."""
    return f"eventfold_{log}"


class Listener:
    """A watcher, as `Waiters` asks for one, in the event loop that makes it."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.head: Head | None = None
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._task = self._loop.create_task(self._run(), name="eventfold listener")

    def stop(self) -> None:
        """Ends the watching."""
        if self._loop is asyncio._get_running_loop():
            self._task.cancel()
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._task.cancel)

    async def ended(self) -> None:
        """Waits until the listening connection is closed."""
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        looking = asyncio.ensure_future(self._look_now_and_then())
        listening = asyncio.ensure_future(self._listen_again_and_again())
        try:
            await asyncio.wait([looking, listening])
        finally:
            looking.cancel()
            listening.cancel()
            await asyncio.wait([looking, listening])

    async def _look_now_and_then(self) -> None:
        """Looks on every notification, and every second."""
        session = self._session
        while True:
            try:
                known, self._news = self.head, asyncio.Event()
                head = await session.head()
                if head != known:
                    lines = None if known is None else await session.recent_lines(known, head)
                    self.head = head
                    session.waiters.notify(head, known, lines, watcher=self)
            except (OSError, EventfoldError) as error:
                session.waiters.notify(error, watcher=self)
            try:
                async with asyncio.timeout(LOOK_INTERVAL):
                    await self._news.wait()
            except TimeoutError:
                pass

    async def _listen_again_and_again(self) -> None:
        """Listens, on another connection when one is lost."""
        delay = FIRST_DELAY
        while True:
            try:
                if await self._session.find():
                    standing = self._session.connections.standing
                    connection = await standing.take()
                    try:
                        delay = FIRST_DELAY
                        await self._listen(connection)
                    finally:
                        standing.leave(connection)
                delay = LAST_DELAY
            except (*LOST, asyncpg.PostgresError, EventfoldError) as error:
                log_event(
                    INFO,
                    "postgres.listener_lost",
                    "%(location)s is listened to anew: %(error)s",
                    location=self._session.settings.location,
                    error=repr(error),
                )
            await asyncio.sleep(delay)
            delay = min(2 * delay, LAST_DELAY)

    async def _listen(self, connection: Any) -> None:
        """Listens until the connection is lost."""
        lost = asyncio.Event()
        name = channel(self._session.log)

        def notified(*_: object) -> None:
            self._news.set()

        def terminated(_: object) -> None:
            lost.set()

        run = self._session.connections.standing.run
        await run(lambda: connection.add_listener(name, notified))
        connection.add_termination_listener(terminated)
        try:
            self._news.set()  # for what was appended before it listened
            await lost.wait()
        finally:
            connection.remove_termination_listener(terminated)
            if not connection.is_closed():
                try:
                    async with asyncio.timeout(CLOSED_WITHIN):
                        await run(lambda: connection.remove_listener(name, notified))
                except (*LOST, asyncpg.PostgresError):
                    connection.terminate()
