"""The examples as they are run: real servers and a worker in processes of their own, and real clients."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import aiohttp
import httpx
import pytest
from tests.support import event

from eventfold import EventLog, SyncMode

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
STOPS_WITHIN = 1.0


class Server:
    """An example that runs: where it listens, and its process."""

    def __init__(self, command: list[str], data: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.data = data
        self.process = subprocess.Popen(
            [sys.executable, *command], env={**os.environ, "EVENTFOLD_DATA": str(data)}, start_new_session=True
        )

    def stop(self, number: int = signal.SIGINT) -> float:
        """Sends the signal to the process and its children, as a terminal does on Ctrl-C; the seconds until its end."""
        since = monotonic()
        os.killpg(self.process.pid, number)
        self.process.wait(20)
        return monotonic() - since


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def running(name: str, data: Path, *options: str) -> Iterator[Server]:
    """Runs an example on a free port, and gives it when it answers."""
    port = free_port()
    if name == "fastapi":
        command = ["-m", "uvicorn", "--app-dir", str(EXAMPLES), "--log-level", "warning", "fastapi_app:app"]
    else:
        command = [str(EXAMPLES / (f"{name}.py" if name == "metrics" else f"{name}_app.py"))]
    server = Server([*command, "--port", str(port), *options], data, port)
    try:
        until = monotonic() + 30
        while True:
            try:
                httpx.get(server.url, verify=False)
                break
            except httpx.TransportError:
                assert monotonic() < until, "the server does not answer"
                assert server.process.poll() is None, "the server has ended"
                sleep(0.02)
        yield server
    finally:
        if server.process.poll() is None:
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()


@pytest.fixture(scope="module", params=["fastapi", "aiohttp"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Each of the two backends, with one log for all tests."""
    with running(request.param, tmp_path_factory.mktemp(request.param) / "data") as found:
        yield found


@pytest.fixture
def example(server: Server) -> str:
    return "fastapi" if "fastapi" in str(server.data.parent.name) else "aiohttp"


@asynccontextmanager
async def stream(example: str, url: str, after: int, **headers: str) -> AsyncIterator[Callable[[], Any]]:
    """A stream of events from an offset; what it gives is called for the next one, as `(offset, data)`.

    None is the end of the stream. For FastAPI it is server-sent events, for aiohttp a WebSocket.
    """
    if example == "fastapi":
        params = {} if headers else {"after": after}
        async with (
            httpx.AsyncClient(timeout=10, verify=False) as client,
            client.stream("GET", f"{url}/events", params=params, headers=headers) as response,
        ):
            assert response.status_code == 200
            lines = response.aiter_lines()

            async def following() -> Any:
                fields: dict[str, str] = {}
                async for line in lines:
                    if not line and "id" in fields:
                        return int(fields["id"]), httpx.Response(200, text=fields["data"]).json()
                    name, _, value = line.partition(": ")
                    fields[name] = value
                return None

            yield following
    else:
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{url}/events?after={after}") as ws:

            async def following() -> Any:
                message = await ws.receive(10)
                if message.type is not aiohttp.WSMsgType.TEXT:
                    return None
                found = message.json()
                return found["offset"], found["data"]

            yield following


def post(url: str, text: str, head: Any = None) -> httpx.Response:
    body = {"text": text} if head is None else {"text": text, "head": head}
    return httpx.post(f"{url}/todos", json=body, verify=False)


def get(url: str, after: int = 0) -> Any:
    return httpx.get(f"{url}/todos", params={"after": after}, verify=False).raise_for_status().json()


def test_a_write_is_in_the_answer_that_asks_for_it(server: Server) -> None:
    """Read your own writes: the POST's offset, given to GET."""
    answer = post(server.url, "read your writes")
    found = get(server.url, answer.json()["offset"])

    assert answer.status_code == 201
    assert found["todos"][-1] == "read your writes"
    assert found["head"] == answer.json()


def test_a_write_on_top_of_what_was_read_is_taken(server: Server) -> None:
    """The head that came with the list is the one that the log has."""
    answer = post(server.url, "seen", get(server.url)["head"])

    assert answer.status_code == 201
    assert get(server.url)["todos"][-1] == "seen"


def test_a_write_on_top_of_something_older_is_a_conflict_with_the_actual_head(server: Server) -> None:
    """409, nothing is written, and the head in the answer is the one to try again with."""
    stale = get(server.url)["head"]
    newer = post(server.url, "faster").json()
    refused = post(server.url, "slower", stale)
    body = refused.json()
    actual = body.get("detail", body)["head"]
    retried = post(server.url, "slower", actual)

    assert refused.status_code == 409
    assert actual == newer
    assert retried.status_code == 201
    assert get(server.url)["todos"][-2:] == ["faster", "slower"]


def test_of_many_writes_on_top_of_one_head_one_is_taken(server: Server) -> None:
    """Optimistic concurrency under load: exactly one wins."""
    head = get(server.url)["head"]

    async def race() -> list[int]:
        async with httpx.AsyncClient(verify=False) as client:
            body = {"text": "race", "head": head}
            answers = await asyncio.gather(*(client.post(f"{server.url}/todos", json=body) for _ in range(20)))
        return sorted(answer.status_code for answer in answers)

    assert asyncio.run(race()) == [201] + [409] * 19


async def test_a_request_that_is_sent_again_with_its_key_is_written_once(server: Server, example: str) -> None:
    """All answers are those of the first, also after another write, and on top of a head that is no longer the last."""
    if example != "fastapi":
        pytest.skip("only the FastAPI example takes an Idempotency-Key")
    body = {"text": "only once", "head": get(server.url)["head"]}

    async def send(key: str) -> httpx.Response:
        async with httpx.AsyncClient(verify=False) as client:
            return await client.post(f"{server.url}/todos", json=body, headers={"Idempotency-Key": key})

    together = await asyncio.gather(*(send("k1") for _ in range(5)))
    post(server.url, "between")
    later = await send("k1")
    with_another_key = await send("k2")

    assert sorted(answer.status_code for answer in together) == [200, 200, 200, 200, 201]
    assert later.status_code == 200
    assert {answer.text for answer in together} == {later.text}
    assert get(server.url)["todos"].count("only once") == 1
    assert with_another_key.status_code == 409


async def test_a_stream_gives_what_is_appended_while_it_is_open(server: Server, example: str) -> None:
    """The event comes with the offset behind it."""
    head = get(server.url)["head"]["offset"]
    async with stream(example, server.url, head) as following:
        answer = await asyncio.to_thread(post, server.url, "streamed")

        assert await following() == (answer.json()["offset"], {"text": "streamed"})


async def test_a_stream_resumes_exactly_where_it_broke_off(server: Server, example: str) -> None:
    """Reconnecting with the last offset that was seen gives the next event, whatever was appended meanwhile."""
    start = get(server.url)["head"]["offset"]
    for n in range(5):
        post(server.url, f"resume {n}")
    async with stream(example, server.url, start) as following:
        seen = [await following() for _ in range(2)]
    for n in range(5, 8):
        post(server.url, f"resume {n}")
    last = seen[-1][0]
    headers = {"Last-Event-ID": str(last)} if example == "fastapi" else {}
    async with stream(example, server.url, last, **headers) as following:
        seen += [await following() for _ in range(6)]

    assert [data["text"] for _, data in seen] == [f"resume {n}" for n in range(8)]


def test_a_stream_from_where_no_event_begins_is_refused(server: Server, example: str) -> None:
    """400 before anything is streamed, with the reason."""
    post(server.url, "something")
    if example == "fastapi":
        answer = httpx.get(f"{server.url}/events", headers={"Last-Event-ID": "1"})
    else:
        answer = httpx.get(f"{server.url}/events?after=1", headers={"Connection": "Upgrade", "Upgrade": "websocket"})

    assert answer.status_code == 400
    assert "not where a line begins" in answer.text


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs a list of a process's descriptors")
async def test_clients_that_go_leave_nothing_behind_in_the_server(server: Server, example: str) -> None:
    """After a hundred streams have come and gone the server has the descriptors that it had before."""
    head = get(server.url)["head"]["offset"]
    descriptors = Path(f"/proc/{server.process.pid}/fd")

    async def come_and_go() -> None:
        async with stream(example, server.url, head):
            await asyncio.sleep(0.05)

    await come_and_go()
    await asyncio.sleep(0.2)
    before = len(list(descriptors.iterdir()))
    for _ in range(4):
        await asyncio.gather(*(come_and_go() for _ in range(25)))
    async with asyncio.timeout(5):
        while len(list(descriptors.iterdir())) > before:
            await asyncio.sleep(0.02)

    assert len(list(descriptors.iterdir())) <= before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("name", ["fastapi", "aiohttp"])
async def test_a_server_stops_within_a_second_with_streams_open(tmp_path: Path, name: str, number: int) -> None:
    """The streams end, the log is closed, and nothing that was acknowledged is lost."""
    with running(name, tmp_path / "data") as server:
        post(server.url, "before the end")
        ends = [asyncio.create_task(read_to_the_end(name, server.url)) for _ in range(10)]
        await asyncio.sleep(0.3)
        took = await asyncio.to_thread(server.stop, number)
        seen = await asyncio.gather(*ends)
    async with EventLog.open(tmp_path / "data") as log:
        stored = [record.event.data["text"] async for record in log.read_full()]

    assert took < STOPS_WITHIN
    assert seen == [["before the end"]] * 10
    assert stored == ["before the end"]


async def read_to_the_end(name: str, url: str) -> list[str]:
    seen = []
    async with stream(name, url, 0) as following:
        while (found := await following()) is not None:
            seen.append(found[1]["text"])
    return seen


@pytest.mark.parametrize(
    ("name", "options", "seconds"),
    [("aiohttp", [], STOPS_WITHIN), ("fastapi", ["--timeout-graceful-shutdown", "1"], 1 + STOPS_WITHIN)],
    ids=["aiohttp", "fastapi"],
)
def test_clients_that_have_stopped_reading_hold_up_no_stop(
    tmp_path: Path, name: str, options: list[str], seconds: float
) -> None:
    """With connections that take nothing more, a server stops soon after its time limit, and closes its log."""
    with running(name, tmp_path / "data", *options) as server:
        for _ in range(20):
            post(server.url, "x" * 500_000)
        get(server.url)
        clients = [client_that_does_not_read(name, server.url) for _ in range(3)]
        sleep(0.5)
        took = server.stop()
        for client in clients:
            client.close()

    assert took < seconds
    assert server.process.returncode == 0
    assert (tmp_path / "data" / "views" / "todos.snapshot.json").exists()


def client_that_does_not_read(name: str, url: str) -> socket.socket:
    """A client that asks for all events and then takes none of them."""
    upgrade = [
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ]
    lines = ["GET /events?after=0 HTTP/1.1", "Host: localhost", *(upgrade if name == "aiohttp" else []), "", ""]
    client = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.sendall("\r\n".join(lines).encode())
    return client


@pytest.fixture(scope="module")
def two_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """Two processes of the FastAPI example on one log: the first writes."""
    data = tmp_path_factory.mktemp("two") / "data"
    with running("fastapi", data) as writer, running("fastapi", data) as reader:
        yield writer, reader


def test_a_second_server_says_who_the_writer_is(two_servers: tuple[Server, Server]) -> None:
    """A POST that it can't take is answered with 503 and the writer's process."""
    writer, reader = two_servers
    answer = post(reader.url, "not here")

    assert answer.status_code == 503
    assert f"process {writer.process.pid}" in answer.json()["detail"]


def test_a_second_server_reads_what_the_first_one_wrote(two_servers: tuple[Server, Server]) -> None:
    """Read your own writes works across processes, by the offset."""
    writer, reader = two_servers
    answer = post(writer.url, "over there").json()
    found = get(reader.url, answer["offset"])

    assert found["todos"][-1] == "over there"
    assert found["head"] == answer


async def test_a_second_server_streams_what_the_first_one_writes(two_servers: tuple[Server, Server]) -> None:
    """A stream may be resumed at any of the processes."""
    writer, reader = two_servers
    first = post(writer.url, "first").json()["offset"]
    async with stream("fastapi", reader.url, 0, **{"Last-Event-ID": str(first)}) as following:
        answer = await asyncio.to_thread(post, writer.url, "second")

        assert await following() == (answer.json()["offset"], {"text": "second"})


async def test_two_workers_of_one_server_share_a_log(tmp_path: Path) -> None:
    """One worker takes the writes and the other refuses them; both stream, and Ctrl-C ends both."""
    with running("fastapi", tmp_path / "data", "--workers", "2") as server:
        async with httpx.AsyncClient(
            timeout=20, verify=False, limits=httpx.Limits(max_keepalive_connections=0)
        ) as client:
            answers: list[httpx.Response] = []
            async with asyncio.timeout(20):
                while {answer.status_code for answer in answers} != {201, 503}:
                    body = {"text": "whoever takes it"}
                    requests = (client.post(f"{server.url}/todos", json=body) for _ in range(20))
                    answers += await asyncio.gather(*requests)
        taken = [answer.json()["offset"] for answer in answers if answer.status_code == 201]
        refusals = {answer.json()["detail"] for answer in answers if answer.status_code == 503}
        streams = [asyncio.create_task(read_to_the_end("fastapi", server.url)) for _ in range(20)]
        states = await asyncio.gather(*(asyncio.to_thread(get, server.url, max(taken)) for _ in range(20)))
        await asyncio.sleep(0.3)
        took = await asyncio.to_thread(server.stop)
        seen = await asyncio.gather(*streams)
        writer = (tmp_path / "data" / "writer.pid").read_text()

    assert len(refusals) == 1
    assert re.search(rf"its writer is process {writer}$", refusals.pop())
    assert all(len(state["todos"]) == len(taken) for state in states)
    assert [len(events) for events in seen] == [len(taken)] * 20
    assert took < STOPS_WITHIN


class Worker:
    """The worker example, which prints the offset of each event that it works on."""

    def __init__(self, data: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / "worker.py")],
            env={**os.environ, "EVENTFOLD_DATA": str(data)},
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self, count: int) -> list[int]:
        """The offsets of the next events that it works on."""
        return [int(self.process.stdout.readline().split()[0]) for _ in range(count)]

    def end(self, number: int) -> list[int]:
        """Sends it a signal; what it has worked on besides."""
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=20)
        return [int(line.split()[0]) for line in rest.splitlines()]


@contextmanager
def worker_on(data: Path) -> Iterator[Worker]:
    worker = Worker(data)
    try:
        yield worker
    finally:
        worker.process.kill()
        worker.process.communicate()


async def test_a_worker_killed_again_and_again_loses_and_skips_nothing(tmp_path: Path) -> None:
    """Each run begins with the event after the last commit: at most the one that was at work is done again."""
    data = tmp_path / "data"
    runs: list[list[int]] = []
    async with EventLog.open(data, sync=SyncMode.OS, max_log_size=4000) as log:

        async def append() -> list[int]:
            offsets = []
            for n in range(400):
                offsets.append((await log.append(event(n))).start_offset)
                await asyncio.sleep(0.002)
            return offsets

        appending = asyncio.create_task(append())
        for _ in range(3):
            with worker_on(data) as worker:
                found = await asyncio.to_thread(worker.read, 60)
                runs.append(found + await asyncio.to_thread(worker.end, signal.SIGKILL))
        offsets = await appending
        with worker_on(data) as worker:
            found = []
            while not found or found[-1] != offsets[-1]:
                found += await asyncio.to_thread(worker.read, 1)
            runs.append(found)

    done: list[int] = []
    for run in runs:
        repeated = 1 if done and run[0] == done[-1] else 0
        done += run[repeated:]
    assert done == offsets


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
async def test_a_worker_stops_within_a_second_and_repeats_nothing(tmp_path: Path, number: int) -> None:
    """It finishes and commits what is at work, and ends with success."""
    data = tmp_path / "data"
    async with EventLog.open(data) as log:
        results = await log.append_many([event(n) for n in range(3)])
        with worker_on(data) as worker:
            first = await asyncio.to_thread(worker.read, 3)
            await asyncio.sleep(0.1)
            since = monotonic()
            rest = await asyncio.to_thread(worker.end, number)
            took = monotonic() - since
        with worker_on(data) as again:
            later = await log.append(event(3))
            following = await asyncio.to_thread(again.read, 1)

    assert first + rest == [result.start_offset for result in results]
    assert took < STOPS_WITHIN
    assert worker.process.returncode == 0
    assert following == [later.start_offset]


METRIC = re.compile(r'(eventfold_\w+)(\{\w+="[^"\\\n]+"\})? (\d+(?:\.\d+)?(?:e-\d+)?)')


def scraped(url: str) -> dict[str, float]:
    """What Prometheus would read: each line in its format, each metric with its help and type before it."""
    answer = httpx.get(f"{url}/metrics", timeout=10)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    described: set[str] = set()
    found: dict[str, float] = {}
    assert answer.text.endswith("\n")
    for row in answer.text.splitlines():
        if row.startswith("# HELP"):
            described.add(row.split()[2])
        elif row.startswith("# TYPE"):
            assert row.split()[2] in described
            assert row.split()[3] in ("counter", "gauge")
        else:
            match = METRIC.fullmatch(row)
            assert match is not None, row
            assert match[1] in described
            assert match[1] + (match[2] or "") not in found
            found[match[1] + (match[2] or "")] = float(match[3])
    return found


async def test_the_metrics_of_a_log_are_shown_to_prometheus(tmp_path: Path) -> None:
    """What was appended, and how far views and consumers are behind."""
    data = tmp_path / "data"
    async with EventLog.open(data) as log:
        first = await log.append(event(0))
        async for record in (consumer := log.consumer("mailer")):
            await consumer.commit(record)
            break
    with running("metrics", data) as server:
        before = await asyncio.to_thread(scraped, server.url)
        for n in range(3):
            answer = httpx.post(f"{server.url}/events", json={"n": n}, timeout=10)
        after = await asyncio.to_thread(scraped, server.url)

    end = answer.json()["offset"]
    assert (before["eventfold_appends_total"], after["eventfold_appends_total"]) == (0, 3)
    assert after["eventfold_commit_seconds_total"] > 0
    assert after["eventfold_head_bytes"] == end
    assert after['eventfold_file_bytes{file="app.jsonl"}'] == end
    assert after['eventfold_consumer_lag_bytes{consumer="mailer"}'] == end - first.end_offset
    assert after['eventfold_view_lag_bytes{view="count"}'] == end - first.end_offset
