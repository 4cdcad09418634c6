"""A to-do list behind aiohttp: optimistic concurrency, read your own writes, events over a WebSocket.

    EVENTFOLD_DATA=todo-data python docs/examples/aiohttp_app.py --port 8080

Ctrl-C ends the open WebSockets first, and then closes the log.
"""

import argparse
import asyncio
import os
from collections.abc import AsyncIterator

from aiohttp import web

from eventfold import ConditionalAppendError, Event, EventLog, LogClosedError, View

LOG = web.AppKey("log", EventLog)
routes = web.RouteTableDef()


def reduce_todos(state: list[str], event: Event) -> list[str]:
    if event.type == "todo_added":
        state.append(event.data["text"])
    return state


@routes.post("/todos")
async def add_todo(request: web.Request) -> web.Response:
    log, new = request.app[LOG], await request.json()
    event = Event("todo_added", {"text": new["text"]})
    try:
        if head := new.get("head"):
            result = await log.append_if(event, head["offset"], head["hash"])
        else:
            result = await log.append(event)
    except ConditionalAppendError as error:
        head = {"offset": log.head.offset, "hash": log.head.line_hash}
        return web.json_response({"message": str(error), "head": head}, status=409)
    return web.json_response({"offset": result.end_offset, "hash": result.line_hash}, status=201)


@routes.get("/todos")
async def get_todos(request: web.Request) -> web.Response:
    """The list, as soon as it includes what was written before the offset `after`."""
    log, after = request.app[LOG], offset_of(request)
    try:
        async with asyncio.timeout(5):
            await log.wait_until("todos", after or 0)
            head = log.head
            todos = await log.wait_until("todos", head.offset)
    except (TimeoutError, LogClosedError) as error:
        raise web.HTTPServiceUnavailable(text=f"offset {after} is not here yet") from error
    return web.json_response({"todos": todos, "head": {"offset": head.offset, "hash": head.line_hash}})


@routes.get("/events")
async def stream_events(request: web.Request) -> web.WebSocketResponse:
    """Each event from `after` on (now, if it is not given), with the offset to go on from."""
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
        async for _ in socket:  # ends when the client goes, or the tail
            pass
        sending.cancel()
    return socket


def offset_of(request: web.Request) -> int | None:
    try:
        return int(request.query["after"]) if "after" in request.query else None
    except ValueError as error:
        raise web.HTTPBadRequest(text=str(error)) from error


async def open_log(app: web.Application) -> AsyncIterator[None]:
    data = os.environ.get("EVENTFOLD_DATA", "todo-data")
    async with EventLog.open(data, views=[View("todos", reduce_todos, list)]) as log:
        app[LOG] = log
        yield


async def end_streams(app: web.Application) -> None:
    """The server waits for its open streams before it closes the log, so they end first."""
    app[LOG].reader().end_waits()


def make_app() -> web.Application:
    app = web.Application()
    app.add_routes(routes)
    app.cleanup_ctx.append(open_log)
    app.on_shutdown.append(end_streams)
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A to-do list behind aiohttp.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    args = parser.parse_args()
    # Clients that have stopped reading are not waited for any longer.
    web.run_app(make_app(), host=args.host, port=args.port, shutdown_timeout=0.2)
