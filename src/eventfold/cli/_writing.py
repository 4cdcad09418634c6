"""The commands that write: `append`, `import`, `rotate`, `consumers reset`, `backup`, `copy`, `migrate`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from .._address import engine_of, without_password
from .._backup import backup as backup_log
from .._codec.encode import encode_line
from .._codec.selection import decode_events
from .._codec.stored import StoredEvent
from .._consumer import move_consumer
from .._copy import copy_log
from .._engine import MigratingEngine
from .._errors import EventfoldError, InvalidEventError
from .._event import AppendResult, Event, line_hash
from .._log import EventLog
from .._query import Query
from .._threads import Thread
from ._output import print_json
from ._run import progress, reading

# How many lines are checked and then appended together.
_BATCH = 1000
_READ_SIZE = 2**20
_MAX_EVENT_SIZE = 16 * 2**20


class _EventInput(msgspec.Struct, forbid_unknown_fields=True):
    """An event as a person writes it, in which only the type is required."""

    type: str
    data: Any = msgspec.UNSET
    ts: int | msgspec.UnsetType = msgspec.UNSET
    id: str | None = None
    actor: str | None = None
    meta: Any = None
    tags: tuple[str, ...] = ()

    def event(self) -> Event:
        options = {} if self.ts is msgspec.UNSET else {"ts": self.ts}
        data = {} if self.data is msgspec.UNSET else self.data
        return Event(self.type, data, id=self.id, actor=self.actor, meta=self.meta, tags=self.tags, **options)


_decode_input = msgspec.json.Decoder(_EventInput).decode


@asynccontextmanager
async def writing(address: str) -> AsyncIterator[EventLog]:
    """Opens the log for writing. At the end, flushes the output that was printed meanwhile."""
    async with EventLog.open(address) as log:
        try:
            yield log
        finally:
            sys.stdout.flush()


async def append_one(address: str, event: Event, head: str | None, unless: list[str] | None) -> None:
    """Appends an event, on condition that `head` (`OFFSET:HASH`) is still the head, or that no event has all tags in
    `unless`.
    """
    if head is not None and unless is not None:
        raise ValueError("--if-head and --unless-tag were both given")
    expected = None if head is None else _parse_head(head)
    async with writing(address) as log:
        if unless is not None:
            [result] = await log.append_unless([event], Query(tags=unless))
            print_json(result)
        elif expected is None:
            print_json(await log.append(event))
        else:
            print_json(await log.append_if(event, *expected))


def event_from_options(
    type: str, data: str, ts: int | None, id: str | None, actor: str | None, meta: str | None, tags: list[str]
) -> Event:
    """The event that the options describe. Raises `ValueError` for invalid JSON."""
    options = {} if ts is None else {"ts": ts}
    parsed_meta = None if meta is None else _parse_json("--meta", meta)
    return Event(type, _parse_json("DATA", data), id=id, actor=actor, meta=parsed_meta, tags=tuple(tags), **options)


def _parse_json(name: str, text: str) -> Any:
    try:
        return msgspec.json.decode(os.fsencode(text))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not JSON ({error}): write it as in '{{\"amount\": 3}}'") from error


def _parse_head(text: str) -> tuple[int, str]:
    offset, colon, hash = text.partition(":")
    if not colon or not (offset.isascii() and offset.isdigit()):
        raise ValueError(f"--if-head must be OFFSET:HASH, as `eventfold info` prints it, not {text!r}")
    return int(offset), hash


async def append_lines(address: str) -> None:
    """Appends events from standard input, batch by batch; each batch is written completely or not at all."""
    async with writing(address) as log:
        async for first, lines in _input_lines():
            events = []
            for number, line in enumerate(lines, first):
                try:
                    event = _decode_input(line).event()
                    encode_line(event, _MAX_EVENT_SIZE)
                except (msgspec.MsgspecError, UnicodeDecodeError, InvalidEventError) as error:
                    raise _bad_line(number, error, first) from error
                events.append(event)
            for result in await log.append_many(events):
                print_json(result)
            sys.stdout.flush()


def _bad_line(number: int, error: object, first: int) -> ValueError:
    return ValueError(
        f"line {number}: {error}; nothing was written from line {first} on: correct the line, and continue from line "
        f"{first}"
    )


async def import_lines(address: str) -> None:
    """Appends the lines that `export` printed, unchanged."""
    with progress("import") as report_progress:
        count = await _import(address, report_progress)
    print_json({"imported": count})


async def _import(address: str, report_progress: Callable[[int, int], object] | None) -> int:
    size = os.fstat(sys.stdin.fileno()).st_size  # 0 for a pipe, whose length is unknown
    read = count = 0
    batch: list[StoredEvent] = []  # a batch of which lines are still missing
    batch_lines: list[bytes] = []
    batch_begin = 1
    async with writing(address) as log:
        async for first, lines in _input_lines():
            batches: list[list[StoredEvent]] = []
            expected: list[bytes] = []
            first_unwritten = batch_begin = batch_begin if batch else first
            for number, line in enumerate(lines, first):
                try:
                    event = decode_events.decode(line)
                    if event.batch != _expected_position(batch, event):
                        raise InvalidEventError("a batch is broken here: some of its lines are missing or out of order")
                    if encode_line(event, _MAX_EVENT_SIZE, event.batch) != line + b"\n":
                        raise InvalidEventError(
                            "it would be written differently; use `append` for lines written by hand"
                        )
                except (msgspec.MsgspecError, UnicodeDecodeError, InvalidEventError) as error:
                    raise _bad_line(number, error, first_unwritten) from error
                batch.append(event)
                batch_lines.append(line)
                if event.batch is None or event.batch[0] == event.batch[1]:
                    batches.append(batch)
                    expected += batch_lines
                    batch, batch_lines = [], []
                    batch_begin = number + 1
            results = await _append_batches(log, batches)
            if [result.line_hash for result in results] != list(map(line_hash, expected)):
                raise EventfoldError(f"lines from {first} on were written differently than they were exported")
            count += len(results)
            read += sum(map(len, lines)) + len(lines)
            if report_progress is not None:
                report_progress(read, size)
        if batch:
            raise _bad_line(batch_begin, "the batch that begins here has no end", batch_begin)
    return count


def _expected_position(batch: list[StoredEvent], event: StoredEvent) -> tuple[int, int] | None:
    """The position in the batch, and its size, that the next event must have."""
    if not batch:
        return None if event.batch is None else (1, event.batch[1])
    assert batch[0].batch is not None
    return len(batch) + 1, batch[0].batch[1]


async def _append_batches(log: EventLog, batches: list[list[StoredEvent]]) -> list[AppendResult]:
    """Appends batches, and events as batches of one, in order."""
    appended = await asyncio.gather(*(log.append_many(batch) for batch in batches))
    return [result for results in appended for result in results]


async def _input_lines() -> AsyncIterator[tuple[int, list[bytes]]]:
    """Yields the lines of standard input as they arrive, up to `_BATCH` at a time, with the number of the first."""
    # In a thread that is never joined, so that Ctrl-C ends the command while it waits for input.
    thread = Thread("eventfold input")
    number, rest, ended = 1, b"", False
    while not ended:
        data = await thread.call(os.read, sys.stdin.fileno(), _READ_SIZE).interruptible()
        ended = not data
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > _MAX_EVENT_SIZE:
            raise ValueError(
                f"line {number + len(lines)} has more than {_MAX_EVENT_SIZE} bytes, the maximum of this command"
            )
        if ended and rest:
            lines.append(rest)
        for start in range(0, len(lines), _BATCH):
            batch = lines[start : start + _BATCH]
            yield number, batch
            number += len(batch)
    thread.end()


async def rotate(address: str) -> None:
    """Moves the active log into the archive."""
    async with reading(address), writing(address) as log:
        await log.rotate()


async def reset_consumer(address: str, name: str, to: str) -> None:
    """Resets a consumer to another offset."""
    async with reading(address) as reader:
        names = await reader._documents.names("consumer")
        if name not in names:
            others = ", ".join(names) or "none"
            raise EventfoldError(
                f"no consumer {name!r} has committed in {without_password(address)}; there are: {others}"
            )
        head = (await reader.head()).offset
        if to not in ("start", "head") and not (to.isascii() and to.isdigit()):
            raise ValueError(f"--to is an offset, `start` or `head`, not {to!r}")
        offset = {"start": 0, "head": head}.get(to)
        offset = int(to) if offset is None else offset
        await move_consumer(reader, name, offset)
    print_json({"consumer": name, "offset": offset})


async def copy(address: str, target: str) -> None:
    """Copies the log, with its snapshots and consumers, to another engine or directory."""
    async with reading(address) as reader:
        await reader.head()  # raises an error before anything is created at the target
        with progress("copy") as report_progress:
            head = await copy_log(address, target, report_progress)
    print_json({"target": without_password(target), "offset": head.offset, "line_hash": head.line_hash})


async def backup(address: str, target: str) -> None:
    """Copies the log to another directory, or updates an older copy there."""
    async with reading(address) as reader:
        with progress("backup") as report_progress:
            head = await backup_log(reader, target, report_progress)
    print_json({"directory": target, "offset": head.offset, "line_hash": head.line_hash})


async def migrate(address: str, role: str | None, only_sql: bool) -> None:
    """Creates or migrates the tables of a log in a database, or prints the SQL that would do it."""
    engine = engine_of(address)
    if not isinstance(engine, MigratingEngine):
        raise EventfoldError(f"{engine.source().location} has no tables: only a log in PostgreSQL can be migrated")
    statements = await (engine.migration_sql(role=role) if only_sql else engine.migrate(role=role))
    sys.stdout.write(statements.strip("\n") + "\n" if statements else "")
