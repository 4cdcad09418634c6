"""UmaDB, an event store with conditions on tags: its server, as its package starts it, and its client for Python.

The server runs while a request is answered, with its defaults: every append is on disk before it is acknowledged. The
client is synchronous and does not hold the interpreter while it waits, so each task is a thread; they share a client,
which is as fast here as one for each. An event's data is the same JSON as in eventfold's line, without its tags.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, perf_counter, sleep

import msgspec
import umadb

from benchmarks._events import PlainEvent, blocks, tagged_fields

from ._serve import Answer, reading_times, serve

SERVER = "from umadb.umadb_server_cli import main; main()"
# Seconds for the server to answer for the first time.
PATIENCE = 30.0
# Events that `write_tagged` appends at once.
BATCH_SIZE = 1_000

encode = msgspec.json.Encoder().encode


def stored(number: int, tags: int | None = None) -> umadb.Event:
    fields = tagged_fields(number, tags)
    tagged = fields.pop("tags")
    return umadb.Event(fields["type"], encode(PlainEvent(**fields)), tagged)


def query_of(tags: Sequence[str]) -> umadb.Query:
    return umadb.Query([umadb.QueryItem(tags=tags)])


@contextmanager
def running(dir: str) -> Iterator[umadb.Client]:
    """Starts the server for a directory; yields a client."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    command = [sys.executable, "-c", SERVER, "--db-path", str(Path(dir, "uma.db")), "--listen", address]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield connected(server, f"http://{address}")
    finally:
        server.terminate()
        server.wait()


def connected(server: subprocess.Popen[bytes], url: str) -> umadb.Client:
    """Waits until the server answers; returns a client."""
    until = monotonic() + PATIENCE
    while True:
        try:
            client = umadb.Client(url)
            client.head()
            return client
        except umadb.TransportError:
            if server.poll() is not None or monotonic() > until:
                raise
            sleep(0.005)


def appending(client: umadb.Client, events: Sequence[umadb.Event], tasks: int, conditional: bool) -> float:
    """The seconds that `tasks` threads take to append the events, each its share one by one."""
    start = threading.Event()
    failures: list[BaseException] = []

    def work(mine: Sequence[umadb.Event]) -> None:
        start.wait()
        try:
            for event in mine:
                condition = umadb.AppendCondition(query_of(event.tags)) if conditional else None
                client.append([event], condition)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(events[i::tasks],)) for i in range(tasks)]
    for thread in threads:
        thread.start()
    begun = perf_counter()
    start.set()
    for thread in threads:
        thread.join()
    seconds = perf_counter() - begun
    if failures:
        raise failures[0]
    return seconds


class Umadb:
    async def append_tagged(
        self, dir: str, tasks: int, count: int, start: int, conditional: bool, index: bool | None
    ) -> Answer:
        events = [stored(number) for number in range(start, start + tasks * count)]
        with running(dir) as client:
            return {"seconds": appending(client, events, tasks, conditional)}

    async def write_tagged(self, dir: str, events: int, tags: int) -> Answer:
        with running(dir) as client:
            for start, count in blocks(events):
                for first in range(start, start + count, BATCH_SIZE):
                    last = min(first + BATCH_SIZE, start + count)
                    client.append([stored(number, tags) for number in range(first, last)])
        return {}

    async def read_tagged(self, dir: str, tags: list[int], index: bool | None) -> Answer:
        """Reads by tag; the time of the first read includes starting the server."""
        begun = perf_counter()
        with running(dir) as client:

            async def events_of(tag: str) -> int:
                found = [msgspec.json.decode(e.event.data, type=PlainEvent) for e in client.read(query_of([tag]))]
                return len(found)

            return await reading_times(begun, events_of, tags)


if __name__ == "__main__":
    serve(Umadb())
