"""Commands on a log of another engine: those that work on any log work there, and the others are refused."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cli.commands import COMMAND, numbers, run
from tests.jetstream.servers import Servers
from tests.postgres.servers import Server

from eventfold import Event, EventLog, Query, View
from eventfold.jetstream import JetStream

_numbers = itertools.count()


def total(state: int, event: Event) -> int:
    return state + int(event.data["n"])


totals = View("totals", total, 0)


@pytest.fixture
def address(nats_server: Servers) -> str:
    """The address of a log that does not exist yet."""
    return f"{nats_server.addresses[0]}/commands{next(_numbers)}"


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
def test_a_missing_log_is_an_error_and_is_not_created(address: str, command: list[str]) -> None:
    """A misspelt address must leave nothing on the servers."""
    for _ in range(2):
        error = run(*command, address, status=1).stderr
        assert "there is no stream" in error
        assert error.count("\n") == 1


def test_an_event_is_appended_conditionally(address: str) -> None:
    run("append", address, "added", '{"n":0}', "--tag", "order:1")
    offset, line_hash = json.loads(run("info", address, "--json").stdout)["head"]

    for refused in (["--if-head", f"{offset + 1}:{line_hash}"], ["--unless-tag", "order:1"]):
        assert run("append", address, "added", '{"n":1}', *refused, status=1).stderr.count("\n") == 1
    output = json.loads(run("append", address, "added", '{"n":2}', "--if-head", f"{offset}:{line_hash}").stdout)

    assert output["start_offset"] == offset
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


def test_info_and_verify_report_views_and_consumers(address: str) -> None:
    """Both commands also report a snapshot and a consumer's offset that don't belong to the log."""

    async def fill() -> None:
        async with EventLog.open(JetStream.from_address(address), views=[View("total", total, 0)]) as log:
            await log.append_many([added(n) for n in range(4)])
            consumer = log.consumer("mailer")
            await consumer.commit(await anext(consumer))
            await log.refresh_all()

    async def spoil() -> None:
        async with EventLog.open(JetStream.from_address(address)) as log:
            documents = log.reader()._documents
            await documents.store("view", "total", b"nonsense")
            await documents.store("consumer", "mailer", b'{"offset":1,"hash":"0000000000000000"}')

    asyncio.run(fill())
    output = json.loads(run("info", address, "--json").stdout)
    assert [view["name"] for view in output["views"]] == ["total"]
    assert [consumer["name"] for consumer in output["consumers"]] == ["mailer"]
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
    assert not list(tmp_path.iterdir())
    exported = run("export", address).stdout
    run("import", tmp_path / "imported", input=exported)
    assert run("export", tmp_path / "imported").stdout == exported


@pytest.fixture
def database(postgres_server: Server) -> Iterator[str]:
    """The address of an empty database, without a log's name."""
    name = f"commands{next(_numbers)}"
    asyncio.run(postgres_server.execute(f"CREATE DATABASE {name}"))
    yield postgres_server.address(name)
    asyncio.run(postgres_server.execute(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def log(database: str) -> str:
    """The address of a log in PostgreSQL that does not exist yet."""
    return f"{database}?log=orders"


def given(count: int) -> str:
    return "".join(f'{{"type":"added","data":{{"n":{n}}},"tags":["n:{n}"]}}\n' for n in range(count))


def test_events_are_appended_to_postgresql_on_their_conditions_and_printed(log: str) -> None:
    run("append", log, input=given(5))
    head = json.loads(run("info", log, "--json").stdout)["head"]
    run("append", log, "added", '{"n": 5}', "--if-head", ":".join(map(str, head)))
    refused = run("append", log, "added", "{}", "--if-head", ":".join(map(str, head)), status=1).stderr
    run("append", log, "added", '{"n": 6}', "--tag", "n:6", "--unless-tag", "n:6")
    run("append", log, "added", '{"n": 6}', "--unless-tag", "n:6", status=1)

    assert "head" in refused
    assert numbers(run("cat", log).stdout) == list(range(7))
    assert numbers(run("cat", log, "--tag", "n:6").stdout) == [6]
    assert numbers(run("tail", log, "-n", 2).stdout) == [5, 6]


def test_a_log_in_postgresql_is_followed(log: str) -> None:
    run("append", log, input=given(2))
    with subprocess.Popen([*COMMAND, "tail", "-f", log], stdout=subprocess.PIPE) as following:
        assert following.stdout is not None
        seen = [following.stdout.readline() for _ in range(2)]
        run("append", log, "added", '{"n": 2}')
        seen.append(following.stdout.readline())
        following.terminate()

    assert [json.loads(line)["data"]["n"] for line in seen] == [0, 1, 2]


def test_views_and_consumers_in_postgresql_are_shown_and_moved(log: str) -> None:
    reducer = f"{__name__}:totals"
    run("append", log, input=given(4))

    async def use() -> None:
        async with EventLog.open(log, views=[totals]) as opened:
            await opened.refresh_all()
            consumer = opened.consumer("mailer")
            await consumer.commit(await anext(consumer))

    asyncio.run(use())
    report = json.loads(run("info", log, "--json").stdout)

    assert [view["name"] for view in report["views"]] == ["totals"]
    assert json.loads(run("state", log, "totals").stdout) == 6
    assert json.loads(run("state", log, "--reducer", reducer).stdout) == 6
    run("rebuild", log, "--reducer", reducer)
    assert run("consumers", "list", log).stdout.startswith("mailer\t")
    run("consumers", "reset", log, "mailer", "--to", "head")
    assert run("consumers", "list", log).stdout.split("\t")[1] == str(report["head"][0])
    run("verify", log, "--reducer", reducer)


def test_a_log_is_copied_to_postgresql_and_back(log: str, tmp_path: Path) -> None:
    run("append", tmp_path / "data", input=given(20))
    exported = run("export", tmp_path / "data").stdout
    run("copy", tmp_path / "data", log)
    run("copy", log, tmp_path / "back")
    run("import", log.replace("orders", "imported"), input=exported)

    for where in (log, tmp_path / "back", log.replace("orders", "imported")):
        assert run("export", where).stdout == exported


def test_verify_reports_a_commit_that_is_missing_in_postgresql(
    log: str, database: str, postgres_server: Server
) -> None:
    for _ in range(3):
        run("append", log, input=given(5))
    assert json.loads(run("verify", log, "--json").stdout)["events"] == 15
    statement = 'DELETE FROM eventfold_commits WHERE start = (SELECT "end" FROM eventfold_commits WHERE start = 0)'
    asyncio.run(postgres_server.execute(statement, database=database.rpartition("/")[2]))

    assert json.loads(run("verify", log, "--json", status=1).stdout)["problems"] != []


def test_the_index_of_a_log_in_postgresql_is_built_and_dropped(log: str) -> None:
    run("append", log, input=given(5))
    head = json.loads(run("info", log, "--json").stdout)["head"]

    async def find() -> list[int]:
        async with EventLog.open(log, index=True) as opened:
            return [record.event.data["n"] async for record in opened.read_from(query=Query(tags={"n:3"}))]

    built = json.loads(run("index", "build", log).stdout)
    assert [built["offset"], built["line_hash"]] == head
    run("index", "drop", log)
    assert "no index" in run("index", "drop", log, status=1).stderr
    assert asyncio.run(find()) == [3]


def test_an_administrator_migrates_the_tables_for_a_role_that_may_not(log: str, postgres_server: Server) -> None:
    as_app = log.replace("admin@", "cliapp@")
    database = log.rpartition("/")[2].partition("?")[0]
    asyncio.run(postgres_server.execute("CREATE ROLE cliapp LOGIN"))
    try:
        refused = run("append", as_app, "added", '{"n": 0}', status=1).stderr
        assert "eventfold migrate" in refused
        assert "CREATE TABLE" in refused
        shown = run("migrate", as_app, "--sql", "--role", "cliapp").stdout
        assert "CREATE TABLE" in shown
        assert "GRANT" in shown
        run("migrate", as_app, status=1)

        assert run("migrate", log, "--role", "cliapp").stdout == shown
        run("append", as_app, "added", '{"n": 0}')
        assert numbers(run("cat", as_app).stdout) == [0]
        assert run("migrate", log).stdout == ""
    finally:
        asyncio.run(postgres_server.execute("DROP OWNED BY cliapp", database=database))
        asyncio.run(postgres_server.execute("DROP ROLE cliapp"))


def test_only_a_log_in_postgresql_is_migrated(tmp_path: Path) -> None:
    assert "only a log in PostgreSQL" in run("migrate", tmp_path / "data", status=1).stderr
    assert not (tmp_path / "data").exists()
