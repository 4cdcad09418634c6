"""The order service as real processes, on PostgreSQL and in a directory: both pass the same tests."""

from __future__ import annotations

import asyncio
import importlib
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from tests.examples.programs import EXAMPLES, WITHIN, Server, process, served


@pytest.fixture(scope="module", params=["directory", "PostgreSQL"])
def log(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The value of ORDERS_LOG: an empty log."""
    if request.param == "directory":
        yield str(tmp_path_factory.mktemp("orders") / "data")
        return
    server = request.getfixturevalue("postgres_server")
    asyncio.run(server.execute("CREATE DATABASE orders"))
    yield server.address("orders") + "?log=orders"
    asyncio.run(server.execute("DROP DATABASE orders WITH (FORCE)"))


@pytest.fixture(scope="module")
def server(log: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The web server."""
    with served("orders", cwd=tmp_path_factory.mktemp("server"), ORDERS_LOG=log) as found:
        yield found


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, verify=False, timeout=WITHIN) as opened:
        yield opened


async def test_no_more_is_sold_than_is_in_stock(client: httpx.AsyncClient) -> None:
    """Many customers order at the same moment."""
    await client.post("/stock/lamp", params={"count": 5})
    requests = (client.put(f"/orders/lamp{n}", params={"product": "lamp", "count": 1}) for n in range(12))
    answers = await asyncio.gather(*requests)
    refused = [answer for answer in answers if answer.status_code != 204]

    assert len(refused) == 7
    assert {(answer.status_code, answer.json()["detail"]) for answer in refused} == {(409, "only 0 of lamp are left")}


async def test_an_order_that_is_sent_again_is_placed_once(client: httpx.AsyncClient) -> None:
    """The customer got no answer and tries again. A different order with the same name is refused."""
    await client.post("/stock/chair", params={"count": 3})
    again = [await client.put("/orders/c1", params={"product": "chair", "count": 2}) for _ in range(2)]
    other = await client.put("/orders/c1", params={"product": "chair", "count": 1})
    rest = await client.put("/orders/c2", params={"product": "chair", "count": 1})

    assert [answer.status_code for answer in [*again, other, rest]] == [204, 204, 409, 204]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", "/orders/x?product=lamp&count=-1", 422),
        ("PUT", "/orders/x?product=dragon&count=1", 409),
        ("POST", "/orders/x/payment", 409),
        ("GET", "/orders/x", 404),
    ],
    ids=["nothing ordered", "unknown product", "payment without order", "unknown order"],
)
async def test_requests_that_break_the_rules_are_refused(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    """The HTTP status says why."""
    answer = await client.request(method, path)

    assert answer.status_code == status
    assert answer.json()["detail"]


async def test_a_paid_order_is_shipped_once_even_if_the_shipping_department_is_killed(
    client: httpx.AsyncClient, log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next process continues where the killed one was, and Ctrl-C ends it."""
    monkeypatch.setenv("ORDERS_LOG", log)
    await client.post("/stock/table", params={"count": 2})
    for order in ("t1", "t2"):
        await client.put(f"/orders/{order}", params={"product": "table", "count": 1})
    await client.post("/orders/t1/payment")
    with process("orders", cwd=tmp_path) as killed:
        assert await asyncio.to_thread(killed.stdout.readline) == "shipped t1\n"
        killed.kill()
    await client.post("/orders/t2/payment")
    with process("orders", cwd=tmp_path) as second:
        assert await asyncio.to_thread(second.stdout.readline) == "shipped t2\n"
        states = [(await client.get(f"/orders/{order}")).json()["status"] for order in ("t1", "t2")]
        second.send_signal(signal.SIGINT)
        rest, complaints = await asyncio.to_thread(second.communicate, timeout=WITHIN)

    assert states == ["shipped", "shipped"]
    assert (second.returncode, rest, complaints) == (0, "", "")


def test_an_order_that_was_shipped_is_not_shipped_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shipping department that was killed before its commit gets the same payment again."""
    monkeypatch.syspath_prepend(EXAMPLES)
    orders = importlib.import_module("orders")
    shop = orders.Shop(orders={"paid": orders.Order("lamp", 1, "paid"), "gone": orders.Order("lamp", 1, "shipped")})

    assert orders.ship(shop, "paid") == orders.OrderShipped("paid")
    assert orders.ship(shop, "gone") is None
