"""Wrong arguments for the engine: each causes an error that says what is wrong, and shows no password."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client
from tests.jetstream.servers import Servers, free_ports

from eventfold import Event, EventfoldError, EventLog
from eventfold.jetstream import JetStream


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nats://me:secret@host:4222", "must have a host and the log's name"),
        ("nats://me:secret@host:4222/?log=orders", "must have a host and the log's name"),
        ("nats://me:secret@host:4222/orders?log=orders", "unknown options log"),
        ("nats://me:secret@host:4222/or.ders", "log name 'or.ders'"),
        ("nats://me:secret@host:4222/orders?replicas=many", "replicas must be 1, 3 or 5, not 'many'"),
        ("nats://me:secret@host:4222/orders?replicas=2", "replicas must be 1, 3 or 5, not 2"),
        ("nats://me:secret@host:port/orders", "which 'host:port' does not"),
        ("nats:me:secret@host/orders", "begins with nats://"),
    ],
)
def test_an_address_that_is_wrong_is_refused(where: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        EventLog.open(where)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("servers", "message"),
    [
        (None, "not NoneType"),
        ([], "at least one"),
        ([None], "addresses or a nats.aio.client.Client"),
        ("http://me:secret@host", "not http://"),
        (["nats://host", "nats://me:secret@"], "which '' does not"),
    ],
)
def test_a_value_that_names_no_servers_is_refused(servers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        JetStream(servers, "orders")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("log", 5, "log name 5"),
        ("replicas", "3", "replicas must be 1, 3 or 5, not '3'"),
        ("replicas", 3.0, "replicas must be 1, 3 or 5, not 3.0"),
        ("replicas", True, "replicas must be 1, 3 or 5, not True"),
        ("create", "no", "create must be True or False, not 'no'"),
        ("timeout", "2", "timeout must be a number of seconds, more than 0, not '2'"),
        ("timeout", None, "timeout must be a number of seconds, more than 0, not None"),
        ("attempt_timeout", "2", "attempt_timeout must be a number of seconds, more than 0, not '2'"),
        ("attempt_timeout", True, "attempt_timeout must be a number of seconds, more than 0, not True"),
        ("compression", True, "compression must be 'none' or 's2', not True"),
        ("compression", "zip", "compression must be 'none' or 's2', not 'zip'"),
    ],
)
def test_an_option_of_the_wrong_type_is_named(name: str, value: Any, wanted: str) -> None:
    """The error says what to pass."""
    with pytest.raises(ValueError, match=wanted):
        JetStream(**{"servers": "nats://host", "log": "orders", name: value})


async def test_a_client_that_is_not_connected_is_an_error_at_once() -> None:
    with pytest.raises(OSError, match="not connected"):
        await EventLog.open(JetStream(Client(), "orders"))


async def test_a_client_that_the_program_closes_before_the_log_ends_a_waiting_tail(server: Servers) -> None:
    """It never reconnects, so the tail would wait forever."""

    async def first() -> None:
        async for _ in log.tail(0):
            pass

    client = Client()
    await client.connect(server.addresses)
    async with EventLog.open(JetStream(client, "closed-early", attempt_timeout=0.5)) as log:
        tailing = asyncio.create_task(first())
        await asyncio.sleep(0.3)
        await client.close()

        with pytest.raises(EventfoldError, match="close it after the log"):
            await asyncio.wait_for(tailing, 20)
        with pytest.raises(EventfoldError, match="close it after the log"):
            await log.append(Event("a"))


async def test_an_option_that_the_client_library_does_not_have_is_named() -> None:
    with pytest.raises(TypeError, match="pasword"):
        await EventLog.open(JetStream("nats://127.0.0.1:4222", "orders", pasword="secret"))


async def test_a_log_with_fewer_replicas_than_requested_logs_a_warning(
    server: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    """A program that asked for one replica has created the stream."""
    for replicas in (1, 3):
        assert not caplog.records
        async with EventLog.open(JetStream(server.addresses, "few", replicas=replicas, timeout=5 + replicas)) as log:
            await log.append(Event("a"))
    [record] = caplog.records
    assert "1 instead of 3; to change that, run `nats stream edit few --replicas=3`" in record.getMessage()


@pytest.fixture
def guarded(own_servers: Callable[[], Servers]) -> Servers:
    """A server with two users, one of whom has no permissions."""
    servers = own_servers()
    nothing = 'permissions: {publish: ["nothing"], subscribe: ["_INBOX.>"]}'
    users = f"{{user: ann, password: right}}, {{user: bob, password: right, {nothing}}}"
    servers.all[0].configure(f"accounts {{ shop {{ jetstream: enabled, users: [{users}] }} }}")
    servers.all[0].restart()
    return servers


@pytest.mark.parametrize("user", ["", "ann:wrong@", "eve:right@"])
async def test_a_user_whom_the_server_refuses_is_an_error_at_once(guarded: Servers, user: str) -> None:
    """The error says what to check."""
    [address] = guarded.addresses
    with pytest.raises(EventfoldError, match=r"refuses the user .* check the user and the password"):
        await EventLog.open(address.replace("//", f"//{user}") + "/orders")
    async with EventLog.open(address.replace("//", "//ann:right@") + "/orders"):
        pass


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
async def test_a_certificate_that_is_not_trusted_is_an_error_at_once(
    own_servers: Callable[[], Servers], tmp_path: Path
) -> None:
    """Another attempt would not change it."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    request = ["openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", "-subj", "/CN=test"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run([*request, *names], check=True, capture_output=True)
    servers = own_servers()
    servers.all[0].configure(f"tls {{ cert_file: '{certificate}', key_file: '{key}' }}")
    servers.all[0].restart()
    [address] = servers.addresses

    with pytest.raises(EventfoldError, match=r"certificate is not trusted \(self-signed certificate\).*`tls`"):
        async with asyncio.timeout(20):
            await EventLog.open(address.replace("nats://", "tls://") + "/orders")
    trusted = ssl.create_default_context(cafile=certificate)
    async with EventLog.open(JetStream(address.replace("nats://", "tls://"), "orders", tls=trusted)) as log:
        await log.append(Event("a"))


@pytest.mark.parametrize("options", [{}, {"tls": ssl.create_default_context()}])
async def test_a_server_without_tls_is_refused_where_tls_was_asked_for(
    server: Servers, options: dict[str, Any]
) -> None:
    """The client library would use the connection all the same."""
    [address] = server.addresses
    address = address if options else address.replace("nats://", "tls://")
    with pytest.raises(EventfoldError, match="connection is not encrypted: enable TLS on the servers"):
        await EventLog.open(JetStream(address, "orders", **options))


async def test_a_user_without_permission_for_jetstream_gets_an_error(guarded: Servers) -> None:
    """The error comes after the time-out, since the servers don't answer such a request."""
    [address] = guarded.addresses
    engine = JetStream(address.replace("//", "//bob:right@"), "orders", timeout=0.5, attempt_timeout=0.2)
    with pytest.raises(OSError, match="permissions violation for publish"):
        await EventLog.open(engine)


async def test_the_error_says_that_servers_have_no_jetstream(own_servers: Callable[[], Servers]) -> None:
    servers = own_servers()
    servers.all[0].configure(jetstream=False)
    servers.all[0].restart()
    with pytest.raises(OSError, match="JetStream is not enabled"):
        await EventLog.open(JetStream(servers.addresses, "orders", timeout=0.5, attempt_timeout=0.2))


async def test_an_unavailable_server_is_an_error_after_the_timeout(caplog: pytest.LogCaptureFixture) -> None:
    """The error says why and what to check; before that, a warning says what the program waits for."""
    [port] = free_ports(1)
    engine = JetStream(f"nats://127.0.0.1:{port}", "orders", timeout=0.5, attempt_timeout=0.2)
    with pytest.raises(OSError, match=r"for 0.5 s \(Connect call failed.*check the address"):
        await EventLog.open(engine)
    [record] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "trying for up to 0.5 s: ConnectionRefusedError" in record.getMessage()
