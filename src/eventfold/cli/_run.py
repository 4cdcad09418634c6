"""What all commands share: how they run and end, and how they open a log."""

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
# After Ctrl-C, output that could not be written at so many looks, so many seconds apart, is blocked.
_LOOKS, _LOOK_INTERVAL = 5, 0.1


def run(command: Coroutine[Any, Any, int | None]) -> None:
    """Runs a command to its end. Raises `typer.Exit` with its status, after a message if it failed."""
    try:
        with _watched():
            status = asyncio.run(_interruptible(command))
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        # The reader is gone. What is still in the buffer must go somewhere, or Python complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = CLOSED_PIPE
    except CorruptLogError as error:
        say(f"{error} (`eventfold verify` lists everything that is wrong)")
        status = FAILED
    except OSError as error:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        say(f"{where}{error.strerror or error}")
        status = FAILED
    except (EventfoldError, ValueError) as error:
        say(str(error))
        status = FAILED
    raise typer.Exit(status or 0)


async def _interruptible(command: Coroutine[Any, Any, int | None]) -> int | None:
    """Runs the command, which Ctrl-C cancels. A second Ctrl-C, or one while output is blocked, ends it at once.

    A blocked write to a pipe, such as that of a pager on its first page, can't be cancelled. Ending at once leaves the
    log as any other kill does. If the write began just after the signal, or before its handler ran, the thread of
    `_watched` notices.
    """
    cancel = signal.getsignal(signal.SIGINT)
    interrupted = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted or _output_is_blocked():
            _end_at_once()
        interrupted = True
        if callable(cancel):
            cancel(number, frame)

    if callable(cancel):  # else the command was started so that it ignores Ctrl-C
        signal.signal(signal.SIGINT, on_signal)
    return await command


@contextmanager
def _watched() -> Iterator[None]:
    """Watches for Ctrl-C in a thread, which ends the command at once if output is blocked afterwards."""
    if not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    arrivals, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    previous = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(arrivals,), name="eventfold interrupts", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(wakeup)


def _watch(arrivals: int) -> None:
    while numbers := os.read(arrivals, 1):
        if numbers[0] == signal.SIGINT:
            blocked = 0
            while blocked < _LOOKS:
                sleep(_LOOK_INTERVAL)
                blocked = blocked + 1 if _output_is_blocked() else 0
            _end_at_once()
    os.close(arrivals)


def _output_is_blocked() -> bool:
    try:
        return not select([], [1], [], 0)[1]
    except OSError:  # it is closed
        return False


def _end_at_once() -> NoReturn:
    if sys.stderr.isatty():
        os.write(2, SHOW_CURSOR)  # a progress bar hides it
    os._exit(INTERRUPTED)


def say(message: str) -> None:
    """Prints a line on standard error."""
    print(f"eventfold: {printable(message)}", file=sys.stderr)


def printable(text: str) -> str:
    """The text, made safe for a terminal: what would move the cursor or change colours is escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def existing(where: str) -> Engine:
    """Returns the engine of a log that must exist; never creates the log."""
    engine = engine_of(where)
    return engine.existing() if isinstance(engine, CreatingEngine) else engine


@asynccontextmanager
async def reading(where: str) -> AsyncIterator[EventReader]:
    """Opens a reader of a log that must exist. Raises `EventfoldError` if its directory does not."""
    reader = EventReader(existing(where))
    try:
        directory = reader.dir
    except EventfoldError:
        directory = None  # another engine reports that itself
    if directory is not None and not directory.is_dir():
        raise EventfoldError(f"there is no log in {where}: name the directory that contains app.jsonl")
    try:
        yield reader
    finally:
        await reader._source.aclose()


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], object] | None]:
    """A progress bar on a terminal, with the rate and the remaining time; None if nobody would see it."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(what, *columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)
