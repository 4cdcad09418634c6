"""Which stream on which servers keeps a log, and how to reach it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from nats.aio.client import Client


class Settings(NamedTuple):
    """The arguments of `JetStream`; times are in seconds.

    `client` is a client of the application, which is used instead of one of our own.
    """

    servers: tuple[str, ...]
    client: Client | None
    log: str
    replicas: int
    create: bool
    timeout: float
    attempt_timeout: float
    compression: str
    connect: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"<Settings of {self.location}>"  # the addresses and the options may contain a password

    @property
    def stream(self) -> str:
        return self.log

    @property
    def subject(self) -> str:
        return f"eventfold.{self.log}"

    @property
    def is_encrypted(self) -> bool:
        """Whether the connections must be encrypted."""
        return self.connect.get("tls") is not None or any(server.startswith("tls://") for server in self.servers)

    @property
    def location(self) -> str:
        """Where the log is, without passwords."""
        hosts = ",".join(server.rpartition("@")[2].rpartition("/")[2] for server in self.servers)
        return f"nats://{hosts}/{self.log}"
