"""A to-do list with aiohttp, in any number of processes that all write.

It refuses conflicting changes, accepts repeated requests, lets clients read their own writes, and sends events over a
WebSocket.

    EVENTFOLD_DATA=todo-data python docs/examples/aiohttp_app.py --port 8080 --reuse-port

Start it several times: all processes listen on the same port, and all write. Gunicorn does the same with
`gunicorn --chdir docs/examples -k aiohttp.GunicornWebWorker -w 4 aiohttp_app:app_factory`. `EVENTFOLD_DATA` is a
directory, or the address of a log that several machines share, such as `postgresql://host/db?log=todos` or
`nats://host:4222/todos`. Nothing else changes.

Ctrl-C ends the open WebSockets first, and then closes the log.
"""

import argparse
import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

from aiohttp import web

from eventfold import ConditionalAppendError, Event, EventLog, LockMode, LogClosedError, Query, View

DATA = os.environ.get("EVENTFOLD_DATA", "todo-data")
# A log in files must be opened as shared by all workers. A log on a server is always shared, and each host has an
# index file.
OPTIONS: Any = {"index": "todos.index.sqlite"} if "://" in DATA else {"index": True, "lock": LockMode.SHARED}
LOG = web.AppKey("log", EventLog)

Todos = dict[str, dict[str, Any]]
routes = web.RouteTableDef()


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


@routes.post("/todos")
async def add_todo(request: web.Request) -> web.Response:
    """Adds a to-do; a repeated request with the same `Idempotency-Key` gets the first response."""
    new, key = await request.json(), request.headers.get("Idempotency-Key") or None
    todo = key or uuid4().hex
    result = await request.app[LOG].append(todo_event("todo_added", todo, key, text=new["text"]))
    return web.json_response({"id": todo, "offset": result.end_offset}, status=200 if result.duplicate else 201)


@routes.put("/todos/{todo}")
async def change_todo(request: web.Request) -> web.Response:
    """Changes the text unless this to-do has been changed since the client saw it."""
    log, todo, new = request.app[LOG], request.match_info["todo"], await request.json()
    await find(log, todo, new["seen"])
    event = todo_event("todo_changed", todo, request.headers.get("Idempotency-Key") or None, text=new["text"])
    try:
        [result] = await log.append_unless([event], Query(tags={f"todo:{todo}"}), after=new["seen"])
    except ConditionalAppendError as error:
        raise web.HTTPConflict(text=f"{todo} has been changed since offset {new['seen']}: look again") from error
    except ValueError as error:  # `seen` is not an offset of this log
        raise web.HTTPBadRequest(text=str(error)) from error
    return web.json_response({"offset": result.end_offset})


@routes.post("/todos/{todo}/done")
async def finish_todo(request: web.Request) -> web.Response:
    """Decides on the newest state, including events of other processes; of many requests, one finishes the to-do."""
    log, todo = request.app[LOG], request.match_info["todo"]
    seen = await find(log, todo)

    def decide(todos: Todos) -> list[Event]:
        return [] if todos[todo]["done"] else [todo_event("todo_done", todo)]

    results = await log.decide("todos", decide, query=Query(tags={f"todo:{todo}"}))
    return web.json_response({"offset": results[-1].end_offset if results else seen})


@routes.get("/todos")
async def get_todos(request: web.Request) -> web.Response:
    """The to-dos, once they include all events before the offset `after`, and the offset to pass as `seen`."""
    todos, offset = await newest(request.app[LOG], offset_of(request) or 0)
    return web.json_response({"todos": todos, "offset": offset})


async def newest(log: EventLog, after: int = 0) -> tuple[Todos, int]:
    try:
        async with asyncio.timeout(5):
            await log.wait_until("todos", after)
            head = await log.reader().head()
            return await log.wait_until("todos", head.offset), head.offset
    except (TimeoutError, LogClosedError) as error:
        raise web.HTTPServiceUnavailable(text=f"offset {after} is not here yet") from error


async def find(log: EventLog, todo: str, after: int = 0) -> int:
    todos, offset = await newest(log, after)
    if todo not in todos:
        raise web.HTTPNotFound(text=f"there is no to-do {todo}")
    return offset


@routes.get("/events")
async def stream_events(request: web.Request) -> web.WebSocketResponse:
    """Sends each event from `after` onwards (by default, from now), with the offset to continue from."""
    log, after = request.app[LOG], offset_of(request)
    try:
        if after is not None:
            await log.read_line_hash_before(after)
    except ValueError as error:
        raise web.HTTPBadRequest(text=str(error)) from error
    socket = web.WebSocketResponse(heartbeat=30, timeout=0.5)
    await socket.prepare(request)

    async def send() -> None:
        async for record in log.tail(after):
            event = {"offset": record.end_offset, "type": record.event.type, "data": record.event.data}
            await socket.send_json(event)
        await socket.close()

    async with asyncio.TaskGroup() as group:
        sending = group.create_task(send())
        async for _ in socket:  # ends when the client disconnects or the tail ends
            pass
        sending.cancel()
    return socket


def offset_of(request: web.Request) -> int | None:
    try:
        return int(request.query["after"]) if "after" in request.query else None
    except ValueError as error:
        raise web.HTTPBadRequest(text=str(error)) from error


async def open_log(app: web.Application) -> AsyncIterator[None]:
    async with EventLog.open(DATA, views=[View("todos", reduce_todos, dict)], unique_ids=True, **OPTIONS) as log:
        app[LOG] = log
        yield


async def end_streams(app: web.Application) -> None:
    """Ends the open streams, for which the server would otherwise wait before it closes the log."""
    app[LOG].reader().end_waits()


def make_app() -> web.Application:
    app = web.Application()
    app.add_routes(routes)
    app.cleanup_ctx.append(open_log)
    app.on_shutdown.append(end_streams)
    return app


async def app_factory() -> web.Application:
    """Gunicorn calls this in each of its workers."""
    return make_app()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A to-do list behind aiohttp.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--reuse-port", action="store_true", help="lets other processes listen on the port too")
    args = parser.parse_args()
    # Limits the wait for clients that have stopped reading.
    web.run_app(make_app(), host=args.host, port=args.port, reuse_port=args.reuse_port, shutdown_timeout=0.2)
