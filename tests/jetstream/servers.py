"""Real nats-servers on the loopback address, one or a cluster of three, each with its own directory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

BINARY = shutil.which("nats-server") or shutil.which("nats-server", path=str(Path(sys.executable).parent))
STARTED_WITHIN = 20  # seconds


def free_ports(count: int) -> list[int]:
    """Returns ports on which nobody listens at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class Server:
    """One server. Its messages are synced before they are acknowledged.

    `routes` are the ports at which it reaches the other servers of its cluster.
    """

    def __init__(self, directory: Path, name: str, ports: tuple[int, int, int], routes: list[int]) -> None:
        self.name = name
        self.port, self._monitor, self._cluster_port = ports
        self.address = f"nats://127.0.0.1:{self.port}"
        self.directory, self._routes = directory, routes
        self._configuration = directory / f"{name}.conf"
        self._log = directory / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        self.configure()

    def configure(self, *lines: str, max_payload: str = "8MB", jetstream: bool = True) -> None:
        """Writes the configuration with which the server starts next."""
        lines += (
            f"server_name: {self.name}",
            f"listen: 127.0.0.1:{self.port}",
            f"http: 127.0.0.1:{self._monitor}",
            f"max_payload: {max_payload}",
        )
        if jetstream:
            lines += (f'jetstream {{ store_dir: "{self.directory / self.name}", sync_interval: always }}',)
        if self._routes:
            urls = ", ".join(f'"nats://127.0.0.1:{port}"' for port in self._routes)
            # It tells the others an address at which nobody listens, so that they use only their own routes.
            listen = f"listen: 127.0.0.1:{self._cluster_port}, advertise: '127.0.0.1:1'"
            lines += (f"cluster {{ name: test, {listen}, routes: [{urls}] }}",)
        self._configuration.write_text("\n".join(lines) + "\n")

    def start(self) -> None:
        assert BINARY is not None
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [BINARY, "-c", str(self._configuration)], stdout=log, stderr=log, start_new_session=True
            )

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _ask(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._monitor}/{path}", timeout=1) as answer:
            return dict(json.load(answer))

    def wait_until_ready(self) -> None:
        """Waits until the server's JetStream accepts requests."""
        until = time.monotonic() + STARTED_WITHIN
        while time.monotonic() < until:
            try:
                if self._ask("healthz")["status"] == "ok":
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise TimeoutError(f"nats-server is not ready: {self._log.read_text()[-2000:]}")

    def leader_of(self, stream: str) -> str | None:
        """Returns the name of the server that leads a stream, as this one knows it; None if it does not know."""
        for account in self._ask("jsz?streams=true").get("account_details", ()):
            for detail in account.get("stream_detail", ()):
                if detail["name"] == stream:
                    return detail["cluster"].get("leader")
        return None

    def signal(self, number: int) -> None:
        if self.running:
            assert self._process is not None
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Kills the server, and waits until it is gone."""
        if self.running:
            assert self._process is not None
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGKILL)
            self._process.wait()

    def restart(self) -> None:
        """Kills the server and starts it with its current configuration."""
        self.kill()
        self.start()
        self.wait_until_ready()


class Servers:
    """One server, or a cluster. `routes(i, ports)` gives the ports at which server `i` reaches the others."""

    def __init__(self, directory: Path, count: int, routes: Any = None) -> None:
        ports = free_ports(3 * count)
        clusters = ports[2::3]
        self.all = [
            Server(
                directory,
                f"server{index}",
                (ports[3 * index], ports[3 * index + 1], ports[3 * index + 2]),
                [] if count == 1 else clusters if routes is None else routes(index, clusters),
            )
            for index in range(count)
        ]

    @property
    def addresses(self) -> list[str]:
        return [server.address for server in self.all]

    def start(self) -> None:
        for server in self.all:
            server.start()
        for server in self.all:
            server.wait_until_ready()

    def leader_of(self, stream: str, *, apart_from: Server | None = None) -> Server:
        """Returns the server that leads a stream; waits until there is one."""
        until = time.monotonic() + STARTED_WITHIN
        while time.monotonic() < until:
            for server in self.all:
                if server.running and server is not apart_from:
                    name = server.leader_of(stream)
                    for leader in self.all:
                        if leader.name == name and leader is not apart_from:
                            return leader
            time.sleep(0.05)
        raise TimeoutError(f"the stream {stream} has no leader")

    def kill(self) -> None:
        for server in self.all:
            server.kill()
