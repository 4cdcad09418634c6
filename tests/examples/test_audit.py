"""The audit log: how entries are found, and how changes to the log are noticed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from unittest import mock

import pytest
from tests.examples.programs import complaint, output

ENTRIES = [
    ("2026-11-01 09:00", "ann", "invoice:7", "created", "amount=1200"),
    ("2026-11-02 10:00", "bob", "invoice:7", "approved", ""),
    ("2026-11-03 11:00", "ann", "invoice:8", "created", "amount=99"),
    ("2026-11-04 12:00", "ann", "invoice:7", "paid", "account=12"),
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an audit log of four days, which no test changes."""
    directory = tmp_path_factory.mktemp("recorded")
    for time, *words in ENTRIES:
        seconds = datetime.fromisoformat(time).timestamp()
        with mock.patch("time.time", lambda seconds=seconds: seconds):
            output("audit", "record", *filter(None, words), cwd=directory)
    return directory


@pytest.fixture
def copied(recorded: Path, tmp_path: Path) -> Path:
    """A copy of it, which a test may change."""
    return Path(shutil.copytree(recorded, tmp_path / "copied"))


def found(directory: Path, *options: str) -> list[str]:
    """Returns the days of the month on which the entries found were made."""
    return [line.split()[1][-2:] for line in output("audit", "find", *options, cwd=directory).splitlines()]


@pytest.mark.parametrize(
    ("options", "days"),
    [
        ([], ["01", "02", "03", "04"]),
        (["--actor", "ann"], ["01", "03", "04"]),
        (["--thing", "invoice:7", "--actor", "ann"], ["01", "04"]),
        (["--action", "created"], ["01", "03"]),
        (["--since", "2026-11-02 10:00", "--until", "2026-11-04"], ["02", "03"]),
        (["--thing", "invoice:7", "--last", "2"], ["02", "04"]),
        (["--actor", "eve"], []),
    ],
    ids=["all", "actor", "actor and thing", "action", "time", "last", "nobody"],
)
def test_entries_are_found_by_any_detail(recorded: Path, options: list[str], days: list[str]) -> None:
    """The details are the actor, the action, the thing, the time, and the age."""
    assert found(recorded, *options) == days


def test_an_entry_says_who_did_what_to_which_thing_and_when(recorded: Path) -> None:
    """A single line shows all details."""
    first = output("audit", "find", cwd=recorded).splitlines()[0]

    assert first.split()[1:] == ["2026-11-01", "09:00:00", "ann", "created", "invoice:7", "amount=1200"]


def test_a_seal_stays_valid_while_entries_are_added(copied: Path) -> None:
    """The seal covers only the entries before it."""
    seal = output("audit", "seal", cwd=copied).split()
    output("audit", "record", "eve", "invoice:9", "created", cwd=copied)

    assert "has been changed" in output("audit", "check", *seal, cwd=copied)
    assert output("audit", "seal", cwd=copied).split() != seal


def altered(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b"approved", b"declined"), *lines[2:]]


def removed(lines: list[bytes]) -> list[bytes]:
    return [lines[0], *lines[2:]]


def moved(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[2], lines[1], lines[3]]


def inserted(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], lines[0], *lines[2:]]


def damaged(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], lines[2].replace(b'"thing"', b'"thing '), lines[3]]


@pytest.mark.parametrize("tamper", [altered, removed, moved, inserted, damaged])
def test_a_seal_shows_that_the_log_was_changed(copied: Path, tamper: Callable[[list[bytes]], list[bytes]]) -> None:
    """Any change is noticed, even if the changed log is valid."""
    seal = output("audit", "seal", cwd=copied).split()
    log = copied / "audit-data" / "app.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    assert tamper(lines) != lines
    log.write_bytes(b"".join(tamper(lines)))

    assert complaint("audit", "check", *seal, cwd=copied).startswith("audit: ")


def test_the_error_message_is_one_line(tmp_path: Path) -> None:
    """A missing log does not look like an empty one."""
    assert complaint("audit", "find", cwd=tmp_path) == "audit: there is no log in audit-data"
    assert "type must be a non-empty string" in complaint("audit", "record", "ann", "it", "", cwd=tmp_path)
    assert output("audit", "find", cwd=tmp_path) == ""
