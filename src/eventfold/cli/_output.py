"""Prints events and tables: for people on a terminal, for programs in a pipe."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Iterable
from datetime import datetime

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .._event import Record
from .._export import CSV_COLUMNS, as_json, csv_row, csv_writer
from ._run import printable


class Format(enum.Enum):
    """`table` is for people, `jsonl` is the exact lines of the log, and `csv` is for spreadsheets."""

    TABLE = "table"
    JSONL = "jsonl"
    CSV = "csv"


def printer(format: Format | None) -> Callable[[Record], None]:
    """Returns a function that prints a record. The default format is a table on a terminal, exact lines elsewhere."""
    if format is None:
        format = Format.TABLE if sys.stdout.isatty() else Format.JSONL
    return {Format.TABLE: _row_printer, Format.JSONL: _line_printer, Format.CSV: _csv_printer}[format]()


def _line_printer() -> Callable[[Record], None]:
    def line(record: Record) -> None:
        sys.stdout.buffer.write(record._line)

    return line


def _csv_printer() -> Callable[[Record], None]:
    write = csv_writer(sys.stdout.write).writerow
    write(CSV_COLUMNS)

    def row(record: Record) -> None:
        write(csv_row(record))

    return row


def _row_printer() -> Callable[[Record], None]:
    console = Console()

    def row(record: Record) -> None:
        event = record.event
        text = Text.assemble(
            (f"{record.start_offset:>12} ", "dim"),
            (f"{show_time(event.ts)} ", "green"),
            (f"{printable(event.type)} ", "bold cyan"),
            printable(as_json(event.data)),
        )
        fields = {
            "id": event.id,
            "actor": event.actor,
            "tags": " ".join(event.tags) or None,
            "meta": None if event.meta is None else as_json(event.meta),
        }
        for name, value in fields.items():
            if value is not None:
                text.append(f" {name}={printable(value)}", "dim")
        console.print(text, soft_wrap=True)

    return row


def show_time(seconds: int) -> str:
    """Returns a time as local date and time, or as a number if it is outside the calendar's range."""
    try:
        return datetime.fromtimestamp(seconds).isoformat(" ")
    except (ValueError, OverflowError, OSError):
        return str(seconds)


def print_json(value: object) -> None:
    """Prints one line of JSON."""
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, in the plural unless the number is 1."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def print_table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Prints a table on a terminal, and tab-separated lines elsewhere. Empty names of columns are not printed."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(printable(str(field)) for field in row))
        return
    columns = list(columns)
    table = Table(box=None, pad_edge=False, show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(str(field))) for field in row))
    Console().print(table)
