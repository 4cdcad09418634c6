"""Directories written by the Rust crate eventfold 0.2.0, read and continued in place."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import COMPAT
from tests.support import event, line, line_hash, records

from eventfold import CorruptLogError, Event, EventLog, EventReader, EventWriter, View

NAMES = sorted(path.name for path in COMPAT.iterdir() if path.is_dir())
PLAIN = ["empty", "long_lines", "plain", "torn_tail"]
Compat = Callable[[str], Path]


def todos(state: dict[str, Any], event: Event) -> dict[str, Any]:
    """The reducer that the directories' `todos` were made with."""
    items = state["items"]
    if event.type == "todo_added":
        items = [*items, {"id": state["next_id"], "text": event.data["text"], "done": False}]
        return {"items": items, "next_id": state["next_id"] + 1}
    if event.type == "todo_completed":
        items = [{**item, "done": True} if item["id"] == event.data["id"] else item for item in items]
    elif event.type == "todo_deleted":
        items = [item for item in items if item["id"] != event.data["id"]]
    return {**state, "items": items}


class Folding:
    """The two views of the directories, and how many events each has folded."""

    def __init__(self) -> None:
        self.folded = {"todos": 0, "counts": 0}
        self.views: list[View[Any]] = [
            View("todos", self._todos, lambda: {"items": [], "next_id": 0}),
            View("counts", self._counts, dict),
        ]

    def _todos(self, state: dict[str, Any], event: Event) -> dict[str, Any]:
        self.folded["todos"] += 1
        return todos(state, event)

    def _counts(self, state: dict[str, int], event: Event) -> dict[str, int]:
        self.folded["counts"] += 1
        return {**state, event.type: state.get(event.type, 0) + 1}


def expected(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((COMPAT / f"{name}.expected.json").read_text())
    return found


def as_event(found: dict[str, Any]) -> Event:
    return Event(found.pop("type"), found.pop("data"), **found)


def test_the_directories_are_all_there() -> None:
    """Without this test, the others could pass over an empty list."""
    assert NAMES == ["archive_only", "empty", "long_lines", "plain", "rotated", "stale_snapshot", "torn_tail"]


@pytest.mark.parametrize("name", NAMES)
async def test_a_reader_gives_the_crate_s_events_and_hashes(compat: Compat, name: str) -> None:
    """A reader gives them before any writer has touched the directory, and the offsets chain up to the head."""
    reader = EventReader(compat(name))
    found = await records(reader)
    head = await reader.head()
    wanted = expected(name)["events"]

    assert [record.event for record in found] == [as_event(each["event"]) for each in wanted]
    assert [record.line_hash for record in found] == [each["hash"] for each in wanted]
    assert [record.start_offset for record in found] == [0, *(record.end_offset for record in found)][: len(found)]
    assert head == ((found[-1].end_offset, found[-1].line_hash) if found else (0, ""))


@pytest.mark.parametrize("name", NAMES)
async def test_a_log_gives_the_crate_s_events_and_states(compat: Compat, name: str) -> None:
    """The log is opened for writing and uses the crate's snapshots."""
    wanted, folding = expected(name), Folding()
    async with EventLog.open(compat(name), views=folding.views) as log:
        found = await records(log)
        states = log.view("todos"), log.view("counts")
        rebuilt = await log.rebuild("todos"), await log.rebuild("counts")

    assert [record.line_hash for record in found] == [each["hash"] for each in wanted["events"]]
    assert states == rebuilt == (wanted["todos"], wanted["counts"])


@pytest.mark.parametrize("name", NAMES)
async def test_the_log_continues_after_the_crate_s_events(compat: Compat, name: str) -> None:
    """Appended events follow the crate's and are still there after a restart, where our own snapshots are used."""
    directory, wanted = compat(name), expected(name)
    async with EventLog.open(directory, views=Folding().views) as log:
        await log.append(event(1))
        await log.refresh_all()
    again = Folding()
    async with EventLog.open(directory, views=again.views) as log:
        found = await records(log)
        states = log.view("todos"), log.view("counts")

    assert [record.line_hash for record in found[:-1]] == [each["hash"] for each in wanted["events"]]
    assert found[-1].event == event(1)
    assert states == (wanted["todos"], {**wanted["counts"], "counted": 1})
    assert again.folded == {"todos": 0, "counts": 0}


@pytest.mark.parametrize("name", ["plain", "long_lines", "rotated", "torn_tail"])
async def test_the_crate_s_snapshots_in_the_active_log_are_used(
    compat: Compat, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """The view folds only the events after the snapshot, and no rebuild is logged."""
    directory, folding = compat(name), Folding()
    places = {
        view: json.loads((directory / "views" / f"{view}.snapshot.json").read_text())["offset"]
        for view in folding.folded
    }
    async with EventLog.open(directory, views=folding.views) as log:
        base = log.head.offset - await log.active_log_size()
        after = {view: len(await records(log, base + offset)) for view, offset in places.items()}

    assert folding.folded == after
    assert "rebuilt" not in caplog.text


@pytest.mark.parametrize(("name", "view"), [("stale_snapshot", "todos"), ("archive_only", "todos")])
async def test_a_snapshot_of_the_crate_without_a_known_offset_is_not_used(
    compat: Compat, caplog: pytest.LogCaptureFixture, name: str, view: str
) -> None:
    """With a snapshot from before a rotation, or with offset 0, the view is rebuilt with a warning."""
    folding, wanted = Folding(), expected(name)
    with caplog.at_level(logging.WARNING, "eventfold"):
        async with EventLog.open(compat(name), views=folding.views) as log:
            state = log.view(view)

    assert folding.folded[view] == len(wanted["events"])
    assert state == wanted[view]
    assert f"view {view!r} is rebuilt" in caplog.text


async def test_the_crate_s_incomplete_line_is_cut_off_and_kept(
    compat: Compat, caplog: pytest.LogCaptureFixture
) -> None:
    """The incomplete line is not an event, and its bytes go into a file of their own."""
    directory = compat("torn_tail")
    data = (directory / "app.jsonl").read_bytes()
    whole = data.rindex(b"\n") + 1
    with caplog.at_level(logging.WARNING, "eventfold"):
        async with EventWriter.open(directory) as writer:
            head = writer.head

    assert head.offset == whole < len(data)
    assert (directory / f"app.jsonl.torn.{whole}").read_bytes() == data[whole:]
    assert f"cut {len(data) - whole} bytes" in caplog.text


@pytest.mark.parametrize("name", PLAIN)
async def test_the_lines_that_the_crate_wrote_are_not_rewritten(compat: Compat, name: str) -> None:
    """Opening and closing leaves the complete lines as they are, byte for byte."""
    directory = compat(name)
    before = (directory / "app.jsonl").read_bytes()
    async with EventLog.open(directory, views=Folding().views):
        pass
    after = (directory / "app.jsonl").read_bytes()

    assert after == before[: before.rfind(b"\n") + 1]


@pytest.mark.parametrize("name", ["plain", "long_lines"])
async def test_our_lines_are_the_crate_s_lines(tmp_path: Path, name: str) -> None:
    """If we append the same events, their hashes are the same."""
    wanted = expected(name)["events"]
    async with EventWriter.open(tmp_path / "data") as writer:
        results = [await writer.append(as_event(each["event"])) for each in wanted]

    assert [result.line_hash for result in results] == [each["hash"] for each in wanted]
    assert (tmp_path / "data" / "app.jsonl").read_bytes() == (COMPAT / name / "app.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["plain", "rotated", "stale_snapshot", "archive_only"])
async def test_our_snapshots_are_correct_for_the_crate(compat: Compat, name: str) -> None:
    """`offset` is a position in the active log with the hash of the line before it, or 0 without a hash."""
    directory = compat(name)
    async with EventLog.open(directory, views=Folding().views) as log:
        await log.append(event(1))
        await log.refresh_all()
    data = (directory / "app.jsonl").read_bytes()
    for view in ("todos", "counts"):
        saved = json.loads((directory / "views" / f"{view}.snapshot.json").read_text())

        assert saved["offset"] == len(data)
        assert saved["hash"] == line_hash(data[:-1].rpartition(b"\n")[2])


async def test_a_rotation_of_the_crate_s_directory_loses_nothing(compat: Compat) -> None:
    """The archive then holds the crate's frames and ours."""
    directory, wanted = compat("rotated"), expected("rotated")
    async with EventLog.open(directory, views=Folding().views) as log:
        await log.append(event(1))
        await log.rotate()
        await log.append(event(2))
        found = await records(log)
    shutil.rmtree(directory / "views")
    async with EventLog.open(directory, views=Folding().views) as log:
        states = log.view("todos"), log.view("counts")

    assert [record.line_hash for record in found[:-2]] == [each["hash"] for each in wanted["events"]]
    assert [record.event for record in found[-2:]] == [event(1), event(2)]
    assert states == (wanted["todos"], {**wanted["counts"], "counted": 2})


async def test_the_error_says_what_to_do_if_the_crate_wrote_the_first_line_after_our_rotation(tmp_path: Path) -> None:
    """Files that were copied at different moments would look the same, so only a person can know."""
    async with EventLog.open(tmp_path) as log:
        await log.append(event(1))
        await log.rotate()
    with (tmp_path / "app.jsonl").open("ab") as file:
        file.write(line(2))
    with pytest.raises(CorruptLogError, match=r"such as the Rust crate, delete .*/app\.jsonl\.base"):
        await EventLog.open(tmp_path)
    (tmp_path / "app.jsonl.base").unlink()
    async with EventLog.open(tmp_path) as log:
        found = await records(log)

    assert [record.event for record in found] == [event(1), event(2)]
