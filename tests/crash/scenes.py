"""Fixtures: small directories to damage, with an archive, with a rotation under way, and from the Rust crate."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from tests.support import event
from tests.test_compat import todos

from eventfold import Event, EventLog, EventReader, EventWriter, Record, ReduceFn, View

Files = dict[str, bytes]


def digest(state: dict[str, Any], event: Event) -> dict[str, Any]:
    """A reducer whose state shows every difference between two logs."""
    text = f"{state['digest']} {event!r}".encode()
    return {"events": state["events"] + 1, "digest": xxhash.xxh64_hexdigest(text)}


def todos_if_any(state: dict[str, Any], event: Event) -> dict[str, Any]:
    """The reducer of the Rust crate's `todos`, but it accepts any event, including damaged ones."""
    try:
        return todos(state, event)
    except (KeyError, TypeError):
        return state


def counts(state: dict[str, int], event: Event) -> dict[str, int]:
    """The reducer of the Rust crate's `counts`."""
    return {**state, event.type: state.get(event.type, 0) + 1}


Views = dict[str, tuple[ReduceFn[Any], Any]]
OURS: Views = {"digest": (digest, {"events": 0, "digest": ""})}
THE_CRATES: Views = {"todos": (todos_if_any, {"items": [], "next_id": 0}), "counts": (counts, {})}


def new_views(views: Views) -> list[View[Any]]:
    """Returns views that have not folded anything yet."""
    return [View(name, reducer, initial) for name, (reducer, initial) in views.items()]


@dataclass
class Scene:
    """A directory's files, and their meaning.

    `log` is the whole log's bytes, and `base` is where the active log begins. `places` are some offsets with the hashes
    of the lines before them; `snapshots` and `consumers` are their offsets.
    """

    name: str
    files: Files
    views: Views
    records: list[Record] = field(default_factory=list)
    log: bytes = b""
    base: int = 0
    places: dict[int, str | None] = field(default_factory=dict)
    snapshots: dict[str, int] = field(default_factory=dict)
    consumers: dict[str, int] = field(default_factory=dict)

    def new_views(self) -> list[View[Any]]:
        """Returns the directory's views, before they are loaded."""
        return new_views(self.views)

    def fold(self, view: str, records: list[Record]) -> Any:
        """Returns the state that a view must have after these records."""
        reducer, state = self.views[view]
        for record in records:
            state = reducer(state, record.event)
        return state


def read_all(directory: Path) -> Files:
    """Returns all files below a directory by their relative names."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


async def archived(directory: Path) -> None:
    """Three frames with records, then a batch and single events; a view and two consumers that lag behind."""
    async with EventLog.open(directory, views=new_views(OURS)) as log:
        for n in range(4):
            await log.append(event(n))
        await log.rotate()
        await log.append_many([event(n) for n in range(4, 7)])
        await log.append(event(7, actor="ann", meta={"by": None}))
        await log.rotate()
        async for record in (consumer := log.consumer("early")):
            if record.event.data["n"] == 5:
                await consumer.commit(record)
                break
        await log.append(event(8))
        await log.append_many([event(n) for n in range(9, 12)])
        async for record in (consumer := log.consumer("late")):
            if record.event.data["n"] == 8:
                await consumer.commit(record)
                break
        await log.refresh_all()
    async with EventWriter.open(directory) as writer:
        await writer.append(event(12, id="x"))
        await writer.append(event(13, type='say "hé"'))


async def rotating(directory: Path) -> None:
    """A directory with a rotation under way: one of its frames is in the archive, and one event came later."""
    await archived(directory)
    log, archive = directory / "app.jsonl", directory / "archive.jsonl.zst"
    active, before = log.read_bytes(), archive.read_bytes()
    base = (await EventReader(directory).head()).offset - len(active)
    async with EventWriter.open(directory) as writer:
        await writer.append(event(14))
        late = log.read_bytes()[len(active) :]
        await writer.rotate()
    after = archive.read_bytes()
    first_record = after.index(b"EVTFOLD\0", len(before)) - 8
    archive.write_bytes(after[: first_record + 80])
    log.write_bytes(active + late)
    (directory / f"app.jsonl.next.{base}.{len(active)}.{len(before)}").write_bytes(late)


async def nothing(directory: Path) -> None:
    """Does nothing, since the Rust crate has created the directory."""


class Plan:
    """How a scene is created: from a directory of the crate, or from nothing."""

    def __init__(self, make: Callable[[Path], Awaitable[None]], crate: str | None = None) -> None:
        self.make, self.crate = make, crate


PLANS = {
    "archived": Plan(archived),
    "rotating": Plan(rotating),
    "crate_archive": Plan(nothing, "stale_snapshot"),
    "crate_snapshots": Plan(nothing, "torn_tail"),
}
SCENES = list(PLANS)


async def build(name: str, directory: Path, compat: Path) -> Scene:
    """Creates a scene in a new directory."""
    plan = PLANS[name]
    directory.mkdir()
    if plan.crate is not None:
        for file, data in read_all(compat / plan.crate).items():
            (directory / file).parent.mkdir(exist_ok=True)
            (directory / file).write_bytes(data)
    await plan.make(directory)
    # The base file would report most of the changes at once; this tests what is noticed without it.
    files = {file: data for file, data in read_all(directory).items() if not file.endswith((".base", ".lock"))}
    scene = Scene(name, files, OURS if plan.crate is None else THE_CRATES)
    reader = EventReader(directory)
    scene.records = [record async for record in reader.read_full()]
    scene.log = b"".join(record._line for record in scene.records)
    scene.base = await reader._base()
    scene.log += scene.files["app.jsonl"][len(scene.log) - scene.base :]
    ends = [record.end_offset for record in scene.records]
    for offset in {ends[1], ends[len(ends) // 3], scene.base, ends[-2], ends[-1]}:
        scene.places[offset] = await reader.read_line_hash_before(offset)
    for file, data in scene.files.items():
        if file.startswith("views/"):
            found = json.loads(data)
            place = found.get("position", found["offset"] + scene.base)
            if found.get("position") or 0 < found["offset"] < len(scene.files["app.jsonl"]):
                scene.snapshots[Path(file).name.removesuffix(".snapshot.json")] = place
        elif file.startswith("consumers/"):
            scene.consumers[Path(file).stem] = json.loads(data)["offset"]
    return scene
