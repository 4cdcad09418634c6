"""The engine on PostgreSQL: a log in tables of a database. Needs `eventfold[postgres]`.

    async with EventLog.open("postgresql://user@host/db?log=orders") as log: ...
    async with EventLog.open(Postgres(pool, log="orders")) as log: ...

Any number of processes and hosts may write; a database may hold any number of logs. Once `append` returns, PostgreSQL
has committed the event, on synchronous standbys too if the server has any.
"""

from ._engine import Postgres

__all__ = ["Postgres"]

Postgres.__module__ = "eventfold.postgres"
