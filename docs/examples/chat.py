"""Chat rooms over WebSockets, in which a client that lost its connection continues with the next message.

    CHAT_DATA=chat-data uvicorn --app-dir docs/examples chat:app

Open http://127.0.0.1:8000/ in two windows, and restart the server while they are open: they reconnect, and no message
is missing or repeated. The server can also run with `--workers 4`, since all workers write the same log.

A client connects to `/rooms/ROOM?name=NAME&after=OFFSET` and gets `{offset, id, name, text, ts}` for each message after
that offset. Without `after`, it gets the last messages and then each new one. It sends `{id, text}` with an id that it
chooses. If it doesn't know whether a message has arrived, it sends the message again with the same id, and the message
is in the room only once.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import msgspec
from fastapi import FastAPI, WebSocket, WebSocketDisconnect, WebSocketException
from fastapi import Query as Parameter
from fastapi.responses import FileResponse
from fastapi.websockets import WebSocketState

from eventfold import Catalog, EventLog, InvalidEventError, LockMode, Query, end_streams_on_stop

PAGE = Path(__file__).with_name("chat.html")
BACKLOG = 50  # how many messages a new client gets
REFUSED = 1008  # the code for closing a WebSocket with an invalid request
catalog = Catalog()
Name = Annotated[str, Parameter(min_length=1, max_length=50)]


@catalog.event("message_posted", tags=lambda message: [f"room:{message.room}"])
class MessagePosted(msgspec.Struct, frozen=True):
    room: str
    name: str
    text: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]


class Incoming(msgspec.Struct):
    """A message from a client."""

    id: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    text: str


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, EventLog]]:
    data = os.environ.get("CHAT_DATA", "chat-data")
    async with EventLog.open(data, catalog=catalog, lock=LockMode.SHARED, index=True, unique_ids=True) as log:
        with end_streams_on_stop(log):
            yield {"log": log}


app = FastAPI(lifespan=lifespan)


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(PAGE)


@app.websocket("/rooms/{room}")
async def join(socket: WebSocket, room: str, name: Name, after: int | None = None) -> None:
    """Sends the room's messages and receives the client's, until either side ends the connection."""
    log: EventLog = socket.state.log
    try:
        offset = await resume_at(log, room, after)
    except ValueError as error:
        await socket.accept()  # a rejection before this could not give a reason
        raise WebSocketException(REFUSED, str(error)) from error
    await socket.accept()
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(send(socket, log, room, offset))
            group.create_task(receive(socket, log, room, name))
    except* WebSocketDisconnect:
        pass  # one of the two tasks noticed it and cancelled the other


async def resume_at(log: EventLog, room: str, after: int | None) -> int:
    """The offset to start from: the given one, if an event ends there, or that of the room's last messages."""
    if after is not None:
        await log.read_line_hash_before(after)  # raises ValueError if no event ends there
        return after
    offset = (await log.reader().head()).offset
    found = 0
    async for record in log.read_back(offset, query=in_room(room)):
        offset, found = record.start_offset, found + 1
        if found == BACKLOG:
            break
    return offset


async def send(socket: WebSocket, log: EventLog, room: str, offset: int) -> None:
    # A slow client delays only its own tail, and nothing is queued for it in memory.
    async for record in log.tail(offset, query=in_room(room)):
        event = record.event
        message = {"offset": record.end_offset, "id": event.id, "ts": event.ts} | msgspec.structs.asdict(event.data)
        await socket.send_json(message)


async def receive(socket: WebSocket, log: EventLog, room: str, name: str) -> None:
    while (message := await socket.receive())["type"] == "websocket.receive":
        try:
            incoming = msgspec.json.decode(message.get("text") or message.get("bytes") or b"", type=Incoming)
            # The id is in the log only once, so a repeated message changes nothing.
            await log.append(MessagePosted(room, name, incoming.text), id=incoming.id)
        except (msgspec.DecodeError, UnicodeDecodeError, InvalidEventError) as error:
            if socket.application_state is WebSocketState.CONNECTED:
                await socket.send_json({"error": str(error)})
    raise WebSocketDisconnect(message["code"])


def in_room(room: str) -> Query:
    return Query(tags=[f"room:{room}"])
