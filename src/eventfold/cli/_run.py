"""What all commands share: how they run and exit, and how they open a log."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from select import select
from types import FrameType
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from .._address import engine_of
from .._engine import Engine, MakesLogs
from .._errors import CorruptLogError, EventfoldError
from .._reader import EventReader

FAILED, INTERRUPTED, CLOSED_PIPE = 1, 130, 141
SHOW_CURSOR = b"\x1b[?25h"


def run(command: Coroutine[Any, Any, int | None]) -> None:
    """Runs a command, prints its error if it fails, and raises `typer.Exit` with its exit status."""
    try:
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
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        print_error(f"{where}{error.strerror or error}")
        status = FAILED
    except (EventfoldError, ValueError) as error:
        print_error(str(error))
        status = FAILED
    raise typer.Exit(status or 0)


async def _interruptible(command: Coroutine[Any, Any, int | None]) -> int | None:
    """Runs the command. Ctrl-C cancels it; a second Ctrl-C, or one while output is blocked, kills the process.

    A blocked write to a pipe, such as to a pager that shows its first page, can't be cancelled. Killing the process is
    as safe for the log as any other crash.
    """
    cancel = signal.getsignal(signal.SIGINT)
    interrupted = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted or not select([], [1], [], 0)[1]:
            if sys.stderr.isatty():
                os.write(2, SHOW_CURSOR)  # a progress bar may have hidden it
            os._exit(INTERRUPTED)
        interrupted = True
        if callable(cancel):
            cancel(number, frame)

    if callable(cancel):  # otherwise, the process was started with SIGINT ignored
        signal.signal(signal.SIGINT, on_signal)
    return await command


def print_error(message: str) -> None:
    """Prints one line to standard error."""
    print(f"eventfold: {printable(message)}", file=sys.stderr)


def printable(text: str) -> str:
    """The text with escaped control characters, which could move a terminal's cursor or change its colours."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def existing(where: str) -> Engine:
    """Returns the engine of a log that must exist, and which is not created."""
    engine = engine_of(where)
    return engine.existing() if isinstance(engine, MakesLogs) else engine


@asynccontextmanager
async def reading(where: str) -> AsyncIterator[EventReader]:
    """Opens a reader of a log that must exist. Raises `EventfoldError` if its directory does not."""
    reader = EventReader(existing(where))
    try:
        directory = reader.dir
    except EventfoldError:
        directory = None  # the log is not in files, and its engine itself reports a missing log
    if directory is not None and not directory.is_dir():
        raise EventfoldError(f"there is no log in {where}: name the directory that contains app.jsonl")
    try:
        yield reader
    finally:
        await reader._source.aclose()


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], object] | None]:
    """A progress bar on a terminal, with the rate and the remaining time; None if standard error is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(what, *columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)
