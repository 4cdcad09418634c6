"""Writers that share only the database, as in several processes and behind a pooler."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence

import asyncpg
import pytest
from tests.postgres.servers import Server
from tests.support import free_port

from eventfold import ConditionalAppendError, Event, EventfoldError, EventLog, EventReader, Head, Query
from eventfold._engine import Commit
from eventfold._judge import Append
from eventfold.postgres import Postgres
from eventfold.postgres._committer import TableCommitter

PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


async def test_a_writer_reads_the_events_of_another_writer(database: str) -> None:
    """The events come in order, after the earlier events of the first writer."""
    engines = [Postgres(database, "orders", timeout=seconds) for seconds in (20, 30)]  # No connections are shared.
    async with EventLog.open(engines[0]) as one, EventLog.open(engines[1]) as two:
        result = await one.append(Event("a", {"n": 0}))
        await two.append(Event("a", {"n": 1}))
        await one.append(Event("a", {"n": 2}))

        assert [record.event.data["n"] async for record in one.read_from(result.end_offset)] == [1, 2]


@pytest.fixture
async def pooler(server: Server, database: str) -> AsyncIterator[str]:
    """The database's address through PgBouncer in transaction mode, which has two connections for all clients."""
    if PGBOUNCER is None:
        pytest.skip("needs pgbouncer: apt-get install pgbouncer")
    port, name = free_port(), database.rpartition("/")[2]
    directory = server.directory / f"pooler-{port}"
    directory.mkdir(mode=0o755)
    users = directory / "users"
    users.write_text('"admin" ""\n')
    configuration = directory / "pgbouncer.ini"
    configuration.write_text(
        f"[databases]\n{name} = host=127.0.0.1 port={server.port} user=admin\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = trust\n"
        f"auth_file = {users}\npool_mode = transaction\ndefault_pool_size = 2\n"
    )
    process = subprocess.Popen(
        [PGBOUNCER, "-q", configuration], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **server.other_user
    )
    try:
        address = f"postgresql://admin@127.0.0.1:{port}/{name}"
        for _ in range(200):
            try:
                await (await asyncpg.connect(address, statement_cache_size=0)).close()
                break
            except OSError:
                await asyncio.sleep(0.02)
        yield address
    finally:
        process.terminate()
        process.wait()


async def test_a_log_works_behind_a_pooler_in_transaction_mode(pooler: str, database: str) -> None:
    """Ten writers share two connections, and a tail listens without the pooler."""
    engines = [
        Postgres(pooler, "orders", transaction_pooling=True, listen_dsn=database, timeout=20 + n) for n in range(10)
    ]
    logs = [await EventLog.open(engine) for engine in engines]
    seen: list[int] = []
    reader = EventReader(engines[0])

    async def tail() -> None:
        async for record in reader.tail(0):
            seen.append(record.event.data["n"])

    task = asyncio.create_task(tail())
    await asyncio.gather(*(logs[n % 10].append(Event("a", {"n": n})) for n in range(300)))
    async with asyncio.timeout(10):
        while len(seen) < 300:
            await asyncio.sleep(0.01)
    for log in logs:
        await log.aclose()
    await reader.aclose()
    await task

    assert sorted(seen) == list(range(300))


async def test_a_consumer_behind_a_pooler_holds_its_name_on_a_direct_connection(pooler: str, database: str) -> None:
    """The connection that listens holds the consumer's lock; its commits go through the pooler."""
    engines = [
        Postgres(pooler, "orders", transaction_pooling=True, listen_dsn=database, timeout=20 + n) for n in range(2)
    ]
    async with EventLog.open(engines[0]) as log:
        await log.append_many([Event("a", {"n": n}) for n in range(3)])
        consumer = log.consumer("worker")
        for n in range(2):
            record = await anext(consumer)
            assert record.event.data["n"] == n
            await consumer.commit(record)
        other = engines[1].source()
        assert await other.documents.lock("consumer", "worker") is None
        await other.aclose()
    async with EventLog.open(engines[1]) as log:
        assert (await anext(log.consumer("worker"))).event.data["n"] == 2


async def test_writers_that_reserve_the_same_seats_get_each_seat_once(database: str) -> None:
    """A query also covers what the others appended."""
    engines = [Postgres(database, "seats", timeout=20 + n) for n in range(3)]
    logs = [await EventLog.open(engine) for engine in engines]

    async def reserve(log: EventLog, seat: int) -> bool:
        try:
            await log.append_unless([Event("reserved", {"seat": seat}, tags=(f"seat:{seat}",))], of_seat(seat))
        except ConditionalAppendError:
            return False
        return True

    taken = await asyncio.gather(*(reserve(log, seat) for seat in range(30) for log in logs))
    found = [record.event.data["seat"] async for record in logs[0].read_full()]
    for log in logs:
        await log.aclose()

    assert sum(taken) == 30
    assert sorted(found) == list(range(30))


async def test_a_condition_is_checked_in_its_turn_however_often_others_append(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that appends without a pause does not hold up another one, and the condition covers its events."""
    write = TableCommitter._write

    async def overtaken(self: TableCommitter, data: bytes, expected: Head | None) -> int | None:
        if expected is not None:
            await busy.append(Event("reserved", {"seat": 1}, tags=("seat:1",)))
        return await write(self, data, expected)

    engines = [Postgres(database, "seats", timeout=20 + n) for n in range(2)]
    async with EventLog.open(engines[0]) as busy, EventLog.open(engines[1]) as log, asyncio.timeout(10):
        monkeypatch.setattr(TableCommitter, "_write", overtaken)
        await log.append_unless([Event("reserved", {"seat": 2})], of_seat(2))
        with pytest.raises(ConditionalAppendError):
            await log.append_unless([Event("reserved", {"seat": 1})], of_seat(1))
        found = [record.event.data["seat"] async for record in log.read_full()]

    assert found == [1, 2]


async def test_a_refusal_names_offsets_of_the_log_even_if_another_writer_comes_first(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refused appends conflict with an event of their own commit, which gets a later offset than was expected."""
    write = TableCommitter._write
    overtaken = False

    async def overtaken_once(self: TableCommitter, data: bytes, expected: Head | None) -> int | None:
        nonlocal overtaken
        if not overtaken:
            overtaken = True
            await other.append(Event("something else"))
        return await write(self, data, expected)

    engines = [Postgres(database, "seats", timeout=20 + n) for n in range(2)]
    async with EventLog.open(engines[0]) as other, EventLog.open(engines[1]) as log, asyncio.timeout(10):
        monkeypatch.setattr(TableCommitter, "_write", overtaken_once)
        reserved, *refused = await asyncio.gather(
            log.append(Event("reserved", {"seat": 1}, tags=("seat:1",))),
            log.append_unless([Event("reserved", {"seat": 1}, tags=("seat:1",))], of_seat(1)),
            log.append_if(Event("reserved"), *log.head),
            return_exceptions=True,
        )

    assert overtaken
    assert not isinstance(reserved, BaseException)
    by_query, by_head = [error.conflict for error in refused if isinstance(error, ConditionalAppendError)]
    assert by_query.offset == reserved.start_offset > 0
    assert by_query.actual_offset == by_head.actual_offset == reserved.end_offset


def of_seat(seat: int) -> Query:
    return Query(tags={f"seat:{seat}"})


async def test_a_commit_begins_while_the_calls_of_the_previous_one_return(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the server works, so does this process; the appends return in the order of the log all the same."""
    commit = TableCommitter.commit
    written, returned, ahead = 0, [], []

    async def counted(self: TableCommitter, appends: Sequence[Append]) -> Commit:
        nonlocal written
        ahead.append(written - len(returned))
        written += len(appends)
        return await commit(self, appends)

    async def append(task: int) -> None:
        for n in range(6):
            result = await log.append(Event("a", {"task": task, "n": n}))
            returned.append(result.start_offset)

    monkeypatch.setattr(TableCommitter, "commit", counted)
    async with EventLog.open(Postgres(database, "orders")) as log:
        await asyncio.gather(*map(append, range(600)))
        records = [record async for record in log.read_full()]

    assert max(ahead) >= 200
    assert returned == sorted(returned) == [record.start_offset for record in records]
    for task in range(600):
        assert [r.event.data["n"] for r in records if r.event.data["task"] == task] == list(range(6))


async def test_a_failure_fails_the_appends_of_both_commits_under_way(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The appends of the commit before them have succeeded."""
    commit = TableCommitter.commit
    commits = 0

    async def failing(self: TableCommitter, appends: Sequence[Append]) -> Commit:
        nonlocal commits
        commits += 1
        if commits == 3:
            raise EventfoldError("somebody altered the tables")
        return await commit(self, appends)

    async def append() -> int:
        for n in range(6):
            try:
                await log.append(Event("a"))
            except EventfoldError:
                return n
        return 6

    monkeypatch.setattr(TableCommitter, "commit", failing)
    log = await EventLog.open(Postgres(database, "orders"))
    async with asyncio.timeout(30):
        counts = await asyncio.gather(*(append() for _ in range(600)))
        await log.aclose()

    async with EventLog.open(Postgres(database, "orders"), read_only=True) as log:
        assert len([record async for record in log.read_full()]) == sum(counts)
    assert commits == 3
    assert set(counts) == {1, 2}
