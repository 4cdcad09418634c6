"""The command `eventfold`, run as users run it: in a pipe and on a terminal."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from tests.cli.commands import COMMAND, lines, make, numbers, run, run_on_terminal, start

import eventfold
from eventfold import Event, EventLog


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log with 20 events."""
    make(tmp_path / "log")
    return tmp_path / "log"


def test_cat_prints_the_exact_lines_in_a_pipe(log: Path) -> None:
    """The lines of the archive are included."""
    assert run("cat", log).stdout.encode() == b"".join(line + b"\n" for line in lines(log))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--type", "odd"), range(1, 20, 2)),
        (("--type", "odd", "--type", "even"), range(20)),
        (("--tag", "n:3"), (3, 8, 13, 18)),
        (("--tag", "n:3", "--type", "odd"), (3, 13)),
        (("--last", "3"), (17, 18, 19)),
        (("--last", "15"), range(5, 20)),
        (("--last", "2", "--tag", "n:3"), (13, 18)),
        (("--last", "100"), range(20)),
        (("--limit", "3"), (0, 1, 2)),
        (("--limit", "0"), ()),
        (("--since", "1015"), range(15, 20)),
        (("--until-time", "1970-01-01T00:16:45Z"), range(5)),
    ],
)
def test_cat_selects(log: Path, options: tuple[str, ...], expected: object) -> None:
    """Events can be selected by type, tag, time and number."""
    assert numbers(run("cat", log, *options).stdout) == list(expected)  # type: ignore[call-overload]


def test_cat_selects_by_offset(log: Path) -> None:
    """The output starts at one offset and ends before another."""
    first, second = (sum(len(line) + 1 for line in lines(log)[:n]) for n in (5, 15))

    assert numbers(run("cat", log, "--from", first, "--until", second).stdout) == list(range(5, 15))
    assert numbers(run("cat", log, "--until", second, "--last", 2).stdout) == [13, 14]


def test_json_is_short_for_the_exact_lines(log: Path) -> None:
    assert run_on_terminal("cat", log, "--json", "--last", 1).encode().splitlines() == lines(log)[-1:]
    assert (
        run("tail", log, "--json", "--since", 1018, "--until-time", 1019).stdout.encode().splitlines()
        == lines(log)[18:19]
    )


def test_cat_prints_csv(log: Path) -> None:
    """The first line is a header."""
    rows = list(csv.DictReader(io.StringIO(run("cat", log, "--format", "csv", "--last", "1").stdout)))

    assert [(row["type"], row["ts"], row["data"], row["tags"]) for row in rows] == [
        ("odd", "1019", '{"n":19}', '["n:4"]')
    ]


def test_cat_shows_rows_on_a_terminal_and_escapes_control_characters(tmp_path: Path) -> None:
    """An event can't move the cursor or change colours."""
    run("append", tmp_path, "evil\x1b[2J", '{"a": 1}')

    shown = run_on_terminal("cat", tmp_path)

    assert "evil\\x1b[2J" in shown
    assert "\x1b[2J" not in shown
    assert '{"a":1}' in shown


def test_a_closed_pipe_ends_cat_quietly(tmp_path: Path) -> None:
    """An example is `eventfold cat | head -1`."""
    make(tmp_path, 3000, rotate=False)
    with start("cat", tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""


def test_tail_prints_the_last_events(log: Path) -> None:
    """The default is ten events; an option changes the number."""
    assert numbers(run("tail", log).stdout) == list(range(10, 20))
    assert numbers(run("tail", log, "-n", 2, "--type", "odd").stdout) == [17, 19]
    assert numbers(run("tail", log, "--from", 0).stdout) == list(range(20))


def test_tail_follows_a_log_that_is_being_written_until_it_is_interrupted(log: Path) -> None:
    """Events that another process appends appear at once, and Ctrl-C ends the command without a message."""
    with start("tail", "-f", log, "-n", 1) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert numbers(process.stdout.readline().decode()) == [19]
        run("append", log, "odd", '{"n": 20}')
        assert numbers(process.stdout.readline().decode()) == [20]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == b""


def test_append_writes_an_event_and_prints_its_offsets(tmp_path: Path) -> None:
    """The options can set every field of an event."""
    options = ("--ts", 7, "--id", "a", "--actor", "ann", "--meta", "[1]", "--tag", "x", "--tag", "y")
    done = run("append", tmp_path, "paid", '{"amount": 3}', *options)

    line = b'{"type":"paid","data":{"amount":3},"ts":7,"id":"a","actor":"ann","meta":[1],"tags":["x","y"]}'
    assert lines(tmp_path) == [line]
    assert json.loads(done.stdout)["end_offset"] == len(line) + 1


def test_append_refuses_data_that_is_not_json(tmp_path: Path) -> None:
    """One line says how to write it."""
    done = run("append", tmp_path, "paid", "amount=3", status=1)

    assert done.stderr.startswith("eventfold: DATA is not JSON")
    assert done.stderr.count("\n") == 1


def test_append_if_head_appends_only_once(log: Path) -> None:
    """`info` prints the head to pass."""
    found = json.loads(run("info", log, "--json").stdout)
    head = f"{found['head'][0]}:{found['head'][1]}"

    run("append", log, "odd", '{"n": 20}', "--if-head", head)
    done = run("append", log, "odd", '{"n": 21}', "--if-head", head, status=1)

    assert "expected the head at offset" in done.stderr
    assert len(lines(log)) == 21


def test_append_reads_lines_from_standard_input(tmp_path: Path) -> None:
    """The last line may lack its newline."""
    done = run("append", tmp_path, input='{"type":"a","data":1}\n{"type":"b","ts":5,"tags":["x"]}')

    assert len(done.stdout.splitlines()) == 2
    assert [json.loads(line)["type"] for line in lines(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize(
    "bad", ["nonsense", "{}", '{"type":""}', '{"type":"a","extra":1}', '{"type":"a","ts":-1}', "", "\udcff"]
)
def test_a_bad_line_is_refused_with_its_number_and_nothing_of_its_batch_is_written(tmp_path: Path, bad: str) -> None:
    """The good lines before it are not written either."""
    given = f'{{"type":"a"}}\n{bad}\n{{"type":"b"}}\n'.encode(errors="surrogateescape")

    done = run("append", tmp_path, input=given, status=1)

    assert done.stderr.startswith("eventfold: line 2: ")
    assert "nothing was written from line 1 on" in done.stderr
    assert lines(tmp_path) == []


def test_lines_that_arrive_slowly_are_written_as_they_arrive(tmp_path: Path) -> None:
    """A pipe may stay open for days, and Ctrl-C ends the waiting."""
    with start("append", tmp_path) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        for n in range(2):
            process.stdin.write(b'{"type":"a"}\n')
            process.stdin.flush()
            process.stdout.readline()
            assert len(lines(tmp_path)) == n + 1
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == b""


@pytest.mark.parametrize("command", [("append", "odd"), ("rotate",)])
def test_a_locked_log_is_refused_in_one_line(log: Path, command: tuple[str, ...]) -> None:
    """The line names the process that holds the lock."""

    async def refused() -> subprocess.CompletedProcess[str]:
        async with EventLog.open(log):
            return await asyncio.to_thread(run, command[0], log, *command[1:], status=1)

    done = asyncio.run(refused())

    assert f"is locked by another writer in process {os.getpid()}" in done.stderr
    assert done.stderr.count("\n") == 1


def test_commands_that_read_work_while_a_writer_is_running(log: Path) -> None:
    """`info` names the writing process."""

    async def read() -> list[str]:
        async with EventLog.open(log):
            commands = [("info", log), ("cat", log), ("verify", log), ("backup", log, log.parent / "copy")]
            return [(await asyncio.to_thread(run, *command)).stdout for command in commands]

    output, events, verified, _ = asyncio.run(read())

    assert f"process {os.getpid()}" in output
    assert len(events.splitlines()) == 20
    assert verified.startswith("no problem: 20 events")
    assert lines(log.parent / "copy") == lines(log)


def test_info_says_what_is_a_view_and_what_a_consumer(log: Path) -> None:
    """A line in a pipe has no heading above it, so it begins with the kind."""
    rows = [row.split("\t")[:2] for row in run("info", log).stdout.splitlines()]

    assert rows[-2:] == [["view", "count"], ["consumer", "mailer"]]


def test_info_prints_the_same_on_a_terminal(log: Path) -> None:
    """On a terminal, the output has tables."""
    shown = run_on_terminal("info", log)

    assert "mailer" in shown
    assert "count" in shown
    assert shown.startswith("log ")


def test_info_shows_a_rate_of_growth_without_an_exponent(tmp_path: Path) -> None:
    """Rates of a thousand or more are whole numbers; smaller ones have three digits."""

    async def write() -> None:
        async with EventLog.open(tmp_path / "log") as log:
            await log.append_many([Event("counted", "x" * 1000, ts=0)] * 5 + [Event("counted", ts=300)])

    asyncio.run(write())

    rate = dict(row.split("\t") for row in run("info", tmp_path / "log").stdout.splitlines())["a day"]
    assert re.fullmatch(r"\d{7} bytes, 1728 events, on average", rate)


def test_verify_reports_damage_and_exits_with_1(log: Path) -> None:
    """The report has the file and the offset; `cat` prints the events before the damage and then the error."""
    path = log / "app.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"n":15', b'"n":\0' + b"5"))

    done = run("verify", log, status=1)
    read = run("cat", log, status=1)

    assert str(path) in done.stdout
    assert "1 problem: " in done.stdout
    assert numbers(read.stdout) == list(range(15))
    assert read.stderr.startswith(f"eventfold: {path}, offset ")
    assert "eventfold verify" in read.stderr


def test_rotate_moves_all_events_into_the_archive(log: Path) -> None:
    """Everything else stays the same."""
    before = lines(log)

    run("rotate", log)

    assert (log / "app.jsonl").stat().st_size == 0
    assert lines(log) == before


def test_consumers_are_listed_and_reset(log: Path) -> None:
    """A consumer can be set to the start, to the head, or to an offset."""
    name, offset, lag = run("consumers", "list", log).stdout.strip().split("\t")
    assert (name, lag.endswith("bytes")) == ("mailer", True)

    run("consumers", "reset", log, "mailer", "--to", "head")
    assert run("consumers", "list", log).stdout.endswith("\t0 bytes\n")
    run("consumers", "reset", log, "mailer", "--to", offset)
    assert run("consumers", "list", log).stdout.split("\t")[1] == offset
    assert "offset 3 is not where a line begins" in run("consumers", "reset", log, "mailer", "--to", 3, status=1).stderr
    run("consumers", "reset", log, "mailer", "--to", "start")
    assert run("consumers", "list", log).stdout == ""
    assert "there are: none" in run("consumers", "reset", log, "nobody", "--to", "head", status=1).stderr


def test_state_prints_the_state_of_a_snapshot(log: Path) -> None:
    """If there is no snapshot of that name, the error lists the existing ones."""
    assert run("state", log, "count").stdout == "20\n"
    assert "stored are: count" in run("state", log, "todos", status=1).stderr


def test_a_backup_is_brought_up_to_date(log: Path, tmp_path: Path) -> None:
    """The same command creates the backup and updates it."""
    run("backup", log, tmp_path / "copy")
    run("append", log, "odd", '{"n": 20}')
    run("rotate", log)

    output = json.loads(run("backup", log, tmp_path / "copy").stdout)

    assert lines(tmp_path / "copy") == lines(log)
    assert output["offset"] == sum(len(line) + 1 for line in lines(log))


def test_export_and_import_give_the_same_lines(log: Path, tmp_path: Path) -> None:
    """The lines are the same byte for byte, and batches stay batches, so the offsets are the same too."""
    run("append", log, input='{"type":"a","data":{"n":1}}\n{"type":"b","data":{"n":2}}\n{"type":"c"}\n')
    exported = run("export", log).stdout

    output = run("import", tmp_path / "other", input=exported)

    assert json.loads(output.stdout) == {"imported": 23}
    assert b'"batch":[2,3]' in lines(tmp_path / "other")[-2]
    assert run("export", tmp_path / "other").stdout == exported


def test_an_import_larger_than_one_read_keeps_batches(tmp_path: Path) -> None:
    """Batches stay batches, even if they are larger than the part that is checked together."""
    given = "".join(f'{{"type":"a","data":{{"n":{n}}}}}\n' for n in range(2500))
    run("append", tmp_path / "one", input=given)
    exported = run("export", tmp_path / "one").stdout

    run("import", tmp_path / "other", input=exported)

    assert run("export", tmp_path / "other").stdout == exported


@pytest.mark.parametrize(
    "bad",
    [
        '{"type": "a","data":{},"ts":1}',
        '{"type":"a","data":{}}',
        '{"type":"a","data":{},"ts":1,"batch":[2,2]}',
        '{"type":"a","data":{},"ts":1,"batch":[1,2]}',
        '{"type":"a","data":{},"ts":1,"unknown":1}',
    ],
)
def test_import_refuses_lines_that_would_not_be_stored_unchanged(tmp_path: Path, bad: str) -> None:
    """Examples are spaces, missing or unknown keys, and broken batches."""
    done = run("import", tmp_path, input=bad + "\n", status=1)

    assert done.stderr.startswith("eventfold: line 1: ")
    assert lines(tmp_path) == []


@pytest.mark.parametrize("command", ["info", "cat", "tail", "verify", "export", "rotate", "state"])
def test_a_missing_log_is_not_created(tmp_path: Path, command: str) -> None:
    """A misspelt path must not look like an empty log."""
    arguments = ["count"] if command == "state" else []

    done = run(command, tmp_path / "none", *arguments, status=1)

    assert "there is no log in" in done.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--from", "3"), "not where a line begins"),
        (("--from", "99999"), "beyond the head"),
        (("--since", "yesterday"), "is not a time"),
    ],
)
def test_the_error_about_a_wrong_option_is_one_line(log: Path, arguments: tuple[str, ...], said: str) -> None:
    """The line says what is wrong."""
    done = run("cat", log, *arguments, status=1)

    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_empty_name_is_refused_because_it_would_be_the_current_directory(tmp_path: Path) -> None:
    """It is usually a variable that is not set."""
    done = subprocess.run([*COMMAND, "append", "", "seen"], cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "empty" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_version_is_printed() -> None:
    assert run("--version").stdout == f"eventfold {eventfold.__version__}\n"


def test_wrong_usage_exits_with_2() -> None:
    run("cat", status=2)
    run("nonsense", status=2)


def test_help_has_the_exit_statuses_and_an_example_of_each_command() -> None:
    text = " ".join(run("--help").stdout.split())

    assert "130 ended by Ctrl-C" in text
    for command in ("info", "cat", "tail", "append", "verify", "rotate", "state", "backup", "export", "import"):
        assert "Example: eventfold" in " ".join(run(command, "--help").stdout.split())


def test_help_says_what_the_value_of_each_option_is() -> None:
    """A value has a name such as TIME, rather than that of its Python type."""
    for command in ("cat", "tail", "append", "state", "migrate", "consumers reset"):
        text = run(*command.split(), "--help").stdout
        assert not re.search(r"^  -.*(<str>|<int range>|<list|TEXT|INTEGER)", text, re.MULTILINE), text


def test_importing_eventfold_imports_nothing_of_the_command_line() -> None:
    """Programs that don't use the command line need not load it."""
    script = "import eventfold, sys; print([m for m in ('typer', 'rich', 'click') if m in sys.modules])"

    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


# Folding

APPLICATION = """
from collections import deque

import pydantic
from eventfold import View

def count(state, event):
    return state + 1

def by_type(state, event):
    state[event.type] = state.get(event.type, 0) + 1
    return state

class Newest(pydantic.BaseModel):
    numbers: deque = deque(maxlen=2)

def keep_newest(state, event):
    state.numbers.append(event.data["n"])
    return state

def keep_types(state, event):
    return state | {event.type}

counted = View("count", count, 0)
newest = View("newest", keep_newest, Newest)
types = View("types", keep_types, set)
objects = View("objects", lambda state, event: state, object)
wrong = View("count", lambda state, event: state + 2, 0)
number = 5
"""


@pytest.fixture
def application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `app`, in the current directory of the command."""
    (tmp_path / "app.py").write_text(APPLICATION)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("application")
def test_a_state_is_folded_with_a_view_or_a_reducer_at_an_offset_or_a_time(tmp_path: Path) -> None:
    make(tmp_path / "data")
    rows = lines(tmp_path / "data")
    third = sum(len(row) + 1 for row in rows[:3])

    assert run("state", tmp_path / "data", "--reducer", "app:counted").stdout == "20\n"
    assert run("state", tmp_path / "data", "--reducer", "app:counted", "--at", third).stdout == "3\n"
    assert run("state", tmp_path / "data", "--reducer", "app:counted", "--at-time", 1005).stdout == "5\n"
    folded = run("state", tmp_path / "data", "--reducer", "app:by_type", "--initial", "{}").stdout
    assert json.loads(folded) == {"even": 10, "odd": 10}


@pytest.mark.usefixtures("application")
def test_a_state_of_any_type_that_a_view_can_save_is_printed_and_compared(tmp_path: Path) -> None:
    """The states themselves are compared, not how they print: a set may print its elements in any order."""
    make(tmp_path / "data")
    end = sum(len(row) + 1 for row in lines(tmp_path / "data"))
    middle = sum(len(row) + 1 for row in lines(tmp_path / "data")[:5])

    assert json.loads(run("state", tmp_path / "data", "--reducer", "app:newest").stdout) == {"numbers": [18, 19]}
    found = json.loads(run("diff", tmp_path / "data", 0, end, "--reducer", "app:newest", status=1).stdout)
    assert (found["before"], found["after"]) == ({"numbers": []}, {"numbers": [18, 19]})
    assert found["differs"].startswith("numbers: ")
    same = json.loads(run("diff", tmp_path / "data", middle, end, "--reducer", "app:types").stdout)
    assert same["differs"] is None
    assert sorted(same["after"]) == ["even", "odd"]


@pytest.mark.usefixtures("application")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reducer", "app:objects"], "can't be printed"),
        (["--reducer", "app"], "MODULE:NAME"),
        (["--reducer", "nowhere:view"], "nowhere"),
        (["--reducer", "app:missing"], "missing"),
        (["--reducer", "app:number"], "neither a View nor a reducer"),
        (["--reducer", "app:by_type"], "--initial"),
        (["--reducer", "app:by_type", "--initial", "{"], "--initial is not JSON"),
        (["--reducer", "app:counted", "--at", "first"], "whole number"),
        (["--reducer", "app:counted", "--at", "7"], "not where a line begins"),
        (["--reducer", "app:counted", "--at", "0", "--at-time", "0"], "both"),
        (["--at", "0"], "--reducer"),
    ],
)
def test_the_error_about_wrong_arguments_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    make(tmp_path / "data")
    error = run("state", tmp_path / "data", *arguments, status=1).stderr
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("application")
def test_a_view_is_compared_at_two_offsets(tmp_path: Path) -> None:
    make(tmp_path / "data")
    end = sum(len(row) + 1 for row in lines(tmp_path / "data"))

    found = run("diff", tmp_path / "data", 0, end, "--reducer", "app:counted", status=1).stdout
    assert (json.loads(found)["before"], json.loads(found)["after"]) == (0, 20)
    assert "20" in json.loads(found)["differs"]
    assert json.loads(run("diff", tmp_path / "data", 0, 0, "--reducer", "app:counted").stdout)["differs"] is None


@pytest.mark.usefixtures("application")
def test_a_view_can_be_compared_at_two_times(tmp_path: Path) -> None:
    make(tmp_path / "data")
    compare = partial(run, "diff", tmp_path / "data", "--reducer", "app:counted")

    found = json.loads(compare("1970-01-01T00:16:43Z", "1970-01-01T00:16:45Z", status=1).stdout)
    assert (found["before"], found["after"]) == (3, 5)
    assert json.loads(compare(0, "1970-01-02", status=1).stdout)["after"] == 20
    assert "neither an offset nor a time" in compare(0, "yesterday", status=1).stderr


@pytest.mark.usefixtures("application")
def test_verify_compares_a_snapshot_with_a_replay(tmp_path: Path) -> None:
    make(tmp_path / "data")

    assert "no problem" in run("verify", tmp_path / "data", "--reducer", "app:counted").stdout
    wrong = run("verify", tmp_path / "data", "--reducer", "app:wrong", status=1).stdout
    assert "its state differs from that of a replay" in wrong


@pytest.mark.usefixtures("application")
def test_a_snapshot_is_rebuilt(tmp_path: Path) -> None:
    make(tmp_path / "data")
    (tmp_path / "data" / "views" / "count.snapshot.json").unlink()

    run("rebuild", tmp_path / "data", "--reducer", "app:counted")
    assert run("state", tmp_path / "data", "count").stdout == "20\n"


@pytest.mark.usefixtures("application")
@pytest.mark.parametrize(("command", "arguments"), [("copy", ["other"]), ("rebuild", ["--reducer", "app:counted"])])
def test_a_long_command_shows_its_progress_only_on_a_terminal(
    tmp_path: Path, command: str, arguments: list[str]
) -> None:
    make(tmp_path / "data")

    bar = run_on_terminal(command, tmp_path / "data", *arguments).partition("{")[0]
    assert f"{command} " in bar
    assert "bytes" in bar
    assert run(command, tmp_path / "data", *arguments).stderr == ""


def test_an_event_is_appended_unless_another_has_its_tags(tmp_path: Path) -> None:
    for status in (0, 1):
        arguments = ("append", tmp_path, "taken", "{}", "--tag", "seat:1", "--unless-tag", "seat:1")
        done = run(*arguments, status=status)
    assert "offset 0" in done.stderr
    assert len(lines(tmp_path)) == 1


def test_a_log_is_copied_with_its_snapshots_and_consumers(tmp_path: Path) -> None:
    make(tmp_path / "data")

    run("copy", tmp_path / "data", tmp_path / "copy")
    assert lines(tmp_path / "copy") == lines(tmp_path / "data")
    assert run("state", tmp_path / "copy", "count").stdout == "20\n"
    assert "mailer" in run("consumers", "list", tmp_path / "copy").stdout
    assert "there is no log" in run("copy", tmp_path / "nowhere", tmp_path / "other", status=1).stderr
    assert not (tmp_path / "other").exists()
