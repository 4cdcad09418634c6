"""The notebook at any moment, and the changes between two moments. Write notes with `notebook.py` first.

    python docs/examples/time_travel.py log
    python docs/examples/time_travel.py at "2026-11-25 18:30"
    python docs/examples/time_travel.py diff 158 now

A moment is an offset that `log` shows, a date with or without a time of day, or `now`. The notebook needs no code for
this: any program that keeps its state in a log can be examined afterwards.
"""

import argparse
import asyncio
import difflib
import sys
from datetime import datetime
from pathlib import Path

from notebook import Notebook, catalog, lines, notebook_view

from eventfold import EventfoldError, EventLog, View


def moment(text: str) -> int | datetime | None:
    """An offset, a local time, or None for now."""
    if text == "now":
        return None
    try:
        return int(text) if text.isdecimal() else datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither an offset, nor a time like '2026-11-25 18:30', nor 'now'"
        ) from None


async def state_at(log: EventLog, view: View[Notebook], at: int | datetime | None) -> Notebook:
    # Everything before the offset or the time is folded with today's reducer.
    return view.state if at is None else await log.state_at(view, at)


async def show_log(log: EventLog) -> None:
    async for record in log.read_full():
        time = datetime.fromtimestamp(record.event.ts)
        print(f"{record.end_offset:>8}  {time:%Y-%m-%d %H:%M:%S}  {record.event.data}")


async def run(args: argparse.Namespace) -> None:
    view = notebook_view()
    # Read-only: takes no lock, so that the notebook may be in use.
    async with EventLog.open(args.dir, catalog=catalog, views=[view], read_only=True) as log:
        match args.command:
            case "log":
                await show_log(log)
            case "at":
                print("\n".join(lines(await state_at(log, view, args.moment))) or "no notes")
            case "diff":
                before, after = [lines(await state_at(log, view, at)) for at in (args.before, args.after)]
                for line in difflib.ndiff(before, after):
                    if line.startswith(("+", "-")):
                        print(line)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The notebook as it was at any moment.")
    parser.add_argument("--dir", default="notebook-data", type=Path, help="where it is (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("log", help="everything that has happened, with the offset after each event")
    commands.add_parser("at", help="the notes at a moment").add_argument("moment", type=moment)
    diff = commands.add_parser("diff", help="the notes that changed between two moments")
    diff.add_argument("before", type=moment)
    diff.add_argument("after", type=moment)
    return parser


if __name__ == "__main__":
    args = parser().parse_args()
    if not args.dir.is_dir():  # a missing directory counts as an empty log, which would hide a mistyped name
        sys.exit(f"time_travel: there is no notebook in {args.dir}")
    try:
        asyncio.run(run(args))
    except (ValueError, EventfoldError, OSError) as error:
        sys.exit(f"time_travel: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
