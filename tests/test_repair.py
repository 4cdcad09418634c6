"""`plan_repairs` and `repair`: a person decides about a damaged log, and nothing else happens to it."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from tests.crash.oracle import Oracle
from tests.crash.recorder import Expected, Recorded, Recorder, States, read_files, scratch_directory, write_files
from tests.support import FaultInjector, event, line, records, write_log

from eventfold import (
    CorruptLogError,
    CutEnd,
    DropSnapshot,
    Event,
    EventfoldError,
    EventLog,
    EventReader,
    LogLockedError,
    RepairPlan,
    ResetConsumer,
    SyncMode,
    View,
    plan_repairs,
    repair,
    verify,
)

GARBAGE = b'{"type":"a","data":\0\0}\n'


def count(state: int, event: Event) -> int:
    return state + 1


def counting() -> View[int]:
    return View("count", count, 0)


async def repair_all(directory: Path, **options: int) -> None:
    """Repairs what is planned until the plan is empty."""
    while repairs := (await plan_repairs(directory)).repairs:
        await repair(directory, repairs, **options)


async def make(directory: Path, archived: int = 0, active: int = 3) -> int:
    """Creates a log with a snapshot and a consumer at its head; returns the offset where the active log begins."""
    async with EventLog.open(directory, views=[counting()]) as log:
        for n in range(archived):
            await log.append(event(n))
        if archived:
            await log.rotate()
        base = log.head.offset
        for n in range(archived, archived + active):
            await log.append(event(n))
        await log.refresh_all()
        async for record in (consumer := log.consumer("mailer")):
            await consumer.commit(record)
            if record.end_offset == log.head.offset:
                break
    return base


async def numbers(directory: Path) -> list[int]:
    return [record.event.data["n"] for record in await records(EventReader(directory))]


async def test_a_sound_log_needs_no_repair(tmp_path: Path) -> None:
    await make(tmp_path, archived=3)

    assert await plan_repairs(tmp_path) == RepairPlan((), ())


@pytest.mark.parametrize("archived", [0, 3])
async def test_a_damaged_end_is_cut_off_and_its_bytes_are_kept(tmp_path: Path, archived: int) -> None:
    base = await make(tmp_path, archived)
    path = tmp_path / "app.jsonl"
    whole = path.read_bytes()
    # So many bad lines make even the opening of the log fail.
    path.write_bytes(whole + GARBAGE * 5)
    with pytest.raises(CorruptLogError):
        await EventLog.open(tmp_path)

    [cut] = (await plan_repairs(tmp_path)).repairs
    await repair(tmp_path, [cut])

    assert isinstance(cut, CutEnd)
    assert (cut.offset, cut.size, cut.events) == (base + len(whole), 5 * len(GARBAGE), 0)
    assert Path(cut.kept_in).read_bytes() == GARBAGE * 5
    assert path.read_bytes() == whole
    assert (await verify(tmp_path)).ok
    async with EventLog.open(tmp_path) as log:
        await log.append(event(99))
    assert await numbers(tmp_path) == [*range(archived + 3), 99]


async def test_events_after_the_damage_are_not_cut_unless_their_offset_is_named(tmp_path: Path) -> None:
    data = write_log(tmp_path, line(1), GARBAGE, line(2), GARBAGE, line(3))
    [cut] = (await plan_repairs(tmp_path)).repairs
    assert isinstance(cut, CutEnd)
    assert (cut.offset, cut.events) == (len(line(1)), 2)

    for named in (None, 0, cut.offset + 1):
        with pytest.raises(EventfoldError, match="2 valid events"):
            await repair(tmp_path, [cut], lose_events_from=named)
        assert (tmp_path / "app.jsonl").read_bytes() == data

    await repair(tmp_path, [cut], lose_events_from=cut.offset)
    assert await numbers(tmp_path) == [1]
    assert Path(cut.kept_in).read_bytes() == data[cut.offset :]


async def test_a_very_large_event_after_the_damage_counts_as_an_event(tmp_path: Path) -> None:
    """A log may be opened with a `max_event_size` of up to 1 GiB."""
    async with EventLog.open(tmp_path, sync=SyncMode.OS, max_event_size=2**30) as log:
        await log.append(event(0))
        end = log.head.offset
        await log.append(Event("stored", "x" * (70 * 2**20)))
    path = tmp_path / "app.jsonl"
    path.write_bytes(path.read_bytes()[:end] + b"nonsense\n" + path.read_bytes()[end:])

    [cut] = (await plan_repairs(tmp_path)).repairs

    assert isinstance(cut, CutEnd)
    assert cut.events == 1
    assert "; 1 valid event after the damage would be lost" in str(cut)


async def test_a_batch_with_a_damaged_line_is_cut_off_completely(tmp_path: Path) -> None:
    """The other lines contain events that readers no longer get, but they are not deleted without consent."""
    data = write_log(tmp_path, line(1), line(2, batch="1,3"), line(3, batch="2,3"), GARBAGE)

    [cut] = (await plan_repairs(tmp_path)).repairs

    assert isinstance(cut, CutEnd)
    assert (cut.offset, cut.events) == (len(line(1)), 2)
    await repair(tmp_path, [cut], lose_events_from=cut.offset)
    assert await numbers(tmp_path) == [1]
    assert Path(cut.kept_in).read_bytes() == data[cut.offset :]


async def test_a_batch_without_its_first_line_is_cut_off(tmp_path: Path) -> None:
    """The rest looks like a batch that reading begins in the middle of."""
    data = write_log(tmp_path, line(1), line(2), line(3, batch="2,3"), line(4, batch="3,3"))
    [cut] = (await plan_repairs(tmp_path)).repairs
    assert isinstance(cut, CutEnd)

    await repair(tmp_path, [cut], lose_events_from=cut.offset)

    assert (tmp_path / "app.jsonl").read_bytes() == data[: cut.offset] == line(1) + line(2)


@pytest.mark.parametrize("archived", [0, 3])
async def test_a_log_whose_first_line_is_damaged_is_emptied(tmp_path: Path, archived: int) -> None:
    """The base file contains that line's hash; it must not be mistaken for the base file of another log."""
    base = await make(tmp_path, archived)
    path = tmp_path / "app.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"data", b"da\0a", 1))

    [cut] = (await plan_repairs(tmp_path)).repairs
    assert isinstance(cut, CutEnd)
    assert (cut.offset, cut.size, cut.events) == (base, len(whole), 2)
    await repair_all(tmp_path, lose_events_from=base)

    assert (await verify(tmp_path)).ok
    async with EventLog.open(tmp_path) as log:
        await log.append(event(99))
    assert await numbers(tmp_path) == [*range(archived), 99]


async def test_two_cuts_at_the_same_offset_keep_the_bytes_of_both(tmp_path: Path) -> None:
    for garbage in (b"first\n", b"second\n"):
        with (tmp_path / "app.jsonl").open("ab") as file:
            file.write(garbage)
        await repair_all(tmp_path)

    assert (tmp_path / "app.jsonl.torn.0").read_bytes() == b"first\nsecond\n"


async def test_files_from_different_moments_are_not_cut(tmp_path: Path) -> None:
    """Their first line is sound but not the expected one, and a copy that fits may exist somewhere."""
    await make(tmp_path, archived=3)
    data = write_log(tmp_path, line(7), line(8))

    plan = await plan_repairs(tmp_path)

    assert plan.repairs == ()
    assert "copied at different moments" in plan.problems[0].reason
    assert (tmp_path / "app.jsonl").read_bytes() == data


async def test_a_damaged_archive_is_left_as_it_is(tmp_path: Path) -> None:
    await make(tmp_path, archived=3)
    path = tmp_path / "archive.jsonl.zst"
    path.write_bytes(path.read_bytes()[:-10])

    plan = await plan_repairs(tmp_path)

    assert plan.repairs == ()
    assert {problem.path for problem in plan.problems} == {str(path)}


async def test_a_line_that_is_being_archived_is_not_cut(tmp_path: Path) -> None:
    """The file that an interrupted rotation left says that the line is still needed."""
    data = write_log(tmp_path, line(1), GARBAGE)
    (tmp_path / f"app.jsonl.next.0.{len(data)}.0").touch()

    plan = await plan_repairs(tmp_path)

    assert plan.repairs == ()
    assert "an interrupted rotation" in plan.problems[0].reason


async def test_a_bad_snapshot_is_deleted_and_its_view_rebuilt(tmp_path: Path) -> None:
    await make(tmp_path)
    path = tmp_path / "views" / "count.snapshot.json"
    path.write_bytes(path.read_bytes().replace(b'"state":3', b'"state":4'))

    [drop] = (await plan_repairs(tmp_path)).repairs
    assert isinstance(drop, DropSnapshot)
    await repair(tmp_path, [drop])

    assert not path.exists()
    async with EventLog.open(tmp_path, views=[counting()]) as log:
        assert log.view("count") == 3


async def test_a_snapshot_that_a_replay_contradicts_is_deleted(tmp_path: Path) -> None:
    await make(tmp_path)

    [drop] = (await plan_repairs(tmp_path, views=[View("count", lambda state, event: state + 2, 0)])).repairs

    assert isinstance(drop, DropSnapshot)
    assert "its state differs from that of a replay" in drop.reason


async def test_a_consumer_beyond_the_end_of_the_log_continues_from_the_head(tmp_path: Path) -> None:
    """Such an offset is left after the end of the log was cut off, or after an older copy was restored."""
    await make(tmp_path)
    path = tmp_path / "app.jsonl"
    path.write_bytes(path.read_bytes()[: len(line(0)) * 2])
    (tmp_path / "views" / "count.snapshot.json").unlink()

    [reset] = (await plan_repairs(tmp_path)).repairs
    assert isinstance(reset, ResetConsumer)
    assert (reset.name, reset.offset) == ("mailer", len(line(0)) * 2)
    await repair(tmp_path, [reset])

    async with EventLog.open(tmp_path) as log:
        await log.append(event(7))
        async for record in log.consumer("mailer"):
            assert record.event.data["n"] == 7
            break


@pytest.mark.parametrize("place", [b"nonsense", b'{"offset":40,"hash":"0"}'])
async def test_a_consumer_whose_offset_is_not_in_the_log_starts_over(tmp_path: Path, place: bytes) -> None:
    """Events that are processed twice do less harm than events that are never processed."""
    await make(tmp_path)
    (tmp_path / "consumers" / "mailer.json").write_bytes(place)

    [reset] = (await plan_repairs(tmp_path)).repairs
    assert isinstance(reset, ResetConsumer)
    assert reset.offset == 0
    await repair(tmp_path, [reset])

    async with EventLog.open(tmp_path) as log:
        async for record in log.consumer("mailer"):
            assert record.start_offset == 0
            break


async def test_repairs_that_depend_on_a_cut_are_planned_after_it(tmp_path: Path) -> None:
    """Before the cut, nobody knows where the log will end."""
    await make(tmp_path)
    path = tmp_path / "app.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"n":2', b'"n":\0', 1))

    first = (await plan_repairs(tmp_path)).repairs
    await repair(tmp_path, first)
    second = (await plan_repairs(tmp_path)).repairs
    await repair(tmp_path, second)

    assert [type(one) for one in first] == [CutEnd]
    assert [type(one) for one in second] == [DropSnapshot, ResetConsumer]
    assert (await verify(tmp_path)).ok


async def test_a_log_that_is_open_for_writing_is_not_repaired(tmp_path: Path) -> None:
    await make(tmp_path)
    (tmp_path / "consumers" / "mailer.json").write_bytes(b"nonsense")
    repairs = (await plan_repairs(tmp_path)).repairs

    async with EventLog.open(tmp_path):
        with pytest.raises(LogLockedError):
            await repair(tmp_path, repairs)
    assert (tmp_path / "consumers" / "mailer.json").exists()


async def test_a_consumer_that_is_being_read_is_not_reset(tmp_path: Path) -> None:
    await make(tmp_path)
    path = tmp_path / "consumers" / "mailer.json"
    path.write_bytes(b"nonsense")
    [reset] = (await plan_repairs(tmp_path)).repairs
    lock = await EventReader(tmp_path)._documents.lock("consumer", "mailer")

    with pytest.raises(EventfoldError, match="is being read"):
        await repair(tmp_path, [reset])

    lock.release()
    assert path.exists()


@pytest.mark.parametrize("change", ["append", "mend"])
async def test_a_log_that_has_changed_since_the_plan_is_not_cut(tmp_path: Path, change: str) -> None:
    data = write_log(tmp_path, line(1), GARBAGE)
    [cut] = (await plan_repairs(tmp_path)).repairs
    mended = line(1) + GARBAGE.replace(b"\0\0", b"77").replace(b"}", b',"ts":1}')
    changed = data + line(2) if change == "append" else mended
    (tmp_path / "app.jsonl").write_bytes(changed)

    with pytest.raises(EventfoldError, match="has changed since"):
        await repair(tmp_path, [cut])

    assert (tmp_path / "app.jsonl").read_bytes() == changed


@pytest.mark.parametrize("name", ["write", "sync", "rename"])
async def test_nothing_is_cut_off_if_it_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    data = write_log(tmp_path, line(1), GARBAGE)
    repairs = (await plan_repairs(tmp_path)).repairs
    FaultInjector(monkeypatch).fail(name, number=errno.ENOSPC)

    with pytest.raises(OSError, match="made to fail"):
        await repair(tmp_path, repairs)

    assert read_files(tmp_path) == {"app.jsonl": data}
    await repair(tmp_path, repairs)
    assert await numbers(tmp_path) == [1]


@pytest.mark.parametrize("cancelling", ["task", "anyio scope"])
async def test_a_repair_that_is_cancelled_releases_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cancelling: str
) -> None:
    """The repair finishes its current step, after which the log is either cut off or unchanged."""
    write_log(tmp_path, line(1), GARBAGE)
    repairs = (await plan_repairs(tmp_path)).repairs
    gate = FaultInjector(monkeypatch).freeze("write")
    scope = anyio.CancelScope()

    async def repair_in_scope() -> None:
        with scope:
            await repair(tmp_path, repairs)

    task = asyncio.create_task(repair_in_scope())
    await gate.reached()
    (task if cancelling == "task" else scope).cancel()
    await asyncio.sleep(0.01)
    assert not task.done()
    gate.open()
    await asyncio.wait([task])

    async with EventLog.open(tmp_path) as log:
        await log.append(event(99))


async def test_logs_on_other_engines_are_not_repaired() -> None:
    with pytest.raises(EventfoldError, match="is not a directory of files"):
        await plan_repairs("postgresql://nobody@localhost/none?log=orders")


@pytest.mark.parametrize("directory", ["none", "empty"])
async def test_without_a_log_nothing_is_created(tmp_path: Path, directory: str) -> None:
    (tmp_path / "empty").mkdir()

    with pytest.raises(EventfoldError, match=r"there is no"):
        await repair(tmp_path / directory, [])

    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty"]


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    with scratch_directory(tmp_path) as path:
        yield path


@pytest.mark.parametrize("damaged", [0, 1])
async def test_a_crash_leaves_the_log_as_it_was_or_cut_and_loses_no_byte(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, damaged: int
) -> None:
    """If the process is killed or the power fails at any moment, the same repair can be made again."""
    directory = scratch / "log"
    base = await make(directory, archived=2, active=3)
    path = directory / "app.jsonl"
    sound = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*sound[:damaged], GARBAGE, *sound[damaged + 1 :]]))
    before = read_files(directory)
    offset = base + sum(map(len, sound[:damaged]))
    tail = before["app.jsonl"][offset - base :]
    with monkeypatch.context() as patch:
        recorder = Recorder(patch, directory)
        await repair(directory, (await plan_repairs(directory)).repairs, lose_events_from=offset)
    kept = f"app.jsonl.torn.{offset}"
    assert read_files(directory)[kept] == tail

    for number, state in enumerate(States().after(Recorded(before, recorder.ops, Expected(Oracle())))):
        files = state.files
        # Each byte is in its place or in the file of removed bytes.
        assert files["app.jsonl"] == before["app.jsonl"] or files[kept] == tail, state.after
        assert files["archive.jsonl.zst"] == before["archive.jsonl.zst"]
        again = write_files(scratch / str(number), files)
        await repair_all(again, lose_events_from=offset)
        assert (await verify(again)).ok, state.after
        assert (again / kept).read_bytes() == tail, state.after
        async with EventLog.open(again) as log:
            await log.append(event(99))
        assert await numbers(again) == [*range(2 + damaged), 99], state.after
    assert number > 8
