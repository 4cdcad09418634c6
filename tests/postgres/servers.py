"""A real PostgreSQL server from the system's binaries, with its own data directory, that a test may harm."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from tests.support import free_port

STARTED_WITHIN = 30  # seconds


def find_binaries() -> Path | None:
    """Returns the directory of the newest `initdb` and `postgres` of this system."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    if found:
        return max(found, key=lambda path: int(path.parent.name))
    initdb = shutil.which("initdb")
    return Path(initdb).resolve().parent if initdb else None


def _other_user() -> dict[str, Any]:
    """Returns how to start a process as another user if this one is root's, whom the server refuses."""
    if os.geteuid() != 0:
        return {}
    try:
        entry = pwd.getpwnam("postgres")
    except KeyError:
        entry = pwd.getpwnam("nobody")
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


class Server:
    """One server on the loopback address, whose superuser is `admin`."""

    def __init__(self, binaries: Path, **options: str) -> None:
        self._binaries = binaries
        self._options = options
        # Another user may not enter pytest's directory.
        self.directory = Path(tempfile.mkdtemp(prefix="eventfold-postgres-"))
        self._data = self.directory / "data"
        self.other_user = _other_user()
        if self.other_user:
            os.chown(self.directory, self.other_user["user"], self.other_user["group"])
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def address(self, database: str = "postgres", user: str = "admin") -> str:
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def create(self) -> None:
        command = [self._binaries / "initdb", "-D", self._data, "-U", "admin", "-A", "trust", "-E", "UTF8"]
        subprocess.run(
            [*command, "--locale=C", "--no-sync"],
            check=True,
            capture_output=True,
            cwd=self.directory,
            **self.other_user,
        )

    def require_password(self, role: str) -> None:
        """Requires a role's password, once the configuration is read again."""
        rules = self._data / "pg_hba.conf"
        rules.write_text(f"host all {role} 127.0.0.1/32 scram-sha-256\n{rules.read_text()}")

    def enable_tls(self) -> Path:
        """Gives a stopped server a new certificate for its address, and returns the certificate's path."""
        certificate, key = self._data / "server.crt", self._data / "server.key"
        request = ["openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", "-subj", "/CN=test"]
        names = ["-addext", "subjectAltName=IP:127.0.0.1"]
        subprocess.run(
            [*request, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True, **self.other_user
        )
        key.chmod(0o600)
        self._options["ssl"] = "on"
        return certificate

    def create_standby_of(self, primary: Server) -> None:
        """Copies another server, whose changes this one will follow once it is started."""
        # Processes that outlive a kill for a moment may still write to the previous directory.
        self._data = Path(tempfile.mkdtemp(prefix="standby-", dir=self.directory))
        if self.other_user:
            os.chown(self._data, self.other_user["user"], self.other_user["group"])
        command = [self._binaries / "pg_basebackup", "-D", self._data, "-d", primary.address(), "--write-recovery-conf"]
        subprocess.run(
            [*command, "--checkpoint=fast", "--no-sync"],
            check=True,
            capture_output=True,
            cwd=self.directory,
            **self.other_user,
        )

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        options = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": self.directory,
            "max_connections": 50,
            "shared_buffers": "16MB",
            **self._options,
        }
        arguments = [f"-c{name}={value}" for name, value in options.items()]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._binaries / "postgres", "-D", self._data, *arguments],
                stdout=log,
                stderr=log,
                cwd=self.directory,
                start_new_session=True,
                **self.other_user,
            )
        until = time.monotonic() + STARTED_WITHIN
        ready = [self._binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run(ready, check=False).returncode:
            if time.monotonic() > until or self._process.poll() is not None:
                raise TimeoutError(f"the server did not start: {(self.directory / 'log').read_text()[-2000:]}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Stops the server as an administrator does; its clients are disconnected."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Kills the server's first process; its connections' processes follow."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """Suspends all its processes, as on a machine that stands still: connections stay, and nothing answers."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        """Resumes its processes, if there are any."""
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: int) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        first = self._process.pid
        # Stop the first one before the others, so that it starts no new ones meanwhile.
        os.kill(first, number)
        for pid in subprocess.run(["pgrep", "-P", str(first)], capture_output=True, check=False).stdout.split():
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(int(pid), number)

    def _end(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
            self._process.wait(STARTED_WITHIN)

    def restart_after_kill(self) -> None:
        """Starts it once the processes that a kill left behind have gone."""
        for _ in range(100):
            try:
                self.start()
                return
            except TimeoutError:
                time.sleep(0.1)
        raise TimeoutError("the server did not start again after it was killed")

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    async def execute(self, statement: str, *arguments: Any, database: str = "postgres", user: str = "admin") -> Any:
        """Runs a statement on its own connection; returns the rows."""
        connection = await asyncpg.connect(self.address(database, user))
        try:
            return await (connection.fetch(statement, *arguments) if arguments else _run(connection, statement))
        finally:
            await connection.close()


async def _run(connection: Any, statement: str) -> Any:
    if statement.lstrip().upper().startswith("SELECT"):
        return await connection.fetch(statement)
    return await connection.execute(statement)


async def in_thread(function: Any) -> None:
    """Runs a blocking call while the tasks of a test go on."""
    await asyncio.to_thread(function)


def _binaries() -> Path:
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("needs PostgreSQL's initdb and postgres: apt-get install postgresql")
    return binaries


@contextmanager
def running_server() -> Iterator[Server]:
    """Runs a new server; skips the test if this system has no PostgreSQL."""
    server = Server(_binaries())
    try:
        server.create()
        server.start()
        yield server
    finally:
        server.remove()


@contextmanager
def primary_and_standby() -> Iterator[tuple[Server, Server]]:
    """Runs two new servers, of which one follows the other; a commit waits for both. Skips as `running_server` does."""
    servers = [Server(_binaries(), synchronous_standby_names="*") for _ in range(2)]
    primary, standby = servers
    try:
        primary.create()
        primary.start()
        standby.create_standby_of(primary)
        standby.start()
        yield primary, standby
    finally:
        for server in servers:
            server.remove()
