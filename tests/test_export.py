"""`export_log`: every event of a log as a line or a row."""

from __future__ import annotations

import asyncio
import csv
import io
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet
from tests.support import line, write_log

from eventfold import CorruptLogError, Event, EventfoldError, EventLog, EventReader, ExportFormat, export_log

EVENTS = [
    Event("plain", {"n": 1}, ts=7),
    Event("full", [1, "ä\u2028,\"'"], ts=2**64 - 1, id="a", actor="ann", meta={"ip": None}, tags=("x y", "z")),
    Event("line\r\nbreak", "text", ts=0, id=""),
    Event("old\rbreak", None, ts=1, actor="\r"),
]


async def make(directory: Path) -> list[int]:
    """Creates a log with these events, partly archived; returns their offsets."""
    async with EventLog.open(directory) as log:
        first = await log.append(EVENTS[0])
        await log.rotate()
        return [first.start_offset, *(result.start_offset for result in await log.append_many(EVENTS[1:]))]


async def exported(source: Path, format: ExportFormat) -> bytes:
    file = io.BytesIO()
    assert await export_log(source, file, format) == len(EVENTS)
    return file.getvalue()


async def test_lines_are_exported_byte_for_byte(tmp_path: Path) -> None:
    await make(tmp_path)

    lines = [record._line async for record in EventReader(tmp_path).read_full()]
    assert await exported(tmp_path, ExportFormat.JSONL) == b"".join(lines)


async def test_csv_has_a_row_for_each_event(tmp_path: Path) -> None:
    """Tags are written as JSON, since a tag may contain spaces and commas."""
    offsets = await make(tmp_path)

    text = (await exported(tmp_path, ExportFormat.CSV)).decode()
    rows = list(csv.DictReader(io.StringIO(text, newline="")))

    assert [int(row["offset"]) for row in rows] == offsets
    assert [int(row["ts"]) for row in rows] == [event.ts for event in EVENTS]
    assert [row["type"] for row in rows] == [event.type for event in EVENTS]
    assert [row["data"] for row in rows] == ['{"n":1}', '[1,"ä\u2028,\\"\'"]', '"text"', "null"]
    assert rows[0] == {**rows[0], "id": "", "actor": "", "meta": "", "tags": ""}
    assert rows[1] == {**rows[1], "id": "a", "actor": "ann", "meta": '{"ip":null}', "tags": '["x y","z"]'}


async def test_parquet_has_a_row_for_each_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has several row groups, and fields that an event lacks are null."""
    monkeypatch.setattr("eventfold._export._GROUP_ROWS", 1)
    offsets = await make(tmp_path)

    file = io.BytesIO(await exported(tmp_path, ExportFormat.PARQUET))
    columns: dict[str, list[Any]] = parquet.read_table(file).to_pydict()

    assert parquet.ParquetFile(file).num_row_groups > 1
    assert columns == {
        "offset": offsets,
        "ts": [event.ts for event in EVENTS],
        "type": [event.type for event in EVENTS],
        "id": [None, "a", "", None],
        "actor": [None, "ann", None, "\r"],
        "data": ['{"n":1}', '[1,"ä\u2028,\\"\'"]', '"text"', "null"],
        "meta": [None, '{"ip":null}', None, None],
        "tags": [[], ["x y", "z"], [], []],
    }


async def test_an_empty_log_is_exported(tmp_path: Path) -> None:
    for format in ExportFormat:
        file = io.BytesIO()
        assert await export_log(tmp_path, file, format) == 0
    assert parquet.read_table(file).num_rows == 0


@pytest.mark.parametrize("format", ExportFormat)
async def test_events_before_damage_are_exported(tmp_path: Path, format: ExportFormat) -> None:
    """The exported file is complete, and the damage is reported afterwards."""
    write_log(tmp_path, line(1), line(2), b"damage\n", line(3))
    file = io.BytesIO()

    with pytest.raises(CorruptLogError):
        await export_log(tmp_path, file, format)

    file.seek(0)
    rows = parquet.read_table(file).num_rows if format is ExportFormat.PARQUET else file.getvalue().count(b'"n"')
    assert rows == 2 or (format is ExportFormat.CSV and file.getvalue().count(b'""n""') == 2)


async def test_an_incomplete_parquet_file_does_not_look_complete(tmp_path: Path) -> None:
    """The file has no footer if pyarrow's writer is thrown away."""
    await make(tmp_path)

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() > 0:
                raise OSError("made to fail")
            return super().write(data)

    file = Full()
    with pytest.raises(OSError, match="made to fail"):
        await export_log(tmp_path, file, ExportFormat.PARQUET)
    assert file.getvalue() == b"PAR1"


async def test_a_cancelled_export_ends(tmp_path: Path) -> None:
    await make(tmp_path)
    task = asyncio.create_task(export_log(tmp_path, io.BytesIO()))
    await asyncio.sleep(0)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("format", ExportFormat)
async def test_a_slow_file_does_not_block_the_event_loop(tmp_path: Path, format: ExportFormat) -> None:
    """The loop is not held before the first row or after the last one either."""
    await make(tmp_path)
    threads: set[threading.Thread] = set()

    class File(io.BytesIO):
        def write(self, data: Any) -> int:
            threads.add(threading.current_thread())
            return super().write(data)

        def flush(self) -> None:
            threads.add(threading.current_thread())

    await export_log(tmp_path, File(), format)

    assert threads
    assert threading.main_thread() not in threads


async def test_progress_is_reported(tmp_path: Path) -> None:
    await make(tmp_path)
    reports: list[tuple[int, int]] = []

    await export_log(tmp_path, io.BytesIO(), progress=lambda done, total: reports.append((done, total)))

    assert reports[-1] == ((await EventReader(tmp_path).head()).offset,) * 2


async def test_without_pyarrow_parquet_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    with pytest.raises(EventfoldError, match=r"pip install 'eventfold\[parquet\]'"):
        await export_log(tmp_path, io.BytesIO(), ExportFormat.PARQUET)


def test_pyarrow_is_imported_only_for_parquet() -> None:
    script = "import eventfold, sys; print('pyarrow' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "False"
