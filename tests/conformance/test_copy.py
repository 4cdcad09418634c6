"""A log is copied from one engine to another, and the program continues there without noticing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from tests.conformance.conftest import ENGINES

from eventfold import Event, EventfoldError, EventLog, EventReader, Head, Record, View, copy_log, snapshot
from eventfold._address import Address
from eventfold._engine import CreatingEngine

# Engines whose offsets count bytes.
BYTES = ["files", "postgres"]


def total(state: int, event: Any) -> int:
    return state + int(event.data["n"])


def never(state: int, event: Any) -> int:
    raise AssertionError("the snapshot was not used")


async def records(where: Address) -> list[Record]:
    reader = EventReader(where)
    try:
        return [record async for record in reader.read_full()]
    finally:
        await reader.aclose()


@pytest.fixture(params=[(one, other) for one in BYTES for other in BYTES], ids="-".join)
def ends(request: pytest.FixtureRequest) -> tuple[Address, Address]:
    """A source and a target that don't exist yet."""
    one, other = request.param
    return ENGINES[one](request), ENGINES[other](request)


async def fill(where: Address, count: int = 20) -> Head:
    async with EventLog.open(where, views=[View("total", total, 0)]) as log:
        await log.append_many([Event("a", {"n": n}) for n in range(count)])
        await log.append(Event("a", {"n": 1}))
        await log.refresh_all()
        consumer = log.consumer("mailer")
        async for record in consumer:
            await consumer.commit(record)
            break
        return log.head


async def test_a_copy_has_the_same_offsets_hashes_snapshots_and_consumers(ends: tuple[Address, Address]) -> None:
    """Each record is the same, the view continues from its snapshot, and the consumer after its last commit."""
    source, target = ends
    head = await fill(source)

    assert await copy_log(source, target) == head
    assert await records(target) == await records(source)
    async with EventLog.open(target, views=[View("total", never, 0)]) as log:
        assert log.view("total") == 191
        async for record in log.consumer("mailer"):
            assert record.event.data["n"] == 1
            break
        await log.append(Event("a", {"n": 5}))


async def test_a_second_copy_adds_the_new_events(ends: tuple[Address, Address]) -> None:
    """Another copy right after that changes nothing."""
    source, target = ends
    await fill(source)
    await copy_log(source, target)
    head = await fill(source)

    assert await copy_log(source, target) == head
    assert await copy_log(source, target) == head
    assert await records(target) == await records(source)


async def test_a_cancelled_copy_can_be_continued(
    ends: tuple[Address, Address], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy may be cancelled after any number of commits, and the target never ends inside a batch."""
    from eventfold import _copy

    monkeypatch.setattr(_copy, "_COMMIT_SIZE", 1)
    source, target = ends
    async with EventLog.open(source) as log:
        for n in range(200):
            await log.append_many([Event("a", {"n": n, "text": "x" * 20_000}) for _ in range(n % 5 + 1)])
    for delay in (0.01, 0.03, 0.06):
        task = asyncio.create_task(copy_log(source, target))
        await asyncio.sleep(delay)
        task.cancel()
        await asyncio.wait([task])
    await copy_log(source, target)

    assert await records(target) == await records(source)


async def test_a_copy_onto_another_log_is_refused(ends: tuple[Address, Address]) -> None:
    """The other log may be shorter or longer, and it is left as it was."""
    source, target = ends
    await fill(source)
    async with EventLog.open(target) as log:
        await log.append(Event("another"))
    with pytest.raises(EventfoldError, match="a different log"):
        await copy_log(source, target)
    with pytest.raises(EventfoldError, match="the target has more events than the source"):
        await copy_log(target, source)

    assert len(await records(target)) == 1


async def test_an_archived_log_is_copied_completely(tmp_path: Any, request: pytest.FixtureRequest) -> None:
    """The log is copied from the archive and the active log, and back again."""
    target = ENGINES["postgres"](request)
    async with EventLog.open(tmp_path / "data") as log:
        await log.append_many([Event("a", {"n": n}) for n in range(10)])
        await log.rotate()
        await log.append(Event("a", {"n": 10}))
    await copy_log(tmp_path / "data", target)
    await copy_log(target, tmp_path / "back")

    assert await records(tmp_path / "data") == await records(target) == await records(tmp_path / "back")


async def test_a_snapshot_in_the_copy_has_the_offset_at_which_the_rust_crate_continues(tmp_path: Path) -> None:
    """The crate counts from the start of `app.jsonl`, which the rotated log and its copy have at different offsets."""
    async with EventLog.open(tmp_path / "data", views=[View("total", total, 0)]) as log:
        await log.append_many([Event("a", {"n": n}) for n in range(10)])
        await log.rotate()
        head = log.head
    rotated = await snapshot.load(tmp_path / "data" / "views" / "total.snapshot.json")
    await copy_log(tmp_path / "data", tmp_path / "copy")
    copied = await snapshot.load(tmp_path / "copy" / "views" / "total.snapshot.json")

    assert rotated is not None
    assert (rotated.offset, rotated.hash) == (0, "")
    assert copied == structs.replace(rotated, offset=head.offset, hash=head.line_hash)
    assert (tmp_path / "copy" / "app.jsonl").stat().st_size == head.offset


async def test_a_copy_reports_its_progress(ends: tuple[Address, Address]) -> None:
    """The total counts every event that is read: once to be copied, and once in each log to be compared."""
    source, target = ends
    head = await fill(source)
    reports: list[tuple[int, int]] = []

    await copy_log(source, target, lambda done, total: reports.append((done, total)))

    assert reports == sorted(reports)
    assert reports[-1] == (3 * head.offset, 3 * head.offset)


@pytest.fixture
def streams(request: pytest.FixtureRequest) -> tuple[Address, Address]:
    """Two logs whose offsets don't count bytes."""
    return ENGINES["jetstream"](request), ENGINES["jetstream"](request)


async def test_a_log_whose_offsets_do_not_count_bytes_is_refused_before_anything_is_created(
    tmp_path: Path, streams: tuple[Address, Address]
) -> None:
    """Such a log is refused as source and as target."""
    stream, other_stream = streams
    directory, other_directory = tmp_path / "from", tmp_path / "to"
    for where in (stream, directory):
        async with EventLog.open(where) as log:
            await log.append(Event("a"))

    with pytest.raises(EventfoldError, match="don't count bytes"):
        await copy_log(stream, other_directory)
    with pytest.raises(EventfoldError, match="don't count bytes"):
        await copy_log(directory, other_stream)
    assert not other_directory.exists()
    assert isinstance(other_stream, CreatingEngine)
    with pytest.raises(EventfoldError, match="there is no stream"):
        await EventLog.open(other_stream.existing())
