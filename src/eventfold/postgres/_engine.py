"""`Postgres`: which log in which database, and how to reach it."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlunsplit

from .._aio import UncancellableTask, uninterrupted
from .._options import address_parts, check_flag, check_seconds, refuse_options
from ._committer import TableCommitter
from ._connections import Connections, Settings
from ._schema import migrate, pending, quoted
from ._source import TableSource

_DSN = re.compile(r"postgres(ql)?://")
_LOG_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Postgres:
    """A log in a PostgreSQL database; pass it to `EventLog.open` or `EventReader`.

    Args:
        dsn_or_pool: The database's address, as for `asyncpg.connect`, or an `asyncpg.Pool` of the application, which is
            neither configured nor closed here. While anything waits for events, one of the pool's connections is in
            use, unless there is a `listen_dsn`.
        log: The log's name in the database: 1 to 128 of `A-Z a-z 0-9 . _ -`.
        schema: The schema of the tables; None for the one in which the server's search path finds them.
        timeout: Seconds for which calls are retried after a connection was lost. After that, an append raises
            `UnknownOutcomeError`, or `OSError` if it was never sent; everything else raises `OSError`.
        attempt_timeout: Seconds after which an unanswered statement counts as lost.
        listen_dsn: A second address, on which to listen for notifications if that is impossible on the first one,
            such as behind PgBouncer in transaction mode.
        transaction_pooling: Whether there is a pooler in transaction mode in front of the server. Then no statement
            stays prepared beyond its transaction.
        pool_size: The maximum number of connections; ignored for a pool of the application.
        **connect: Further options for `asyncpg.connect`, such as `ssl` or `target_session_attrs`.

    Raises:
        ValueError: A name or a number is not allowed.
    """

    def __init__(
        self,
        dsn_or_pool: Any,
        log: str,
        *,
        schema: str | None = None,
        timeout: float = 30.0,
        attempt_timeout: float = 10.0,
        listen_dsn: str | None = None,
        transaction_pooling: bool = False,
        pool_size: int = 4,
        **connect: Any,
    ) -> None:
        if not isinstance(log, str) or not _LOG_NAME.fullmatch(log):
            raise ValueError(f"log name {log!r}: it must be 1 to 128 characters of A-Z a-z 0-9 . _ -")
        if isinstance(dsn_or_pool, str):
            if not _DSN.match(dsn_or_pool):
                raise ValueError("the database's address must look like postgresql://user@host/db")
            if any(name in ("log", "schema") for name, _ in parse_qsl(address_parts(dsn_or_pool).query)):
                raise ValueError(
                    "the address names a log or a schema: leave out ?log= and ?schema=, or pass the whole address to "
                    "Postgres.from_address"
                )
        elif not callable(getattr(dsn_or_pool, "acquire", None)):
            raise ValueError(
                f"dsn_or_pool must be the database's address or an asyncpg.Pool, not {type(dsn_or_pool).__name__}"
            )
        if schema is not None and not (isinstance(schema, str) and schema):
            raise ValueError("schema must be a name, or None for the one that the server's search path finds")
        check_seconds("timeout", timeout)
        check_seconds("attempt_timeout", attempt_timeout)
        if listen_dsn is not None and not (isinstance(listen_dsn, str) and _DSN.match(listen_dsn)):
            # It may have a password, so it is not shown.
            kind = type(listen_dsn).__name__
            raise ValueError(f"listen_dsn must be an address like postgresql://user@host/db, or None, not {kind}")
        check_flag("transaction_pooling", transaction_pooling)
        if isinstance(pool_size, bool) or not isinstance(pool_size, int) or pool_size < 2:
            raise ValueError(f"pool_size must be an integer of 2 or more, not {pool_size!r}")
        if not isinstance(dsn_or_pool, str) and connect:
            raise ValueError(f"{', '.join(sorted(connect))}: the pool was connected without these options")
        self._settings = Settings(
            dsn_or_pool, log, schema, timeout, attempt_timeout, listen_dsn, transaction_pooling, pool_size, connect
        )

    @classmethod
    def from_address(cls, address: str) -> Postgres:
        """The engine that an address names: `postgresql://user@host/db?log=orders`.

        In the query, `log` and `schema` are for eventfold; the rest, such as `sslmode`, is for `asyncpg.connect`.

        Raises:
            ValueError: The address names no log, or several.
        """
        parts = address_parts(address)
        options: dict[str, str] = {}
        connect_options = []
        for name, value in parse_qsl(parts.query, keep_blank_values=True):
            if name in ("log", "schema"):
                if name in options:
                    raise ValueError(f"the address names two {name}s: {options[name]!r} and {value!r}")
                options[name] = value
            else:
                connect_options.append((name, value))
        if "log" not in options:
            raise ValueError("the address names no log: add ?log=NAME to it, as in postgresql://host/db?log=orders")
        dsn = urlunsplit(parts._replace(query=urlencode(connect_options)))
        return cls(dsn, options["log"], schema=options.get("schema"))

    def __repr__(self) -> str:
        return f"<Postgres {self._settings.location}>"

    def source(self) -> TableSource:
        """The log, for reading, in any event loop. No I/O."""
        return TableSource(self._settings)

    async def migrate(self, *, role: str | None = None) -> str:
        """Creates the tables, or migrates them to what this version of eventfold needs.

        Opening a log for appending does the same, if the role that connects may do so. Programs may be running.

        Args:
            role: A role to which the privileges that a program needs are granted.

        Returns:
            The SQL that was run; "" if there was nothing to do.

        Raises:
            ValueError: The role is not a name.
            OSError: The server can't be reached.
            EventfoldError: The role that connects is not allowed to do it; the message has the SQL.

        If cancelled, the migration may or may not have been done.
        """

        grantee = _quoted_role(role)

        async def call(connection: Any) -> str:
            return await migrate(connection, self._settings, grantee)

        return await self._run(call)

    async def migration_sql(self, *, role: str | None = None) -> str:
        """Returns the SQL that `migrate` would run, and changes nothing.

        Args:
            role: A role to which the privileges that a program needs are granted.

        Returns:
            The SQL; "" if there is nothing to do.

        Raises:
            ValueError: The role is not a name.
            OSError: The server can't be reached.
            EventfoldError: The tables can't be migrated, for example because a newer version of eventfold created them.
        """

        grantee = _quoted_role(role)

        async def call(connection: Any) -> str:
            return await pending(connection, self._settings, grantee)

        return await self._run(call)

    async def _run(self, call: Callable[[Any], Awaitable[str]]) -> str:
        """Makes a call in a transaction, on a connection that is then closed."""
        connections = Connections(self._settings)
        try:
            return await connections.run_with_retries(call, transaction=True)
        finally:
            await uninterrupted(UncancellableTask(connections.aclose(), "eventfold close"))

    async def open_committer(self, **options: Any) -> TableCommitter:
        """Opens the log for appending; creates the tables and the log, or migrates them, if necessary.

        Raises:
            ValueError: This engine does not have one of the options.
            OSError: The server can't be reached.
            EventfoldError: The database is configured so that events could be lost, or the role lacks a privilege; the
                message says what to change.

        If cancelled, it opens nothing; the tables may have been created.
        """
        refuse_options(options, "PostgreSQL")
        return await TableCommitter.open(self.source())


def _quoted_role(role: str | None) -> str | None:
    if role is None:
        return None
    if not isinstance(role, str) or not role:
        raise ValueError(f"role must be a name, or None, not {role!r}")
    return quoted(role)
