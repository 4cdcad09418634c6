"""Exports a log: as its exact lines, as CSV for spreadsheets, or as Parquet for analysis.

Promises: memory is bounded by a few blocks of the log and one Parquet row group, regardless of the log's size; the
event loop is not blocked while rows are created and written.
"""

from __future__ import annotations

import csv
import enum
import io
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any, BinaryIO, Protocol

import msgspec

from ._address import Address
from ._codec.decode import Slice
from ._errors import CorruptLogError, EventfoldError
from ._event import Record
from ._reader import EventReader
from ._threads import in_thread

# A Parquet row group ends after this number of rows or of bytes of lines, whichever comes first.
_GROUP_ROWS, _GROUP_SIZE = 50_000, 16 * 2**20

CSV_COLUMNS = ("offset", "ts", "type", "id", "actor", "data", "meta", "tags")


class ExportFormat(enum.Enum):
    """`JSONL`: the lines of the log, byte for byte. `CSV` and `PARQUET`: a row for each event.

    The columns are `offset`, `ts`, `type`, `id`, `actor`, `data`, `meta` and `tags`. `data` and `meta` contain JSON. In
    CSV, `tags` contains JSON too.
    """

    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"


class _Export(Protocol):
    """Writes the events of a log in one format, slice by slice. Each method except `abandon` blocks."""

    def begin(self) -> None:
        """Writes what precedes the first event. Raises `EventfoldError` if a package is missing."""

    def add(self, slice_: Slice) -> None: ...

    def end(self) -> None:
        """Completes and flushes the file, but does not close it."""

    def abandon(self) -> None:
        """Makes sure that nothing more is written."""


async def export_log(
    source: Address,
    file: BinaryIO,
    format: ExportFormat = ExportFormat.JSONL,
    *,
    progress: Callable[[int, int], object] | None = None,
) -> int:
    """Writes all events of a log, which may be in use, to a binary file.

    To copy a log, use `EventLog.backup` or `copy_log`. If cancelled, it stops after the current write, and the file is
    incomplete.

    Args:
        source: The data directory, an address or an engine.
        file: A buffered binary file, open for writing; it need not be seekable, and is not closed.
        format: How the events are written.
        progress: Called repeatedly with the number of bytes of the log read so far and in total.

    Returns:
        The number of events.

    Raises:
        EventfoldError: The format is `PARQUET`, and the package pyarrow is not installed.
        CorruptLogError: The log is damaged. The file is complete, and contains the events before the damage.
        OSError: The log could not be read, or the file could not be written.
    """
    export = _EXPORTS[ExportFormat(format)](file)
    reader = EventReader(source)
    events = 0
    try:
        await in_thread(export.begin)
        head = None if progress is None else (await reader.head()).offset
        try:
            async with aclosing(reader.read_slices()) as slices:
                async for slice_ in slices:
                    await in_thread(export.add, slice_)
                    events += len(slice_.events)
                    if progress is not None and head is not None:
                        progress(slice_.end_offset, max(head, slice_.end_offset))
        except CorruptLogError:
            await in_thread(export.end)
            raise
        await in_thread(export.end)
        return events
    except BaseException:
        export.abandon()
        raise
    finally:
        await reader._source.aclose()


class _Lines:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def begin(self) -> None:
        pass

    def add(self, slice_: Slice) -> None:
        self._file.write(slice_._lines.data)

    def end(self) -> None:
        self._file.flush()

    def abandon(self) -> None:
        pass


class _Csv(_Lines):
    def begin(self) -> None:
        self._write([CSV_COLUMNS])

    def _write(self, rows: Iterable[Sequence[object]]) -> None:
        text = io.StringIO()
        csv_writer(text.write).writerows(rows)
        self._file.write(text.getvalue().encode())

    def add(self, slice_: Slice) -> None:
        self._write(map(csv_row, slice_.records()))


class _CsvRows:
    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write

    def write(self, row: str) -> None:
        self._write(row.removesuffix("\r\n") + "\n")


def csv_writer(write: Callable[[str], object]) -> Any:
    """A writer of CSV whose rows end with a newline."""
    # Before Python 3.13, a carriage return in a field is quoted only if the end of a row contains one.
    return csv.writer(_CsvRows(write), lineterminator="\r\n")


def csv_row(record: Record) -> Sequence[object]:
    """The fields of an event for CSV, in the order of `CSV_COLUMNS`; absent ones are empty."""
    event = record.event
    meta = "" if event.meta is None else as_json(event.meta)
    tags = as_json(event.tags) if event.tags else ""
    return record.start_offset, event.ts, event.type, event.id or "", event.actor or "", as_json(event.data), meta, tags


def as_json(value: object) -> str:
    """Compact JSON."""
    return msgspec.json.encode(value).decode()


class _Sink(io.RawIOBase):
    """The file for pyarrow, which completes its file in any case; after `abandoned` is set, nothing is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.abandoned = False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if not self.abandoned:
            self._file.write(data)
        return len(data)


class _Parquet:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sink = _Sink(file)
        self._rows: list[tuple[object, ...]] = []
        self._size = 0

    def begin(self) -> None:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise EventfoldError(
                f"Parquet needs the package pyarrow: pip install 'eventfold[parquet]' ({error})"
            ) from error
        text, number = pyarrow.string(), pyarrow.int64()
        types = (number, pyarrow.uint64(), text, text, text, text, text, pyarrow.list_(text))
        self._schema = pyarrow.schema(list(zip(CSV_COLUMNS, types, strict=True)))
        self._new_batch = pyarrow.record_batch
        self._writer = parquet.ParquetWriter(self._sink, self._schema, compression="zstd")

    def add(self, slice_: Slice) -> None:
        self._rows += map(_parquet_row, slice_.records())
        self._size += len(slice_._lines.data)
        if len(self._rows) >= _GROUP_ROWS or self._size >= _GROUP_SIZE:
            self._write()

    def _write(self) -> None:
        if self._rows:
            self._writer.write_batch(self._new_batch(list(zip(*self._rows, strict=True)), schema=self._schema))
            self._rows, self._size = [], 0

    def end(self) -> None:
        self._write()
        self._writer.close()
        self._file.flush()

    def abandon(self) -> None:
        self._sink.abandoned = True


def _parquet_row(record: Record) -> tuple[object, ...]:
    event = record.event
    meta = None if event.meta is None else as_json(event.meta)
    return (
        record.start_offset,
        event.ts,
        event.type,
        event.id,
        event.actor,
        as_json(event.data),
        meta,
        list(event.tags),
    )


_EXPORTS: dict[ExportFormat, Callable[[BinaryIO], _Export]] = {
    ExportFormat.JSONL: _Lines,
    ExportFormat.CSV: _Csv,
    ExportFormat.PARQUET: _Parquet,
}
