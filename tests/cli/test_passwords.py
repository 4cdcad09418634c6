"""No command prints a password that is in an address: not in results, in errors, or about a server that is away."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.cli.commands import COMMAND, make
from tests.cli.test_engines import database  # noqa: F401  (a fixture)
from tests.jetstream.servers import Servers
from tests.support import free_port

from eventfold._address import without_password
from eventfold.jetstream import JetStream
from eventfold.postgres import Postgres

SECRET = ("s3cr%7Eet", "s3cr~et", "cr~et")
# Those that print something about their addresses, for a log that exists and one that does not.
COMMANDS = [
    ["append", "{log}", "a"],
    ["info", "{log}", "--json"],
    ["verify", "{log}", "--json"],
    ["state", "{log}", "missing"],
    ["backup", "{log}", "copy"],
    ["backup", "log", "{log}"],
    ["restore", "{log}", "restored"],
    ["restore", "log", "{log}"],
    ["repair", "{log}"],
    ["rotate", "{log}"],
    ["consumers", "reset", "{log}", "missing", "--to", "start"],
    ["index", "drop", "{log}"],
    ["copy", "log", "{log}"],
    ["copy", "{log}", "log"],
]


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A directory with a log in `log`."""
    make(tmp_path / "log")
    return tmp_path


def printed(command: Sequence[str], log: str, directory: Path) -> str:
    """Returns all that a command prints, which must not contain a password, and which must leave no other directory."""
    arguments = [part.format(log=log) for part in command]
    done = subprocess.run([*COMMAND, *arguments], input=b"", capture_output=True, timeout=60, cwd=directory)
    shown = (done.stdout + done.stderr).decode()
    assert shown
    assert not [secret for secret in SECRET if secret in shown], shown
    assert os.listdir(directory) == ["log"]
    return shown


def test_no_command_prints_the_password_of_a_log_in_postgresql(
    database: str,  # noqa: F811
    there: Path,
) -> None:
    host, name = database.rpartition("@")[2].split("/")
    for number, command in enumerate(COMMANDS):
        printed(
            command,
            f"postgresql://admin:s3cr%7Eet@{host}/{name}?log=orders"
            if number % 2
            else f"postgresql://{host}/{name}?log=orders&user=admin&password=s3cr%7Eet",
            there,
        )


def test_no_command_prints_the_password_or_the_token_of_a_log_in_jetstream(nats_server: Servers, there: Path) -> None:
    host = nats_server.addresses[0].removeprefix("nats://")
    for number, command in enumerate(COMMANDS):
        printed(command, f"nats://{'me:' * (number % 2)}s3cr%7Eet@{host}/passwords", there)


@pytest.mark.parametrize(
    "log",
    [
        # In the first ones, the password has characters that should be encoded.
        "postgresql://me:s3/cr~et@127.0.0.1:{port}/db?log=orders",
        "postgresql://me:77/cr~et@127.0.0.1:{port}/db?log=orders",
        "postgresql://me:s3?cr~et@127.0.0.1:{port}/db?log=orders",
        "postgresql://me:s3#cr~et@127.0.0.1:{port}/db?log=orders",
        "postgresql://me:[cr~et@127.0.0.1:{port}/db?log=orders",
        "nats://me:s3/cr~et@127.0.0.1:{port}/orders",
        "nats://me:s3?cr~et@127.0.0.1:{port}/orders",
        "nats://me:s3#cr~et@127.0.0.1:{port}/orders",
        "postgresql://me:s3cr~et@127.0.0.1:port/db?log=orders",
        "postgresql://me@127.0.0.1:port/db?log=orders&password=s3cr~et",
        "postgres://me:s3cr~et@127.0.0.1:port/db",
        "nats://me:s3cr~et@127.0.0.1:port/orders",
        "nats://me:s3cr~et@127.0.0.1:{port}/or.ders",
        "nats://me@127.0.0.1:{port}/orders?password=s3cr~et",
        "tls://me:s3cr~et@127.0.0.1/",
        "mysql://me:s3cr~et@127.0.0.1/db",
        "file://me:s3cr~et@127.0.0.1/data",
        "postgresql:me:s3cr~et@127.0.0.1/db",
    ],
)
def test_a_wrong_address_is_refused_without_its_password(log: str, there: Path) -> None:
    assert printed(["copy", "log", "{log}"], log.format(port=free_port()), there).startswith("eventfold: ")


def test_an_address_is_shown_without_what_is_secret_in_it() -> None:
    shown = {
        "data/orders": "data/orders",
        "./a@b": "./a@b",
        "postgresql://ann:s3cr~et@host:5432/db?log=orders&sslmode=require": "postgresql://ann@host:5432/db?log=orders",
        "postgresql://ann@host/db?password=s3cr~et&log=orders": "postgresql://ann@host/db?log=orders",
        "postgres://ann:s/3@c?r@host/db?log=a": "postgres://ann@host/db?log=a",
        "nats://ann:s3cr~et@host/orders?replicas=3": "nats://ann@host/orders?replicas=3",
        "nats://s3cr~et@one:4222,two:4222/orders": "nats://one:4222,two:4222/orders",
    }
    assert {address: without_password(address) for address in shown} == shown


@pytest.mark.parametrize("engine", [Postgres, JetStream])
def test_the_settings_of_an_engine_are_shown_without_what_is_secret_in_them(engine: Any) -> None:
    """A traceback with the values of variables shows them too."""
    scheme = "nats" if engine is JetStream else "postgresql"
    made = engine(f"{scheme}://ann:s3cr~et@host", "orders", password="s3cr~et")

    assert "cr~et" not in repr(made) + repr(made._settings)
