"""An audit log: who did what to which thing, and a way to prove that no entry has been changed since.

    python docs/examples/audit.py record ann invoice:7 approved amount=1200
    python docs/examples/audit.py find --thing invoice:7 --since 2026-11-01 --last 20
    python docs/examples/audit.py seal
    python docs/examples/audit.py check 103 9f86d081884c7d65...

A seal is an offset and a checksum (SHA-256) of all entries before it. Keep seals where those who can write to this log
can't change them: in an email, with a customer, in print. If an entry was altered, removed, inserted or moved since,
the checksum is different, and `check` says so. It can't say anything about entries after the last seal, so seal often.
"""

import argparse
import asyncio
import hashlib
import json
import sys
from datetime import datetime
from pathlib import Path

from eventfold import Event, EventfoldError, EventLog, LockMode, Query, Record, View, verify


def reduce_seal(seal: str, event: Event) -> str:
    """The checksum of an entry and of the previous checksum, and so of all entries up to this one."""
    entry = [event.type, event.data, event.ts, event.id, event.actor, event.meta, event.tags]
    return hashlib.sha256(f"{seal}{json.dumps(entry, sort_keys=True)}".encode()).hexdigest()


async def find(log: EventLog, args: argparse.Namespace) -> list[Record]:
    """The matching entries, oldest first."""
    tags = [f"{key}:{value}" for key, value in (("actor", args.actor), ("thing", args.thing)) if value]
    query = Query(types=[args.action] if args.action else [], tags=tags)
    found: list[Record] = []
    # Read backwards, so that recent entries are found at once and nothing older than `--since` is read.
    async for record in log.read_back(query=query):
        if len(found) == args.last or (args.since and record.event.ts < args.since.timestamp()):
            break
        if not args.until or record.event.ts < args.until.timestamp():
            found.append(record)
    return found[::-1]


def describe(record: Record) -> str:
    event = record.event
    time = f"{datetime.fromtimestamp(event.ts):%Y-%m-%d %H:%M:%S}"
    details = [f"{key}={value}" for key, value in event.data["details"].items()]
    return "  ".join([f"{record.end_offset:>8}", time, event.actor or "-", event.type, event.data["thing"], *details])


async def check(log: EventLog, seal: View[str], offset: int, expected: str) -> str | None:
    """The problem with the log before an offset; None if it is unchanged since it was sealed."""
    report = await verify(log.dir)
    if not report.ok:
        return f"the log is damaged: {report.problems[0]}"
    try:
        # Calculate the checksum from the entries, since a snapshot could have been changed together with them.
        found = await log.state_at(seal, offset)
    except ValueError as error:
        return f"this is not the log that was sealed: {error}"
    return None if found == expected else f"an entry before offset {offset} is not what it was when this was sealed"


async def run(args: argparse.Namespace) -> None:
    if args.command != "record" and not args.dir.is_dir():
        sys.exit(f"audit: there is no log in {args.dir}")  # an empty result would hide a mistyped name
    seal = View("seal", reduce_seal, "")
    # SHARED: any number of programs record at once. Commands that only read take no lock, and change nothing on disk.
    options = {"lock": LockMode.SHARED, "index": True} if args.command == "record" else {"read_only": True}
    async with EventLog.open(args.dir, views=[seal], **options) as log:
        match args.command:
            case "record":
                tags = (f"actor:{args.actor}", f"thing:{args.thing}")
                data = {"thing": args.thing, "details": dict(args.details)}
                await log.append(Event(args.action, data, actor=args.actor, tags=tags))
            case "find":
                for record in await find(log, args):
                    print(describe(record))
            case "seal":
                print(seal.offset, seal.state or "(there is nothing to seal)")
            case "check":
                if problem := await check(log, seal, args.offset, args.checksum):
                    sys.exit(f"audit: {problem}")
                print(f"nothing before offset {args.offset} has been changed")


def detail(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    return key, value


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="An audit log.")
    parser.add_argument("--dir", default="audit-data", type=Path, help="where the log is (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="record who did what to which thing")
    for name in ("actor", "thing", "action"):
        recording.add_argument(name)
    recording.add_argument("details", nargs="*", type=detail, metavar="KEY=VALUE")
    finding = commands.add_parser("find", help="show entries")
    for name in ("--actor", "--thing", "--action"):
        finding.add_argument(name)
    for name in ("--since", "--until"):
        finding.add_argument(name, type=datetime.fromisoformat, metavar="TIME", help="such as 2026-11-25 or '… 18:30'")
    finding.add_argument("--last", type=int, default=100, metavar="N", help="only the last N (default: %(default)s)")
    commands.add_parser("seal", help="print the offset and the checksum of all entries")
    checking = commands.add_parser("check", help="see whether what was sealed is unchanged")
    checking.add_argument("offset", type=int)
    checking.add_argument("checksum")
    return parser


if __name__ == "__main__":
    try:
        asyncio.run(run(parser().parse_args()))
    except (EventfoldError, OSError) as error:
        sys.exit(f"audit: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
