"""The commands and their options. The other modules do the work."""

from __future__ import annotations

import os
from glob import escape as glob_escape
from glob import glob
from typing import Annotated

import typer

from .. import __version__
from .._export import ExportFormat
from . import _folding, _indexing, _reading, _repairing, _writing
from ._output import Format
from ._run import run
from ._select import selection

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=(
        "Inspect, append to and maintain an event log. LOG is the directory that contains app.jsonl, or an "
        "address such as nats://host/name. Commands that only read can be used while a program writes. Exit status: 0 "
        "success, 1 failure, refusal or damage, 2 wrong usage, 130 ended by Ctrl-C, 141 output pipe closed."
    ),
)
consumers = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="List consumers, or reset one to another offset."
)
app.add_typer(consumers, name="consumers")
index = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Build or remove the index of tags and ids.")
app.add_typer(index, name="index")


def _directories(incomplete: str) -> list[str]:
    """The directories that a shell offers to complete the name of a log."""
    try:
        return sorted(name + os.sep for name in glob(glob_escape(incomplete) + "*") if os.path.isdir(name))
    except OSError:
        return []


Log = Annotated[
    str,
    typer.Argument(
        metavar="LOG", help="Directory or address of the log.", show_default=False, autocompletion=_directories
    ),
]
Types = Annotated[
    list[str] | None, typer.Option("--type", metavar="TYPE", help="Only events of this type; may be repeated.")
]
Tags = Annotated[
    list[str] | None,
    typer.Option("--tag", metavar="TAG", help="Only events with this tag; may be repeated to require several."),
]
Since = Annotated[
    str | None,
    typer.Option("--since", metavar="TIME", help="Only events from this time onwards, in ISO 8601 or Unix seconds."),
]
Until = Annotated[str | None, typer.Option("--until-time", metavar="TIME", help="Only events before this time.")]
Formats = Annotated[Format | None, typer.Option("--format", help="Default: table on a terminal, jsonl in a pipe.")]
Lines = Annotated[bool, typer.Option("--json", help="Print the exact lines; short for --format jsonl.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Reducer = Annotated[
    str,
    typer.Option("--reducer", metavar="MODULE:NAME", help="A View, or a reducer and --initial.", show_default=False),
]
Initial = Annotated[
    str | None, typer.Option("--initial", metavar="JSON", help="A reducer's state before the first event.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"eventfold {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def info(log: Log, json: Json = False) -> None:
    """Show head, sizes, views and consumers. Example: eventfold info data --json"""
    run(_reading.info(log, json))


@app.command()
def cat(
    log: Log,
    start: Annotated[int, typer.Option("--from", metavar="OFFSET", min=0, help="The offset to start at.")] = 0,
    end: Annotated[
        int | None, typer.Option("--until", metavar="OFFSET", min=0, help="The offset to stop before.")
    ] = None,
    since: Since = None,
    until_time: Until = None,
    type: Types = None,
    tag: Tags = None,
    last: Annotated[
        int | None, typer.Option("--last", metavar="N", min=1, help="Only the last N selected events.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", min=0, help="Stop after N events.")] = None,
    format: Formats = None,
    json: Lines = False,
) -> None:
    """Print events; in a pipe, their exact lines. Example: eventfold cat data --type paid --last 20"""

    async def command() -> None:
        wanted = selection(type or (), tag or (), since, until_time)
        await _reading.cat(log, start, end, wanted, last, limit, Format.JSONL if json else format)

    run(command())


@app.command()
def tail(
    log: Log,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Then print each new event.")] = False,
    start: Annotated[
        int | None, typer.Option("--from", metavar="OFFSET", min=0, help="The offset to start at.")
    ] = None,
    count: Annotated[
        int, typer.Option("-n", "--last", metavar="N", min=1, help="How many of the last events to print first.")
    ] = 10,
    since: Since = None,
    until_time: Until = None,
    type: Types = None,
    tag: Tags = None,
    format: Formats = None,
    json: Lines = False,
) -> None:
    """Print the last events and, with -f, each new one. Example: eventfold tail -f data --type paid"""

    async def command() -> None:
        wanted = selection(type or (), tag or (), since, until_time)
        await _reading.tail(log, start, wanted, count, follow, Format.JSONL if json else format)

    run(command())


@app.command()
def append(
    log: Log,
    type: Annotated[
        str | None, typer.Argument(metavar="TYPE", help="The event's type; if omitted, events are read from stdin.")
    ] = None,
    data: Annotated[str, typer.Argument(metavar="DATA", help="The event's data, as JSON.")] = "{}",
    ts: Annotated[
        int | None, typer.Option(metavar="SECONDS", min=0, help="The event's time in Unix seconds; default: now.")
    ] = None,
    id: Annotated[str | None, typer.Option(metavar="ID", help="The event's id.")] = None,
    actor: Annotated[str | None, typer.Option(metavar="ACTOR", help="Who caused the event.")] = None,
    meta: Annotated[str | None, typer.Option(metavar="JSON", help="The event's metadata, as JSON.")] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", metavar="TAG", help="A tag; may be repeated.")] = None,
    if_head: Annotated[
        str | None, typer.Option("--if-head", metavar="OFFSET:HASH", help="Append only if this is still the head.")
    ] = None,
    unless_tag: Annotated[
        list[str] | None,
        typer.Option(
            "--unless-tag", metavar="TAG", help="Append only if no event has this tag; if repeated, all of them."
        ),
    ] = None,
) -> None:
    """Append an event, or events from standard input. Example: eventfold append data paid '{"amount": 3}'

    On standard input, each line is a JSON object with `type` and optionally `data`, `ts`, `id`, `actor`, `meta` and
    `tags`. Lines are appended in batches, each completely or not at all.
    """

    async def command() -> None:
        if type is not None:
            event = _writing.event_from_options(type, data, ts, id, actor, meta, tag or [])
            await _writing.append_one(log, event, if_head, unless_tag)
        elif if_head is not None or unless_tag is not None:
            raise ValueError("--if-head and --unless-tag are for a single event: give its TYPE and DATA")
        else:
            await _writing.append_lines(log)

    run(command())


@app.command()
def verify(
    log: Log,
    json: Json = False,
    reducer: Annotated[
        list[str] | None,
        typer.Option("--reducer", metavar="MODULE:VIEW", help="Compare the snapshot of this View with a replay."),
    ] = None,
) -> None:
    """Read everything and report problems. Exit status 1 if there are any. Example: eventfold verify data"""

    async def command() -> int:
        return await _reading.verify(log, json, _folding.views_of(reducer or ()))

    run(command())


@app.command()
def rotate(log: Log) -> None:
    """Move app.jsonl into the compressed archive. No other process may be writing. Example: eventfold rotate data"""
    run(_writing.rotate(log))


@app.command()
def state(
    log: Log,
    view: Annotated[
        str | None, typer.Argument(metavar="VIEW", help="The name of a view, to print its stored state.")
    ] = None,
    reducer: Annotated[
        str | None,
        typer.Option("--reducer", metavar="MODULE:NAME", help="Fold with this View, or this reducer and --initial."),
    ] = None,
    initial: Initial = None,
    at: Annotated[str | None, typer.Option("--at", metavar="OFFSET", help="Fold up to this offset.")] = None,
    at_time: Annotated[
        str | None, typer.Option("--at-time", metavar="TIME", help="Fold the events before this time.")
    ] = None,
) -> None:
    """Print a view's stored or folded state as JSON. Example: eventfold state data --reducer app:todos --at 1200"""

    async def command() -> None:
        if reducer is not None:
            await _folding.state(log, _folding.load_view(reducer, view, initial), at, at_time)
        elif view is None or at is not None or at_time is not None:
            raise ValueError("give the VIEW whose stored state is to be printed, or the --reducer to fold with")
        else:
            await _reading.state(log, view)

    run(command())


@app.command()
def diff(
    log: Log,
    before: Annotated[str, typer.Argument(metavar="A", help="An offset, or a time in ISO 8601.")],
    after: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    reducer: Reducer,
    initial: Initial = None,
) -> None:
    """Compare a view's states at two moments. Exit status 1 if they differ.

    Example: eventfold diff data 2026-01-30 2026-01-31 --reducer app:todos
    """

    async def command() -> int:
        return await _folding.diff(log, _folding.load_view(reducer, None, initial), before, after)

    run(command())


@app.command()
def rebuild(log: Log, reducer: Reducer) -> None:
    """Rebuild a view's snapshot. No other process may be writing.

    Example: eventfold rebuild data --reducer app:todos
    """

    async def command() -> None:
        await _folding.rebuild(log, _folding.load_view(reducer))

    run(command())


@app.command()
def copy(
    log: Log, target: Annotated[str, typer.Argument(metavar="TARGET", help="Directory or address of the copy.")]
) -> None:
    """Copy a log to another engine or directory. Copies snapshots and consumers too; continues an interrupted copy.

    Example: eventfold copy data 'postgresql://host/db?log=orders'
    """
    run(_writing.copy(log, target))


@app.command()
def migrate(
    log: Annotated[str, typer.Argument(metavar="LOG", help="Address of a log in PostgreSQL.", show_default=False)],
    role: Annotated[
        str | None, typer.Option("--role", metavar="ROLE", help="Grant this role the privileges that a program needs.")
    ] = None,
    sql: Annotated[bool, typer.Option("--sql", help="Print the SQL without running it.")] = False,
) -> None:
    """Create or migrate the tables in PostgreSQL. Needs a role that is allowed to do so; programs may be running.

    Example: eventfold migrate 'postgresql://admin@host/db?log=orders' --role app
    """
    run(_writing.migrate(log, role, sql))


@app.command()
def backup(
    log: Log, directory: Annotated[str, typer.Argument(metavar="DIR", help="New, empty, or an older copy.")]
) -> None:
    """Copy a log, even while it is written, or update an older copy. Example: eventfold backup data /backup/data"""
    run(_writing.backup(log, directory))


@app.command()
def restore(
    backup: Annotated[str, typer.Argument(metavar="BACKUP", help="The directory of the backup.", show_default=False)],
    directory: Annotated[str, typer.Argument(metavar="DIR", help="New or empty.", show_default=False)],
) -> None:
    """Verify a backup and restore it. Example: eventfold restore /backup/data data"""
    run(_repairing.restore(backup, directory))


@app.command()
def repair(
    log: Log,
    yes: Annotated[bool, typer.Option("--yes", help="Repair without asking for confirmation.")] = False,
    lose_events_from: Annotated[
        int | None,
        typer.Option(
            "--lose-events-from",
            metavar="OFFSET",
            help="Cut off the log at this offset, and lose the valid events after it.",
        ),
    ] = None,
    reducer: Annotated[
        list[str] | None,
        typer.Option("--reducer", metavar="MODULE:VIEW", help="Compare the snapshot of this View with a replay."),
    ] = None,
) -> None:
    """Show problems and repair them after confirmation. Example: eventfold repair data

    No other process may be writing. Cuts off a damaged end of app.jsonl and saves its bytes, deletes bad snapshots, and
    resets consumers whose offset is not in the log. Exit status 1 if a problem remains.
    """

    async def command() -> int:
        return await _repairing.repair(log, yes, lose_events_from, _folding.views_of(reducer or ()))

    run(command())


@app.command()
def export(
    log: Log, format: Annotated[ExportFormat, typer.Option("--format", help="The output format.")] = ExportFormat.JSONL
) -> None:
    """Print all events, as their exact lines or as rows. Example: eventfold export data > events.jsonl"""
    run(_reading.export(log, format))


@app.command("import")
def import_(log: Log) -> None:
    """Append the lines that `export` printed, unchanged. Example: eventfold import data < events.jsonl"""
    run(_writing.import_lines(log))


@consumers.command("list")
def list_(log: Log) -> None:
    """List the consumers with their offsets and lag. Example: eventfold consumers list data"""
    run(_reading.consumers(log))


@consumers.command()
def reset(
    log: Log,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The consumer's name.")],
    to: Annotated[
        str, typer.Option("--to", metavar="OFFSET", help="An offset, `start` or `head`.", show_default=False)
    ],
) -> None:
    """Reset a stopped consumer to another offset. Example: eventfold consumers reset data mailer --to start"""
    run(_writing.reset_consumer(log, name, to))


@index.command()
def build(log: Log) -> None:
    """Build or update the index, even while a program writes. Example: eventfold index build data"""
    run(_indexing.build(log))


@index.command()
def drop(log: Log) -> None:
    """Remove the index. No other process may be writing to a log in files. Example: eventfold index drop data"""
    run(_indexing.drop(log))
