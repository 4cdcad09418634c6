"""The parent's side of the protocol of contenders (see `benchmarks.contenders`)."""

from __future__ import annotations

import json
import selectors
import shlex
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[1]
# The built-in contenders, by the names of their modules.
BUILT_IN = ("raw", "eventfold", "sqlite", "sqlite_shared", "eventsourcing", "jsonl", "umadb")
# Seconds to wait for an answer.
PATIENCE = 1800.0

Answer = dict[str, Any]


class ContenderError(Exception):
    """A contender failed, or doesn't follow the protocol."""


class Contender:
    """A contender and its process, which is started at the first request."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def __repr__(self) -> str:
        return f"<Contender {self.name}: {shlex.join(self._command)}>"

    @classmethod
    def built_in(cls, name: str, loop: str) -> Contender:
        return cls(name, [sys.executable, "-m", f"benchmarks.contenders.{name}", "--loop", loop])

    @classmethod
    def from_option(cls, option: str) -> Contender:
        """The contender that an option `NAME=COMMAND` describes."""
        name, separator, command = option.partition("=")
        if not (name and separator and command.strip()) or name in BUILT_IN:
            raise ValueError(f"--contender takes NAME=COMMAND, with a name that isn't taken, not {option!r}")
        return cls(name, shlex.split(command))

    def again(self) -> Contender:
        """The same contender in another process."""
        return Contender(self.name, self._command)

    def __enter__(self) -> Contender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, do: str, **fields: Any) -> Answer | None:
        """The answer to a request; None if the contender can't do it."""
        self.request(do, **fields)
        return self.answer()

    def request(self, do: str, **fields: Any) -> None:
        if self._process is None:
            pipe = subprocess.PIPE
            directory = ROOT if self._command[0] == sys.executable else None
            try:
                self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, bufsize=0, cwd=directory)
            except OSError as error:
                raise ContenderError(f"{self.name} could not be started: {error}") from None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
        except BrokenPipeError:
            raise ContenderError(f"{self.name} ended before it was asked to {do}") from None

    def answer(self) -> Answer | None:
        try:
            answer = json.loads(self._line())
        except json.JSONDecodeError as error:
            raise ContenderError(f"{self.name} answered with something other than JSON: {error}") from None
        if not isinstance(answer, dict):
            raise ContenderError(f"{self.name} answered with something other than a JSON object: {answer!r}")
        if "error" in answer:
            raise ContenderError(f"{self.name} failed: {answer['error']}")
        return None if answer.get("unsupported") else answer

    def _line(self) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(PATIENCE):
                    raise ContenderError(f"{self.name} did not answer for {PATIENCE:.0f} seconds")
                if not (data := self._process.stdout.read(65_536)):
                    raise ContenderError(f"{self.name} ended without an answer, with {self._process.wait()}")
                self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def close(self) -> None:
        """Ends the process by closing its input."""
        if self._process is None:
            return
        process, self._process = self._process, None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
