"""Log records: each has a stable name and its details, and the documentation lists all of them."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from eventfold import Event, EventLog, WriterFailedError

from .support import FaultInjector

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"^\| `(?P<name>[a-z_]+\.[a-z_]+)` \| (?P<level>[a-z]+) \| (?P<fields>[^|]*) \|", re.MULTILINE)


def calls() -> Iterator[tuple[Path, ast.Call]]:
    """Yields the calls in the source that log something."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "log_event":
                yield path, node


def described(call: ast.Call) -> tuple[str, str, frozenset[str]]:
    """Returns the name, the level and the fields of a record."""
    level, name = call.args[0], call.args[1]
    assert isinstance(level, ast.Name)
    fields = {keyword.arg or "" for keyword in call.keywords} - {"cause"}
    return ast.literal_eval(name), level.id.lower(), frozenset(fields)


def test_the_documentation_lists_every_record_with_its_level_and_fields() -> None:
    rows = list(ROW.finditer((ROOT / "docs" / "operations.md").read_text()))
    listed = {(row["name"], row["level"], frozenset(re.findall(r"`(\w+)`", row["fields"]))) for row in rows}
    assert listed == {described(call) for _, call in calls()}
    assert len(rows) == len({row["name"] for row in rows})


def test_every_message_refers_to_fields_that_its_record_has() -> None:
    for path, call in calls():
        message = ast.literal_eval(call.args[2])
        used = set(re.findall(r"%\((\w+)\)", message))
        assert used, f"{path}: {message}"
        assert used <= described(call)[2], f"{path}: {message}"
        message % dict.fromkeys(used, 1)


def test_nothing_is_logged_without_a_name() -> None:
    getting = {path.name for path in (ROOT / "src").rglob("*.py") if "getLogger" in path.read_text()}
    assert getting == {"_logging.py"}


async def test_a_record_has_its_name_and_its_details(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with EventLog.open(tmp_path) as log:
        end = (await log.append(Event("added"))).end_offset
    with (tmp_path / "app.jsonl").open("ab") as file:
        file.write(b'{"type":"torn"')
    async with EventLog.open(tmp_path):
        pass
    [record] = caplog.records
    assert (record.name, record.levelno, record.__dict__["event_name"]) == (
        "eventfold",
        logging.WARNING,
        "recovery.tail_cut",
    )
    assert {name: record.__dict__[name] for name in ("path", "offset", "size", "kept_in")} == {
        "path": str(tmp_path / "app.jsonl"),
        "offset": end,
        "size": 14,
        "kept_in": f"app.jsonl.torn.{end}",
    }
    assert f"cut 14 bytes of an unfinished write at offset {end}" in record.getMessage()
    assert record.filename == "active.py"


async def test_a_failed_sync_is_logged_once_however_many_appends_it_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, faults: FaultInjector
) -> None:
    async with EventLog.open(tmp_path) as log:
        faults.fail("sync")
        for _ in range(2):
            with pytest.raises(WriterFailedError):
                await log.append(Event("added"))
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.__dict__["event_name"] == "writer.failed"
    assert record.__dict__["location"] == str(tmp_path / "app.jsonl")
