"""JetStream's own API, by requests: finds and creates streams, and gets single messages from a stream's leader."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from .._errors import CorruptLogError, EventfoldError
from ._codes import NO_MESSAGE, NO_PEERS, NO_STREAM, STREAM_EXISTS, error_code
from ._settings import Settings

# Sends a payload to a subject, and returns the answer; see `Connection.request`.
Request: TypeAlias = Callable[[str, Any], Awaitable[dict[str, Any]]]

_RETRY_DELAY = 0.05  # seconds


class Message(NamedTuple):
    """A message of a stream."""

    sequence: int
    headers: Mapping[str, str]
    data: bytes


async def stream_info(request: Request, settings: Settings, wanted: Mapping[str, Any], *, create: bool) -> Any:
    """The server's answer about a stream; with `create`, a stream that does not exist is created as `wanted`."""
    subject = f"$JS.API.STREAM.INFO.{wanted['name']}"
    info = await request(subject, None)
    if error_code(info) == NO_STREAM and create:
        await _create_stream(request, settings, wanted)
        info = await request(subject, None)
    return info


async def _create_stream(request: Request, settings: Settings, wanted: Mapping[str, Any]) -> None:
    name, loop = wanted["name"], asyncio.get_running_loop()
    deadline = loop.time() + settings.timeout
    while True:
        answer = await request(f"$JS.API.STREAM.CREATE.{name}", wanted)
        if "error" not in answer or error_code(answer) == STREAM_EXISTS:
            return
        # The servers of a cluster that has just been started may not know each other yet.
        if error_code(answer) != NO_PEERS or loop.time() >= deadline:
            description = answer["error"]["description"]
            raise EventfoldError(f"{settings.location}: the stream {name} can't be created: {description}")
        await asyncio.sleep(_RETRY_DELAY)


async def get_message(request: Request, location: str, stream: str, which: Mapping[str, Any]) -> Message | None:
    """The message that `which` describes, as the stream's leader has it; None if there is none."""
    answer = await request(f"$JS.API.STREAM.MSG.GET.{stream}", which)
    if error_code(answer) == NO_MESSAGE:
        return None
    if error_code(answer) == NO_STREAM:
        raise CorruptLogError(location, 0, f"the stream {stream} was deleted")
    if "error" in answer:
        raise EventfoldError(f"{location}: {answer['error']['description']}")
    message = answer["message"]
    headers = base64.b64decode(message.get("hdrs") or "").decode()
    pairs = dict(line.split(": ", 1) for line in headers.split("\r\n") if ": " in line)
    return Message(message["seq"], pairs, base64.b64decode(message.get("data") or ""))
