"""Chat rooms over WebSockets: a client that lost the connection continues with exactly the next message.

    CHAT_DATA=chat-data uvicorn --app-dir docs/examples chat:app

Open http://127.0.0.1:8000/ in two windows, and restart the server while they are open: they reconnect, and nothing is
missing or repeated. `--workers 4` needs nothing else, since all workers write the same log.

A client connects to `/rooms/ROOM?name=NAME&after=OFFSET` and gets `{offset, id, name, text, ts}` for each message after
that offset; without `after`, the last messages and then each new one. It sends `{id, text}` with an id that it chooses:
a message that may or may not have arrived can be sent again with the same id, and is in the room only once.
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
BACKLOG = 50  # how many messages a newcomer gets
REFUSED = 1008  # the code for closing a WebSocket that asks for something impossible
catalog = Catalog()
Name = Annotated[str, Parameter(min_length=1, max_length=50)]


@catalog.event("message_posted", tags=lambda message: [f"room:{message.room}"])
class MessagePosted(msgspec.Struct, frozen=True):
    room: str
    name: str
    text: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]


class Incoming(msgspec.Struct):
    """What a client sends."""

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
        await socket.accept()  # before that, no reason can be given
        raise WebSocketException(REFUSED, str(error)) from error
    await socket.accept()
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(send(socket, log, room, offset))
            group.create_task(receive(socket, log, room, name))
    except* WebSocketDisconnect:
        pass  # whichever noticed it first, the other one was cancelled


async def resume_at(log: EventLog, room: str, after: int | None) -> int:
    """Where to start: at the given offset, if an event ends there, or with the room's last messages."""
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
    # A slow client slows down only its own tail: events wait in the log, not in memory.
    async for record in log.tail(offset, query=in_room(room)):
        event = record.event
        message = {"offset": record.end_offset, "id": event.id, "ts": event.ts} | msgspec.structs.asdict(event.data)
        await socket.send_json(message)


async def receive(socket: WebSocket, log: EventLog, room: str, name: str) -> None:
    while (message := await socket.receive())["type"] == "websocket.receive":
        try:
            incoming = msgspec.json.decode(message.get("text") or message.get("bytes") or b"", type=Incoming)
            # The id is in the log only once: a repetition is not an error, and changes nothing.
            await log.append(MessagePosted(room, name, incoming.text), id=incoming.id)
        except (msgspec.DecodeError, UnicodeDecodeError, InvalidEventError) as error:
            if socket.application_state is WebSocketState.CONNECTED:
                await socket.send_json({"error": str(error)})
    raise WebSocketDisconnect(message["code"])


def in_room(room: str) -> Query:
    return Query(tags=[f"room:{room}"])
