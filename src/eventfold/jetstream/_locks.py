"""Locks on consumers' documents: only one process at a time reads under a consumer's name.

The manifest of the document names the holder of the lock. It is replaced only at a known revision, so only one of
several processes can acquire the lock. While the holder lives, it answers requests on a subject of its own. A process
that waits for the lock sends requests there. It takes over the lock if nobody has subscribed to the subject for
`ABSENT_FOR` seconds, which means that the holder has ended, or if nobody has answered for `timeout` seconds, which
means that the holder or its host is frozen.

Promise: of several processes that believe they hold a lock, only the one that the manifest names can commit. A process
that has lost its lock finds that out when it commits, and at the next check of the connection.
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

from ._calls import run_isolated
from ._connection import Connection

ABSENT_FOR = 5.0  # seconds: far longer than a client needs to connect to another server
PROBE_INTERVAL = 0.4  # seconds
_RETRY_DELAY = 0.05  # seconds


def _subject(connection: Connection, identity: str) -> str:
    return f"{connection.settings.subject}.holder.{identity}"


async def _answer(message: Msg) -> None:
    await run_isolated(message.respond(b""))


async def _probe(client: Client, subject: str, timeout: float) -> bool | None:
    """Whether the holder of a lock answers; None if there is no reply, not even that nobody has subscribed."""
    try:
        await run_isolated(client.request(subject, timeout=timeout), timeout)
    except NoRespondersError:
        return False
    except (NatsError, OSError):
        return None
    return True


class Lock:
    """A lock. Call `open` before its identity is written to the manifest.

    `on_release` is called once, in the lock's event loop, with its identity. It must not refer to the lock.
    """

    def __init__(self, connection: Connection, on_release: Callable[[str, Responder], object]) -> None:
        self.identity = uuid.uuid4().hex
        self.lost = False
        self._responder = Responder(connection, self.identity)
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
        """Whether the lock has not been released, and, as far as is known, not been lost."""
        return not self._released and not self.lost

    async def was_lost(self) -> bool:
        """See `DocumentLock.was_lost`."""
        return self.lost

    async def open(self) -> None:
        """Begins to answer requests, and checks that they arrive. Raises `OSError` if they don't."""
        await self._responder.start()

    def release(self) -> None:
        """See `DocumentLock.release`."""
        if self._released or self._pid != os.getpid():
            return
        self._released = True
        release = self._on_release, self.identity, self._responder
        if asyncio._get_running_loop() is self._loop:
            _release(*release)
            return
        try:
            self._loop.call_soon_threadsafe(_release, *release)
        except RuntimeError:
            pass  # the loop and the connection are closed; other processes notice that the holder does not answer


def _release(on_release: Callable[[str, Responder], object], identity: str, responder: Responder) -> None:
    on_release(identity, responder)


class Responder:
    """Answers the requests to a holder, through the connection's current client."""

    def __init__(self, connection: Connection, identity: str) -> None:
        self._connection = connection
        self._subject = _subject(connection, identity)
        self._client: Client | None = None
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        """Subscribes, or subscribes again if the client was replaced. Raises `OSError` if no request arrives."""
        client = await self._connection.client()
        if client is self._client:
            return
        settings, loop = self._connection.settings, asyncio.get_running_loop()
        deadline = loop.time() + settings.timeout
        try:
            self._subscription = await run_isolated(client.subscribe(self._subject, cb=_answer))
            while not await _probe(client, self._subject, settings.attempt_timeout):
                if loop.time() >= deadline:
                    problem = "no answer from this process itself; may the user publish and subscribe there?"
                    raise OSError(errno.ETIMEDOUT, problem, self._subject)
                await asyncio.sleep(_RETRY_DELAY)
        except BaseException:
            await self.stop()
            raise
        self._client = client

    async def stop(self) -> None:
        """Unsubscribes; idempotent."""
        subscription, self._subscription, self._client = self._subscription, None, None
        if subscription is not None:
            try:
                await run_isolated(subscription.unsubscribe())
            except (NatsError, OSError):
                pass  # the connection was closed, and the subscription with it


class HolderLiveness:
    """For how long the holders of the locks for which this process waits have not answered."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._unanswered: dict[str, float] = {}  # seconds, by the identity of the lock

    async def is_dead(self, identity: str) -> bool:
        """Sends one request to a holder; returns whether its lock may be taken over. Takes half a second or more."""
        client, loop = await self._connection.client(), asyncio.get_running_loop()
        settings, started = self._connection.settings, loop.time()
        answered = await _probe(client, _subject(self._connection, identity), settings.attempt_timeout)
        if answered:
            self._unanswered.pop(identity, None)
            await asyncio.sleep(PROBE_INTERVAL)
            return False
        # If more time has passed, the cause was here: this process was stopped, or had no connection.
        seconds = min(loop.time() - started, settings.attempt_timeout) + PROBE_INTERVAL
        unanswered = self._unanswered[identity] = self._unanswered.get(identity, 0.0) + seconds
        if unanswered >= (settings.timeout if answered is None else ABSENT_FOR):
            del self._unanswered[identity]
            return True
        await asyncio.sleep(PROBE_INTERVAL)
        return False
