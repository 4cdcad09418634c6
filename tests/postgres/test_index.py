"""The index in a table: it is written with the events, and never trusted for events that it lacks."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from tests.postgres.servers import Server

from eventfold import Event, EventfoldError, EventLog, EventReader, Query, build_index, drop_index
from eventfold._codec.keys import pairs_of
from eventfold._codec.lines import Lines
from eventfold._event import Head
from eventfold._index import EngineIndex
from eventfold.postgres import Postgres, _keys


def tagged(n: int, *tags: str) -> Event:
    return Event("a", {"n": n, "text": "x" * (n % 100)}, tags=tags, id=f"id-{n}")


async def fetch(address: str, statement: str) -> list[tuple[int, ...]]:
    connection = await asyncpg.connect(address)
    try:
        return [tuple(row) for row in await connection.fetch(statement)]
    finally:
        await connection.close()


async def check_table(address: str, log: str = "orders") -> None:
    """Asserts that the table has the keys of all events up to the offset that it claims, and no others."""
    [(number, indexed, end)] = await fetch(
        address, f"SELECT log, indexed, \"offset\" FROM eventfold_logs WHERE name = '{log}'"
    )
    table = set(await fetch(address, f'SELECT key, "offset" FROM eventfold_keys WHERE log = {number}'))
    reader = EventReader(Postgres(address, log))
    blocks = [block async for block in reader._source.blocks(Head(0, ""), end)]
    await reader.aclose()
    log_has = set(pairs_of(Lines("", 0, b"".join(block.data for block in blocks))))
    assert {pair for pair in log_has if pair[1] < indexed} <= table <= log_has


async def test_the_keys_are_written_in_the_commit_of_their_events(database: str) -> None:
    """Nothing is left to be added, whoever appended."""
    engines = [Postgres(database, "orders", timeout=20 + n) for n in range(2)]
    async with EventLog.open(engines[0], index=True) as one, EventLog.open(engines[1], index=True) as two:
        await asyncio.gather(*((one, two)[n % 2].append(tagged(n, f"tag:{n % 7}")) for n in range(300)))
        [(indexed, offset)] = await fetch(database, 'SELECT indexed, "offset" FROM eventfold_logs')

    assert indexed == offset > 0
    await check_table(database)


async def test_events_of_a_writer_without_the_index_are_not_missed(database: str) -> None:
    """The offset that the table claims stays until somebody queries the index, and then includes that event."""
    engines = [Postgres(database, "orders", timeout=20 + n) for n in range(2)]
    async with EventLog.open(engines[0], index=True) as log, EventLog.open(engines[1]) as other:
        first = await log.append(tagged(0, "x"))
        await other.append(tagged(1, "x"))
        await log.append(tagged(2, "x"))
        [before] = await fetch(database, "SELECT indexed FROM eventfold_logs")
        found = [r.event.data["n"] async for r in log.read_from(query=Query(tags={"x"}))]
        [after] = await fetch(database, 'SELECT indexed = "offset" FROM eventfold_logs')

    assert before == (first.end_offset,)
    assert found == [0, 1, 2]
    assert after == (True,)


async def test_a_log_is_indexed_while_others_write(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two readers index it at once, in small steps."""
    monkeypatch.setattr(_keys, "_STEP_SIZE", 1000)
    engines = [Postgres(database, "orders", timeout=20 + n) for n in range(3)]
    async with EventLog.open(engines[0]) as log:
        await log.append_many([tagged(n, f"tag:{n % 7}") for n in range(2000)])

        async def write() -> None:
            for n in range(2000, 2100):
                await log.append(tagged(n, f"tag:{n % 7}"))

        writing = asyncio.create_task(write())
        async with EventLog.open(engines[1], index=True) as one, EventLog.open(engines[2], index=True) as two:
            await one.append(tagged(3000, "tag:0"))
            await writing
            for indexed in (one, two):
                found = [r.event.data["n"] async for r in indexed.read_from(query=Query(tags={"tag:0"}))]
                assert sorted(found) == [*range(0, 2100, 7), 3000]

    await check_table(database)


async def test_an_index_that_is_dropped_in_use_is_rebuilt(database: str) -> None:
    """The next query builds it; the keys of other logs stay."""
    async with EventLog.open(Postgres(database, "another"), index=True) as another:
        await another.append(tagged(0, "x"))
    async with EventLog.open(Postgres(database, "orders"), index=True, unique_ids=True) as log:
        index = log._writer._index
        assert isinstance(index, EngineIndex)
        assert index._opening is not None
        await index._opening  # otherwise it may add what is dropped below
        await log.append_many([tagged(n, "x") for n in range(10)])
        dropped = await drop_index(Postgres(database, "orders"))
        [left] = await fetch(database, "SELECT count(*) FROM eventfold_keys")
        again = await log.append(tagged(5))
        found = [r.event.data["n"] async for r in log.read_from(query=Query(tags={"x"}))]

    assert dropped
    assert left == (2,)
    assert again.duplicate
    assert found == list(range(10))
    await check_table(database)


async def test_an_index_is_built_ahead_of_time(database: str) -> None:
    """Progress is reported up to the head."""
    engine = Postgres(database, "orders")
    async with EventLog.open(engine) as log:
        await log.append_many([tagged(n, "x") for n in range(10)])
        head = log.head
    reported: list[tuple[int, int]] = []

    assert await build_index(engine, progress=lambda done, of: reported.append((done, of))) == head
    assert reported == [(head.offset, head.offset)]
    assert await fetch(database, "SELECT indexed, count(*) FROM eventfold_logs, eventfold_keys GROUP BY 1") == [
        (head.offset, 20)
    ]
    with pytest.raises(EventfoldError, match="no such log"):
        await build_index(Postgres(database, "none"))


async def test_long_lines_are_found_and_complete(database: str) -> None:
    """The lines are longer than what is fetched at first, at the beginning of a commit and inside it."""
    sizes = [10, 5000, 4096, 300_000, 0, 100_000]
    async with EventLog.open(Postgres(database, "orders"), index=True) as log:
        await log.append_many([Event("a", {"text": "x" * size}, tags=("x",)) for size in sizes])
        await log.append_many([Event("a", {"text": "y" * size}, tags=("x",)) for size in sizes[::-1]])
        records = [r async for r in log.read_from(query=Query(tags={"x"}))]

        assert records == [r async for r in log.read_full()]
    assert [len(r.event.data["text"]) for r in records] == sizes + sizes[::-1]


async def test_the_table_agrees_with_the_log_after_backends_were_killed(own_server: Server) -> None:
    """Meanwhile, some append with the index, one without it, and one rebuilds it."""
    address, killed = own_server.address(), 0
    engines = [Postgres(address, "killed", timeout=60 + n) for n in range(3)]
    logs = [await EventLog.open(engine, index=n < 2, unique_ids=n < 2) for n, engine in enumerate(engines)]

    async def append(log: EventLog, first: int) -> None:
        for n in range(first, first + 100):
            await log.append(tagged(n, f"tag:{n % 7}"))

    tasks = [asyncio.create_task(append(log, 1000 * number)) for number, log in enumerate(logs * 5)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0.05)
        rows = await own_server.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE query LIKE '%eventfold%' "
            "AND pid <> pg_backend_pid() AND random() < 0.5"
        )
        killed += rows[0][0]
        if killed % 3 == 0:
            await drop_index(Postgres(address, "killed"))
    await asyncio.gather(*tasks)
    found = [r.event.data["n"] async for r in logs[0].read_from(query=Query(tags={"tag:1"}))]
    for log in logs:
        await log.aclose()

    assert killed > 3
    assert sorted(found) == [n for first in range(0, 15_000, 1000) for n in range(first, first + 100) if n % 7 == 1]
    await check_table(address, "killed")
