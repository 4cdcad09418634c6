"""Opening a log: the tables are created, checked and migrated; otherwise an error says what to do."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import asyncpg
import pytest
from tests.postgres.servers import Server

from eventfold import (
    CorruptLogError,
    Event,
    EventfoldError,
    EventLog,
    EventReader,
    Query,
    WriterFailedError,
    build_index,
)
from eventfold.postgres import Postgres, _schema


async def execute(address: str, statements: str) -> None:
    connection = await asyncpg.connect(address)
    try:
        await connection.execute(statements)
    finally:
        await connection.close()


async def fill(address: str, log: str = "orders", count: int = 3) -> None:
    async with EventLog.open(Postgres(address, log)) as opened:
        for n in range(count):
            await opened.append(Event("a", {"n": n}))


async def read(address: str, log: str = "orders") -> list[int]:
    reader = EventReader(Postgres(address, log))
    try:
        return [record.event.data["n"] async for record in reader.read_full()]
    finally:
        await reader.aclose()


def as_user(address: str, user: str) -> str:
    return address.replace("admin@", f"{user}@")


@pytest.mark.parametrize("isolation", ["read committed", "serializable"])
async def test_processes_that_open_at_once_create_the_tables_once(database: str, isolation: str) -> None:
    """Ten processes start with an empty database, whose default for transactions may be another level."""
    name = database.rpartition("/")[2]
    await execute(database, f"ALTER DATABASE {name} SET default_transaction_isolation = '{isolation}'")
    logs = await asyncio.gather(
        *(EventLog.open(Postgres(database, f"log{n % 3}", timeout=20.0 + n)) for n in range(10))
    )
    await asyncio.gather(*(log.append(Event("a", {"n": 1})) for log in logs))
    await asyncio.gather(*(log.aclose() for log in logs))

    assert [len(await read(database, f"log{n}")) for n in range(3)] == [4, 3, 3]


async def test_tables_that_another_process_creates_during_the_opening_are_found(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They appear after the search path was looked through, and before it is asked for tables elsewhere."""
    check = _schema._check_search_path

    async def check_late(*arguments: Any) -> None:
        monkeypatch.setattr(_schema, "_check_search_path", check)
        await fill(database, "one", 1)
        await check(*arguments)

    monkeypatch.setattr(_schema, "_check_search_path", check_late)
    await fill(database, "two", 2)

    assert (await read(database, "one"), await read(database, "two")) == ([0], [0, 1])


async def test_a_database_holds_many_logs(database: str) -> None:
    """Each log has its own events."""
    await fill(database, "one", 1)
    await fill(database, "two", 2)

    assert (await read(database, "one"), await read(database, "two")) == ([0], [0, 1])


async def test_a_log_that_does_not_exist_reads_as_empty(database: str) -> None:
    """Tested without tables, and with tables that have other logs."""
    assert await read(database) == []
    await fill(database, "another")
    assert await read(database) == []


async def test_tables_of_an_older_version_are_migrated(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the missing steps are run, and only once."""
    await fill(database)
    step = "ALTER TABLE {schema}.eventfold_logs ADD COLUMN later integer;"
    monkeypatch.setattr(_schema, "MIGRATIONS", (*_schema.MIGRATIONS, step))
    monkeypatch.setattr(_schema, "VERSION", _schema.VERSION + 1)
    await fill(database, count=1)
    await fill(database, count=1)

    assert await read(database) == [0, 1, 2, 0, 0]


async def test_tables_of_the_first_version_are_migrated_to_an_index(database: str) -> None:
    """The index then has earlier events; before that, the log can be read."""
    await fill(database)
    await execute(
        database,
        "ALTER TABLE eventfold_logs DROP COLUMN indexed; DROP TABLE eventfold_keys; "
        "UPDATE eventfold_schema SET version = 1",
    )
    assert await read(database) == [0, 1, 2]
    with pytest.raises(EventfoldError, match="version 1"):
        await build_index(Postgres(database, "orders"))
    async with EventLog.open(Postgres(database, "orders"), index=True) as log:
        await log.append(Event("a", {"n": 3}, tags=("x",)))
        assert [r.event.data["n"] async for r in log.read_from(query=Query(tags={"x"}))] == [3]

    assert await read(database) == [0, 1, 2, 3]


async def test_tables_of_a_newer_version_are_refused(database: str) -> None:
    """An older release can't know what a newer one has changed."""
    await fill(database)
    await execute(database, "UPDATE eventfold_schema SET version = 99")

    with pytest.raises(EventfoldError, match=r"version 99.*upgrade eventfold"):
        await EventLog.open(Postgres(database, "orders"))


async def test_a_role_that_may_not_create_tables_is_given_the_sql(server: Server, database: str) -> None:
    """If somebody with the right runs it, the log can be opened."""
    await execute(database, "CREATE ROLE app LOGIN")
    try:
        with pytest.raises(EventfoldError, match="may not create or migrate the tables") as raised:
            await EventLog.open(Postgres(as_user(database, "app"), "orders"))
        sql = re.sub(" TO ROLE;", " TO app;", str(raised.value).partition("\n")[2])
        await execute(database, sql)
        await fill(as_user(database, "app"))

        assert await read(database) == [0, 1, 2]
    finally:
        await execute(database, "DROP OWNED BY app; DROP ROLE app")


async def test_the_error_for_a_role_that_may_not_append_names_the_grants(database: str) -> None:
    """The message has the statements that the tables' owner must run."""
    await fill(database)
    await execute(database, "CREATE ROLE reporter LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO reporter")
    try:
        with pytest.raises(EventfoldError, match=r"GRANT SELECT, INSERT, UPDATE ON public.eventfold_logs TO"):
            await EventLog.open(Postgres(as_user(database, "reporter"), "orders"))

        assert await read(as_user(database, "reporter")) == [0, 1, 2]
    finally:
        await execute(database, "DROP OWNED BY reporter; DROP ROLE reporter")


async def test_a_permission_revoked_while_the_log_is_open_is_a_permission_error(database: str) -> None:
    """Nothing is written; once the permission is granted again, the same writer continues."""
    await fill(database)
    grant = "ALL ON ALL TABLES IN SCHEMA public"
    await execute(database, f"CREATE ROLE clerk LOGIN; GRANT {grant} TO clerk")
    try:
        async with EventLog.open(Postgres(as_user(database, "clerk"), "orders")) as log:
            await execute(database, "REVOKE INSERT ON eventfold_commits FROM clerk")
            with pytest.raises(PermissionError, match="grant it to the role"):
                await log.append(Event("a", {"n": 3}))
            await execute(database, f"GRANT {grant} TO clerk")
            await log.append(Event("a", {"n": 4}))

        assert await read(database) == [0, 1, 2, 4]
    finally:
        await execute(database, "DROP OWNED BY clerk; DROP ROLE clerk")


async def test_a_read_only_server_can_be_read_but_not_appended_to(database: str) -> None:
    """A standby is such a server."""
    await fill(database)
    name = database.rpartition("/")[2]
    await execute(database, f"ALTER DATABASE {name} SET default_transaction_read_only = on")

    with pytest.raises(EventfoldError, match="the server is read-only"):
        await EventLog.open(Postgres(database, "orders"))
    assert await read(database) == [0, 1, 2]


@pytest.mark.parametrize("setting", ["synchronous_commit"])
async def test_a_server_that_acknowledges_before_it_is_durable_is_refused(database: str, setting: str) -> None:
    """The message names the setting."""
    name = database.rpartition("/")[2]
    await execute(database, f"ALTER DATABASE {name} SET {setting} = off")

    with pytest.raises(EventfoldError, match=f"{setting} is off"):
        await EventLog.open(Postgres(database, "orders"))


async def test_a_search_path_without_a_schema_is_an_error_that_says_so(database: str) -> None:
    """No table can be found or created there."""
    engine = Postgres(database, "orders", server_settings={"search_path": "nowhere"})

    with pytest.raises(EventfoldError, match=r"search path \(nowhere\)"):
        await EventLog.open(engine)


async def test_a_search_path_that_misses_the_tables_is_an_error_and_no_empty_log(database: str) -> None:
    """The tables are in another schema: no new ones are created, and the log does not look empty."""
    await execute(database, "CREATE SCHEMA shop")
    await fill(f"{database}?search_path=shop")

    with pytest.raises(EventfoldError, match=r"tables in schema shop, which is not in the search path \(.*public.*\)"):
        await EventLog.open(Postgres(database, "orders"))
    with pytest.raises(EventfoldError, match=r"tables in schema shop, which is not in the search path \(.*public.*\)"):
        await read(database)
    async with EventLog.open(Postgres(database, "orders", schema="public")) as log:
        assert log.head.offset == 0  # A second set of tables must be requested.


async def test_the_tables_may_be_in_a_schema_of_their_own(database: str) -> None:
    """The address names the schema, whatever the search path is."""
    await execute(database, 'CREATE SCHEMA "My Events"')
    address = f"{database}?log=orders&schema=My%20Events"
    async with EventLog.open(address) as log:
        await log.append(Event("a", {"n": 7}))
    async with EventLog.open(address, read_only=True) as log:
        assert [record.event.data["n"] async for record in log.read_full()] == [7]

    with pytest.raises(EventfoldError, match="there is no schema"):
        await EventLog.open(Postgres(database, "orders", schema="nowhere"))


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("ALTER TABLE eventfold_commits DROP COLUMN id", "column eventfold_commits.id"),
        ("ALTER TABLE eventfold_commits DROP CONSTRAINT eventfold_commits_id", "constraint eventfold_commits_id"),
        ('ALTER TABLE eventfold_logs ALTER "offset" TYPE numeric', "column eventfold_logs.offset of type bigint"),
        ("DROP TABLE eventfold_documents", "column eventfold_documents.data"),
    ],
)
async def test_an_altered_table_is_refused_when_the_log_is_opened(database: str, statement: str, named: str) -> None:
    """The message says what is missing."""
    await fill(database)
    await execute(database, statement)

    with pytest.raises(EventfoldError, match=named):
        await EventLog.open(Postgres(database, "orders"))


@pytest.mark.parametrize("table", ["eventfold_commits", "eventfold_keys"])
async def test_an_unlogged_table_is_refused(database: str, table: str) -> None:
    """A crash of the server would empty it."""
    await fill(database)
    await execute(database, f"ALTER TABLE {table} SET UNLOGGED")

    with pytest.raises(EventfoldError, match=f"ALTER TABLE public.{table} SET LOGGED"):
        await EventLog.open(Postgres(database, "orders"))


async def test_temporary_tables_are_not_created(database: str) -> None:
    """They would last only as long as a connection."""
    await execute(database, f"ALTER DATABASE {database.rpartition('/')[2]} SET search_path = pg_temp, public")

    with pytest.raises(EventfoldError, match=r"temporary.*pg_temp, public.*\?schema=NAME"):
        await EventLog.open(Postgres(database, "orders"))


async def test_a_server_that_quotes_all_names_is_accepted(database: str) -> None:
    """The setting is meant for dumps, but applies to every query that asks for a name."""
    await fill(database)
    await execute(database, f"ALTER DATABASE {database.rpartition('/')[2]} SET quote_all_identifiers = on")

    async with EventLog.open(Postgres(database, "orders")) as log:
        assert log.head.offset > 0


async def test_a_table_altered_while_the_log_is_open_fails_the_writer(database: str) -> None:
    """The error says what happened."""
    log = await EventLog.open(Postgres(database, "orders"))
    await execute(database, "ALTER TABLE eventfold_commits RENAME lines TO body")

    with pytest.raises(EventfoldError, match="somebody altered them"):
        await log.append(Event("a"))
    with pytest.raises((EventfoldError, WriterFailedError)):
        await log.append(Event("a"))
    await log.aclose()


async def test_a_head_that_does_not_match_the_last_commit_is_refused(database: str) -> None:
    """Somebody deleted the last commit."""
    await fill(database)
    await execute(database, "DELETE FROM eventfold_commits WHERE start = (SELECT max(start) FROM eventfold_commits)")

    with pytest.raises(CorruptLogError, match="somebody altered one of them"):
        await EventLog.open(Postgres(database, "orders"))


async def test_a_read_reports_a_missing_commit(database: str) -> None:
    """Events before the gap are returned first."""
    await fill(database)
    await execute(database, 'DELETE FROM eventfold_commits WHERE start = (SELECT min("end") FROM eventfold_commits)')
    seen = []

    reader = EventReader(Postgres(database, "orders"))
    with pytest.raises(CorruptLogError, match="a commit is missing here"):
        async for piece in reader.read_slices():
            seen += piece.events
    await reader.aclose()


async def test_an_address_without_a_log_is_an_error() -> None:
    """The message says what to add."""
    with pytest.raises(ValueError, match=r"add \?log=NAME"):
        EventReader("postgresql://host/db")


def test_no_password_is_shown() -> None:
    """Neither the engine's repr nor a reader's has it."""
    engine = Postgres.from_address("postgresql://me:secret@host:5432/db?log=orders&sslmode=require")

    assert "secret" not in repr(engine) + repr(EventReader(engine))
    assert "postgresql://me@host:5432/db?log=orders" in repr(engine)


async def test_a_wrong_database_is_an_error_at_once(server: Server) -> None:
    """Another attempt would not help."""
    with pytest.raises(EventfoldError, match=r"refuses the connection.*does not exist"):
        await EventLog.open(Postgres(server.address("nowhere"), "orders", timeout=60))


async def test_options_of_files_are_refused(database: str) -> None:
    """For example, there is nothing to rotate."""
    with pytest.raises(ValueError, match="max_log_size"):
        await EventLog.open(Postgres(database, "orders"), max_log_size=1)
    async with EventLog.open(Postgres(database, "orders")) as log:
        with pytest.raises(EventfoldError, match="can't be rotated"):
            await log.rotate()


async def test_the_pool_of_an_application_is_used_and_left_open(database: str) -> None:
    """The pool has one connection for the appends and one for a tail."""
    async with asyncpg.create_pool(database, min_size=2, max_size=3) as pool:
        async with EventLog.open(Postgres(pool, "orders")) as log:
            await log.append(Event("a", {"n": 1}))
            assert [record.event.data["n"] async for record in log.read_full()] == [1]
            async for record in log.tail(0):
                assert record.event.data["n"] == 1
                break

        assert await pool.fetchval("SELECT 1") == 1
