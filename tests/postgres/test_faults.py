"""The server fails, and comes back: nothing that was acknowledged is lost, and nothing is there twice."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
from tests.postgres.servers import Server, in_thread

from eventfold import ConditionalAppendError, Event, EventLog, EventReader, Head, UnknownOutcomeError
from eventfold.postgres import Postgres

# More rounds of each fault than the suite has time for.
ROUNDS = int(os.environ.get("EVENTFOLD_POSTGRES_ROUNDS", "2"))
TASKS = 100


async def kill_server(server: Server) -> None:
    await in_thread(server.kill)
    await in_thread(server.restart_after_kill)


async def restart_server(server: Server) -> None:
    await in_thread(server.stop)
    await in_thread(server.start)


async def kill_backends(server: Server) -> None:
    for _ in range(10):
        await asyncio.sleep(random.uniform(0.001, 0.05))
        await server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
            "AND backend_type = 'client backend'"
        )


async def kill_writing_backends(server: Server) -> None:
    """Kills whoever is between the beginning and the end of a statement."""
    for _ in range(50):
        await server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
            "AND state = 'active' AND query LIKE '%eventfold_commits%'"
        )


@pytest.fixture
def engine(own_server: Server) -> Callable[[], Postgres]:
    """Makes the engine of one log, the same at each call."""
    name = f"log{random.randrange(10**9)}"
    return lambda: Postgres(own_server.address(), name, timeout=60)


@pytest.mark.parametrize("fault", [kill_server, restart_server, kill_backends, kill_writing_backends])
async def test_what_was_acknowledged_under_faults_is_there_once(
    own_server: Server, engine: Callable[[], Postgres], fault: Callable[[Server], Awaitable[None]]
) -> None:
    """100 tasks in two writers append, some on a condition, while the server fails; tails see each event once."""
    acknowledged: set[int] = set()
    unknown: set[int] = set()
    numbers = iter(range(10**9))
    done = False

    async def append(log: EventLog, conditional: bool) -> None:
        while not done:
            number = next(numbers)
            event = Event("counted", {"n": number})
            try:
                await (log.append_if(event, *log.head) if conditional else log.append(event))
                acknowledged.add(number)
            except ConditionalAppendError:
                pass
            except UnknownOutcomeError:
                unknown.add(number)

    seen: list[int] = []

    async def tail(log: EventLog) -> None:
        async for record in log.tail(0):
            seen.append(record.event.data["n"])

    async with EventLog.open(engine()) as one, EventLog.open(engine()) as two:
        tailing = asyncio.create_task(tail(two))
        tasks = [asyncio.create_task(append(log, i % 10 == 0)) for log in (one, two) for i in range(TASKS // 2)]
        for _ in range(ROUNDS):
            await asyncio.sleep(0.2)
            before = len(acknowledged)
            await fault(own_server)
            while len(acknowledged) == before:  # until it goes on
                await asyncio.sleep(0.01)
        done = True
        await asyncio.gather(*tasks)
        written = [record.event.data["n"] async for record in one.read_full()]
        async with asyncio.timeout(10):
            while len(seen) < len(written):
                await asyncio.sleep(0.01)
    await tailing

    counts = Counter(written)
    lost = acknowledged - counts.keys()
    doubled = [number for number, count in counts.items() if count > 1]
    print(f"{fault.__name__}: {ROUNDS} rounds, {len(acknowledged)} acknowledged, {len(unknown)} unknown, "
          f"{len(lost)} lost, {len(doubled)} doubled")  # fmt: skip
    assert not lost
    assert not doubled
    assert counts.keys() <= acknowledged | unknown
    assert seen == written


async def test_a_commit_whose_answer_was_lost_is_in_the_log_once(
    own_server: Server, engine: Callable[[], Postgres], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statement is done, and its connection breaks before the answer is read."""
    from eventfold.postgres._connections import Connections

    run = Connections.run
    lost = []

    async def losing(self, call, **options):  # type: ignore[no-untyped-def]
        result = await run(self, call, **options)
        if call.__name__ == "attempt" and not lost:
            lost.append(result)
            raise ConnectionResetError("the connection was lost")
        return result

    async with EventLog.open(engine()) as log:
        monkeypatch.setattr(Connections, "run", losing)
        result = await log.append(Event("a", {"n": 1}))
        lost.clear()
        conditional = await log.append_if(Event("a", {"n": 2}), *log.head)
        records = [record async for record in log.read_full()]

    assert [record.event.data["n"] for record in records] == [1, 2]
    assert (result.start_offset, conditional.start_offset) == (0, records[1].start_offset)


async def test_an_append_is_of_unknown_outcome_where_the_server_never_answers_again(
    own_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was sent, and the server is gone; once it is back the writer goes on."""
    from eventfold.postgres._connections import Connections

    run = Connections.run
    broken = True

    async def losing(self, call, **options):  # type: ignore[no-untyped-def]
        result = await run(self, call, **options)
        if broken and call.__name__ == "attempt":
            raise ConnectionResetError("the connection was lost")
        if broken:
            raise TimeoutError("no answer")
        return result

    async with EventLog.open(Postgres(own_server.address(), "unknown", timeout=0.5)) as log:
        with monkeypatch.context() as context:
            context.setattr(Connections, "run", losing)
            with pytest.raises(UnknownOutcomeError, match="may or may not be in the log"):
                await log.append(Event("a", {"n": 1}))
        broken = False
        await log.append(Event("a", {"n": 2}))

        assert [record.event.data["n"] async for record in log.read_full()] == [1, 2]


async def test_an_append_that_was_never_sent_is_an_os_error(own_server: Server) -> None:
    """There is no server: nothing was written, and the writer goes on when there is one."""
    async with EventLog.open(Postgres(own_server.address(), "not_sent", timeout=0.5)) as log:
        await log.append(Event("a", {"n": 1}))
        # An idle connection would be found lost only once something was sent on it.
        await log._writer._source.session().connections._pool.expire_connections()
        await in_thread(own_server.stop)
        try:
            with pytest.raises(OSError, match=r"no success for 0.5 s"):
                await log.append(Event("a", {"n": 2}))
        finally:
            await in_thread(own_server.start)
        await log.append(Event("a", {"n": 3}))

        assert [record.event.data["n"] async for record in log.read_full()] == [1, 3]


async def test_a_tail_goes_on_where_its_listening_connection_is_lost(own_server: Server) -> None:
    """Whatever listens is cut off again and again."""
    engine = Postgres(own_server.address(), "listen")
    seen = []
    reader = EventReader(engine)

    async def tail() -> None:
        async for record in reader.tail(0):
            seen.append(record.event.data["n"])

    async with EventLog.open(engine) as log:
        task = asyncio.create_task(tail())
        for n in range(5):
            await log.append(Event("a", {"n": n}))
            await own_server.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"
            )
            async with asyncio.timeout(10):
                while len(seen) <= n:
                    await asyncio.sleep(0.01)
    await reader.aclose()
    await task

    assert seen == [0, 1, 2, 3, 4]


async def test_a_tail_sees_what_others_append_without_any_notification(
    own_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pooler in transaction mode, say, lets none through: the look every second finds it."""
    from eventfold.postgres._listener import Listener

    async def deaf(self: Listener) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Listener, "_listen_again_and_again", deaf)
    engine, reader = (Postgres(own_server.address(), "deaf", attempt_timeout=t) for t in (9.0, 10.0))
    other = EventReader(reader)
    async with EventLog.open(engine) as log:
        tail = other.tail(0)
        waiting = asyncio.ensure_future(anext(tail))
        await asyncio.sleep(0.2)
        await log.append(Event("a"))
        async with asyncio.timeout(10):
            record = await waiting
    await other.aclose()

    assert record.event.type == "a"


async def test_a_statement_timeout_is_an_os_error_and_nothing_was_written(own_server: Server) -> None:
    """Somebody holds the log's row for longer than the role may wait."""
    import asyncpg

    options = {"server_settings": {"statement_timeout": "200"}}
    async with EventLog.open(Postgres(own_server.address(), "timeout", **options)) as log:
        connection = await asyncpg.connect(own_server.address())
        async with connection.transaction():
            await connection.execute("SELECT FROM eventfold_logs WHERE name = 'timeout' FOR UPDATE")
            with pytest.raises(OSError, match=r"statement timeout.*raise statement_timeout"):
                await log.append(Event("a", {"n": 1}))
        await connection.close()
        await log.append(Event("a", {"n": 2}))

        assert [record.event.data["n"] async for record in log.read_full()] == [2]


async def test_a_head_that_went_back_to_a_backup_is_noticed_by_a_condition(own_server: Server) -> None:
    """The hash tells a log that was restored, and went on differently, from the one that was read."""
    async with EventLog.open(Postgres(own_server.address(), "hash")) as log:
        head = log.head
        await log.append(Event("a"))
        with pytest.raises(ConditionalAppendError):
            await log.append_if(Event("a"), log.head.offset, "0" * 16)

    assert head == Head(0, "")
