"""The same work on each engine, beside asyncpg (a row and a transaction an event) and nats-py (a message an event).

Run it apart, since it starts a PostgreSQL server and four nats-servers, one alone and three in a cluster, all of which
sync what they acknowledge: `python -m benchmarks.engines`. Needs the servers' binaries. `R3` has a replica on each
server of the cluster. Clients and servers share the machine's processors, so only the ratios count. It fails where a
floor is not reached. `nats-py commits` publishes what eventfold does, messages of a thousand events, which are encoded
already: no program that appends through these servers can be faster.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import resource
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from time import monotonic_ns, perf_counter, process_time
from typing import Any, Protocol

import asyncpg
import msgspec
import nats
from nats.js.api import DeliverPolicy, StreamConfig
from tests.jetstream.servers import Servers
from tests.postgres.servers import running_server

from eventfold import Event, EventLog, EventReader

from ._events import PlainEvent, sample_fields, sample_lines
from ._harness import Case, Figures, Goal, Table, measure

TASKS = (1, 100, 1000)
# How many times as fast as plain asyncpg the engine must be.
APPEND_FLOOR, REPLAY_FLOOR = 15.0, 5.0
_TAILED = 100  # events to a tail, one every so many seconds
_TAIL_INTERVAL = 0.01
_CONNECTIONS = 20
_PLAIN_MESSAGES = 20_000  # of the replay with a message an event, since each is synced
_IN_FLIGHT = (1, 2, 4)  # ready-made commits at once


class Contender(Protocol):
    """Somebody who keeps a log."""

    name: str

    async def append(self, number: int) -> Any:
        """Appends one event; it is durable then."""

    async def append_if(self, number: int) -> Any:
        """The same if nothing was appended since the last call."""

    async def append_now(self) -> Any:
        """Appends an event that holds the time of the call."""

    def tail(self, begun: Callable[[], object]) -> AsyncIterator[int]:
        """The times of the calls that append such events after `begun` is called."""

    async def fill(self, count: int) -> int:
        """Appends that many sample events, or fewer, to a log of its own, which `replay` reads; how many."""

    async def replay(self) -> int:
        """Reads and decodes all events of that log; their number."""

    async def aclose(self) -> None: ...


class Eventfold:
    """This package, with one log that is appended to and one that is replayed."""

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
            for start in range(0, count, 1000):
                # One commit for a thousand events, as with as many tasks.
                events = [Event(**sample_fields(n)) for n in range(start, start + 1000)]
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
    """A table with a row for each event, written in a transaction of its own."""

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


_COMMIT = b"".join(sample_lines(TASKS[-1]))


class PlainNats:
    """A stream with a message for each event, whose acknowledgement is waited for."""

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
        """Publishes a message of a thousand events, as eventfold does with as many tasks; how many they are."""
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
        for start in range(0, count, 1000):
            lines = [msgspec.json.encode(PlainEvent(**sample_fields(n))) for n in range(start, start + 1000)]
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
# Which contender is compared with which other one.
PLAIN = {"postgres": "asyncpg", "jetstream": "nats-py", "jetstream R3": "nats-py R3"}


def contender_of(name: str, places: Mapping[str, str]) -> Plain | PlainNats | Eventfold:
    """The one with this name, not opened yet. `places` has a directory and the servers' addresses."""
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


async def appends(append: Callable[[int], Awaitable[Any]], tasks: int, seconds: float) -> Figures:
    """How many calls end in a second, where each of so many tasks makes one after the other, and what one takes."""
    done, start, cpu = 0, perf_counter(), process_time()

    async def run(task: int) -> None:
        nonlocal done
        while perf_counter() < start + seconds:
            await append(task)
            done += 1

    await asyncio.gather(*map(run, range(tasks)))
    return {"rate": done / (perf_counter() - start), "cpu": (process_time() - cpu) / done * 1e6}


async def ready_commits(contender: PlainNats, in_flight: int, seconds: float) -> Figures:
    """How many events a second, where so many messages of a thousand are always under way."""
    done, start, cpu = 0, perf_counter(), process_time()

    async def run() -> None:
        nonlocal done
        while perf_counter() < start + seconds:
            done += await contender.append_commit()

    await asyncio.gather(*(run() for _ in range(in_flight)))
    return {"rate": done / (perf_counter() - start), "cpu": (process_time() - cpu) / done * 1e6}


async def replay(contender: Contender, filled: Mapping[str, int], places: Mapping[str, str]) -> Figures:
    """In a process of its own, for what it takes."""
    found = await in_other_process("--replay", contender.name, places)
    figures = msgspec.json.decode(found[-1], type=dict[str, float])
    if (count := figures.pop("events")) != filled[contender.name]:
        raise AssertionError(f"{contender.name} has {count} events, and not {filled[contender.name]}")
    return figures


async def replay_as_other_process(name: str, places: str) -> None:
    contender = contender_of(name, msgspec.json.decode(places))
    await contender.open(read_only=True)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = perf_counter(), process_time()
    count = await contender.replay()
    seconds, cpu = perf_counter() - start, process_time() - cpu
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    await contender.aclose()
    figures = {"events": count, "rate": count / seconds, "cpu": cpu / count * 1e6, "memory": memory / 1024}
    print(msgspec.json.encode(figures).decode())


async def tailed(contender: Contender, begun: Callable[[], object]) -> list[float]:
    """For each event of a tail, the milliseconds since the call of append."""
    delays: list[float] = []
    async with aclosing(contender.tail(begun)) as times:  # type: ignore[type-var]
        async for called in times:
            delays.append((monotonic_ns() - called) / 1e6)
            if len(delays) == _TAILED:
                break
    return delays


async def append_slowly(contender: Contender) -> None:
    for _ in range(_TAILED):
        await contender.append_now()
        await asyncio.sleep(_TAIL_INTERVAL)


async def to_own_tail(contender: Contender) -> Figures:
    begun = asyncio.Event()
    tailing = asyncio.create_task(tailed(contender, begun.set))
    await begun.wait()
    await append_slowly(contender)
    return percentiles(await tailing)


async def to_other_process(contender: Contender, places: Mapping[str, str]) -> Figures:
    found = await in_other_process("--tail", contender.name, places, lambda: append_slowly(contender))
    return percentiles(msgspec.json.decode(found[-1], type=list[float]))


async def in_other_process(
    option: str, name: str, places: Mapping[str, str], meanwhile: Callable[[], Awaitable[None]] | None = None
) -> list[bytes]:
    """The lines that this program prints with an option; `meanwhile` is done after the first of them."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.engines", option, name, msgspec.json.encode(places).decode()),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    first = await process.stdout.readline()
    if meanwhile is not None:
        await meanwhile()
    lines = [first, *(await process.stdout.read()).splitlines()]
    await process.wait()
    return lines


async def tail_as_other_process(name: str, places: str) -> None:
    contender = contender_of(name, msgspec.json.decode(places))
    await contender.open(read_only=True)
    delays = await tailed(contender, lambda: print("begun", flush=True))
    await contender.aclose()
    print(msgspec.json.encode(delays).decode())


def percentiles(delays: list[float]) -> Figures:
    return {"p50": statistics.median(delays), "p99": statistics.quantiles(delays, n=100)[98]}


def tables(runner: asyncio.Runner, places: Mapping[str, str], options: argparse.Namespace) -> Iterator[Table]:
    """What is measured, with all contenders open in one event loop."""
    contenders = [contender_of(name, places) for name in options.only or CONTENDERS]
    for contender in contenders:
        runner.run(contender.open())

    def cases(work: str, call: Callable[[Any], Coroutine[Any, Any, Figures]], floor: float | None = None) -> list[Case]:
        return [
            Case(
                work,
                contender.name,
                lambda contender=contender: runner.run(call(contender)),  # type: ignore[misc]
                (Goal(floor, to=f"{work}, {PLAIN[contender.name]}"),)
                if floor is not None and contender.name in PLAIN
                else (),
                f"{work}, {PLAIN.get(contender.name, contenders[0].name)}",
            )
            for contender in contenders
        ]

    found = []
    for tasks in TASKS:
        work = f"{tasks:,} task{'s' * (tasks > 1)}"
        floor = APPEND_FLOOR if tasks == TASKS[-1] else None
        found += cases(work, lambda c, tasks=tasks: appends(c.append, tasks, options.seconds), floor)
    for contender in contenders:
        if isinstance(contender, PlainNats):
            for count in _IN_FLIGHT:
                found.append(
                    Case(
                        f"{count} ready-made commit{'s' * (count > 1)} of {TASKS[-1]:,}",
                        contender.name,
                        lambda c=contender, n=count: runner.run(ready_commits(c, n, options.seconds)),  # type: ignore[misc]
                        reference=f"{TASKS[-1]:,} tasks, {contender.name}",
                    )
                )
    found += cases("append_if, 1 task", lambda c: appends(c.append_if, 1, options.seconds))
    columns = {"rate": "events/s", "cpu": "µs an event"}
    notes = ["The processor time is the client's, without the servers'."]
    yield Table("append", "appends", columns, found, more_is_better=True, notes=notes)

    columns = {"p50": "ms", "p99": "ms"}
    found = cases("same process", to_own_tail)
    found += cases("another process", lambda c: to_other_process(c, places))
    yield Table("tail", "from the call of append to a tail", columns, found, warm_up=False)

    filled = {contender.name: runner.run(contender.fill(options.events)) for contender in contenders}
    found = cases(f"{options.events:,} events", lambda c: replay(c, filled, places), REPLAY_FLOOR)
    columns = {"rate": "events/s", "cpu": "µs an event", "memory": "MiB"}
    notes = ["Each in a process of its own: its processor time, and what its peak memory grew by."]
    yield Table("replay", "reading and decoding all events", columns, found, more_is_better=True, notes=notes)
    for contender in contenders:
        runner.run(contender.aclose())


def main() -> int:
    """Measures, prints tables, and tells by the status whether the floors were reached."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each number of tasks, in each round")
    parser.add_argument("--events", type=int, default=1_000_000, help="to replay, a multiple of 1,000")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved; their medians count")
    parser.add_argument("--only", action="append", choices=CONTENDERS, help="only this contender; more than once")
    parser.add_argument("--tail", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--replay", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tail:
        asyncio.run(tail_as_other_process(*options.tail))
        return 0
    if options.replay:
        asyncio.run(replay_as_other_process(*options.replay))
        return 0
    reached = True
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        places = {"files": directory, "postgres": stack.enter_context(running_server()).address()}
        for name, count in (("server", 1), ("cluster", 3)):
            servers = Servers(Path(directory, name), count)
            stack.callback(servers.kill)
            servers.start()
            places[name] = "nats://" + ",".join(address.removeprefix("nats://") for address in servers.addresses)
        runner = stack.enter_context(asyncio.Runner())
        for table in tables(runner, places, options):
            result = measure(table, options.rounds)
            result = replace(result, ours="postgres")
            print(result, end="\n\n", flush=True)
            reached = reached and all(verdict.reached for verdict in result.verdicts())
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
