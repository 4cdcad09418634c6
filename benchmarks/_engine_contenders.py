"""The programs that `benchmarks.engines` compares: this package on each engine, plain asyncpg, and plain nats-py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from time import monotonic_ns
from typing import Any, Protocol

import asyncpg
import msgspec
import nats
from nats.js.api import DeliverPolicy, StreamConfig

from eventfold import Event, EventLog, EventReader

from ._events import PlainEvent, sample_fields, sample_lines

_CONNECTIONS = 20
_PLAIN_MESSAGES = 20_000  # to replay with one message per event, since each is synced
_COMMIT_SIZE = 1_000  # events of a ready-made commit, and of a commit of `fill`


class Contender(Protocol):
    """A program that keeps a log."""

    name: str

    async def append(self, number: int) -> Any:
        """Appends one event durably."""

    async def append_if(self, number: int) -> Any:
        """Appends one event if nothing has been appended since the last call."""

    async def append_now(self) -> Any:
        """Appends an event that contains the time of the call."""

    def tail(self, begun: Callable[[], object]) -> AsyncIterator[int]:
        """Yields the times in those events of `append_now` that are appended after it has called `begun`."""

    async def fill(self, count: int) -> int:
        """Appends up to `count` sample events to a separate log, which `replay` reads; returns their number."""

    async def replay(self) -> int:
        """Reads and decodes all events of that log; returns their number."""

    async def aclose(self) -> None: ...


class Eventfold:
    """This package, with one log to append to and one to replay."""

    def __init__(self, name: str, where: Callable[[str], str]) -> None:
        self.name = name
        self._where = where
        self.log: EventLog
        self._replayed: EventReader

    async def open(self, *, read_only: bool = False) -> None:
        self.log = await EventLog.open(self._where("appended"), read_only=read_only)
        self._replayed = EventReader(self._where("replayed"))

    async def append(self, number: int) -> None:
        await self.log.append(Event(**sample_fields(number)))

    async def append_if(self, number: int) -> None:
        await self.log.append_if(Event(**sample_fields(number)), *self.log.head)

    async def append_now(self) -> None:
        await self.log.append(Event("now", monotonic_ns()))

    async def tail(self, begun: Callable[[], object]) -> AsyncIterator[int]:
        head = await self.log.reader().head()
        begun()
        async for record in self.log.tail(head.offset):
            yield record.event.data

    async def fill(self, count: int) -> int:
        async with EventLog.open(self._where("replayed")) as log:
            for start in range(0, count, _COMMIT_SIZE):
                # One commit for a thousand events, as with as many tasks.
                events = [Event(**sample_fields(n)) for n in range(start, start + _COMMIT_SIZE)]
                await asyncio.gather(*map(log.append, events))
        return count

    async def replay(self) -> int:
        count = 0
        async for piece in self._replayed.read_slices():
            count += len(piece.events)
        return count

    async def aclose(self) -> None:
        await self._replayed.aclose()
        await self.log.aclose()


class Plain:
    """A table with one row per event, each written in its own transaction."""

    name = "asyncpg"

    def __init__(self, address: str) -> None:
        self._address = address
        self._pool: asyncpg.Pool[Any]
        self._head = 0

    async def open(self, *, read_only: bool = False) -> None:
        self._pool = await asyncpg.create_pool(
            self._address, min_size=1 if read_only else _CONNECTIONS, max_size=_CONNECTIONS
        )
        for table in ("plain", "plain_replayed"):
            await self._pool.execute(
                f"CREATE TABLE IF NOT EXISTS {table} (n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, "
                "line bytea NOT NULL)"
            )
        await self._pool.execute("CREATE TABLE IF NOT EXISTS plain_head AS SELECT 0::bigint AS n")

    async def append(self, number: int) -> None:
        line = msgspec.json.encode(PlainEvent(**sample_fields(number)))
        await self._pool.execute("INSERT INTO plain (line) VALUES ($1)", line)

    async def append_if(self, number: int) -> None:
        line = msgspec.json.encode(PlainEvent(**sample_fields(number)))
        self._head = await self._pool.fetchval(
            "WITH head AS (UPDATE plain_head SET n = n + 1 WHERE n = $2 RETURNING n), "
            "written AS (INSERT INTO plain (line) SELECT $1 FROM head) SELECT n FROM head",
            line,
            self._head,
        )

    async def append_now(self) -> None:
        line = msgspec.json.encode(PlainEvent("now", monotonic_ns(), 0))
        await self._pool.execute(
            "WITH written AS (INSERT INTO plain (line) VALUES ($1)) SELECT pg_notify('plain', '')", line
        )

    async def tail(self, begun: Callable[[], object]) -> AsyncIterator[int]:
        news = asyncio.Event()

        def notified(*_: object) -> None:
            news.set()

        async with self._pool.acquire() as connection:
            await connection.add_listener("plain", notified)
            last = await connection.fetchval("SELECT coalesce(max(n), 0) FROM plain")
            begun()
            try:
                while True:
                    await news.wait()
                    news.clear()
                    for row in await connection.fetch("SELECT n, line FROM plain WHERE n > $1 ORDER BY n", last):
                        last = row[0]
                        yield msgspec.json.decode(row[1], type=PlainEvent).data
            finally:
                await connection.remove_listener("plain", notified)

    async def fill(self, count: int) -> int:
        for start in range(0, count, 10_000):
            numbers = range(start, min(count, start + 10_000))
            rows = [(msgspec.json.encode(PlainEvent(**sample_fields(n))),) for n in numbers]
            await self._pool.copy_records_to_table("plain_replayed", records=rows, columns=["line"])
        return count

    async def replay(self) -> int:
        decoder, count = msgspec.json.Decoder(PlainEvent), 0
        async with self._pool.acquire() as connection, connection.transaction():
            async for row in connection.cursor("SELECT line FROM plain_replayed ORDER BY n"):
                decoder.decode(row[0])
                count += 1
        return count

    async def aclose(self) -> None:
        await self._pool.close()


_COMMIT = b"".join(sample_lines(_COMMIT_SIZE))


class PlainNats:
    """A stream with one message per event; each call waits for the acknowledgement."""

    def __init__(self, name: str, address: str, replicas: int) -> None:
        self.name = name
        self._address, self._replicas = address, replicas
        self._last = 0

    async def open(self, *, read_only: bool = False) -> None:
        self._client = await nats.connect(self._address.split(","))
        self._stream = self._client.jetstream(timeout=30)
        for name in ("plain", "plain_replayed"):
            name += str(self._replicas)
            await self._stream.add_stream(StreamConfig(name=name, subjects=[name], num_replicas=self._replicas))

    async def _publish(self, event: PlainEvent, expected: int | None = None) -> int:
        headers = None if expected is None else {"Nats-Expected-Last-Sequence": str(expected)}
        subject = f"plain{self._replicas}"
        return (await self._stream.publish(subject, msgspec.json.encode(event), headers=headers)).seq

    async def append(self, number: int) -> None:
        self._last = await self._publish(PlainEvent(**sample_fields(number)))

    async def append_if(self, number: int) -> None:
        self._last = await self._publish(PlainEvent(**sample_fields(number)), self._last)

    async def append_commit(self) -> int:
        """Publishes a thousand events as one message, as eventfold does; returns their number."""
        self._last = max(self._last, (await self._stream.publish(f"plain{self._replicas}", _COMMIT)).seq)
        return _COMMIT.count(b"\n")

    async def append_now(self) -> None:
        await self._publish(PlainEvent("now", monotonic_ns(), 0))

    async def tail(self, begun: Callable[[], object]) -> AsyncIterator[int]:
        subscription = await self._stream.subscribe(
            f"plain{self._replicas}", ordered_consumer=True, deliver_policy=DeliverPolicy.NEW
        )
        begun()
        async for message in subscription.messages:
            yield msgspec.json.decode(message.data, type=PlainEvent).data

    async def fill(self, count: int) -> int:
        count = min(count, _PLAIN_MESSAGES)
        subject = f"plain_replayed{self._replicas}"
        for start in range(0, count, _COMMIT_SIZE):
            lines = [msgspec.json.encode(PlainEvent(**sample_fields(n))) for n in range(start, start + _COMMIT_SIZE)]
            await asyncio.gather(*(self._stream.publish(subject, line) for line in lines))
        return count

    async def replay(self) -> int:
        decoder, count = msgspec.json.Decoder(PlainEvent), 0
        subject = f"plain_replayed{self._replicas}"
        last = (await self._stream.stream_info(subject)).state.messages
        subscription = await self._stream.subscribe(subject, ordered_consumer=True)
        async for message in subscription.messages:
            decoder.decode(message.data)
            count += 1
            if count == last:
                break
        await subscription.unsubscribe()
        return count

    async def aclose(self) -> None:
        await self._client.close()


CONTENDERS = ("asyncpg", "files", "postgres", "nats-py", "jetstream", "nats-py R3", "jetstream R3")
# Each contender's reference.
PLAIN = {"postgres": "asyncpg", "jetstream": "nats-py", "jetstream R3": "nats-py R3"}


def contender_of(name: str, places: Mapping[str, str]) -> Plain | PlainNats | Eventfold:
    """The contender with this name, not opened yet. `places` has a directory and the servers' addresses."""
    engine, _, cluster = name.partition(" ")
    servers = places["cluster" if cluster else "server"]
    if engine == "asyncpg":
        return Plain(places["postgres"])
    if engine == "nats-py":
        return PlainNats(name, servers, 3 if cluster else 1)
    where = {
        "files": f"{places['files']}/{{}}",
        "postgres": f"{places['postgres']}?log={{}}",
        "jetstream": f"{servers}/{{}}{cluster and '?replicas=3'}",
    }[engine]
    return Eventfold(name, where.format)
