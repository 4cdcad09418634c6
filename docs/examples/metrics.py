"""A log's metrics for Prometheus, in a backend that appends to it.

    EVENTFOLD_DATA=data python docs/examples/metrics.py --port 8080

Prometheus scrapes `GET /metrics` every few seconds. `POST /events` appends an event, so that the metrics change.
"""

import argparse
import os
from collections.abc import AsyncIterator, Iterator

from aiohttp import web

from eventfold import Event, EventLog, View

LOG = web.AppKey("log", EventLog)
routes = web.RouteTableDef()


async def metrics(log: EventLog) -> str:
    """The text for Prometheus. `stats` costs nothing, but `info` looks at the files, so don't scrape too often."""
    stats, info = log.stats(), await log.info()
    lines = [
        *metric("appends_total", "counter", "Appends that were acknowledged.", {"": stats.appends}),
        *metric("refused_total", "counter", "Appends that were refused or failed.", {"": stats.refused}),
        *metric(
            "commits_total", "counter", "Writes and syncs, each of all appends that were waiting.", {"": stats.batches}
        ),
        *metric("commit_seconds_total", "counter", "Seconds that all commits took.", {"": stats.commit_seconds}),
        *metric("queued", "gauge", "Appends that are waiting to be committed.", {"": stats.queued}),
        *metric(
            "waiting_for_place",
            "gauge",
            "Appends that are waiting because the queue is full.",
            {"": stats.waiting_for_place},
        ),
        *metric("waiting", "gauge", "Tails, watches and waits that are waiting for events.", {"": stats.waiting}),
        *metric("head_bytes", "gauge", "The offset of the head.", {"": info.head.offset}),
        *metric("view_lag_bytes", "gauge", "Bytes that a view has not folded yet.", labels("view", view_lags(log))),
        *metric(
            "consumer_lag_bytes",
            "gauge",
            "Bytes that a consumer has not committed yet.",
            labels("consumer", {place.name: place.lag for place in info.consumers if place.lag is not None}),
        ),
    ]
    if info.files is not None:
        sizes = {"app.jsonl": info.files.active_size, "archive.jsonl.zst": info.files.archive_size}
        lines += metric("file_bytes", "gauge", "Sizes of the log's files.", labels("file", sizes))
    return "\n".join(lines) + "\n"


def view_lags(log: EventLog) -> dict[str, int]:
    return {name: view.lag for name, view in log.stats().views.items()}


def labels(label: str, values: dict[str, int]) -> dict[str, float]:
    # Names of views and consumers contain no characters that would have to be escaped.
    return {f'{{{label}="{name}"}}': value for name, value in values.items()}


def metric(name: str, kind: str, about: str, values: dict[str, float]) -> Iterator[str]:
    yield f"# HELP eventfold_{name} {about}"
    yield f"# TYPE eventfold_{name} {kind}"
    for labels, value in values.items():
        yield f"eventfold_{name}{labels} {value}"


@routes.get("/metrics")
async def get_metrics(request: web.Request) -> web.Response:
    text = await metrics(request.app[LOG])
    return web.Response(body=text.encode(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


@routes.post("/events")
async def add_event(request: web.Request) -> web.Response:
    result = await request.app[LOG].append(Event("posted", await request.json()))
    return web.json_response({"offset": result.end_offset}, status=201)


async def open_log(app: web.Application) -> AsyncIterator[None]:
    count = View("count", lambda state, event: state + 1, 0)
    async with EventLog.open(os.environ.get("EVENTFOLD_DATA", "data"), views=[count]) as log:
        app[LOG] = log
        yield


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A log's metrics for Prometheus.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    args = parser.parse_args()
    app = web.Application()
    app.add_routes(routes)
    app.cleanup_ctx.append(open_log)
    web.run_app(app, host=args.host, port=args.port, print=None)
