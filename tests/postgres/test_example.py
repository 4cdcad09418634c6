"""The FastAPI example on PostgreSQL: two hosts with two workers each write one list of to-dos."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx
import pytest
from tests.postgres.servers import Server
from tests.support import free_port

STARTED_WITHIN = 120  # seconds, on a busy machine
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


class Worker:
    """One process of the example, on its own port, in the directory of its host."""

    def __init__(self, directory: Path, address: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = ["-m", "uvicorn", "--app-dir", EXAMPLES, "--log-level", "warning", "fastapi_app:app"]
        self.process = subprocess.Popen(
            [sys.executable, *command, "--port", str(port)],
            env={**os.environ, "EVENTFOLD_DATA": address},
            cwd=directory,
        )

    def wait_for_answer(self) -> None:
        until = monotonic() + STARTED_WITHIN
        while True:
            try:
                httpx.get(f"{self.url}/todos", verify=False).raise_for_status()
                return
            except httpx.HTTPError:
                assert monotonic() < until, "the worker does not answer"
                assert self.process.poll() is None, "the worker has ended"
                sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Host:
    """The workers of one machine; any of them may get a request."""

    def __init__(self, workers: list[Worker]) -> None:
        self.workers = workers
        self._turns = itertools.count()

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        url = self.workers[next(self._turns) % len(self.workers)].url
        async with httpx.AsyncClient(base_url=url, timeout=30, verify=False) as client:
            return await client.request(method, path, **options)

    async def add(self, text: str, key: str) -> httpx.Response:
        return await self.ask("POST", "/todos", json={"text": text}, headers={"Idempotency-Key": key})


@pytest.fixture(scope="module")
def hosts(postgres_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    """Two hosts with two workers each, and one log for all tests."""
    address = f"{postgres_server.address()}?log=example"
    directories = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    hosts = [Host([Worker(directory, address) for _ in range(2)]) for directory in directories]
    try:
        for host in hosts:
            for worker in host.workers:
                worker.wait_for_answer()
        yield hosts
    finally:
        for host in hosts:
            for worker in host.workers:
                worker.kill()


async def test_a_write_at_one_host_can_be_read_at_the_other(hosts: list[Host]) -> None:
    """The client passes the offset that it was given, and sees the event at once."""
    for n in range(4):
        added = (await hosts[n % 2].add(f"milk {n}", f"milk-{n}")).json()
        found = (await hosts[1 - n % 2].ask("GET", "/todos", params={"after": added["offset"]})).json()

        assert found["todos"][added["id"]]["text"] == f"milk {n}"


async def test_a_request_that_is_sent_to_both_hosts_with_one_key_is_written_once(hosts: list[Host]) -> None:
    """The requests come at the same time; both get the same answer."""
    answers = await asyncio.gather(*(host.add("bread", f"bread-{n}") for n in range(10) for host in hosts))

    assert sorted(answer.status_code for answer in answers) == [200] * 10 + [201] * 10
    assert len({answer.json()["offset"] for answer in answers}) == 10


async def test_of_two_conflicting_changes_at_both_hosts_one_is_accepted(hosts: list[Host]) -> None:
    """The other client gets a conflict."""
    added = (await hosts[0].add("eggs", "eggs")).json()
    for n in range(3):
        seen = (await hosts[0].ask("GET", "/todos", params={"after": added["offset"]})).json()["offset"]
        change = {"text": f"{n} eggs", "seen": seen}
        answers = await asyncio.gather(*(h.ask("PUT", f"/todos/{added['id']}", json=change) for h in hosts * 2))

        assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409]


async def test_a_worker_killed_under_load_loses_and_duplicates_nothing(hosts: list[Host]) -> None:
    """Clients repeat unanswered requests with the same key at any host; a stream yields each event once."""
    acknowledged: dict[str, int] = {}

    async def client(number: int) -> None:
        for n in range(5):
            key, tries = f"client-{number}-{n}", 0
            while key not in acknowledged:
                try:
                    answer = await hosts[(number + tries) % 2].add(key, key)
                    answer.raise_for_status()
                    acknowledged[key] = answer.json()["offset"]
                except httpx.HTTPError:
                    tries += 1
                    assert tries < 100
                    await asyncio.sleep(0.05)

    async with asyncio.TaskGroup() as clients:
        for number in range(10):
            clients.create_task(client(number))
        while len(acknowledged) < 20:
            await asyncio.sleep(0.01)
        hosts[0].workers[0].kill()

    assert await texts_streamed(hosts[1], 50, lambda text: text.startswith("client-")) == sorted(
        acknowledged, key=acknowledged.__getitem__
    )


async def texts_streamed(host: Host, count: int, wanted: Callable[[str], bool]) -> list[str]:
    """Returns the first `count` texts, in the order of the log."""
    texts: list[str] = []
    async with (
        httpx.AsyncClient(timeout=30, verify=False) as client,
        client.stream("GET", f"{host.workers[0].url}/events", params={"after": 0}) as response,
    ):
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                text = httpx.Response(200, text=line.removeprefix("data: ")).json().get("text", "")
                texts += [text] if wanted(text) else []
                if len(texts) == count:
                    break
    return texts
