"""Receives new messages while anything waits for them, by one ordered consumer for all waits in this process.

The consumer is recreated after a gap, a missed heartbeat or a reconnect. It then begins at the last known head, so that
no message is missed. The client library's own ordered consumer does not notice all of these events. If the library
drops a message because this process is slow, that is a gap too.

Promise: each wait ends with the next message or with an error, even a wait that begins after the error.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from .._errors import EventfoldError
from .._event import Head
from .._logging import INFO, log_event
from ._calls import NO_LIMITS, run_isolated
from ._offsets import sequence_at

if TYPE_CHECKING:
    from ._stream import Stream

_HEARTBEAT = 1.0  # seconds
_RETRY_DELAY = 0.1
_ERROR_DELAY = 0.5
_IDLE_HEARTBEAT_STATUS = "100"


class Follower:
    """A `Watcher`. Create it in the event loop of its stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._task = asyncio.get_running_loop().create_task(self._run(), name="eventfold follower")

    @property
    def head(self) -> Head | None:
        """See `Watcher.head`."""
        return self._stream.known_head

    def stop(self) -> None:
        """Stops following. Call it in the stream's event loop."""
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            try:
                await self._stream.head()
                await self._follow()
            except EventfoldError as error:
                (await self._stream.waiters()).notify(error)
                await asyncio.sleep(_ERROR_DELAY)
            except (NatsError, OSError) as error:
                log_event(
                    INFO,
                    "jetstream.follower_lost",
                    "the subscription to %(location)s was lost, and is recreated: %(error)s",
                    location=self._stream.location,
                    error=repr(error),
                )
                await asyncio.sleep(_RETRY_DELAY)

    async def _follow(self) -> None:
        """Reports each new message to the stream; returns if one was missed."""
        connection = self._stream.connection
        client = await connection.client()
        messages: asyncio.Queue[Msg] = asyncio.Queue()
        inbox, name = client.new_inbox(), f"eventfold-{uuid.uuid4().hex}"
        subscription = await run_isolated(client.subscribe(inbox, cb=messages.put, **NO_LIMITS))
        try:
            sequence = sequence_at(self._stream.known_head.offset) - 1
            answer = await connection.request(
                f"$JS.API.CONSUMER.CREATE.{connection.settings.stream}.{name}",
                {
                    "stream_name": connection.settings.stream,
                    "config": {
                        "name": name,
                        "deliver_subject": inbox,
                        "deliver_policy": "by_start_sequence",
                        "opt_start_seq": sequence + 1,
                        "ack_policy": "none",
                        "max_deliver": 1,
                        "flow_control": True,
                        "idle_heartbeat": int(_HEARTBEAT * 1e9),
                        "mem_storage": True,
                        "num_replicas": 1,
                        "inactive_threshold": 30 * 10**9,
                    },
                },
            )
            if "error" in answer:
                await connection.check()
                raise OSError(f"the consumer can't be created: {answer['error']['description']}")
            while True:
                async with asyncio.timeout(3 * _HEARTBEAT):
                    message = await messages.get()
                headers = message.headers or {}
                if headers.get("Status") == _IDLE_HEARTBEAT_STATUS:
                    if message.reply:  # a flow control request
                        await run_isolated(client.publish(message.reply))
                    elif int(headers.get("Nats-Last-Stream", sequence)) > sequence and messages.empty():
                        return
                    continue
                # $JS.ACK.<stream>.<consumer>.<delivered>.<sequence>.<consumer sequence>.<time>.<pending>, with more
                # tokens before the stream if it is in a domain.
                if int(message.reply.split(".")[-4]) != sequence + 1:
                    return
                sequence += 1
                self._stream.note_message(sequence, message.data)
        finally:
            await self._delete(client, subscription, name)

    async def _delete(self, client: Client, subscription: Subscription, name: str) -> None:
        try:
            await run_isolated(subscription.unsubscribe())
            if client.is_connected:
                stream = self._stream.connection.settings.stream
                await run_isolated(client.publish(f"$JS.API.CONSUMER.DELETE.{stream}.{name}"))
        except (NatsError, OSError):
            pass  # the server deletes the consumer itself after the inactive threshold
