"""Runs the command `eventfold` as a user does: in a pipe and on a terminal."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from eventfold import Event, EventLog, EventReader, View

COMMAND = [sys.executable, "-m", "eventfold"]
QUESTION = b"[y/N] "
# Makes standard input the controlling terminal, so that Ctrl-C ends this process, and becomes the command.
ON_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def run(*args: object, input: str | bytes = b"", status: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs the command with its output in pipes; it must exit with `status` and show no traceback."""
    given = input.encode() if isinstance(input, str) else input
    done = subprocess.run([*COMMAND, *map(str, args)], input=given, capture_output=True, timeout=60)
    out, error = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in error
    assert done.returncode == status, error
    return subprocess.CompletedProcess(done.args, done.returncode, out, error)


def run_on_terminal(*args: object, answers: Sequence[str] = (), status: int = 0) -> str:
    """Returns what the command shows on a terminal, where each of its questions gets the next answer."""
    main, terminal = pty.openpty()
    left = list(answers)
    with subprocess.Popen(
        [sys.executable, "-S", "-c", ON_TERMINAL, *COMMAND, *map(str, args)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm"},
        start_new_session=True,
    ) as process:
        os.close(terminal)
        shown = bytearray()
        killer = threading.Timer(60, process.kill)
        killer.start()
        try:
            while data := os.read(main, 65536):
                shown += data
                if shown.endswith(QUESTION):
                    os.write(main, left.pop(0).encode())
        except OSError:  # Linux raises this when no process has the terminal open any more.
            pass
        finally:
            killer.cancel()
        assert process.wait(60) == status, shown.decode()
    os.close(main)
    assert not left, shown.decode()
    return shown.decode()


def start(*args: object) -> subprocess.Popen[bytes]:
    """Starts the command."""
    return subprocess.Popen(
        [*COMMAND, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def make(dir: Path, events: int = 20, *, rotate: bool = True) -> None:
    """Creates a log with two types, tags and times, partly archived."""

    def count(state: int, event: Event) -> int:
        return state + 1

    async def write() -> None:
        async with EventLog.open(dir, views=[View("count", count, 0)]) as log:
            for n in range(events):
                await log.append(Event("odd" if n % 2 else "even", {"n": n}, ts=1000 + n, tags=(f"n:{n % 5}",)))
                if rotate and n == events // 2:
                    await log.rotate()
            async for record in (consumer := log.consumer("mailer")):
                await consumer.commit(record)
                break
            await log.refresh_all()

    asyncio.run(write())


def lines(dir: Path) -> list[bytes]:
    """Returns the lines of a log."""

    async def read() -> list[bytes]:
        return [record._line[:-1] async for record in EventReader(dir).read_full()]

    return asyncio.run(read())


def numbers(output: str) -> list[int]:
    """Returns the `n` of each event in lines of JSON."""
    return [json.loads(line)["data"]["n"] for line in output.splitlines()]
