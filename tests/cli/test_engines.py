"""The commands on a log that another engine keeps: what works on any log works there, and the rest is refused."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import subprocess
from pathlib import Path

import pytest
from tests.cli.commands import COMMAND, numbers, run
from tests.jetstream.servers import Servers

from eventfold import Event, EventLog, View
from eventfold.jetstream import JetStream

_logs = itertools.count()


@pytest.fixture
def address(nats_server: Servers) -> str:
    """That of a log which is not there yet."""
    return f"{nats_server.addresses[0]}/commands{next(_logs)}"


def added(n: int) -> Event:
    return Event("added", {"n": n}, ts=n)


def test_the_commands_work_on_another_engine_or_say_why_not(address: str, tmp_path: Path) -> None:
    run("append", address, input="".join(f'{{"type":"added","data":{{"n":{n}}}}}\n' for n in range(3)))

    shown = run("cat", address, "--last", 2).stdout
    assert numbers(shown) == [1, 2]
    report = json.loads(run("verify", address, "--json").stdout)
    assert (report["events"], report["size"], report["problems"]) == (3, len(run("export", address).stdout), [])
    assert json.loads(run("info", address, "--json").stdout)["files"] is None
    for refused in (["rotate"], ["repair"], ["backup", tmp_path / "copy"], ["index", "build"]):
        at = [refused[0], address, *refused[1:]] if refused[0] != "index" else [*refused, address]
        error = run(*at, status=1).stderr
        assert error.count("\n") == 1
        assert address in error


@pytest.mark.parametrize("command", [["cat"], ["info"], ["tail"], ["verify"], ["consumers", "list"]], ids=" ".join)
def test_a_log_that_is_not_there_is_an_error_and_is_not_made(address: str, command: list[str]) -> None:
    """A slip of the pen must leave nothing on the servers."""
    for _ in range(2):
        error = run(*command, address, status=1).stderr
        assert "there is no stream" in error
        assert error.count("\n") == 1


def test_an_event_is_appended_on_a_condition(address: str) -> None:
    run("append", address, "added", '{"n":0}', "--tag", "order:1")
    offset, line_hash = json.loads(run("info", address, "--json").stdout)["head"]

    for refused in (["--if-head", f"{offset + 1}:{line_hash}"], ["--unless-tag", "order:1"]):
        assert run("append", address, "added", '{"n":1}', *refused, status=1).stderr.count("\n") == 1
    told = json.loads(run("append", address, "added", '{"n":2}', "--if-head", f"{offset}:{line_hash}").stdout)

    assert told["start_offset"] == offset
    assert numbers(run("cat", address).stdout) == [0, 2]


def test_lines_are_appended_up_to_the_first_bad_one(address: str) -> None:
    lines = [f'{{"type":"added","data":{{"n":{n}}}}}' for n in range(1500)]
    error = run("append", address, input="\n".join([*lines, '{"typ":"added"}', *lines]), status=1).stderr

    assert "line 1501" in error
    assert numbers(run("cat", address).stdout) == list(range(1000))


def test_a_tail_shows_each_new_event_until_it_is_interrupted(address: str) -> None:
    run("append", address, "added", '{"n":0}')
    with subprocess.Popen([*COMMAND, "tail", address, "-f"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert numbers(process.stdout.readline().decode()) == [0]
        run("append", address, "added", '{"n":1}')
        assert numbers(process.stdout.readline().decode()) == [1]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == b""


def test_info_and_verify_tell_of_views_and_consumers(address: str) -> None:
    """And of a snapshot and a place that are not of this log."""

    async def fill() -> None:
        view = View("total", lambda state, event: state + event.data["n"], 0)
        async with EventLog.open(JetStream.from_address(address), views=[view]) as log:
            await log.append_many([added(n) for n in range(4)])
            consumer = log.consumer("mailer")
            await consumer.commit(await anext(consumer))
            await log.refresh_all()

    async def spoil() -> None:
        async with EventLog.open(JetStream.from_address(address)) as log:
            documents = log.reader().documents
            await documents.store("view", "total", b"nonsense")
            await documents.store("consumer", "mailer", b'{"offset":1,"hash":"0000000000000000"}')

    asyncio.run(fill())
    told = json.loads(run("info", address, "--json").stdout)
    assert [view["name"] for view in told["views"]] == ["total"]
    assert [consumer["name"] for consumer in told["consumers"]] == ["mailer"]
    assert run("consumers", "list", address).stdout.startswith("mailer\t")
    report = json.loads(run("verify", address, "--json").stdout)
    assert (report["events"], report["snapshots"], report["consumers"], report["problems"]) == (4, 1, 1, [])

    asyncio.run(spoil())
    problems = json.loads(run("verify", address, "--json", status=1).stdout)["problems"]
    assert len(problems) == 2
    run("consumers", "reset", address, "mailer", "--to", "start")
    assert "mailer" not in run("consumers", "list", address).stdout


def test_a_log_whose_offsets_do_not_count_bytes_is_not_copied(address: str, tmp_path: Path) -> None:
    run("append", address, "added", '{"n":0}')

    assert "don't count bytes" in run("copy", address, tmp_path / "copy", status=1).stderr
    assert "there is no stream" in run("copy", address + "x", tmp_path / "other", status=1).stderr
    assert not (tmp_path / "other").exists()
    exported = run("export", address).stdout
    run("import", tmp_path / "imported", input=exported)
    assert run("export", tmp_path / "imported").stdout == exported
