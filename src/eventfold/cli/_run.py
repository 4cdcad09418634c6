"""What all commands share: how they run and exit, and how they open a log."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from select import select
from time import sleep
from types import FrameType
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from .._address import engine_of
from .._engine import CreatingEngine, Engine
from .._errors import CorruptLogError, EventfoldError
from .._reader import EventReader

FAILED, INTERRUPTED, CLOSED_PIPE = 1, 130, 141
SHOW_CURSOR = b"\x1b[?25h"
# After Ctrl-C, output counts as blocked if this many checks in a row, this many seconds apart, find it blocked.
_BLOCKED_CHECKS, _CHECK_INTERVAL = 5, 0.1


def run(command: Coroutine[Any, Any, int | None]) -> None:
    """Runs a command, prints its error if it fails, and raises `typer.Exit` with its exit status."""
    try:
        with _interrupt_watcher():
            status = asyncio.run(_interruptible(command))
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        # The reader has closed the pipe. Python would report an error at exit if it could not flush its buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = CLOSED_PIPE
    except CorruptLogError as error:
        print_error(f"{error} (`eventfold verify` lists everything that is wrong)")
        status = FAILED
    except OSError as error:
        prefix = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        print_error(f"{prefix}{error.strerror or error}")
        status = FAILED
    except (EventfoldError, ValueError) as error:
        print_error(str(error))
        status = FAILED
    raise typer.Exit(status or 0)


async def _interruptible(command: Coroutine[Any, Any, int | None]) -> int | None:
    """Runs the command. Ctrl-C cancels it; a second Ctrl-C, or one while output is blocked, kills the process.

    A blocked write to a pipe, such as to a pager that shows its first page, can't be cancelled. Killing the process is
    as safe for the log as any other crash. If the write blocks only after the signal, or before its handler runs, the
    thread of `_interrupt_watcher` notices that.
    """
    cancel = signal.getsignal(signal.SIGINT)
    interrupted = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted or _output_is_blocked():
            _kill()
        interrupted = True
        if callable(cancel):
            cancel(number, frame)

    if callable(cancel):  # otherwise, the process was started with SIGINT ignored
        signal.signal(signal.SIGINT, on_signal)
    return await command


@contextmanager
def _interrupt_watcher() -> Iterator[None]:
    """Runs a thread that kills the process if output is blocked after Ctrl-C."""
    if not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    signals, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    previous = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(signals,), name="eventfold interrupts", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(wakeup)


def _watch(signals: int) -> None:
    while numbers := os.read(signals, 1):
        if numbers[0] == signal.SIGINT:
            blocked = 0
            while blocked < _BLOCKED_CHECKS:
                sleep(_CHECK_INTERVAL)
                blocked = blocked + 1 if _output_is_blocked() else 0
            _kill()
    os.close(signals)


def _output_is_blocked() -> bool:
    try:
        return not select([], [1], [], 0)[1]
    except OSError:  # standard output is closed
        return False


def _kill() -> NoReturn:
    if sys.stderr.isatty():
        os.write(2, SHOW_CURSOR)  # a progress bar may have hidden it
    os._exit(INTERRUPTED)


def print_error(message: str) -> None:
    """Prints one line to standard error."""
    print(f"eventfold: {printable(message)}", file=sys.stderr)


def printable(text: str) -> str:
    """The text with escaped control characters, which could move a terminal's cursor or change its colours."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def existing(address: str) -> Engine:
    """Returns the engine of a log that must exist, and which is not created."""
    engine = engine_of(address)
    return engine.existing() if isinstance(engine, CreatingEngine) else engine


@asynccontextmanager
async def reading(address: str) -> AsyncIterator[EventReader]:
    """Opens a reader of a log that must exist. Raises `EventfoldError` if its directory does not."""
    reader = EventReader(existing(address))
    try:
        directory = reader.dir
    except EventfoldError:
        directory = None  # the log is not in files, and its engine itself reports a missing log
    if directory is not None and not directory.is_dir():
        raise EventfoldError(f"there is no log in {address}: name the directory that contains app.jsonl")
    try:
        yield reader
    finally:
        await reader._source.aclose()


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], object] | None]:
    """A progress bar on a terminal, with the rate and the remaining time; None if standard error is not a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(what, *columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)
