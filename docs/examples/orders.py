"""An order service: any number of web servers and a shipping department, on PostgreSQL or in a directory.

    export ORDERS_LOG="postgresql://user@localhost/shop?log=orders"
    uvicorn --app-dir docs/examples orders:app    # on as many hosts as you like
    python docs/examples/orders.py                # the shipping department, a single process

With `ORDERS_LOG=orders-data`, everything runs on one machine without a database. Nothing else changes.

    curl -X POST "localhost:8000/stock/lamp?count=5"
    curl -X PUT "localhost:8000/orders/a1?product=lamp&count=2"
    curl -X POST "localhost:8000/orders/a1/payment"
    curl "localhost:8000/orders/a1"
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import reduce
from operator import or_
from typing import Annotated, Literal

import msgspec
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi import Query as Parameter
from fastapi.responses import JSONResponse

from eventfold import AsyncOpener, Catalog, Event, EventfoldError, EventLog, LockMode, Query, UnknownOutcomeError, View

LOG = os.environ.get("ORDERS_LOG", "orders-data")
catalog = Catalog()


@catalog.event("stock_added", tags=lambda event: [f"product:{event.product}"])
class StockAdded(msgspec.Struct, frozen=True):
    product: str
    count: int


@catalog.event("order_placed", tags=lambda event: [f"product:{event.product}", f"order:{event.order}"])
class OrderPlaced(msgspec.Struct, frozen=True):
    order: str
    product: str
    count: int


@catalog.event("order_paid", tags=lambda event: [f"order:{event.order}"])
class OrderPaid(msgspec.Struct, frozen=True):
    order: str


@catalog.event("order_shipped", tags=lambda event: [f"order:{event.order}"])
class OrderShipped(msgspec.Struct, frozen=True):
    order: str


class Order(msgspec.Struct):
    product: str
    count: int
    status: Literal["placed", "paid", "shipped"] = "placed"


class Shop(msgspec.Struct):
    stock: dict[str, int] = {}
    orders: dict[str, Order] = {}


def reduce_shop(shop: Shop, event: Event) -> Shop:
    match event.data:
        case StockAdded(product, count):
            shop.stock[product] = shop.stock.get(product, 0) + count
        case OrderPlaced(order, product, count):
            shop.stock[product] -= count
            shop.orders[order] = Order(product, count)
        case OrderPaid(order):
            shop.orders[order].status = "paid"
        case OrderShipped(order):
            shop.orders[order].status = "shipped"
    return shop


class RefusedError(Exception):
    """The rules of the shop forbid the request."""


# The decisions. A request may be repeated, since a response can get lost; then there is nothing to append.


def place(shop: Shop, order: str, product: str, count: int) -> OrderPlaced | None:
    if known := shop.orders.get(order):
        if (known.product, known.count) != (product, count):
            raise RefusedError(f"order {order} is for {known.count} {known.product}")
        return None
    if (left := shop.stock.get(product, 0)) < count:
        raise RefusedError(f"only {left} of {product} are left")
    return OrderPlaced(order, product, count)


def pay(shop: Shop, order: str) -> OrderPaid | None:
    if order not in shop.orders:
        raise RefusedError(f"there is no order {order}")
    return OrderPaid(order) if shop.orders[order].status == "placed" else None


def ship(shop: Shop, order: str) -> OrderShipped | None:
    return OrderShipped(order) if shop.orders[order].status == "paid" else None


def open_log() -> AsyncOpener[EventLog]:
    # A directory must be opened as shared; a database always allows several writers.
    options = {} if "://" in LOG else {"lock": LockMode.SHARED}
    return EventLog.open(LOG, catalog=catalog, views=[View("shop", reduce_shop, Shop)], **options)


async def decide(log: EventLog, decision: Callable[[Shop], object], *tags: str) -> None:
    """Makes a decision that depends only on the events with one of the tags."""
    query = reduce(or_, (Query(tags=[tag]) for tag in tags))
    await log.decide(log.views["shop"], decision, query=query, attempts=100)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, EventLog]]:
    async with open_log() as log:
        yield {"log": log}


def log_of(request: Request) -> EventLog:
    return request.state.log


Log = Annotated[EventLog, Depends(log_of)]
Count = Annotated[int, Parameter(gt=0, le=1_000_000)]
app = FastAPI(lifespan=lifespan)


@app.post("/stock/{product}", status_code=204)
async def add_stock(log: Log, product: str, count: Count) -> None:
    await log.append(StockAdded(product, count))


@app.put("/orders/{order}", status_code=204)
async def place_order(log: Log, order: str, product: str, count: Count) -> None:
    await decide(log, lambda shop: place(shop, order, product, count), f"product:{product}", f"order:{order}")


@app.post("/orders/{order}/payment", status_code=204)
async def pay_order(log: Log, order: str) -> None:
    await decide(log, lambda shop: pay(shop, order), f"order:{order}")


@app.get("/orders/{order}")
async def get_order(log: Log, order: str) -> dict[str, str | int]:
    shop = await log.wait_until("shop")  # includes all events that any server has acknowledged
    if order not in shop.orders:
        raise HTTPException(404, f"there is no order {order}")
    return msgspec.structs.asdict(shop.orders[order])


@app.exception_handler(RefusedError)
async def refused(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 409)


@app.exception_handler(OSError)
@app.exception_handler(UnknownOutcomeError)
async def unavailable(request: Request, error: Exception) -> JSONResponse:
    """The database is unavailable. All requests except those that add stock can be sent again, written or not."""
    return JSONResponse({"detail": str(error)}, 503, {"Retry-After": "1"})


async def ship_what_is_paid() -> None:
    async with open_log() as log:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, log.reader().end_waits)
        # It continues after the last record that it committed. If it is killed before the commit, it gets that record
        # again, and the decision finds nothing left to do.
        consumer = log.consumer("shipping", query=Query(types=["order_paid"]))
        async for record in consumer:
            order = record.event.data.order
            await decide(log, lambda shop, order=order: ship(shop, order), f"order:{order}")
            await consumer.commit(record)
            print(f"shipped {order}", flush=True)


if __name__ == "__main__":
    try:
        asyncio.run(ship_what_is_paid())
    except (ValueError, EventfoldError, OSError) as error:
        # A wrong address, or a database that is unavailable for too long.
        sys.exit(f"orders: {error}")
