"""The notebook and its time machine, run from the command line."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.examples.programs import EXAMPLES, WITHIN, complaint, output, process

from eventfold import EventLog, Record


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a notebook in which a note was added, edited and deleted; no test writes to it."""
    directory = tmp_path_factory.mktemp("written")
    for words in (["add", "buy milk"], ["add", "call Ann"], ["edit", "1", "buy oat milk"], ["delete", "2"]):
        output("notebook", *words, cwd=directory)
    return directory


def records(directory: Path) -> list[Record]:
    """Returns the events in the notebook's log."""

    async def read() -> list[Record]:
        async with EventLog.open(directory / "notebook-data", read_only=True) as log:
            return [record async for record in log.read_full()]

    return asyncio.run(read())


def test_notes_are_there_after_a_restart(written: Path) -> None:
    """Edited notes have their new text, and deleted notes are missing."""
    assert output("notebook", "list", cwd=written) == "   1  buy oat milk\n"


def test_a_deleted_note_has_its_history(written: Path) -> None:
    """The log keeps all of its versions."""
    lines = [line.split(maxsplit=2)[2].strip() for line in output("notebook", "history", "2", cwd=written).splitlines()]

    assert lines == ["note_added    call Ann", "note_deleted"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["edit", "2", "call Bob"], "notebook: there is no note 2"),
        (["add", " "], "notebook: a note needs a text"),
        (["history", "3"], "notebook: there never was a note 3"),
    ],
    ids=["deleted", "empty", "never there"],
)
def test_the_error_message_is_one_line(written: Path, words: list[str], reason: str) -> None:
    """Nothing is written."""
    assert complaint("notebook", *words, cwd=written) == reason


def test_notes_that_are_added_at_the_same_time_get_different_numbers(tmp_path: Path) -> None:
    """Several terminals write to one notebook."""
    command = [sys.executable, EXAMPLES / "notebook.py", "add", "me too"]
    writers = [subprocess.Popen(command, cwd=tmp_path) for _ in range(2)]
    for writer in writers:
        assert writer.wait(WITHIN) == 0

    assert [record.event.data["note"] for record in records(tmp_path)] == [1, 2]


def test_watching_shows_what_another_terminal_writes_until_ctrl_c(tmp_path: Path) -> None:
    """The command ends without a traceback."""
    with process("notebook", "watch", cwd=tmp_path) as watching:
        assert watching.stdout.readline() == "--\n"
        output("notebook", "add", "seen at once", cwd=tmp_path)
        shown = [watching.stdout.readline() for _ in range(2)]
        watching.send_signal(signal.SIGINT)
        _, complaints = watching.communicate(timeout=WITHIN)

    assert shown == ["   1  seen at once\n", "--\n"]
    assert (watching.returncode, complaints) == (130, "")


def test_the_notebook_is_shown_as_it_was_at_an_offset(written: Path) -> None:
    """The offsets are from before the edit and from before everything."""
    before_the_edit = records(written)[1].end_offset

    assert output("time_travel", "at", str(before_the_edit), cwd=written) == "   1  buy milk\n   2  call Ann\n"
    assert output("time_travel", "at", "0", cwd=written) == "no notes\n"


def test_the_notebook_is_shown_as_it_was_at_a_time(written: Path) -> None:
    """Long ago, the notebook was empty; in the future, it has everything that it has now."""
    assert output("time_travel", "at", "2001-01-01", cwd=written) == "no notes\n"
    assert output("time_travel", "at", "2101-01-01 12:00", cwd=written) == "   1  buy oat milk\n"


def test_two_moments_are_compared(written: Path) -> None:
    """An edited note shows both texts, and a deleted one shows as removed."""
    before_the_edit = records(written)[1].end_offset

    assert output("time_travel", "diff", str(before_the_edit), "now", cwd=written).splitlines() == [
        "-    1  buy milk",
        "+    1  buy oat milk",
        "-    2  call Ann",
    ]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["at", "7"], "time_travel: offset 7 is not where a line begins"),
        (["at", "99999"], "time_travel: offset 99999 is beyond the head at"),
        (["--dir", "mistyped", "log"], "time_travel: there is no notebook in mistyped"),
    ],
    ids=["inside a line", "beyond the end", "no notebook"],
)
def test_the_error_about_an_invalid_moment_is_one_line(written: Path, words: list[str], reason: str) -> None:
    """No state is shown for it."""
    assert complaint("time_travel", *words, cwd=written).startswith(reason)
    assert not (written / "mistyped").exists()
