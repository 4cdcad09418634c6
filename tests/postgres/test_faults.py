"""The server fails and comes back: no acknowledged event is lost, and none is there twice."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from tests.postgres.programs import writing
from tests.postgres.proxy import Cut, Proxy, proxy_of
from tests.postgres.servers import Server, in_thread, running_server

from eventfold import ConditionalAppendError, Event, EventLog, EventReader, Head, Query, UnknownOutcomeError, View
from eventfold.postgres import Postgres, _dedicated
from eventfold.postgres._committer import TableCommitter
from eventfold.postgres._source import CLOSING_TIMEOUT

# The number of faults of each kind; the suite has time for one.
ROUNDS = int(os.environ.get("EVENTFOLD_POSTGRES_ROUNDS", "5"))
TASKS = 100

_OTHERS = "FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
_WRITING = f"{_OTHERS} AND state = 'active' AND query LIKE '%INSERT INTO%eventfold_commits%'"


async def kill_server(server: Server, proxy: Proxy) -> None:
    """Kills the first process; those of the connections follow it."""
    await in_thread(server.kill)
    await in_thread(server.restart_after_kill)


async def kill_backend(server: Server, proxy: Proxy) -> None:
    """Kills a process that is committing: the server ends all others and recovers."""
    for _ in range(200):
        rows = await server.execute(f"SELECT pid {_WRITING}")
        if rows:
            os.kill(rows[0]["pid"], signal.SIGKILL)
            return
    raise AssertionError("nobody commits")


async def end_writing_backends(server: Server, proxy: Proxy) -> None:
    """Makes the server end connections in the middle of a commit."""
    for _ in range(20):
        await server.execute(f"SELECT pg_terminate_backend(pid) {_WRITING}")


async def cut_connections(server: Server, proxy: Proxy) -> None:
    """Cuts connections as the network would; the server notices it later."""
    for _ in range(5):
        await asyncio.sleep(random.uniform(0.001, 0.05))
        proxy.cut_all()


async def restart_server(server: Server, proxy: Proxy) -> None:
    """Restarts the server as an administrator does."""
    await in_thread(server.stop)
    await in_thread(server.start)


FAULTS = (kill_server, kill_backend, end_writing_backends, cut_connections, restart_server)


@pytest.fixture
def engine(own_server: Server) -> Callable[[], Postgres]:
    """Returns a function that creates the engine of one log, the same at each call."""
    name = f"log{random.randrange(10**9)}"
    return lambda: Postgres(own_server.address(), name, timeout=60)


@pytest.mark.timeout(240 + 30 * ROUNDS)
async def test_events_acknowledged_under_faults_are_there_once(own_server: Server) -> None:
    """100 tasks in two processes append, some conditionally, while the server fails; tails see each event once."""
    faults: list[Callable[[Server, Proxy], Awaitable[None]]] = [FAULTS[n % len(FAULTS)] for n in range(ROUNDS)]
    async with proxy_of(own_server.port) as proxy:
        address = f"postgresql://admin@127.0.0.1:{proxy.port}/postgres?log=faults"
        async with EventLog.open(address):
            pass
        async with writing([address] * 2, TASKS // 2) as programs:
            await programs.go_on()
            for fault in faults:
                await fault(own_server, proxy)
                await programs.go_on()
            await programs.end()
        names = ", ".join(f"{faults.count(fault)} {fault.__name__}" for fault in FAULTS)
        await programs.check(address, f"{ROUNDS} rounds ({names})")


@pytest.mark.parametrize("when", Cut)
async def test_a_commit_whose_connection_is_cut_is_in_the_log_once(own_server: Server, when: Cut) -> None:
    """The cut comes before the server gets the commit, or after it has answered; with and without a condition."""
    async with proxy_of(own_server.port) as proxy:
        address = f"postgresql://admin@127.0.0.1:{proxy.port}/postgres"
        async with EventLog.open(Postgres(address, f"cut_{when.name}")) as log:
            await log.append(Event("a", {"n": 0}))
            proxy.cut_at(b'"n":1', when)
            result = await log.append(Event("a", {"n": 1}))
            proxy.cut_at(b'"n":2', when)
            conditional = await log.append_if(Event("a", {"n": 2}), *log.head)
            records = [record async for record in log.read_full()]

        assert proxy.cuts >= 2
    assert [record.event.data["n"] for record in records] == [0, 1, 2]
    assert [result.start_offset, conditional.start_offset] == [record.start_offset for record in records[1:]]


@pytest.mark.parametrize("when", Cut)
@pytest.mark.parametrize("mark", [b'"n":1', b"COMMIT"])
async def test_a_commit_cut_off_while_it_has_the_log_locked_is_in_the_log_once(
    own_server: Server, monkeypatch: pytest.MonkeyPatch, mark: bytes, when: Cut
) -> None:
    """Another writer comes first; then the connection is cut while the log is locked."""
    name = f"turn_{when.name}_{mark.isalpha()}"
    async with proxy_of(own_server.port) as proxy, EventLog.open(Postgres(own_server.address(), name)) as other:
        write = TableCommitter._write

        async def overtaken(self: TableCommitter, data: bytes, expected: Head | None) -> int | None:
            if expected is not None:
                await other.append(Event("a", {"n": 0}))
            start = await write(self, data, expected)
            if start is None:
                proxy.cut_at(mark, when)
            return start

        monkeypatch.setattr(TableCommitter, "_write", overtaken)
        address = f"postgresql://admin@127.0.0.1:{proxy.port}/postgres"
        async with EventLog.open(Postgres(address, name)) as log:
            [result] = await log.append_unless([Event("a", {"n": 1}, tags=("one",))], Query(tags={"one"}))
            records = [record async for record in log.read_full()]

        assert proxy.cuts == 1
    assert [record.event.data["n"] for record in records] == [0, 1]
    assert result.start_offset == records[1].start_offset


async def test_a_host_that_is_suspended_with_the_log_locked_delays_the_others_only_briefly(
    own_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server ends its transaction; when the host resumes, it appends its event, once."""
    locked, others_are_done = asyncio.Event(), asyncio.Event()
    judge_in_turn = TableCommitter._lines_needed

    async def stopping(self: TableCommitter, appends: Any, head: Head, fetch: Any) -> Any:
        if fetch.__name__ == "fetch_locked" and not locked.is_set():
            locked.set()
            await others_are_done.wait()
        return await judge_in_turn(self, appends, head, fetch)

    async def overtaken(self: TableCommitter, data: bytes, expected: Head | None) -> int | None:
        return None if expected is not None else await write(self, data, expected)

    write = TableCommitter._write
    monkeypatch.setattr(TableCommitter, "_lines_needed", stopping)
    monkeypatch.setattr(TableCommitter, "_write", overtaken)
    stops = Postgres(own_server.address(), "stops", attempt_timeout=0.5)
    async with EventLog.open(stops) as log, EventLog.open(Postgres(own_server.address(), "stops")) as other:
        appending = asyncio.create_task(log.append_unless([Event("a", {"n": 2})], Query(tags={"one"})))
        await locked.wait()
        await other.append(Event("a", {"n": 1}))
        others_are_done.set()
        await appending

        assert [record.event.data["n"] async for record in log.read_full()] == [1, 2]


@pytest.mark.parametrize(("when", "found"), [(Cut.BEFORE, [0, 2]), (Cut.AFTER, [0, 1, 2])])
async def test_an_append_has_an_unknown_outcome_if_the_server_stays_unreachable(
    own_server: Server, when: Cut, found: list[int]
) -> None:
    """The append was sent, and nobody knows whether it arrived. Once the server is back, the writer continues."""
    async with proxy_of(own_server.port) as proxy:
        address = f"postgresql://admin@127.0.0.1:{proxy.port}/postgres"
        async with EventLog.open(Postgres(address, f"unknown_{when.name}", timeout=0.5)) as log:
            await log.append(Event("a", {"n": 0}))
            proxy.cut_at(b'"n":1', when, then_refuse=True)
            with pytest.raises(UnknownOutcomeError, match="may or may not be in the log"):
                await log.append(Event("a", {"n": 1}))
            proxy.refuses = False
            await log.append(Event("a", {"n": 2}))

            assert [record.event.data["n"] async for record in log.read_full()] == found


async def test_a_server_that_turns_read_only_fails_appends_until_it_is_writable_again(own_server: Server) -> None:
    """A server turns read-only when a primary is demoted, or when a managed server's disk is full."""
    async with EventLog.open(Postgres(own_server.address(), "read_only", timeout=0.5)) as log:
        await log.append(Event("a", {"n": 1}))
        try:
            await own_server.execute("ALTER SYSTEM SET default_transaction_read_only = on")
            await own_server.execute("SELECT pg_reload_conf()")
            await _until_read_only(own_server)
            with pytest.raises(OSError, match="read-only") as raised:
                await log.append(Event("a", {"n": 2}))
        finally:
            await own_server.execute("ALTER SYSTEM RESET default_transaction_read_only")
            await own_server.execute("SELECT pg_reload_conf()")
        await log.append(Event("a", {"n": 3}))

        assert raised.value.errno == errno.EROFS
        assert [record.event.data["n"] async for record in log.read_full()] == [1, 3]


async def _until_read_only(server: Server) -> None:
    async with asyncio.timeout(10):
        while (await server.execute("SELECT current_setting('default_transaction_read_only')"))[0][0] != "on":
            await asyncio.sleep(0.01)


async def test_an_append_that_was_never_sent_is_an_os_error(own_server: Server) -> None:
    """There is no server, so nothing was written; once there is one, the writer continues."""
    async with EventLog.open(Postgres(own_server.address(), "not_sent", timeout=0.5)) as log:
        await log.append(Event("a", {"n": 1}))
        # A lost idle connection would be noticed only after something was sent on it.
        await log._writer._source.session().connections._pool.expire_connections()
        await in_thread(own_server.stop)
        try:
            with pytest.raises(OSError, match=r"no success within 0.5 s"):
                await log.append(Event("a", {"n": 2}))
        finally:
            await in_thread(own_server.start)
        await log.append(Event("a", {"n": 3}))

        assert [record.event.data["n"] async for record in log.read_full()] == [1, 3]


async def test_a_tail_continues_if_its_listening_connection_is_lost(own_server: Server) -> None:
    """The listening connection is cut again and again."""
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


async def test_a_tail_sees_the_events_of_others_without_notifications(
    own_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, a pooler in transaction mode delivers none; a look every second finds the events."""
    from eventfold.postgres._listener import Listener

    async def deaf(self: Listener) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Listener, "_keep_listening", deaf)
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
    """Somebody locks the log's row for longer than the role's time-out."""
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


async def test_an_unresponsive_server_is_waited_for_and_has_each_event_once() -> None:
    """No connection is lost and nothing is answered: appends are sent again, reads are repeated, and tails go on."""
    with running_server() as server:
        async with EventLog.open(Postgres(server.address(), "still", attempt_timeout=0.3)) as log:
            await log.append(Event("a", {"n": 0}))
            seen: list[int] = []

            async def tail() -> None:
                async for record in log.tail(0):
                    seen.append(record.event.data["n"])

            tailing = asyncio.create_task(tail())
            await asyncio.sleep(0.2)
            server.freeze()
            try:
                appending = [asyncio.create_task(log.append(Event("a", {"n": n}))) for n in range(1, 6)]
                reading = asyncio.create_task(log.reader().head())
                await asyncio.sleep(1.0)
                assert not any(task.done() for task in [*appending, reading])
            finally:
                server.thaw()
            await asyncio.gather(*appending, reading)
            async with asyncio.timeout(10):
                while len(seen) < 6:
                    await asyncio.sleep(0.01)
        await tailing

    assert seen == list(range(6))


@pytest.mark.parametrize("pooling", [None, False, True])
async def test_calls_to_a_server_that_never_answers_fail_after_the_timeout(
    own_server: Server, pooling: bool | None
) -> None:
    """Also those that need a new connection, and those on a pool of the program that has no timeouts itself."""
    own_pool = await asyncpg.create_pool(own_server.address(), min_size=0)
    address = own_server.address() if pooling is None else own_pool
    options = {"timeout": 1.0, "attempt_timeout": 0.3, "transaction_pooling": bool(pooling)}
    log = await EventLog.open(Postgres(address, "silent", **options))
    await log.append(Event("a"))
    own_server.freeze()
    try:
        async with asyncio.timeout(20):
            with pytest.raises(UnknownOutcomeError):
                await log.append(Event("a"))
            with pytest.raises(OSError, match="no success within 1 s"):
                await log.append(Event("a"))
            with pytest.raises(OSError, match="no success within 1 s"):
                await anext(log.consumer("worker"))
    finally:
        own_server.thaw()
    await log.append(Event("a"))
    await log.aclose()
    await own_pool.close()


def test_an_append_that_connects_survives_the_end_of_asyncio_run(postgres_server: Server) -> None:
    """At its end, `asyncio.run` cancels all tasks, including the one that connects."""
    engine = Postgres(postgres_server.address(), "end_of_run")

    async def append_at_the_end(log: EventLog) -> None:
        try:
            await asyncio.sleep(100)
        finally:
            await log.append(Event("a", {"n": 2}))
            await log.aclose()

    async def main() -> None:
        log = await EventLog.open(engine)
        await log.reader()._source.session().connections.expire_connections()  # type: ignore[attr-defined]
        tasks = [asyncio.create_task(append_at_the_end(log)), asyncio.create_task(append(log))]
        await asyncio.wait(tasks, timeout=0)

    async def append(log: EventLog) -> None:
        await log.append(Event("a", {"n": 1}))

    async def read() -> list[int]:
        async with EventLog.open(engine, read_only=True) as log:
            return [record.event.data["n"] async for record in log.read_full()]

    asyncio.run(main())

    assert asyncio.run(read())[-1] == 2


@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_closing_waits_briefly_for_an_unavailable_server(how: str) -> None:
    """All views' snapshots, the index and the connections share one time-out; a tail ends too."""

    def count(state: int, event: Event) -> int:
        return state + 1

    views = [View(name, count, 0) for name in "abc"]
    with running_server() as server:
        log = await EventLog.open(Postgres(server.address(), "closed"), views=views, index=True)
        await log.append_many([Event("a", {"n": n}) for n in range(100)])
        tailing = asyncio.create_task(read_on(log))
        await asyncio.sleep(0.2)
        await log.refresh_all()
        server.freeze() if how == "frozen" else server.kill()
        try:
            async with asyncio.timeout(3 * CLOSING_TIMEOUT):
                await log.aclose()
                await asyncio.wait([tailing])
        finally:
            server.thaw()
        assert tailing.exception() is None


async def test_closing_a_log_does_not_fail_if_a_connection_of_the_program_s_pool_is_unresponsive(
    own_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool can't reset the connection on which a tail listened, and closes it."""
    monkeypatch.setattr(_dedicated, "IDLE_TIMEOUT", 60.0)
    async with EventLog.open(Postgres(own_server.address(), "unresponsive")):
        pass
    async with asyncpg.create_pool(own_server.address(), min_size=0) as pool:
        log = await EventLog.open(Postgres(pool, "unresponsive", attempt_timeout=0.5), read_only=True)
        tailing = asyncio.create_task(read_on(log))
        async with asyncio.timeout(10):
            while log._reader._source.session().connections.dedicated._connection is None:  # type: ignore[attr-defined]
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        tailing.cancel()
        await asyncio.wait([tailing])
        own_server.freeze()
        try:
            await log.aclose()
        finally:
            own_server.thaw()


async def read_on(log: EventLog) -> None:
    async for _ in log.tail(0):
        pass


async def test_a_head_that_went_back_to_a_backup_is_noticed_by_a_condition(own_server: Server) -> None:
    """The log was restored and continued differently, so the hash at the same offset differs."""
    async with EventLog.open(Postgres(own_server.address(), "hash")) as log:
        head = log.head
        await log.append(Event("a"))
        with pytest.raises(ConditionalAppendError):
            await log.append_if(Event("a"), log.head.offset, "0" * 16)

    assert head == Head(0, "")
