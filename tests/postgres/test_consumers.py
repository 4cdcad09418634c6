"""Consumers with one name in several processes: one works, and the others stand by."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from tests.postgres.proxy import Cut, Proxy, proxy_of
from tests.postgres.servers import Server

from eventfold import Event, EventfoldError, EventLog
from eventfold.postgres import Postgres, _dedicated, _locks
from eventfold.postgres._documents import TableDocuments

PROGRAM = Path(__file__).with_name("consuming_program.py")


class Worker:
    """A process that consumes, and its output so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.reports: list[str] = []
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.reports.append(line.decode().strip())

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                assert self.process.returncode is None, "the worker has ended"
                await asyncio.sleep(0.01)

    @property
    def ended(self) -> list[int]:
        return [int(line.split()[1]) for line in self.reports if line.startswith("end")]


@asynccontextmanager
async def worker(address: str, seconds: float = 0.0) -> AsyncIterator[Worker]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, PROGRAM, f"{address}?log=orders", str(seconds), stdout=asyncio.subprocess.PIPE
    )
    try:
        found = Worker(process)
        await found.until(lambda: "opened" in found.reports)
        yield found
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def append(address: str, first: int, count: int) -> None:
    async with EventLog.open(Postgres(address, "orders")) as log:
        await log.append_many([Event("a", {"n": n}) for n in range(first, first + count)])


async def test_one_process_works_and_another_takes_over_when_it_is_killed(database: str) -> None:
    """The other process starts after the last commit."""
    await append(database, 0, 3)
    async with worker(database) as first:
        await first.until(lambda: first.ended == [0, 1, 2])
        async with worker(database) as second:
            await append(database, 3, 3)
            await first.until(lambda: len(first.ended) == 6)
            await asyncio.sleep(0.3)
            assert second.reports == ["opened"]

            first.process.kill()
            await append(database, 6, 3)
            await second.until(lambda: second.ended == [6, 7, 8])


async def test_consumers_of_other_names_and_other_logs_run_at_the_same_time(database: str) -> None:
    async with EventLog.open(Postgres(database, "orders")) as log, EventLog.open(Postgres(database, "others")) as other:
        for one in (log, other):
            await one.append(Event("a", {"n": 1}))
        async with asyncio.timeout(10):
            for consumer in (log.consumer("a"), log.consumer("b"), other.consumer("a")):
                assert (await anext(consumer)).event.data["n"] == 1


async def test_the_name_is_free_as_soon_as_its_reader_stops(database: str) -> None:
    """The reader leaves the loop or the log is closed; a second reader in this process is refused before that."""
    engines = [Postgres(database, "orders", timeout=20 + n) for n in range(2)]
    async with EventLog.open(engines[0]) as log:
        await log.append(Event("a", {"n": 1}))
        async with asyncio.timeout(5):
            for _ in range(20):
                async for record in log.consumer("worker"):
                    assert record.event.data["n"] == 1
                    break
        iterator = aiter(log.consumer("worker"))
        await anext(iterator)
        with pytest.raises(EventfoldError, match="elsewhere in this process"):
            await anext(log.consumer("worker"))
    async with EventLog.open(engines[1]) as log, asyncio.timeout(5):
        assert (await anext(log.consumer("worker"))).event.data["n"] == 1


async def test_a_consumer_that_waits_for_its_name_ends_with_its_log(database: str) -> None:
    """The consumer ends without a record and without an error."""
    await append(database, 0, 1)
    async with worker(database) as other:
        await other.until(lambda: other.ended == [0])
        async with EventLog.open(Postgres(database, "orders")) as log:

            async def read() -> list[int]:
                return [record.event.data["n"] async for record in log.consumer("worker", start=0)]

            reading = asyncio.create_task(read())
            await asyncio.sleep(0.3)
            assert not reading.done()
        async with asyncio.timeout(5):
            assert await reading == []


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[Proxy]:
    async with proxy_of(server.port) as proxy:
        yield proxy


async def cut_with_the_connection(server: Server, proxy: Proxy, database: str) -> None:
    """The connection is lost on both sides."""
    proxy.cut_all()


async def end_the_backend(server: Server, proxy: Proxy, database: str) -> None:
    """Ends the connection as `pg_terminate_backend` does."""
    await server.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_database ON oid = database "
        f"WHERE locktype = 'advisory' AND datname = '{database.rpartition('/')[2]}'"
    )


@pytest.fixture
async def documents(database: str) -> AsyncIterator[tuple[TableDocuments, TableDocuments]]:
    """The documents of a log that is open twice, as in two processes."""
    committers = [await Postgres(database, "orders", timeout=20 + n).open_committer() for n in range(2)]
    yield committers[0].source.documents, committers[1].source.documents
    for committer in committers:
        await committer.aclose()


async def test_a_consumer_on_the_program_s_pool_continues_after_its_connection_was_lost(
    server: Server, database: str
) -> None:
    """The pool takes a lost connection back, and then refuses every use of it."""
    await append(database, 0, 10)
    pool = await asyncpg.create_pool(database, min_size=0)
    async with EventLog.open(Postgres(pool, "orders"), read_only=True) as log:
        consumer = log.consumer("worker")
        seen = []
        for n in range(10):
            record = await anext(consumer)
            seen.append(record.event.data["n"])
            if n == 5:
                await server.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    f"WHERE datname = '{database.rpartition('/')[2]}'"
                )
                await asyncio.sleep(0.2)
            await consumer.commit(record)
    await pool.close()

    assert seen == list(range(10))


@pytest.mark.parametrize("quotes_all", [False, True])
async def test_a_name_is_locked_no_matter_how_the_schema_was_named(database: str, quotes_all: bool) -> None:
    """One program names the schema, another one finds it in the search path."""
    one = Postgres(database, "orders").source()
    other = Postgres(database, "orders", schema="public", server_settings={"quote_all_identifiers": str(quotes_all)})
    two = other.source()
    held = await one.documents.lock("consumer", "c")

    assert held is not None
    assert await two.documents.lock("consumer", "c") is None
    await one.aclose()
    await two.aclose()


async def test_a_process_that_lost_its_name_can_commit_nothing(
    server: Server, database: str, proxy: Proxy, documents: tuple[TableDocuments, TableDocuments]
) -> None:
    """Tested before and after the new holder's first commit."""
    first, second = documents
    held = await first.lock("consumer", "c")
    assert held is not None
    await first.store("consumer", "c", b"1")
    await end_the_backend(server, proxy, database)
    taken = await second.lock("consumer", "c")
    assert taken is not None

    with pytest.raises(EventfoldError, match="another process"):
        await first.store("consumer", "c", b"2")
    assert await held.was_lost()
    assert not await taken.was_lost()
    assert await second.load("consumer", "c") == b"1"
    await second.store("consumer", "c", b"3")
    held.release()
    assert await first.lock("consumer", "c") is None
    assert await first.load("consumer", "c") == b"3"


async def test_a_process_that_lost_its_connection_can_commit_until_another_takes_the_name(
    server: Server, database: str, proxy: Proxy, documents: tuple[TableDocuments, TableDocuments]
) -> None:
    """Until then, the process was the last one to hold the name."""
    first, second = documents
    held = await first.lock("consumer", "c")
    await end_the_backend(server, proxy, database)
    await first.store("consumer", "c", b"1")

    assert await second.lock("consumer", "c") is not None
    assert await second.load("consumer", "c") == b"1"
    assert held is not None
    assert await held.was_lost()


async def test_a_role_that_may_only_read_can_hold_the_name(server: Server, database: str) -> None:
    """Other processes can't see that it holds the name, and it commits nothing; once it may write, it does both."""
    await append(database, 0, 2)
    await server.execute("DROP ROLE IF EXISTS reads", database=database.rpartition("/")[2])
    for sql in ("CREATE ROLE reads LOGIN", "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reads"):
        await server.execute(sql, database=database.rpartition("/")[2])
    async with EventLog.open(Postgres(database.replace("admin@", "reads@"), "orders"), read_only=True) as log:
        consumer = log.consumer("worker")
        record = await anext(consumer)
        with pytest.raises(PermissionError):
            await consumer.commit(record)
        grant = "GRANT INSERT, UPDATE ON eventfold_documents TO reads"
        await server.execute(grant, database=database.rpartition("/")[2])
        await consumer.commit(record)
    async with EventLog.open(Postgres(database, "orders")) as log:
        assert (await anext(log.consumer("worker"))).event.data["n"] == 1


async def test_a_late_commit_does_not_move_the_offset_back(server: Server, database: str) -> None:
    """The commit was sent again meanwhile, and so was the next one."""
    async with proxy_of(server.port) as proxy:
        address = database.replace(f":{server.port}/", f":{proxy.port}/")
        async with EventLog.open(Postgres(address, "orders")) as log:
            await log.append_many([Event("a", {"n": n}) for n in range(3)])
            consumer = log.consumer("worker")
            first, second = await anext(consumer), await anext(consumer)
            proxy.cut_at(b'"offset":%d' % first.end_offset, Cut.LATE)
            await consumer.commit(first)
            await consumer.commit(second)
            assert proxy.cuts == 1
            proxy.deliver()
            await asyncio.sleep(0.3)
    async with EventLog.open(Postgres(database, "orders")) as log:
        assert (await anext(log.consumer("worker"))).event.data["n"] == 2


async def test_a_name_that_was_taken_before_there_was_a_log_is_kept_by_its_owner(server: Server, database: str) -> None:
    """The first reader waits until the log is created, and then commits."""
    async with EventLog.open(Postgres(database, "orders", timeout=20), read_only=True) as log:
        consumer = log.consumer("worker")
        waiting = asyncio.ensure_future(anext(consumer))
        await asyncio.sleep(0.3)
        await append(database, 0, 2)
        record = await waiting
        await consumer.commit(record)
    async with EventLog.open(Postgres(database, "orders", timeout=21)) as log:
        assert (await anext(log.consumer("worker"))).event.data["n"] == 1


@pytest.mark.parametrize("lose", [cut_with_the_connection, end_the_backend])
async def test_a_process_that_loses_the_lock_stops_before_the_next_record(
    server: Server, database: str, lose: Callable[[Server, Proxy, str], Awaitable[None]]
) -> None:
    """The other one takes over; both work only on the record that was under way, and no record is left out."""
    await append(database, 0, 60)
    async with proxy_of(server.port) as proxy, AsyncExitStack() as stack:
        address = database.replace(f":{server.port}/", f":{proxy.port}/")
        first = await stack.enter_async_context(worker(address, 0.1))
        await first.until(lambda: len(first.ended) >= 3)
        second = await stack.enter_async_context(worker(database, 0.1))
        for _ in range(3):
            before = len(first.ended), len(second.ended)
            await lose(server, proxy, database)
            await first.until(lambda: (len(first.ended), len(second.ended)) > before)  # noqa: B023
            await asyncio.sleep(0.5)
        await first.until(lambda: 59 in first.ended + second.ended)

    assert sorted(set(first.ended + second.ended)) == list(range(60))
    assert first.ended == sorted(first.ended)
    assert second.ended == sorted(second.ended)
    # At each takeover, only the record that was under way may be given to both.
    assert len(first.ended + second.ended) <= 60 + 4


async def test_a_lock_on_an_unresponsive_server_is_not_trusted(
    server: Server, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may have lost its power; the name is taken again on another connection, and nothing is given twice."""
    monkeypatch.setattr(_locks, "TRUST_PERIOD", 0.0)
    await append(database, 0, 10)
    async with EventLog.open(Postgres(database, "orders", attempt_timeout=0.5), read_only=True) as log:
        consumer = log.consumer("worker")
        given = [(await anext(consumer)).event.data["n"] for _ in range(3)]
        session = log._reader._source.session()  # type: ignore[attr-defined]
        silent = session.connections.dedicated._connection
        fetchval = type(silent).fetchval

        async def never(self: object, *args: object, **options: object) -> object:
            return await (asyncio.Event().wait() if self is silent else fetchval(self, *args, **options))

        async def timed_out(self: object, *args: object, timeout: float, **options: object) -> object:
            async with asyncio.timeout(timeout):
                return await never(self, *args, **options)

        monkeypatch.setattr(type(silent), "fetchval", timed_out)
        given += [(await anext(consumer)).event.data["n"] for _ in range(7)]

        assert session.connections.dedicated._connection is not silent
    assert given == list(range(10))


async def test_one_connection_serves_all_waits_and_locks(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is closed a moment after its last use."""
    monkeypatch.setattr(_dedicated, "IDLE_TIMEOUT", 0.1)
    async with EventLog.open(Postgres(database, "orders")) as log:
        await log.append(Event("a", {"n": 1}))
        consumers = [log.consumer(name) for name in ("a", "b")]
        iterators = [aiter(consumer) for consumer in consumers]
        for iterator in iterators:
            await anext(iterator)
        dedicated = log._reader._source.session().connections.dedicated  # type: ignore[attr-defined]
        connection = dedicated._connection
        waiting = [asyncio.ensure_future(anext(iterator)) for iterator in iterators]
        await asyncio.sleep(0.3)
        assert dedicated._connection is connection
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        async with asyncio.timeout(5):
            while dedicated._connection is not None:
                await asyncio.sleep(0.01)

        assert connection.is_closed()
