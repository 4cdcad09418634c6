"""Runs the example programs in a test's directory: to their end, as processes, or as servers."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import NamedTuple

import httpx
import pytest
from tests.support import free_port

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
WITHIN = 60  # seconds that a program may take for one step


class Done(NamedTuple):
    """A program that has ended: its exit status and its output."""

    returncode: int
    stdout: str
    stderr: str


def run(name: str, *arguments: str, cwd: Path) -> Done:
    """Runs a program to its end, in this process, since most programs take less time than starting Python does."""
    out, err = io.StringIO(), io.StringIO()
    status: str | int | None = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        patch.syspath_prepend(EXAMPLES)  # The interpreter puts a program's directory on this path.
        try:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code
    if isinstance(status, str):  # as the interpreter does it
        err.write(f"{status}\n")
        status = 1
    return Done(status or 0, out.getvalue(), err.getvalue())


def output(name: str, *arguments: str, cwd: Path) -> str:
    """Returns the output of a program that must succeed."""
    done = run(name, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def complaint(name: str, *arguments: str, cwd: Path) -> str:
    """Returns the error message of a program that must fail, with a single line and no traceback."""
    done = run(name, *arguments, cwd=cwd)
    assert done.returncode == 1, (done.returncode, done.stdout)
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.strip()


@contextmanager
def process(name: str, *arguments: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """Starts a program in a separate process, with pipes, and kills it at the end if it is still running."""
    command = [sys.executable, EXAMPLES / f"{name}.py", *arguments]
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


class Server:
    """A running server: its address and its process."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def stop(self, number: int = signal.SIGINT) -> float:
        """Sends the signal to the process and its children, as a terminal does on Ctrl-C; returns the seconds."""
        since = monotonic()
        os.killpg(self.process.pid, number)
        self.process.wait(WITHIN)
        return monotonic() - since


@contextmanager
def served(name: str, *options: str, cwd: Path, port: int = 0, **environment: str) -> Iterator[Server]:
    """Runs an example's application in uvicorn, and yields it once it answers."""
    port = port or free_port()
    command = ["-m", "uvicorn", "--app-dir", EXAMPLES, "--log-level", "warning", "--port", str(port), f"{name}:app"]
    process = subprocess.Popen(
        [sys.executable, *command, *options], cwd=cwd, env=os.environ | environment, start_new_session=True
    )
    try:
        until = monotonic() + WITHIN
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/", verify=False)
                break
            except httpx.TransportError:
                assert monotonic() < until, "the server does not answer"
                assert process.poll() is None, "the server has ended"
                sleep(0.02)
        yield Server(process, port)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
