"""Locks on consumers' names: of all processes that use the log, one at a time reads under a name.

The manifest of the consumer's document names the holder. It is replaced only at a known revision, so of two processes
that want the name, one gets it. The holder answers requests on a subject of its own for as long as it lives, and
whoever wants the name sends requests there. It takes the name over if nobody has subscribed to that subject for
`ABSENT_FOR` seconds (the process has ended), or if nobody has answered for `timeout` seconds (the process or its host
is frozen).

Promise: of several processes that believe they hold a name, only the one that the manifest names can commit. A process
that has lost the name learns of it when it commits, and at the next check of the connection.
"""

from __future__ import annotations

import asyncio
import errno
import os
import uuid
from collections.abc import Callable

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError

from ._calls import called
from ._connection import Connection

ABSENT_FOR = 5.0  # seconds; a client that has lost its server connects to another one long before that
ASK_INTERVAL = 0.4  # seconds
_RETRY_DELAY = 0.05  # seconds


def _subject(connection: Connection, identity: str) -> str:
    return f"{connection.settings.subject}.holder.{identity}"


async def _answer(message: Msg) -> None:
    await called(message.respond(b""))


async def _ask(client: Client, subject: str, timeout: float) -> bool | None:
    """Whether somebody answers; None if the request got no reply of any kind."""
    try:
        await called(client.request(subject, timeout=timeout), timeout)
    except NoRespondersError:
        return False
    except (NatsError, OSError):
        return None
    return True


class Lock:
    """A name that is held. Open the lock before the manifest names it.

    `on_release` is called once with its identity, in its event loop; it must not keep the lock alive.
    """

    def __init__(self, connection: Connection, on_release: Callable[[str, Answering], object]) -> None:
        self.identity = uuid.uuid4().hex
        self.lost = False
        self._answering = Answering(connection, self.identity)
        self._on_release = on_release
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._released = False

    def __repr__(self) -> str:
        return f"<Lock {self.identity}, {'lost' if self.lost else 'released' if self._released else 'held'}>"

    def __del__(self) -> None:
        self.release()

    @property
    def is_held(self) -> bool:
        """Whether it has been neither released nor, as far as is known, lost."""
        return not self._released and not self.lost

    async def was_lost(self) -> bool:
        """See `DocumentLock.was_lost`; as far as is known."""
        return self.lost

    async def open(self) -> None:
        """Begins to answer, and checks that answers arrive. Raises `OSError` if they don't."""
        await self._answering.begin()

    def release(self) -> None:
        """Releases the name; idempotent, and never blocks. Any thread may call it."""
        if self._released or self._pid != os.getpid():
            return
        self._released = True
        release = self._on_release, self.identity, self._answering
        if asyncio._get_running_loop() is self._loop:
            _release(*release)
            return
        try:
            self._loop.call_soon_threadsafe(_release, *release)
        except RuntimeError:  # the loop and the connection are closed: others notice that nobody answers
            pass


def _release(on_release: Callable[[str, Answering], object], identity: str, answering: Answering) -> None:
    on_release(identity, answering)


class Answering:
    """Answers requests for a holder, through whichever client the connection has."""

    def __init__(self, connection: Connection, identity: str) -> None:
        self._connection = connection
        self._subject = _subject(connection, identity)
        self._client: Client | None = None
        self._subscription: Subscription | None = None

    async def begin(self) -> None:
        """Subscribes, and does so again if the client was replaced. Raises `OSError` if no request arrives."""
        client = await self._connection.client()
        if client is self._client:
            return
        settings, loop = self._connection.settings, asyncio.get_running_loop()
        until = loop.time() + settings.timeout
        try:
            self._subscription = await called(client.subscribe(self._subject, cb=_answer))
            while not await _ask(client, self._subject, settings.attempt_timeout):
                if loop.time() >= until:
                    problem = "no answer from this process itself; may the user publish and subscribe there?"
                    raise OSError(errno.ETIMEDOUT, problem, self._subject)
                await asyncio.sleep(_RETRY_DELAY)
        except BaseException:
            await self.end()
            raise
        self._client = client

    async def end(self) -> None:
        subscription, self._subscription, self._client = self._subscription, None, None
        if subscription is not None:
            try:
                await called(subscription.unsubscribe())
            except (NatsError, OSError):
                pass  # the connection was closed, and the subscription with it


class Holders:
    """What is known about the holders of names that this process waits for."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._silent: dict[str, float] = {}  # how long a holder has been silent, in seconds

    async def is_gone(self, identity: str) -> bool:
        """Asks a holder once, and returns whether its name may be taken over. Takes half a second, or one attempt."""
        client, loop = await self._connection.client(), asyncio.get_running_loop()
        settings, begun = self._connection.settings, loop.time()
        answered = await _ask(client, _subject(self._connection, identity), settings.attempt_timeout)
        if answered:
            self._silent.pop(identity, None)
            await asyncio.sleep(ASK_INTERVAL)
            return False
        # Any more time than this was lost here: this process was stopped, or had no connection.
        seconds = min(loop.time() - begun, settings.attempt_timeout) + ASK_INTERVAL
        silent = self._silent[identity] = self._silent.get(identity, 0.0) + seconds
        if silent >= (settings.timeout if answered is None else ABSENT_FOR):
            del self._silent[identity]
            return True
        await asyncio.sleep(ASK_INTERVAL)
        return False
