"""A to-do list behind FastAPI: optimistic concurrency, a POST that may be sent again, read your own writes, and
server-sent events that resume exactly.

    EVENTFOLD_DATA=todo-data uvicorn --app-dir docs/examples fastapi_app:app

With `--workers 2` one worker writes. The other finds the log locked, opens it read-only, serves and streams all the
same, and answers a POST with 503 and the writer's process.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel

from eventfold import ConditionalAppendError, Event, EventLog, LogClosedError, LogLockedError, View, end_streams_on_stop

DATA = Path(os.environ.get("EVENTFOLD_DATA", "todo-data"))
WRITER = DATA / "writer.pid"


def reduce_todos(state: list[str], event: Event) -> list[str]:
    if event.type == "todo_added":
        state.append(event.data["text"])
    return state


async def open_log() -> tuple[EventLog, bool]:
    """The log, and whether this process writes it: only one can, the others read."""
    try:
        log = await EventLog.open(DATA, views=[View("todos", reduce_todos, list)], index=True, unique_ids=True)
    except LogLockedError:
        return await EventLog.open(DATA, views=[View("todos", reduce_todos, list)], read_only=True), False
    WRITER.write_text(str(os.getpid()))
    return log, True


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict]:
    log, writes = await open_log()
    try:
        with end_streams_on_stop(log):  # uvicorn waits for open streams before it ends the lifespan
            yield {"log": log, "writes": writes}
    finally:
        await log.aclose()


def log_of(request: Request) -> EventLog:
    return request.state.log


def writable_log_of(request: Request) -> EventLog:
    if not request.state.writes:
        writer = WRITER.read_text() if WRITER.exists() else "unknown"
        detail = f"this process only reads {DATA}; its writer is process {writer}"
        raise HTTPException(503, detail, {"Retry-After": "1"})
    return request.state.log


Log = Annotated[EventLog, Depends(log_of)]
WritableLog = Annotated[EventLog, Depends(writable_log_of)]
app = FastAPI(lifespan=lifespan)


class Head(BaseModel):
    offset: int
    hash: str


class NewTodo(BaseModel):
    text: str
    head: Head | None = None  # what the client has seen; None: it does not matter


class Todos(BaseModel):
    todos: list[str]
    head: Head


@app.post("/todos", status_code=201)
async def add_todo(
    new: NewTodo,
    log: WritableLog,
    response: Response,
    idempotency_key: Annotated[str | None, Header(min_length=1)] = None,
) -> Head:
    """Adds the text; a request that is sent again with the same `Idempotency-Key` gets the first one's answer."""
    event = Event("todo_added", {"text": new.text}, id=idempotency_key)
    try:
        if new.head is None:
            result = await log.append(event)
        else:
            result = await log.append_if(event, new.head.offset, new.head.hash)
    except ConditionalAppendError as error:
        head = Head(offset=log.head.offset, hash=log.head.line_hash)
        raise HTTPException(409, {"message": str(error), "head": head.model_dump()}) from error
    if result.duplicate:
        response.status_code = 200
    return Head(offset=result.end_offset, hash=result.line_hash)


@app.get("/todos")
async def get_todos(log: Log, after: int = 0) -> Todos:
    """The list, as soon as it includes what was written before the offset `after`."""
    try:
        async with asyncio.timeout(5):
            await log.wait_until("todos", after)
            head = await log.reader().head()
            todos = await log.wait_until("todos", head.offset)
    except (TimeoutError, LogClosedError) as error:
        raise HTTPException(503, f"offset {after} is not here yet") from error
    return Todos(todos=todos, head=Head(offset=head.offset, hash=head.line_hash))


async def resume_at(log: Log, last_event_id: Annotated[int | None, Header()] = None, after: int | None = None):
    """Where a stream begins: behind the last event that the client has got, else at `after`, else now."""
    offset = after if last_event_id is None else last_event_id
    try:
        if offset is not None:
            await log.read_line_hash_before(offset)
    except ValueError as error:
        raise HTTPException(400, str(error)) from error
    return offset


@app.get("/events", response_class=EventSourceResponse)
async def stream_events(log: Log, offset: Annotated[int | None, Depends(resume_at)]) -> AsyncIterator[ServerSentEvent]:
    async for record in log.tail(offset):
        yield ServerSentEvent(id=str(record.end_offset), event=record.event.type, data=record.event.data)
