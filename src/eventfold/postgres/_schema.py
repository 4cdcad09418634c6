"""The tables of the engine: how they are created, migrated and checked.

`eventfold_logs` has a row for each log, with its head. `eventfold_commits` has a row for each group commit.
`eventfold_documents` has a row for each snapshot, for each consumer's committed offset, and for the process that reads
under a consumer's name. `eventfold_keys` is the index. Each append locks the log's row, so that there is one order for
all writers of a log.

Promises: if two processes open a log at once, the tables are not created or migrated twice; if the role is not allowed
to create or migrate them, the error contains the SQL to run.
"""

from __future__ import annotations

import uuid
from typing import Any

import asyncpg

from .._codec.lines import last_line_hash
from .._errors import CorruptLogError, EventfoldError
from .._event import Head
from ._connections import Settings

# The steps from each version to the next. A step is never changed after its release.
MIGRATIONS = (
    """
CREATE TABLE {schema}.eventfold_schema (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    version integer NOT NULL
);
CREATE TABLE {schema}.eventfold_logs (
    log integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL UNIQUE,
    identity uuid NOT NULL,
    "offset" bigint NOT NULL DEFAULT 0,
    hash text NOT NULL DEFAULT ''
) WITH (fillfactor = 50);
CREATE TABLE {schema}.eventfold_commits (
    log integer NOT NULL,
    start bigint NOT NULL,
    "end" bigint NOT NULL,
    id uuid NOT NULL,
    lines bytea NOT NULL,
    PRIMARY KEY (log, start),
    CONSTRAINT eventfold_commits_id UNIQUE (log, id)
);
ALTER TABLE {schema}.eventfold_commits ALTER lines SET STORAGE EXTERNAL;
CREATE TABLE {schema}.eventfold_documents (
    log integer NOT NULL,
    kind text NOT NULL,
    name text NOT NULL,
    data bytea NOT NULL,
    PRIMARY KEY (log, kind, name)
);
INSERT INTO {schema}.eventfold_schema (version) VALUES (1);
""",
    """
ALTER TABLE {schema}.eventfold_logs ADD COLUMN indexed bigint NOT NULL DEFAULT 0;
CREATE TABLE {schema}.eventfold_keys (
    log integer NOT NULL,
    key bigint NOT NULL,
    "offset" bigint NOT NULL,
    PRIMARY KEY (log, key, "offset")
);
""",
)
VERSION = len(MIGRATIONS)

_COLUMNS = {
    ("eventfold_logs", "log", "integer"),
    ("eventfold_logs", "name", "text"),
    ("eventfold_logs", "identity", "uuid"),
    ("eventfold_logs", "offset", "bigint"),
    ("eventfold_logs", "hash", "text"),
    ("eventfold_logs", "indexed", "bigint"),
    ("eventfold_commits", "log", "integer"),
    ("eventfold_commits", "start", "bigint"),
    ("eventfold_commits", "end", "bigint"),
    ("eventfold_commits", "id", "uuid"),
    ("eventfold_commits", "lines", "bytea"),
    ("eventfold_documents", "log", "integer"),
    ("eventfold_documents", "kind", "text"),
    ("eventfold_documents", "name", "text"),
    ("eventfold_documents", "data", "bytea"),
    ("eventfold_keys", "log", "integer"),
    ("eventfold_keys", "key", "bigint"),
    ("eventfold_keys", "offset", "bigint"),
}
_CONSTRAINTS = {
    "eventfold_logs_pkey",
    "eventfold_logs_name_key",
    "eventfold_commits_pkey",
    "eventfold_commits_id",
    "eventfold_documents_pkey",
    "eventfold_keys_pkey",
}
_PRIVILEGES = {
    "eventfold_schema": "SELECT",
    "eventfold_logs": "SELECT, INSERT, UPDATE",
    "eventfold_commits": "SELECT, INSERT",
    "eventfold_documents": "SELECT, INSERT, UPDATE, DELETE",
    "eventfold_keys": "SELECT, INSERT",
}
# A number that no other program is likely to use for an advisory lock.
_MIGRATION_LOCK = 0x6576656E74666F6C


def quoted(name: str) -> str:
    """A name, quoted for SQL."""
    return '"' + name.replace('"', '""') + '"'


def unquoted(identifier: str) -> str:
    """The name that an SQL identifier means, quoted or not."""
    return identifier[1:-1].replace('""', '"') if identifier.startswith('"') else identifier


async def find_schema(connection: Any, settings: Settings) -> tuple[str, int]:
    """The schema with the tables, quoted, and their version; version 0 if there are no tables yet."""
    # Queries of the catalog and not to_regclass, which may use cached data from before the tables were created.
    schema = settings.schema
    if schema is None:
        schema = await connection.fetchval(
            "SELECT coalesce((SELECT relnamespace::regnamespace::text FROM pg_class WHERE relname = 'eventfold_schema' "
            "AND pg_table_is_visible(oid) LIMIT 1), quote_ident(current_schema()))"
        )
        if schema is None:
            path = await connection.fetchval("SELECT current_setting('search_path')")
            raise EventfoldError(
                f"{settings.location}: the search path ({path}) names no schema that exists: create one, or name one "
                "with ?schema=NAME"
            )
    else:
        schema = quoted(schema)
        if await connection.fetchval("SELECT to_regnamespace($1)::text", schema) is None:
            raise EventfoldError(f"{settings.location}: there is no schema {schema}: CREATE SCHEMA {schema};")
    exists = await connection.fetchval(
        "SELECT true FROM pg_class WHERE relname = 'eventfold_schema' AND relnamespace = to_regnamespace($1)", schema
    )
    if not exists:
        if settings.schema is None:
            await _check_search_path(connection, settings, schema)
        return schema, 0
    version: int | None = await connection.fetchval(f"SELECT version FROM {schema}.eventfold_schema")  # noqa: S608
    if version is None:
        raise EventfoldError(f"{settings.location}: {schema}.eventfold_schema is empty: somebody altered it")
    if version > VERSION:
        raise EventfoldError(
            f"{settings.location}: its tables have version {version}, and this eventfold supports {VERSION}: upgrade "
            "eventfold"
        )
    return schema, version


async def _check_search_path(connection: Any, settings: Settings, schema: str) -> None:
    """Raises `EventfoldError` if there are tables in a schema outside the search path, where a log would be missed."""
    # Visible tables may exist by now: another process has just created them.
    others = await connection.fetchval(
        "SELECT string_agg(relnamespace::regnamespace::text, ', ' ORDER BY 1) FROM pg_class "
        "WHERE relname = 'eventfold_schema' AND relkind IN ('r', 'p') AND NOT pg_table_is_visible(oid)"
    )
    if others is not None:
        path = await connection.fetchval("SELECT current_setting('search_path')")
        raise EventfoldError(
            f"{settings.location}: there are tables in schema {others}, which is not in the search path ({path}): name "
            f"the schema with ?schema=NAME, or add it to the search path; to create separate tables in {schema}, name "
            "that schema"
        )


def migration(schema: str, version: int) -> str:
    """The SQL that migrates the tables from a version to the current one."""
    steps = [step.format(schema=schema) for step in MIGRATIONS[version:]]
    steps.append(f"UPDATE {schema}.eventfold_schema SET version = {VERSION};")  # noqa: S608
    return "".join(steps)


async def open_tables(connection: Any, settings: Settings) -> str:
    """Creates, migrates or checks the tables, in a transaction; returns their schema, quoted.

    Raises `EventfoldError`, which says what to change.
    """
    await _check_server(connection, settings)
    schema, version = await find_schema(connection, settings)
    if version < VERSION:
        await migrate(connection, settings, None)
    await _check_tables(connection, settings, schema)
    return schema


async def migrate(connection: Any, settings: Settings, role: str | None) -> str:
    """Creates or migrates the tables if necessary, in a transaction, and grants privileges to a role (quoted for SQL).

    Returns the SQL that was run. Raises `EventfoldError` if the role that connects is not allowed to do it.
    """
    await connection.execute("SELECT pg_advisory_xact_lock($1)", _MIGRATION_LOCK)
    # Another process may have migrated the tables before this one had the lock.
    statements = await pending(connection, settings, role)
    if not statements:
        return ""
    sql = await pending(connection, settings, role or "ROLE")
    try:
        await connection.execute(statements)
    except asyncpg.InsufficientPrivilegeError as error:
        raise EventfoldError(
            f"{settings.location}: this role may not create or migrate the tables ({error}). As a role that may, run "
            f"`eventfold migrate` with this address and --role, or run this SQL:\n{sql}"
        ) from error
    return statements


async def pending(connection: Any, settings: Settings, role: str | None) -> str:
    """The SQL that creates or migrates the tables, if necessary, and grants privileges to a role (quoted for SQL)."""
    schema, version = await find_schema(connection, settings)
    statements = migration(schema, version) if version < VERSION else ""
    return statements if role is None else statements + _grants(schema, role)


def _grants(schema: str, role: str) -> str:
    return f"GRANT USAGE ON SCHEMA {schema} TO {role};\n" + "".join(
        f"GRANT {what} ON {schema}.{table} TO {role};\n" for table, what in _PRIVILEGES.items()
    )


async def _check_server(connection: Any, settings: Settings) -> None:
    row = await connection.fetchrow(
        "SELECT pg_is_in_recovery() AS standby, current_setting('transaction_read_only') = 'on' AS read_only, "
        "current_setting('synchronous_commit') AS synchronous, current_setting('fsync') AS fsync, "
        "current_setting('server_version_num')::int AS version, current_user AS role"
    )
    if row["version"] < 120000:
        raise EventfoldError(f"{settings.location}: eventfold needs PostgreSQL 12 or later")
    if row["standby"] or row["read_only"]:
        why = "it is a standby" if row["standby"] else "default_transaction_read_only is on"
        raise EventfoldError(
            f"{settings.location}: the server is read-only ({why}): connect to the primary, name several hosts with "
            "target_session_attrs=read-write, or open the log read-only"
        )
    if row["synchronous"] == "off" or row["fsync"] == "off":
        name = "fsync" if row["fsync"] == "off" else "synchronous_commit"
        raise EventfoldError(
            f"{settings.location}: {name} is off, so an append would return before it is durable: turn it on"
            + (f" (ALTER ROLE {quoted(row['role'])} SET synchronous_commit = on)" if name != "fsync" else "")
        )


async def _check_tables(connection: Any, settings: Settings, schema: str) -> None:
    await _check_persistence(connection, settings, schema)
    rows = await connection.fetch(
        # The setting quote_all_identifiers quotes the names of types too.
        "SELECT c.relname::text AS table, a.attname::text AS column, trim('\"' FROM format_type(a.atttypid, NULL)) "
        "FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid "
        "WHERE c.relnamespace = to_regnamespace($1) AND a.attnum > 0 AND NOT a.attisdropped",
        schema,
    )
    missing = [f"column {t}.{c} of type {k}" for t, c, k in sorted(_COLUMNS - {tuple(row) for row in rows})]
    names = await connection.fetch(
        "SELECT conname::text FROM pg_constraint WHERE connamespace = to_regnamespace($1)", schema
    )
    missing += [f"constraint {name}" for name in sorted(_CONSTRAINTS - {row[0] for row in names})]
    if missing:
        raise EventfoldError(
            f"{settings.location}: the tables in {schema} are not as eventfold created them; somebody altered them. "
            f"Missing: {', '.join(missing)}"
        )
    for table, privileges in _PRIVILEGES.items():
        for privilege in privileges.split(", "):
            if not await connection.fetchval("SELECT has_table_privilege($1, $2)", f"{schema}.{table}", privilege):
                role = quoted(await connection.fetchval("SELECT current_user::text"))
                raise EventfoldError(
                    f"{settings.location}: this role lacks the privilege {privilege} on {schema}.{table}. As the "
                    f"table's owner, run this SQL:\n{_grants(schema, role)}"
                )


async def _check_persistence(connection: Any, settings: Settings, schema: str) -> None:
    rows = await connection.fetch(
        "SELECT relname::text, relpersistence = 't', current_setting('search_path') FROM pg_class "
        "WHERE relnamespace = to_regnamespace($1) AND relpersistence <> 'p' AND relname = ANY($2) ORDER BY 1",
        schema,
        list(_PRIVILEGES),
    )
    for table, is_temporary, path in rows:
        if is_temporary:
            problem = f"temporary, since pg_temp is first in the search path ({path}): name a schema with ?schema=NAME"
        else:
            problem = f"unlogged, so a crash of the server would empty it: ALTER TABLE {schema}.{table} SET LOGGED;"
        raise EventfoldError(f"{settings.location}: the table {schema}.{table} is {problem}")


async def open_log(connection: Any, settings: Settings, schema: str) -> None:
    """Creates the log if it does not exist, and checks its head.

    Raises `CorruptLogError` if the head is not the end of the last commit.
    """
    await connection.execute(
        f"INSERT INTO {schema}.eventfold_logs (name, identity) SELECT $1, $2 "  # noqa: S608
        f"WHERE NOT EXISTS (SELECT FROM {schema}.eventfold_logs WHERE name = $1) ON CONFLICT DO NOTHING",
        settings.log,
        uuid.uuid4(),
    )
    row = await connection.fetchrow(
        f'SELECT l."offset", l.hash, c."end", c.lines FROM {schema}.eventfold_logs l LEFT JOIN LATERAL '  # noqa: S608
        f'(SELECT "end", lines FROM {schema}.eventfold_commits WHERE log = l.log ORDER BY start DESC LIMIT 1) c '
        "ON true WHERE l.name = $1",
        settings.log,
    )
    head, last = Head(row[0], row[1]), Head(0, "")
    if row[2] is not None:
        last = Head(row[2], last_line_hash(row[3]))
    if head != last:
        raise CorruptLogError(
            settings.location,
            min(head.offset, last.offset),
            f"{schema}.eventfold_logs says that the log ends at {head.offset} with {head.line_hash!r}, and its last "
            f"commit ends at {last.offset} with {last.line_hash!r}: somebody altered one of them",
        )
