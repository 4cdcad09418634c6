"""Real nats-servers on the loopback address, one or a cluster of three, each with a directory of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

BINARY = shutil.which("nats-server") or shutil.which("nats-server", path=str(Path(sys.executable).parent))
STARTED_WITHIN = 20  # seconds


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class Server:
    """One server. Its messages are synced before they are acknowledged."""

    def __init__(self, directory: Path, name: str, ports: tuple[int, int, int], routes: list[int]) -> None:
        self.port, self._monitor, cluster = ports
        self.address = f"nats://127.0.0.1:{self.port}"
        self._configuration = directory / f"{name}.conf"
        self._log = directory / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        lines = [
            f"server_name: {name}",
            f"listen: 127.0.0.1:{self.port}",
            f"http: 127.0.0.1:{self._monitor}",
            "max_payload: 8MB",
            f'jetstream {{ store_dir: "{directory / name}", sync_interval: always }}',
        ]
        if routes:
            urls = ", ".join(f'"nats://127.0.0.1:{port}"' for port in routes)
            lines.append(f"cluster {{ name: test, listen: 127.0.0.1:{cluster}, routes: [{urls}] }}")
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

    def wait_until_ready(self) -> None:
        """Waits until the server's JetStream takes requests."""
        until = time.monotonic() + STARTED_WITHIN
        while time.monotonic() < until:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self._monitor}/healthz", timeout=1) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                pass
            time.sleep(0.05)
        raise TimeoutError(f"nats-server is not ready: {self._log.read_text()[-2000:]}")

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


class Servers:
    """One server, or a cluster."""

    def __init__(self, directory: Path, count: int) -> None:
        ports = free_ports(3 * count)
        clusters = ports[2::3] if count > 1 else []
        self.all = [
            Server(
                directory, f"server{index}", (ports[3 * index], ports[3 * index + 1], ports[3 * index + 2]), clusters
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

    def kill(self) -> None:
        for server in self.all:
            server.kill()
