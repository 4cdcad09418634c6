"""Snapshots: a snapshot is used only if the log before its offset is the one from which it was calculated."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support import FaultInjector, event, line, write_log

from eventfold import Event, EventWriter, Snapshot, SyncMode, View, line_hash, snapshot


def counting(version: int | str = 0) -> tuple[View[int], list[int]]:
    """A view that counts events, and a list that gets an element for each event folded."""
    folded: list[int] = []

    def reduce(state: int, event: Event) -> int:
        folded.append(event.data["n"])
        return state + 1

    return View("v", reduce, 0, version=version), folded


async def build(directory: Path, version: int | str = 0, events: int = 5) -> Path:
    """Creates a log with a snapshot of a counting view at its end; returns the snapshot's path."""
    async with EventWriter.open(directory, sync=SyncMode.OS) as writer:
        for n in range(events):
            await writer.append(event(n))
        view, _ = counting(version)
        await view.refresh(writer.reader())
        await view.save(writer.reader())
    return directory / "views" / "v.snapshot.json"


async def reopen(directory: Path, version: int | str = 0) -> tuple[int, int]:
    """Opens the log as a new program would; returns the state of the counting view and how many events it folded."""
    async with EventWriter.open(directory) as writer:
        view, folded = counting(version)
        state = await view.refresh(writer.reader())
    return state, len(folded)


async def test_a_snapshot_has_the_keys_of_the_format(data_dir: Path) -> None:
    """Their order, and their meaning for the Rust crate and for us, are those of the format."""
    path = await build(data_dir, version=3)
    found = json.loads(path.read_bytes())
    size = (data_dir / "app.jsonl").stat().st_size

    assert list(found) == ["state", "offset", "hash", "position", "position_hash", "version", "checksum"]
    assert found == {
        "state": 5,
        "offset": size,
        "hash": line_hash(line(4)),
        "position": size,
        "position_hash": line_hash(line(4)),
        "version": 3,
        "checksum": line_hash(b"5"),
    }


async def test_a_valid_snapshot_is_used(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is folded and nothing is logged."""
    await build(data_dir)
    result = await reopen(data_dir)

    assert result == (5, 0)
    assert caplog.records == []


async def test_folding_continues_from_a_snapshot_before_the_head(data_dir: Path) -> None:
    """Only the events after it are folded."""
    await build(data_dir)
    async with EventWriter.open(data_dir) as writer:
        await writer.append_many([event(5), event(6)])
    result = await reopen(data_dir)

    assert result == (7, 2)


@pytest.mark.parametrize(("saved", "asked"), [(0, 1), (1, 0), (1, 2), ("a", "b"), (1, "1")])
async def test_another_version_means_a_rebuild(
    data_dir: Path, caplog: pytest.LogCaptureFixture, saved: int | str, asked: int | str
) -> None:
    """A warning contains both versions, and the new snapshot has the new one."""
    path = await build(data_dir, saved)
    with caplog.at_level(logging.WARNING, "eventfold"):
        result = await reopen(data_dir, asked)
    found = json.loads(path.read_bytes())

    assert result == (5, 5)
    assert found["version"] == asked
    assert f"version {saved!r}" in caplog.text
    assert f"version {asked!r}" in caplog.text


@pytest.mark.parametrize(
    ("saved", "asked"), [(["a"], ["a", "b"]), (["a", "b"], ["a"]), (None, ["a"]), (["a"], None), ([], ["a"])]
)
async def test_other_event_types_mean_a_rebuild(
    data_dir: Path, caplog: pytest.LogCaptureFixture, saved: list[str] | None, asked: list[str] | None
) -> None:
    """The version need not change: the snapshot was made from other events. The warning contains both sets of types."""

    def view(types: list[str] | None) -> View[list[str]]:
        return View("v", lambda state, event: [*state, event.type], list, event_types=types)

    async with EventWriter.open(data_dir) as writer:
        await writer.append_many([event(n, "abc"[n]) for n in range(3)])
        first = view(saved)
        await first.refresh(writer.reader())
        await first.save(writer.reader())
        with caplog.at_level(logging.WARNING, "eventfold"):
            state = await view(asked).refresh(writer.reader())

    assert state == ["a", "b", "c"] if asked is None else state == asked
    assert "it was made from" in caplog.text
    assert "the view selects" in caplog.text


async def test_a_snapshot_stores_the_types_of_its_events(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The types are sorted; if a view names the same types in another order, its snapshot is used."""
    calls = 0

    def reduce(state: int, event: Event) -> int:
        nonlocal calls
        calls += 1
        return state + 1

    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(0, "a"))
        for types in (("b", "a"), ("a", "b")):
            view = View("v", reduce, 0, event_types=types)
            await view.refresh(writer.reader())
            await view.save(writer.reader())
    found = json.loads((data_dir / "views" / "v.snapshot.json").read_bytes())

    assert found["query"] == [{"types": ["a", "b"]}]
    assert calls == 1
    assert caplog.records == []


def edited(**changes: Any) -> Callable[[bytes], bytes]:
    """Returns a change to the keys of a snapshot; None removes a key."""

    def change(data: bytes) -> bytes:
        found = {**json.loads(data), **changes}
        return json.dumps({name: value for name, value in found.items() if value is not None}).encode()

    return change


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "no JSON": lambda data: b"\0" * len(data),
    "bad UTF-8": lambda data: b"\xff" + data,
    "a list": lambda data: b"[]",
    "more behind it": lambda data: data + b"{}",
    "another state": edited(state=77),
    "a state of another type": edited(state="five"),
    "no state": edited(state=None),
    "no checksum": edited(checksum=None),
    "another checksum": edited(checksum="0" * 16),
    "another position": edited(position=len(line(0))),
    "a position inside a line": edited(position=len(line(0)) + 3),
    "a position beyond the head": edited(position=10**9),
    "a negative position": edited(position=-1),
    "a position of 0": edited(position=0),
    "a position that is no number": edited(position="x"),
    "another hash": edited(position_hash="0" * 16),
    "no hash": edited(position_hash=None),
    "a state that does not decode": lambda data: edited(state={"a": 1}, checksum=line_hash(b'{"a": 1}'))(data),
}


@pytest.mark.parametrize("case", DAMAGE)
async def test_a_damaged_snapshot_means_a_rebuild_and_a_warning(
    data_dir: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    """Whatever is wrong with it, the state is right, the warning says why, and a good snapshot replaces it."""
    path = await build(data_dir)
    good = path.read_bytes()
    path.write_bytes(DAMAGE[case](good))
    with caplog.at_level(logging.WARNING, "eventfold"):
        result = await reopen(data_dir)
    messages = [record.getMessage() for record in caplog.records]

    assert result == (5, 5)
    assert len(messages) == 1
    assert "view 'v' is rebuilt" in messages[0]
    assert messages[0].rpartition(": ")[2]
    assert case != "a state that does not decode" or "can't be decoded into int" in messages[0]
    assert path.read_bytes() == good


async def test_every_changed_byte_of_a_snapshot_is_noticed_or_harmless(damaged_dir: Path) -> None:
    """Whichever byte is wrong, the state is that of the log."""
    path = await build(damaged_dir, events=2)
    good = path.read_bytes()
    states = set()
    async with EventWriter.open(damaged_dir) as writer:
        for at in range(len(good)):
            path.write_bytes(good[:at] + bytes([good[at] ^ 0x01]) + good[at + 1 :])
            view, _ = counting()
            states.add(await view.refresh(writer.reader()))

    assert states == {2}


async def test_a_missing_snapshot_is_not_a_warning(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """If a view is new, or somebody deleted its snapshot, nothing is logged."""
    path = await build(data_dir)
    path.unlink()
    with caplog.at_level(logging.DEBUG, "eventfold"):
        result = await reopen(data_dir)

    assert result == (5, 5)
    assert caplog.records == []


async def test_a_directory_in_the_place_of_a_snapshot_affects_nothing(
    data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The directory can neither be read nor replaced; the view works, with warnings."""
    path = await build(data_dir)
    path.unlink()
    path.mkdir()
    with caplog.at_level(logging.WARNING, "eventfold"):
        result = await reopen(data_dir)

    assert result == (5, 5)
    assert "is rebuilt" in caplog.text
    assert "could not be written" in caplog.text


@pytest.mark.parametrize("edit", ["changed", "shorter", "emptied", "other"])
async def test_an_edited_log_means_a_rebuild(data_dir: Path, caplog: pytest.LogCaptureFixture, edit: str) -> None:
    """The snapshot was made from another log than the one that is there now."""
    await build(data_dir)
    lines = [line(n) for n in range(5)]
    new = {
        "changed": [*lines[:4], line(4, "countEd")],
        "shorter": lines[:3],
        "emptied": [],
        "other": [line(n) for n in range(10, 19)],
    }[edit]
    write_log(data_dir, *new)
    (data_dir / "app.jsonl.base").unlink()
    with caplog.at_level(logging.WARNING, "eventfold"):
        result = await reopen(data_dir)

    assert result == (len(new), len(new))
    assert "view 'v' is rebuilt" in caplog.text


# Snapshots of the Rust crate


def rust(directory: Path, **keys: Any) -> None:
    """Writes a snapshot as the Rust crate does: with its own keys only, over several lines."""
    path = directory / "views" / "v.snapshot.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(keys, indent=2))


async def test_a_snapshot_of_the_crate_is_used_if_its_hash_fits(
    data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The snapshot's offset must be above 0 and within the active log."""
    write_log(data_dir, line(0), line(1), line(2))
    rust(data_dir, state=2, offset=len(line(0) + line(1)), hash=line_hash(line(1)))
    result = await reopen(data_dir)

    assert result == (3, 1)
    assert caplog.records == []


@pytest.mark.parametrize(
    "keys",
    [
        {"state": 2, "offset": 0, "hash": ""},
        {"state": 2, "offset": len(line(0)), "hash": "0" * 16},
        {"state": 2, "offset": len(line(0)), "hash": ""},
        {"state": 2, "offset": len(line(0)) + 1, "hash": line_hash(line(0))},
        {"state": 2, "offset": 10**6, "hash": line_hash(line(2))},
        {"state": 2, "offset": -5, "hash": line_hash(line(2))},
        {"state": 2, "offset": 2**63 - 1, "hash": ""},
        {"state": "x", "offset": len(line(0)), "hash": line_hash(line(0))},
    ],
    ids=["offset 0", "other hash", "no hash", "inside a line", "beyond the log", "negative", "nowhere", "other type"],
)
async def test_any_other_snapshot_of_the_crate_means_a_rebuild(
    data_dir: Path, caplog: pytest.LogCaptureFixture, keys: dict[str, Any]
) -> None:
    """Offset 0 may mean the beginning of the log or the end of an archive."""
    write_log(data_dir, line(0), line(1), line(2))
    rust(data_dir, **keys)
    with caplog.at_level(logging.WARNING, "eventfold"):
        result = await reopen(data_dir)

    assert result == (3, 3)
    assert "view 'v' is rebuilt" in caplog.text


# The module


async def test_save_and_load_give_the_same_snapshot(tmp_path: Path) -> None:
    """All fields come back, and the directory is created if necessary."""
    original = Snapshot({"a": [1, None, "ä"]}, 10, "abc", 20, "def", "v2")
    path = tmp_path / "deep" / "x.json"
    await snapshot.save(path, original)
    found = await snapshot.load(str(path))

    assert found == original


async def test_a_snapshot_needs_only_state_offset_and_hash(tmp_path: Path) -> None:
    original = Snapshot([1], 10, "abc")
    await snapshot.save(tmp_path / "x.json", original)
    found = await snapshot.load(tmp_path / "x.json", list[int])

    assert found == original
    assert (original.position, original.position_hash, original.version) == (None, None, 0)


async def test_loading_a_missing_file_returns_none_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A snapshot is optional."""
    found = await snapshot.load(tmp_path / "x.json")

    assert found is None
    assert caplog.records == []


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"state":1}', b'{"state":"x","offset":1,"hash":""}'])
async def test_loading_a_damaged_file_returns_none_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    """In the last of these files, the state is not an `int`."""
    (tmp_path / "x.json").write_bytes(data)
    with caplog.at_level(logging.WARNING, "eventfold"):
        found = await snapshot.load(tmp_path / "x.json", int)

    assert found is None
    assert "x.json" in caplog.text


async def test_delete_removes_the_file_durably(tmp_path: Path, faults: FaultInjector) -> None:
    """The directory is synced, and deleting twice is not an error."""
    await snapshot.save(tmp_path / "x.json", Snapshot(1, 0, ""))
    synced = faults.count("sync_dir")
    await snapshot.delete(tmp_path / "x.json")
    removed = list(synced)
    await snapshot.delete(tmp_path / "x.json")

    assert list(tmp_path.iterdir()) == []
    assert removed == [(tmp_path,)]


async def test_save_refuses_a_state_that_is_not_json(tmp_path: Path) -> None:
    """An older file stays."""
    await snapshot.save(tmp_path / "x.json", Snapshot(1, 0, ""))
    with pytest.raises(TypeError, match="object"):
        await snapshot.save(tmp_path / "x.json", Snapshot(object(), 0, ""))
    found = await snapshot.load(tmp_path / "x.json")

    assert found is not None
    assert found.state == 1
