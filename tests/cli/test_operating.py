"""The commands `repair`, `restore`, `index` and `export` to rows, and completion in a shell."""

from __future__ import annotations

import asyncio
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import termios
from pathlib import Path
from select import select
from time import monotonic, sleep

import pytest
from pyarrow import parquet
from tests.cli.commands import COMMAND, lines, make, run, run_on_terminal, start
from tests.support import line, write_log

from eventfold import EventReader
from eventfold._backup import backup

GARBAGE = b'{"type":"a\0\n' * 4


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log with 20 events."""
    make(tmp_path / "log")
    return tmp_path / "log"


@pytest.fixture
def damaged(log: Path) -> Path:
    """A log with 20 events, followed by bad lines."""
    with (log / "app.jsonl").open("ab") as file:
        file.write(GARBAGE)
    return log


def offset_of(log: Path, n: int) -> int:
    """Returns the offset at which the n-th line begins."""
    return sum(len(one) + 1 for one in lines(log)[:n])


# repair


def test_repair_shows_its_plan_and_changes_nothing_in_a_pipe(damaged: Path) -> None:
    before = (damaged / "app.jsonl").read_bytes()

    done = run("repair", damaged, status=1, input="y\n")

    assert f"cut {damaged / 'app.jsonl'} at offset " in done.stdout
    assert "nothing was changed: add --yes" in done.stderr
    assert (damaged / "app.jsonl").read_bytes() == before


def test_repair_asks_before_each_repair(log: Path) -> None:
    """Declined repairs are not made, and the exit status is 1."""
    snapshot, consumer = log / "views" / "count.snapshot.json", log / "consumers" / "mailer.json"
    snapshot.write_bytes(b"{}")
    consumer.write_bytes(b"{}")

    shown = run_on_terminal("repair", log, answers=["no\n", "yes\n"], status=1)

    assert f"delete the snapshot {snapshot}" in "".join(shown.splitlines())
    assert "make consumer mailer continue from offset 0" in shown
    assert shown.count("Do this?") == 2
    assert snapshot.exists()
    assert not consumer.exists()


def test_ctrl_c_at_a_question_changes_nothing(damaged: Path) -> None:
    before = (damaged / "app.jsonl").read_bytes()

    shown = run_on_terminal("repair", damaged, answers=["\x03"], status=130)

    assert "Traceback" not in shown
    assert (damaged / "app.jsonl").read_bytes() == before


def test_repair_loses_events_only_if_their_offset_is_named(log: Path) -> None:
    path = log / "app.jsonl"
    offset = offset_of(log, 15)
    path.write_bytes(path.read_bytes().replace(b'"n":15', b'"n":\0' + b"5"))

    done = run("repair", log, "--yes", status=1)
    assert "4 valid events after the damage would be lost" in done.stdout
    assert f"add --lose-events-from {offset}" in done.stderr
    assert not list(log.glob("*.torn.*"))

    # The snapshot's offset was in the part that was cut, so it is dropped next.
    done = run("repair", log, "--yes", "--lose-events-from", offset)
    assert "delete the snapshot" in done.stdout
    assert done.stdout.endswith("no problem is left\n")
    assert len(lines(log)) == 15
    assert (log / f"app.jsonl.torn.{offset}").read_bytes().count(b"\n") == 5


def test_problems_that_cannot_be_repaired_are_reported(log: Path) -> None:
    path = log / "archive.jsonl.zst"
    path.write_bytes(path.read_bytes()[:-10])

    done = run("repair", log, "--yes", status=1)

    assert f"eventfold: this can't be repaired, so restore a backup: {path}, offset " in done.stderr


# restore


def test_a_backup_is_restored(log: Path, tmp_path: Path) -> None:
    asyncio.run(backup(EventReader(log), tmp_path / "backup"))

    output = json.loads(run("restore", tmp_path / "backup", tmp_path / "new").stdout)

    assert output["directory"] == str(tmp_path / "new")
    assert lines(tmp_path / "new") == lines(log)


# index


def test_an_index_is_built_and_dropped(log: Path) -> None:
    output = json.loads(run("index", "build", log).stdout)
    assert output["offset"] == offset_of(log, 20)
    assert (log / "index.sqlite").exists()

    run("index", "drop", log)
    assert not (log / "index.sqlite").exists()


# export


def test_a_log_is_exported_as_parquet_through_a_pipe(log: Path) -> None:
    done = subprocess.run([*COMMAND, "export", str(log), "--format", "parquet"], capture_output=True, timeout=60)

    table = parquet.read_table(io.BytesIO(done.stdout))
    assert [json.loads(data)["n"] for data in table["data"].to_pylist()] == list(range(20))
    assert done.stderr == b""


def test_parquet_is_not_written_to_a_terminal(log: Path) -> None:
    assert "Parquet is binary" in run_on_terminal("export", log, "--format", "parquet", status=1)


def test_a_closed_pipe_ends_an_export_quietly(tmp_path: Path) -> None:
    """pyarrow tries to write the end of its file when its writer is collected; that must stay silent."""
    write_log(tmp_path, *map(line, range(3000)))
    with start("export", tmp_path, "--format", "parquet") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""


def bytes_in(pipe: int) -> int:
    """Returns the number of bytes that can be read from a pipe."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def check_interrupted(process: subprocess.Popen[bytes]) -> None:
    """Asserts that a command ends as on Ctrl-C, without a message."""
    assert process.stderr is not None
    try:
        assert process.wait(20) == 130
    finally:
        process.kill()
    assert process.stderr.read() == b""


@pytest.mark.parametrize("command", [["cat"], ["export"], ["export", "--format", "csv"], ["tail", "-f", "--from", "0"]])
def test_ctrl_c_ends_a_command_whose_output_is_not_read(tmp_path: Path, command: list[str]) -> None:
    """A pager that shows its first page, for example, ignores Ctrl-C."""
    write_log(tmp_path, *map(line, range(20_000)))
    reading, writing = os.pipe()
    with subprocess.Popen(
        [*COMMAND, *command, tmp_path], stdout=writing, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stderr is not None
        deadline, unread = monotonic() + 60, 0
        # Until the command waits in a write.
        while select([], [writing], [], 0)[1] or unread != (unread := bytes_in(reading)):
            assert monotonic() < deadline
            sleep(0.1)
        process.send_signal(signal.SIGINT)
        check_interrupted(process)
    os.close(reading)
    os.close(writing)


# completion

SCRIPT = """
eval "$(eventfold --show-completion bash)"
complete_last() {
    COMP_WORDS=(eventfold "$@")
    COMP_CWORD=$#
    COMPREPLY=()
    _eventfold_completion eventfold
    echo "${COMPREPLY[@]}"
}
complete_last re
complete_last index build da
"""


def test_bash_completes_commands_and_the_directories_of_logs(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "eventfold").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m eventfold "$@"\n')
    (tmp_path / "eventfold").chmod(0o755)

    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )

    assert done.stderr == ""
    assert [sorted(row.split()) for row in done.stdout.splitlines()] == [
        ["rebuild", "repair", "restore"],
        ["data/"],
    ]


# A signal, and then a write for which the pipe has too little room.
INTERRUPTED_BEFORE_WRITE = """
import asyncio, os, signal, sys
from eventfold.cli._run import run

def write():
    sys.stdout.buffer.write(bytes(10**6))

async def command():
    os.kill(os.getpid(), signal.SIGINT)
    {write}

run(command())
"""


@pytest.mark.parametrize("write", ["write()", "await asyncio.shield(asyncio.to_thread(write))"])
def test_ctrl_c_right_before_a_write_that_waits_for_its_reader_ends_the_command(write: str) -> None:
    """The pipe still had room when the signal arrived."""
    reading, writing = os.pipe()
    program = INTERRUPTED_BEFORE_WRITE.replace("{write}", write)
    with subprocess.Popen([sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE) as process:
        check_interrupted(process)
    os.close(reading)
    os.close(writing)
