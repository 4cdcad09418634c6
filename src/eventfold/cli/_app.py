"""The commands and their options; what they do is in the other modules."""

from __future__ import annotations

from typing import Annotated

import typer

from . import _reading, _writing
from ._output import Format
from ._run import run
from ._select import selection

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=(
        "Look into an event log, append to it and look after it. LOG is the directory that holds app.jsonl, or an "
        "address such as nats://host/name; whatever only reads works while the log is being written. Exit status: 0 "
        "done, 1 refused, failed or damaged, 2 wrong usage, 130 ended by Ctrl-C, 141 nobody reads the output any more."
    ),
)
consumers = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="List consumers, or make one start elsewhere."
)
app.add_typer(consumers, name="consumers")

Log = Annotated[str, typer.Argument(metavar="LOG", help="Directory or address of the log.", show_default=False)]
Types = Annotated[list[str] | None, typer.Option("--type", help="Only events of this type; may be repeated.")]
Tags = Annotated[list[str] | None, typer.Option("--tag", help="Only events with this tag; may be repeated for more.")]
Since = Annotated[str | None, typer.Option("--since", help="Only events from this time on, ISO 8601 or Unix seconds.")]
Until = Annotated[str | None, typer.Option("--until-time", help="Only events before this time.")]
Formats = Annotated[Format | None, typer.Option("--format", help="By default table on a terminal, jsonl in a pipe.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def info(log: Log, json: Json = False) -> None:
    """Tell the head, the sizes, views and consumers with their lag. Example: eventfold info data --json"""
    run(_reading.info(log, json))


@app.command()
def cat(
    log: Log,
    start: Annotated[int, typer.Option("--from", min=0, help="The offset to begin at.")] = 0,
    end: Annotated[int | None, typer.Option("--until", min=0, help="The offset to end before.")] = None,
    since: Since = None,
    until_time: Until = None,
    type: Types = None,
    tag: Tags = None,
    last: Annotated[int | None, typer.Option("--last", min=1, help="Only the last so many of these events.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=0, help="Stop after so many events.")] = None,
    format: Formats = None,
) -> None:
    """Print events, in a pipe as their exact lines. Example: eventfold cat data --type paid --last 20"""

    async def command() -> None:
        wanted = selection(type or (), tag or (), since, until_time)
        await _reading.cat(log, start, end, wanted, last, limit, format)

    run(command())


@app.command()
def tail(
    log: Log,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with each new event.")] = False,
    start: Annotated[int | None, typer.Option("--from", min=0, help="The offset to begin at.")] = None,
    count: Annotated[int, typer.Option("-n", "--last", min=1, help="How many events to begin with.")] = 10,
    type: Types = None,
    tag: Tags = None,
    format: Formats = None,
) -> None:
    """Print the last events, and with -f each new one. Example: eventfold tail -f data --type paid"""

    async def command() -> None:
        await _reading.tail(log, start, selection(type or (), tag or ()), count, follow, format)

    run(command())


@app.command()
def append(
    log: Log,
    type: Annotated[str | None, typer.Argument(help="The event's type; without it, JSON Lines are read.")] = None,
    data: Annotated[str, typer.Argument(help="The event's data, as JSON.")] = "{}",
    ts: Annotated[int | None, typer.Option(min=0, help="Unix seconds; now by default.")] = None,
    id: Annotated[str | None, typer.Option(help="The event's id.")] = None,
    actor: Annotated[str | None, typer.Option(help="Who did it.")] = None,
    meta: Annotated[str | None, typer.Option(help="More about it, as JSON.")] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="A tag; may be repeated.")] = None,
    if_head: Annotated[
        str | None, typer.Option("--if-head", metavar="OFFSET:HASH", help="Only if the head is still this one.")
    ] = None,
) -> None:
    """Append an event, or events from standard input. Example: eventfold append data paid '{"amount": 3}'

    From standard input, each line is an object with `type`, and if wanted `data`, `ts`, `id`, `actor`, `meta` and
    `tags`. Lines are written in batches, each of them whole or not at all.
    """

    async def command() -> None:
        if type is not None:
            event = _writing.given_event(type, data, ts, id, actor, meta, tag or [])
            await _writing.append_one(log, event, if_head)
        elif if_head is not None:
            raise ValueError("--if-head is for one event: name its TYPE and DATA")
        else:
            await _writing.append_lines(log)

    run(command())


@app.command()
def verify(log: Log, json: Json = False) -> None:
    """Read everything and tell what is wrong; exit status 1 if anything is. Example: eventfold verify data"""
    run(_reading.verify(log, json))


@app.command()
def rotate(log: Log) -> None:
    """Move app.jsonl into the compressed archive; no other process may be writing. Example: eventfold rotate data"""
    run(_writing.rotate(log))


@app.command()
def state(log: Log, view: Annotated[str, typer.Argument(help="The view's name.")]) -> None:
    """Print the stored state of a view as JSON. Example: eventfold state data todos"""
    run(_reading.state(log, view))


@app.command()
def backup(log: Log, directory: Annotated[str, typer.Argument(help="New, empty, or an older copy.")]) -> None:
    """Copy a log, also one that is being written; extend an older copy. Example: eventfold backup data /backup/data"""
    run(_writing.backup(log, directory))


@app.command()
def export(log: Log) -> None:
    """Print all lines exactly as they are stored. Example: eventfold export data > events.jsonl"""
    run(_reading.export(log))


@app.command("import")
def import_(log: Log) -> None:
    """Append lines that `export` printed, exactly as they were. Example: eventfold import data < events.jsonl"""
    run(_writing.import_lines(log))


@consumers.command("list")
def list_(log: Log) -> None:
    """List the consumers with their offsets and lag. Example: eventfold consumers list data"""
    run(_reading.consumers(log))


@consumers.command()
def reset(
    log: Log,
    name: Annotated[str, typer.Argument(help="The consumer's name.")],
    to: Annotated[str, typer.Option("--to", help="An offset, `start` or `head`.", show_default=False)],
) -> None:
    """Make a stopped consumer go on from elsewhere. Example: eventfold consumers reset data mailer --to start"""
    run(_writing.reset_consumer(log, name, to))
