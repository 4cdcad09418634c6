"""The examples as users run them: real servers and a worker in separate processes, and real clients."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NamedTuple

import aiohttp
import httpx
import pytest
from tests.support import event, free_port

from eventfold import EventLog, SyncMode

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
# Seconds; generous, for a busy machine. A server whose streams don't end would wait forever.
STOPS_WITHIN = 5.0


class Server:
    """A running example: its address and its process."""

    def __init__(self, command: list[str], data: Path | str, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.data = data
        self.process = subprocess.Popen(
            [sys.executable, *command], env={**os.environ, "EVENTFOLD_DATA": str(data)}, start_new_session=True
        )

    def workers(self) -> list[int]:
        """Returns the processes that serve: uvicorn's workers, or the process itself."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        workers = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return workers or [self.process.pid]

    def wait_for_answer(self) -> None:
        until = monotonic() + 30
        while True:
            try:
                httpx.get(self.url, verify=False)
                break
            except httpx.TransportError:
                assert monotonic() < until, "the server does not answer"
                assert self.process.poll() is None, "the server has ended"
                sleep(0.02)

    def stop(self, number: int = signal.SIGINT) -> float:
        """Sends the signal to the process and its children, as a terminal does on Ctrl-C; returns the seconds."""
        since = monotonic()
        os.killpg(self.process.pid, number)
        self.process.wait(20)
        return monotonic() - since


@contextmanager
def running(name: str, data: Path | str, *options: str, port: int = 0) -> Iterator[Server]:
    """Runs an example, by default on a free port, and yields it once it answers."""
    port = port or free_port()
    if name == "fastapi":
        command = ["-m", "uvicorn", "--app-dir", str(EXAMPLES), "--log-level", "warning", "fastapi_app:app"]
    else:
        command = [str(EXAMPLES / (f"{name}.py" if name == "metrics" else f"{name}_app.py"))]
    server = Server([*command, "--port", str(port), *options], data, port)
    try:
        server.wait_for_answer()
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
    """A stream of events from an offset; each call of what it yields returns the next event as `(offset, data)`.

    None is the end of the stream. With FastAPI, it uses server-sent events; with aiohttp, a WebSocket.
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


def post(url: str, text: str, key: str | None = None) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return httpx.post(f"{url}/todos", json={"text": text}, headers=headers, verify=False)


def put(url: str, todo: str, text: str, seen: int) -> httpx.Response:
    return httpx.put(f"{url}/todos/{todo}", json={"text": text, "seen": seen}, verify=False)


def get(url: str, after: int = 0) -> Any:
    return httpx.get(f"{url}/todos", params={"after": after}, verify=False, timeout=10).raise_for_status().json()


def test_a_read_with_the_offset_of_a_write_includes_the_write(server: Server) -> None:
    """A GET that is given the POST's offset shows the new to-do."""
    answer = post(server.url, "read your writes")
    found = get(server.url, answer.json()["offset"])

    assert answer.status_code == 201
    assert found["todos"][answer.json()["id"]] == {"text": "read your writes", "done": False}
    assert found["offset"] == answer.json()["offset"]


def test_a_change_is_accepted_if_only_other_to_dos_have_changed(server: Server) -> None:
    """The condition concerns that to-do, not the whole log."""
    todo = post(server.url, "seen").json()["id"]
    seen = get(server.url)["offset"]
    other = post(server.url, "another").json()
    put(server.url, other["id"], "another, changed", other["offset"])
    answer = put(server.url, todo, "changed", seen)

    assert answer.status_code == 200
    assert get(server.url)["todos"][todo]["text"] == "changed"


def test_a_change_based_on_an_old_state_is_a_conflict(server: Server) -> None:
    """The answer is 409, nothing is written, and the next GET gives what a new attempt needs."""
    todo = post(server.url, "as it was").json()
    put(server.url, todo["id"], "faster", todo["offset"])
    refused = put(server.url, todo["id"], "slower", todo["offset"])
    found = get(server.url)
    retried = put(server.url, todo["id"], "slower", found["offset"])

    assert refused.status_code == 409
    assert "look again" in refused.text
    assert found["todos"][todo["id"]]["text"] == "faster"
    assert retried.status_code == 200
    assert get(server.url)["todos"][todo["id"]]["text"] == "slower"


def test_a_change_of_a_missing_to_do_is_refused(server: Server) -> None:
    """The answer is 404 for a to-do that nobody added, and 400 for an offset at which no event ends."""
    todo = post(server.url, "there").json()["id"]

    assert put(server.url, "nobody's", "changed", 0).status_code == 404
    assert put(server.url, todo, "changed", 1).status_code == 400


async def test_a_request_that_is_sent_again_with_its_key_is_written_once(server: Server) -> None:
    """All answers are the same as the first, even after another write."""

    async def send() -> httpx.Response:
        return await asyncio.to_thread(post, server.url, "only once", "k1")

    together = await asyncio.gather(*(send() for _ in range(5)))
    post(server.url, "between")
    later = await send()

    assert sorted(answer.status_code for answer in together) == [200, 200, 200, 200, 201]
    assert later.status_code == 200
    assert {answer.text for answer in together} == {later.text}
    assert sum(todo["text"] == "only once" for todo in get(server.url)["todos"].values()) == 1


async def test_a_stream_yields_events_that_are_appended_while_it_is_open(server: Server, example: str) -> None:
    """The event arrives with the offset after it."""
    head = get(server.url)["offset"]
    async with stream(example, server.url, head) as following:
        answer = (await asyncio.to_thread(post, server.url, "streamed")).json()

        assert await following() == (answer["offset"], {"id": answer["id"], "text": "streamed"})


async def test_a_stream_resumes_exactly_where_it_was_interrupted(server: Server, example: str) -> None:
    """A client that reconnects with the last offset it saw gets the next event, whatever was appended meanwhile."""
    start = get(server.url)["offset"]
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


def test_a_stream_from_an_invalid_offset_is_refused(server: Server, example: str) -> None:
    """The answer is 400 with the reason, before anything is streamed."""
    post(server.url, "something")
    if example == "fastapi":
        answer = httpx.get(f"{server.url}/events", headers={"Last-Event-ID": "1"})
    else:
        answer = httpx.get(f"{server.url}/events?after=1", headers={"Connection": "Upgrade", "Upgrade": "websocket"})

    assert answer.status_code == 400
    assert "not where a line begins" in answer.text


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs a list of a process's descriptors")
async def test_clients_that_disconnect_leave_nothing_behind_in_the_server(server: Server, example: str) -> None:
    """After a hundred streams have come and gone, the server has as many descriptors as before."""
    head = get(server.url)["offset"]
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
async def test_a_server_stops_with_streams_open(tmp_path: Path, name: str, number: int) -> None:
    """The streams end, the log is closed, and no acknowledged event is lost."""
    with running(name, tmp_path / "data") as server:
        offset = post(server.url, "before the end").json()["offset"]
        async with AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(stream(name, server.url, 0)) for _ in range(10)]
            seen = [(await following())[0] for following in streams]
            took = await asyncio.to_thread(server.stop, number)
            ends = [await following() for following in streams]
    async with EventLog.open(tmp_path / "data") as log:
        stored = [record.event.data["text"] async for record in log.read_full()]

    assert took < STOPS_WITHIN
    assert seen == [offset] * 10
    assert ends == [None] * 10
    assert stored == ["before the end"]


@pytest.mark.parametrize(
    ("name", "options", "seconds"),
    [("aiohttp", [], STOPS_WITHIN), ("fastapi", ["--timeout-graceful-shutdown", "1"], 1 + STOPS_WITHIN)],
    ids=["aiohttp", "fastapi"],
)
def test_clients_that_have_stopped_reading_do_not_delay_a_stop(
    tmp_path: Path, name: str, options: list[str], seconds: float
) -> None:
    """If clients no longer read, the server still stops soon after its time limit, and closes its log."""
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
    """Connects a client that asks for all events and reads none of them."""
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


class Workers(NamedTuple):
    """Several processes of one example that share a log: their addresses, and the processes."""

    name: str
    data: Path
    servers: list[Server]

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]

    @property
    def pids(self) -> list[int]:
        return [pid for server in self.servers for pid in server.workers()]

    @contextmanager
    def only(self, number: int) -> Iterator[str]:
        """Yields the address at which this worker answers; the others that listen there are stopped meanwhile."""
        server = self.servers[number % len(self.servers)]
        workers = server.workers()
        others = [pid for pid in workers if pid != workers[number % len(workers)]]
        for pid in others:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield server.url
        finally:
            for pid in others:
                os.kill(pid, signal.SIGCONT)


@contextmanager
def running_workers(name: str, data: Path, count: int = 3) -> Iterator[Workers]:
    """Runs workers: uvicorn's share a port, and each process of aiohttp has its own port."""
    with ExitStack() as stack:
        if name == "fastapi":
            servers = [stack.enter_context(running(name, data, "--workers", str(count)))]
            until = monotonic() + 30
            while len(servers[0].workers()) < count or not all(map(has_the_log_open, servers[0].workers())):
                assert monotonic() < until, "the workers have not started"
                sleep(0.02)
        else:
            servers = [stack.enter_context(running(name, data)) for _ in range(count)]
        yield Workers(name, data, servers)


def has_the_log_open(pid: int) -> bool:
    """Whether the process has opened the index, which it does after opening the log."""
    descriptors = Path(f"/proc/{pid}/fd")
    return any(os.path.realpath(fd).endswith("index.sqlite") for fd in descriptors.iterdir())


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's list of child processes")


@pytest.fixture(scope="module", params=["fastapi", "aiohttp"])
def workers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Several workers of each of the two backends, with one log for all tests."""
    with running_workers(request.param, tmp_path_factory.mktemp("workers") / "data") as found:
        yield found


@needs_proc
def test_each_worker_reads_the_writes_of_the_others(workers: Workers) -> None:
    """A client that passes on the offset of its write sees that write at every worker."""
    answers = []
    for number in range(3):
        with workers.only(number) as url:
            answers.append(post(url, f"by worker {number}"))
    for number in range(3):
        with workers.only(number) as url:
            found = get(url, answers[-1].json()["offset"])
            texts = [found["todos"][answer.json()["id"]]["text"] for answer in answers]
            assert texts == [f"by worker {n}" for n in range(3)]

    assert [answer.status_code for answer in answers] == [201] * 3


@needs_proc
async def test_of_many_conflicting_changes_through_all_workers_one_is_accepted(workers: Workers) -> None:
    """Exactly one of the changes wins, whichever workers get them."""
    todo = post(workers.urls[0], "raced for").json()

    async def race(number: int) -> int:
        url = workers.urls[number % len(workers.urls)]
        return (await asyncio.to_thread(put, url, todo["id"], f"{number}", todo["offset"])).status_code

    assert sorted(await asyncio.gather(*map(race, range(20)))) == [200] + [409] * 19


@needs_proc
async def test_of_many_decisions_through_all_workers_one_writes(workers: Workers) -> None:
    """Each decision depends on the newest state, even if another worker has only just made it."""
    todo = post(workers.urls[0], "to be done once").json()

    async def finish(number: int) -> int:
        url = workers.urls[number % len(workers.urls)]
        answer = await asyncio.to_thread(httpx.post, f"{url}/todos/{todo['id']}/done", verify=False)
        return answer.status_code

    assert await asyncio.gather(*map(finish, range(20))) == [200] * 20
    async with EventLog.open(workers.data, read_only=True) as log:
        found = [record async for record in log.read_from(todo["offset"]) if record.event.type == "todo_done"]
    assert len(found) == 1
    assert get(workers.urls[-1])["todos"][todo["id"]]["done"]


@needs_proc
async def test_a_request_that_is_sent_again_to_other_workers_is_written_once(workers: Workers) -> None:
    """A client can repeat its request at any worker."""

    async def send(number: int) -> httpx.Response:
        return await asyncio.to_thread(post, workers.urls[number % len(workers.urls)], "only once", "k1")

    answers = await asyncio.gather(*map(send, range(12)))

    assert Counter(answer.status_code for answer in answers) == {201: 1, 200: 11}
    assert len({answer.text for answer in answers}) == 1


@needs_proc
async def test_a_stream_is_resumed_at_any_worker(workers: Workers) -> None:
    """The stream includes what other workers write meanwhile."""
    first = post(workers.urls[0], "first").json()["offset"]
    headers = {"Last-Event-ID": str(first)} if workers.name == "fastapi" else {}
    async with stream(workers.name, workers.urls[-1], first, **headers) as following:
        answer = (await asyncio.to_thread(post, workers.urls[0], "second")).json()

        assert await following() == (answer["offset"], {"id": answer["id"], "text": "second"})


@needs_proc
@pytest.mark.parametrize("name", ["fastapi", "aiohttp"])
async def test_a_worker_killed_under_load_loses_and_duplicates_nothing(tmp_path: Path, name: str) -> None:
    """Clients without an answer repeat their requests; the other workers continue at once and end on Ctrl-C."""
    data = tmp_path / "data"
    acknowledged: dict[str, int] = {}

    async def send_some(urls: list[str], client: int) -> None:
        async with httpx.AsyncClient(verify=False, timeout=20) as http:
            for n in range(15):
                body, headers = {"text": f"{client}-{n}"}, {"Idempotency-Key": f"{client}-{n}"}
                for url in itertools.islice(itertools.cycle(urls), client, None):
                    try:
                        answer = await http.post(f"{url}/todos", json=body, headers=headers)
                        break
                    except httpx.TransportError:
                        await asyncio.sleep(0.01)
                assert answer.status_code in (200, 201)
                acknowledged[f"{client}-{n}"] = answer.json()["offset"]

    with running_workers(name, data) as workers:
        sending = asyncio.gather(*(send_some(workers.urls, client) for client in range(12)))
        while len(acknowledged) < 60:
            assert not sending.done()
            await asyncio.sleep(0.001)
        os.kill(workers.pids[-1], signal.SIGKILL)
        await sending
        async with AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(stream(name, workers.urls[0], 0)) for _ in range(10)]
            seen = [[(await following())[0] for _ in acknowledged] for following in streams]
            for server in workers.servers[:-1] if name == "aiohttp" else workers.servers:
                await asyncio.to_thread(server.stop)
            ends = [await following() for following in streams]
    async with EventLog.open(data) as log:
        stored = [(record.event.id, record.end_offset) async for record in log.read_full()]

    assert dict(stored) == acknowledged
    assert len(stored) == len(acknowledged) == 12 * 15
    assert seen == [[offset for _, offset in stored]] * 10
    assert ends == [None] * 10


def test_processes_of_the_aiohttp_example_share_a_port(tmp_path: Path) -> None:
    """With `--reuse-port`, one of them can end while the other one answers."""
    with running("aiohttp", tmp_path / "data", "--reuse-port") as one:
        port = int(one.url.rpartition(":")[2])
        with running("aiohttp", tmp_path / "data", "--reuse-port", port=port) as other:
            first = post(one.url, "one")
            one.stop()
            other.wait_for_answer()
            second = post(other.url, "other")

    assert (first.status_code, second.status_code) == (201, 201)


@pytest.mark.parametrize(("name", "engine"), [("fastapi", "nats"), ("aiohttp", "postgres")])
def test_the_examples_run_on_other_engines(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str, engine: str
) -> None:
    """Only `EVENTFOLD_DATA` differs: several processes write, see each other's events, and decide on them."""
    server = request.getfixturevalue(f"{engine}_server")
    address = f"{server.address()}?log={name}" if engine == "postgres" else f"{server.addresses[0]}/{name}"
    monkeypatch.chdir(tmp_path)  # The index file is created here.
    with running(name, address) as one, running(name, address) as other:
        first = post(one.url, "here", "k1").json()
        again = post(other.url, "here", "k1")
        changed = put(other.url, first["id"], "there", first["offset"])
        late = put(one.url, first["id"], "nowhere", first["offset"])
        found = get(one.url, changed.json()["offset"])

    assert (again.status_code, again.json()) == (200, first)
    assert (changed.status_code, late.status_code) == (200, 409)
    assert found["todos"] == {first["id"]: {"text": "there", "done": False}}


class Worker:
    """The worker example, which prints the offset of each event that it processes."""

    def __init__(self, data: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / "worker.py")],
            env={**os.environ, "EVENTFOLD_DATA": str(data)},
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self, count: int) -> list[int]:
        """Returns the offsets of the next events that it processes."""
        return [int(self.process.stdout.readline().split()[0]) for _ in range(count)]

    def end(self, number: int) -> list[int]:
        """Sends it a signal, and returns the offsets that it has printed besides."""
        self.process.send_signal(number)
        rest = self.process.stdout.read()  # `communicate` would leave out what `readline` has buffered.
        self.process.wait(20)
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
    """Each run starts with the event after the last commit, so only the event in progress may be processed again."""
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
async def test_a_worker_stops_soon_and_repeats_nothing(tmp_path: Path, number: int) -> None:
    """The worker finishes and commits the current event, and exits with status 0."""
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
    """Returns the samples as Prometheus would parse them; each metric must come with its help and type first."""
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
    """The page shows the number of appended events, and the lag of views and consumers."""
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
