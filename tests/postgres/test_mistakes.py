"""Wrong arguments for the engine: each causes an error that says what is wrong, and shows no password."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from typing import Any

import asyncpg
import pytest
from tests.postgres.servers import Server, in_thread
from tests.support import free_port

from eventfold import Event, EventfoldError, EventLog
from eventfold.postgres import Postgres


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("postgresql://me:secret@host/db", r"names no log: add \?log=NAME"),
        ("postgres://me:secret@host/db?log=", "log name ''"),
        ("postgresql://me:secret@host/db?log=a/b", "log name 'a/b'"),
        ("postgresql://me:secret@host/db?log=a&log=b", "two logs: 'a' and 'b'"),
        ("postgresql://me:secret@host/db?log=a&schema=", "schema must be a name"),
        ("postgresql://me:secret@host:port/db?log=a", "can't be used as an address"),
        ("postgresql://me:secret@host/db?log=a&sslmode=always", "sslmode"),
        ("postgresql:me:secret@host/db?log=a", "begins with postgresql://"),
    ],
)
async def test_an_address_that_is_wrong_is_refused(where: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        await EventLog.open(where)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (None, "not NoneType"),
        ("me:secret@host/db", "must look like postgresql://"),
        ("host=there password=secret", "must look like postgresql://"),
        ("postgresql://me:secret@host/db?log=other", r"leave out \?log= and \?schema="),
    ],
)
def test_a_value_that_names_no_database_is_refused(where: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Postgres(where, "orders")
    assert "secret" not in str(caught.value)


async def test_a_connection_instead_of_a_pool_is_refused(database: str) -> None:
    connection = await asyncpg.connect(database)
    with pytest.raises(ValueError, match="not Connection"):
        Postgres(connection, "orders")
    await connection.close()


async def test_a_pool_that_is_not_open_is_an_error_at_once(database: str) -> None:
    """Another attempt would not open it."""
    pool = asyncpg.create_pool(database, min_size=0)
    with pytest.raises(EventfoldError, match="open the pool before the log"):
        await EventLog.open(Postgres(pool, "orders"))
    await pool
    async with EventLog.open(Postgres(pool, "orders")):
        pass
    await pool.close()
    with pytest.raises(EventfoldError, match="close it after the log"):
        await EventLog.open(Postgres(pool, "orders"))


async def test_a_pool_without_a_free_connection_is_named_as_the_problem(database: str) -> None:
    """The program itself, or a tail, keeps it; the server is running."""
    pool = await asyncpg.create_pool(database, min_size=0, max_size=1)
    async with EventLog.open(Postgres(pool, "orders", timeout=1, attempt_timeout=0.5)) as log:
        async with pool.acquire():
            with pytest.raises(OSError, match=r"all connections of the pool were in use for 0.5 s: raise its max_size"):
                await log.append(Event("a"))
        await log.append(Event("b"))
    await pool.close()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "postgresql://careful:wrong@{host}/postgres",
            "password authentication failed.*check the user and the password",
        ),
        ("postgresql://careful@{host}/postgres", "password authentication failed.*check the user and the password"),
        ("postgresql://stranger@{host}/postgres", "role.*does not exist.*check the user and the password"),
        ("postgresql://admin@{host}/nowhere", "does not exist: create it, or name another one"),
        ("postgresql://admin@{host}/postgres?timeout=5", '"timeout": .* are arguments of Postgres'),
    ],
)
async def test_a_connection_that_the_server_refuses_is_an_error_at_once(
    own_server: Server, address: str, message: str
) -> None:
    """The error says why, and what to do."""
    if not await own_server.execute("SELECT FROM pg_roles WHERE rolname = 'careful'"):
        await own_server.execute("CREATE ROLE careful LOGIN PASSWORD 'right'")
        own_server.require_password("careful")
        await own_server.execute("SELECT pg_reload_conf()")
    with pytest.raises(EventfoldError, match=message) as caught:
        await EventLog.open(Postgres(address.format(host=f"127.0.0.1:{own_server.port}"), "orders", timeout=60))
    assert "wrong" not in str(caught.value)


async def test_an_unavailable_server_is_an_error_after_the_timeout(caplog: pytest.LogCaptureFixture) -> None:
    """The error says why and what to check; before that, a warning says what the program waits for."""
    with pytest.raises(OSError, match=r"within 3 s: no connection \(Connect call failed.*check the address"):
        await EventLog.open(Postgres(f"postgresql://me@127.0.0.1:{free_port()}/db", "orders", timeout=3))
    [record] = caplog.records
    assert "retrying for up to 3 s: no connection (Connect call failed" in record.getMessage()


@pytest.mark.parametrize("options", [{}, {"ssl": "require"}, {"ssl": ssl.create_default_context()}])
async def test_a_server_without_tls_is_an_error_at_once_where_tls_is_required(
    database: str, options: dict[str, Any]
) -> None:
    """Another attempt would not change its configuration."""
    address = database if options else f"{database}{'&' if '?' in database else '?'}sslmode=require"
    with pytest.raises(EventfoldError, match=r"rejected SSL upgrade.*enable TLS on the server") as caught:
        async with asyncio.timeout(20):
            await EventLog.open(Postgres(address, "orders", timeout=60, **options))
    assert not isinstance(caught.value, OSError)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
async def test_a_certificate_that_is_not_trusted_is_an_error_at_once(own_server: Server) -> None:
    """Also for a tail that is waiting when the certificate is replaced: it does not wait for a connection forever."""

    async def first() -> None:
        async for _ in log.tail(0):
            pass

    await in_thread(own_server.stop)
    trusted = ssl.create_default_context(cafile=own_server.enable_tls())
    await in_thread(own_server.start)
    with pytest.raises(EventfoldError, match=r"certificate is not trusted \(self-signed certificate\).*sslrootcert"):
        async with asyncio.timeout(20):
            await EventLog.open(Postgres(own_server.address(), "a", timeout=60, ssl=ssl.create_default_context()))

    async with EventLog.open(Postgres(own_server.address(), "a", timeout=60, ssl=trusted), read_only=True) as log:
        tailing = asyncio.create_task(first())
        await asyncio.sleep(0.5)
        await in_thread(own_server.stop)
        own_server.enable_tls()
        await in_thread(own_server.start)
        with pytest.raises(EventfoldError, match="certificate is not trusted"):
            async with asyncio.timeout(20):
                await tailing


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("log", 5, "log name 5"),
        ("schema", 5, "schema must be a name, or None"),
        ("timeout", "2", "timeout must be a number of seconds, more than 0, not '2'"),
        ("timeout", None, "timeout must be a number of seconds, more than 0, not None"),
        ("timeout", True, "timeout must be a number of seconds, more than 0, not True"),
        ("timeout", float("nan"), "timeout must be a number of seconds, more than 0, not nan"),
        ("attempt_timeout", "2", "attempt_timeout must be a number of seconds, more than 0, not '2'"),
        ("attempt_timeout", 0, "attempt_timeout must be a number of seconds, more than 0, not 0"),
        ("listen_dsn", 5, "listen_dsn must be .* or None, not int"),
        ("listen_dsn", "me:secret@host/db", "listen_dsn must be .* or None, not str"),
        ("transaction_pooling", "false", "transaction_pooling must be True or False, not 'false'"),
        ("pool_size", "4", "pool_size must be an integer of 2 or more, not '4'"),
        ("pool_size", 2.5, "pool_size must be an integer of 2 or more, not 2.5"),
        ("pool_size", 1, "pool_size must be an integer of 2 or more, not 1"),
    ],
)
def test_an_option_of_the_wrong_type_is_named(name: str, value: Any, wanted: str) -> None:
    """The error says what to pass, and shows no address, which may contain a password."""
    with pytest.raises(ValueError, match=wanted) as caught:
        Postgres(**{"dsn_or_pool": "postgresql://me@host/db", "log": "orders", name: value})
    assert "secret" not in str(caught.value)


async def test_an_option_that_the_client_library_does_not_have_is_named() -> None:
    with pytest.raises(TypeError, match="pasword"):
        await EventLog.open(Postgres("postgresql://me@127.0.0.1/db", "orders", pasword="secret"))


@pytest.mark.parametrize("role", [5, ""])
async def test_a_role_that_is_no_name_is_refused(database: str, role: Any) -> None:
    with pytest.raises(ValueError, match="role must be a name"):
        await Postgres(database, "orders").migrate(role=role)
