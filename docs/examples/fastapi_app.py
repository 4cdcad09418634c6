"""A to-do list with FastAPI, in any number of workers that all write.

It refuses conflicting changes, accepts repeated requests, lets clients read their own writes, and sends server-sent
events that resume exactly.

    EVENTFOLD_DATA=todo-data uvicorn --app-dir docs/examples --workers 4 fastapi_app:app

`EVENTFOLD_DATA` is a directory, or the address of a log that several machines share, such as
`postgresql://host/db?log=todos` or `nats://host:4222/todos`. Nothing else changes.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any
from uuid import uuid4

from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel

from eventfold import (
    ConditionalAppendError,
    Event,
    EventLog,
    LockMode,
    LogClosedError,
    Query,
    View,
    end_streams_on_stop,
)

DATA = os.environ.get("EVENTFOLD_DATA", "todo-data")
# A log in files must be opened as shared by all workers. A log on a server is always shared, and each host has an
# index file.
OPTIONS: Any = {"index": "todos.index.sqlite"} if "://" in DATA else {"index": True, "lock": LockMode.SHARED}

Todos = dict[str, dict[str, Any]]


def reduce_todos(todos: Todos, event: Event) -> Todos:
    match event.type:
        case "todo_added":
            todos[event.data["id"]] = {"text": event.data["text"], "done": False}
        case "todo_changed":
            todos[event.data["id"]]["text"] = event.data["text"]
        case "todo_done":
            todos[event.data["id"]]["done"] = True
    return todos


def todo_event(type: str, todo: str, key: str | None = None, **data: Any) -> Event:
    """An event of one to-do, which its tag names; the id ensures that the event is in the log only once."""
    return Event(type, {"id": todo, **data}, id=key, tags=(f"todo:{todo}",))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict]:
    async with EventLog.open(DATA, views=[View("todos", reduce_todos, dict)], unique_ids=True, **OPTIONS) as log:
        with end_streams_on_stop(log):  # uvicorn waits for open streams before it ends the lifespan
            yield {"log": log}


def log_of(request: Request) -> EventLog:
    return request.state.log


Log = Annotated[EventLog, Depends(log_of)]
Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1)]
app = FastAPI(lifespan=lifespan)


class NewTodo(BaseModel):
    text: str


class ChangedTodo(BaseModel):
    text: str
    seen: int  # the offset that came with the state that the client has seen


@app.post("/todos", status_code=201)
async def add_todo(new: NewTodo, log: Log, response: Response, key: Key = None) -> dict:
    """Adds a to-do; a repeated request with the same `Idempotency-Key` gets the first response."""
    todo = key or uuid4().hex
    result = await log.append(todo_event("todo_added", todo, key, text=new.text))
    if result.duplicate:
        response.status_code = 200
    return {"id": todo, "offset": result.end_offset}


@app.put("/todos/{todo}")
async def change_todo(todo: str, new: ChangedTodo, log: Log, key: Key = None) -> dict:
    """Changes the text unless this to-do has been changed since the client saw it."""
    await find(log, todo, new.seen)
    event = todo_event("todo_changed", todo, key, text=new.text)
    try:
        [result] = await log.append_unless([event], Query(tags={f"todo:{todo}"}), after=new.seen)
    except ConditionalAppendError as error:
        raise HTTPException(409, f"{todo} has been changed since offset {new.seen}: look again") from error
    except ValueError as error:  # `seen` is not an offset of this log
        raise HTTPException(400, str(error)) from error
    return {"offset": result.end_offset}


@app.post("/todos/{todo}/done")
async def finish_todo(todo: str, log: Log) -> dict:
    """Decides on the newest state, including events of other workers; of many requests, one finishes the to-do."""
    seen = await find(log, todo)

    def decide(todos: Todos) -> list[Event]:
        return [] if todos[todo]["done"] else [todo_event("todo_done", todo)]

    results = await log.decide("todos", decide, query=Query(tags={f"todo:{todo}"}))
    return {"offset": results[-1].end_offset if results else seen}


@app.get("/todos")
async def get_todos(log: Log, after: int = 0) -> dict:
    """The to-dos, once they include all events before the offset `after`, and the offset to pass as `seen`."""
    todos, offset = await newest(log, after)
    return {"todos": todos, "offset": offset}


async def newest(log: EventLog, after: int = 0) -> tuple[Todos, int]:
    try:
        async with asyncio.timeout(5):
            await log.wait_until("todos", after)
            head = await log.reader().head()
            return await log.wait_until("todos", head.offset), head.offset
    except (TimeoutError, LogClosedError) as error:
        raise HTTPException(503, f"offset {after} is not here yet") from error


async def find(log: EventLog, todo: str, after: int = 0) -> int:
    todos, offset = await newest(log, after)
    if todo not in todos:
        raise HTTPException(404, f"there is no to-do {todo}")
    return offset


async def resume_at(log: Log, last_event_id: Annotated[int | None, Header()] = None, after: int | None = None):
    """The start of a stream: after the last event that the client received, else at `after`, else now."""
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
