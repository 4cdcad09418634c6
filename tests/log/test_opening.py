"""`EventLog`: opening it, its views by name, its builder, and the mistakes that users make first."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tests.log.views import collect, count, views
from tests.support import FaultInjector, event, line, numbers, recorded_passes, write_log

from eventfold import (
    ConditionalAppendError,
    CorruptLogError,
    Event,
    EventfoldError,
    EventLog,
    EventLogBuilder,
    EventWriter,
    InvalidEventError,
    LockMode,
    LogClosedError,
    LogLockedError,
    ReducerError,
    SyncMode,
    UnknownViewError,
    View,
)

# Opening


async def test_a_log_appends_reads_and_folds(data_dir: Path) -> None:
    """One object has everything that the writer, the reader and the views do."""
    async with EventLog.open(data_dir, views=views()) as log:
        first = await log.append(event(0))
        await log.append_many([event(1), event(2)])
        await log.append_if(event(3), *log.head)
        before = log.view("count")
        await log.refresh_all()
        after = log.view("count"), log.view("numbers")
        read = await numbers(log)
        full = [record.event.data["n"] async for record in log.read_full()]
        hash_before = await log.read_line_hash_before(first.end_offset)
        new = await log.has_new_events(first.end_offset), await log.has_new_events(log.head.offset)
        size = await log.active_log_size()
        waited = await log.wait_for_events(0)
        head = log.head

    assert before == 0
    assert after == (4, [0, 1, 2, 3])
    assert read == full == [0, 1, 2, 3]
    assert hash_before == first.line_hash
    assert new == (True, False)
    assert size == head.offset == waited.size == (data_dir / "app.jsonl").stat().st_size


async def test_opening_brings_the_views_up_to_date(data_dir: Path) -> None:
    """After a restart, the states come from the snapshots and are current without a refresh."""
    async with EventLog.open(data_dir, views=views()) as log:
        await log.append_many([event(n) for n in range(3)])
    folded: list[int] = []

    def watchful(state: int, event: Event) -> int:
        folded.append(event.data["n"])
        return state + 1

    log = await EventLog.open(data_dir, views=[View("count", watchful, 0), View("numbers", collect, list)])
    states = log.view("count"), log.view("numbers")
    await log.aclose()

    assert states == (3, [0, 1, 2])
    assert folded == [0, 1, 2]


async def test_closing_saves_the_snapshots(data_dir: Path) -> None:
    """Everything that was folded is saved, even a single event."""
    async with EventLog.open(data_dir, views=views()) as log:
        await log.append(event(0))
        await log.refresh_all()
        await log.append(event(1))
        await log.refresh_all()
        head = log.head
    saved = {path.name: json.loads(path.read_bytes()) for path in (data_dir / "views").iterdir()}

    assert {name: (s["state"], s["position"]) for name, s in saved.items()} == {
        "count.snapshot.json": (2, head.offset),
        "numbers.snapshot.json": ([0, 1], head.offset),
    }


async def test_views_that_start_together_share_one_pass(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five views at offset 0 read the log together; one that is at another offset reads its own part."""
    passes = recorded_passes(monkeypatch)
    async with EventWriter.open(data_dir, sync=SyncMode.OS) as writer:
        await writer.append_many([event(n) for n in range(100)])
        head = writer.head.offset
    async with EventLog.open(data_dir, views=[View(f"v{n}", count, 0) for n in range(5)]) as log:
        first = list(passes)
        await log.append(event(100))
        await log.refresh_all()
        states = {log.view(f"v{n}") for n in range(5)}
        second = list(passes)
    more = [View(f"v{n}", count, 0) for n in range(6)]
    async with EventLog.open(data_dir, views=more) as log:
        sixth = log.view("v5")
        third = list(passes)

    assert first == [0]
    assert second == [0, head]
    assert states == {101}
    assert third == [0, head, 0]
    assert sixth == 101


async def test_views_with_different_selections_share_a_pass(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each view folds only its own types."""
    passes = recorded_passes(monkeypatch)
    async with EventWriter.open(data_dir, sync=SyncMode.OS) as writer:
        await writer.append_many([event(n, "abc"[n % 3]) for n in range(9)])
    selections = {"a": {"a"}, "bc": {"b", "c"}, "none": set(), "all": None}
    made = [View(name, collect, list, event_types=types) for name, types in selections.items()]
    async with EventLog.open(data_dir, views=made) as log:
        states = {name: log.view(name) for name in selections}

    assert passes == [0]
    assert states == {"a": [0, 3, 6], "bc": [1, 2, 4, 5, 7, 8], "none": [], "all": list(range(9))}


async def test_a_view_that_fails_does_not_stop_the_others(data_dir: Path) -> None:
    """`refresh_all` raises its error after the others have finished."""

    def fail(state: int, event: Event) -> int:
        if event.data["n"] == 3:
            raise RuntimeError("no")
        return state + 1

    async with EventLog.open(data_dir, views=[View("fails", fail, 0), *views()]) as log:
        results = await log.append_many([event(n) for n in range(6)])
        with pytest.raises(ReducerError, match="fails") as caught:
            await log.refresh_all()
        with pytest.raises(ReducerError, match="fails") as asked:
            log.view("fails")
        states = log.views["fails"].state, log.view("count")

    assert states == (3, 6)
    assert asked.value.offset == results[3].start_offset
    assert caught.value.offset == results[3].start_offset


async def test_a_failed_opening_leaves_nothing_locked(damaged_dir: Path) -> None:
    """If a view meets damage, the writer is closed again, and the views can be registered with another log."""
    data = write_log(damaged_dir, line(0), b"damage\n", line(1))
    made = views()
    with pytest.raises(CorruptLogError):
        await EventLog.open(damaged_dir, views=made)
    (damaged_dir / "app.jsonl").write_bytes(data.replace(b"damage", b"      "))
    async with EventLog.open(damaged_dir, views=made) as log:
        found = await numbers(log)

    assert found == [0, 1]


async def test_a_reducer_that_raises_does_not_keep_the_log_from_opening(
    data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The other views are up to date; the failed one raises its error until its version changes."""

    def fail(state: int, event: Event) -> int:
        raise RuntimeError("no")

    write_log(data_dir, line(0))
    with caplog.at_level(logging.WARNING, "eventfold"):
        async with EventLog.open(data_dir, views=[View("v", fail, 0), View("count", count, 0)]) as log:
            await log.append(event(1))
            state = await log.wait_until("count")
            for ask in (log.refresh_all, lambda: log.wait_until("v"), lambda: log.wait_until("v", 0)):
                with pytest.raises(ReducerError, match="'v'"):
                    await ask()
            with pytest.raises(ReducerError, match="'v'"):
                log.view("v")

    assert state == 2
    assert "'v' is not up to date" in caplog.text


async def test_two_views_of_one_name_are_refused(tmp_path: Path) -> None:
    """The two views would overwrite each other's snapshot."""
    with pytest.raises(ValueError, match="'v'"):
        await EventLog.open(tmp_path / "data", views=[View("v", count, 0), View("v", count, 0)])

    assert not (tmp_path / "data").exists()


async def test_a_second_log_of_the_directory_is_refused(data_dir: Path) -> None:
    """If neither log takes the lock, both can be opened."""
    async with EventLog.open(data_dir):
        with pytest.raises(LogLockedError):
            await EventLog.open(data_dir)
    first = await EventLog.open(data_dir, lock=LockMode.NONE)
    second = await EventLog.open(data_dir, lock=LockMode.NONE)
    await first.aclose()
    await second.aclose()


async def test_a_closed_log_refuses_appends(data_dir: Path) -> None:
    """The views of a closed log keep their states."""
    async with EventLog.open(data_dir, views=views()) as log:
        await log.append(event(0))
        await log.refresh_all()
    with pytest.raises(LogClosedError):
        await log.append(event(1))

    assert log.view("count") == 1


async def test_a_conditional_append_conflicts_through_the_log_too(data_dir: Path) -> None:
    """The error is the writer's own."""
    async with EventLog.open(data_dir) as log:
        await log.append(event(0))
        with pytest.raises(ConditionalAppendError):
            await log.append_if(event(1), 0, "")
        found = await numbers(log)

    assert found == [0]


# Views by name


async def test_an_unknown_view_is_a_key_error_that_names_it(data_dir: Path) -> None:
    """Tested for every method that takes a name."""
    async with EventLog.open(data_dir, views=views()) as log:
        with pytest.raises(UnknownViewError, match="'nope'") as caught:
            log.view("nope")
        with pytest.raises(KeyError):
            log.view("nope")
        with pytest.raises(UnknownViewError):
            await log.rebuild("nope")
        with pytest.raises(UnknownViewError):
            await anext(log.watch("nope"))

    assert caught.value.name == "nope"


async def test_the_views_can_be_looked_up_but_not_changed(data_dir: Path) -> None:
    made = views()
    async with EventLog.open(data_dir, views=made) as log:
        with pytest.raises(TypeError):
            log.views["x"] = made[0]  # type: ignore[index]

        assert dict(log.views) == {"count": made[0], "numbers": made[1]}


async def test_rebuild_folds_a_state_from_the_beginning(data_dir: Path) -> None:
    """The whole log is folded, whatever state the view had."""
    async with EventLog.open(data_dir, views=views()) as log:
        await log.append_many([event(n) for n in range(3)])
        await log.refresh_all()
        log.view("numbers").append("spoiled")
        rebuilt = await log.rebuild("numbers")

    assert rebuilt == [0, 1, 2]


# The builder


async def test_the_builder_opens_the_same_log(data_dir: Path) -> None:
    """Every method returns the builder, and the opened log has the views."""
    builder = EventLog.builder(data_dir)
    same = (
        builder.view("count", count, 0)
        .view("numbers", collect, list, state_type=list[int], version=2, event_types={"counted"})
        .max_log_size(0)
        .lock_mode(LockMode.FLOCK)
        .sync_mode(SyncMode.OS)
    )
    async with builder.open() as log:
        await log.append(event(5))
        await log.append(event(6, "other"))
        await log.refresh_all()
        states = log.view("count"), log.view("numbers")
    version = json.loads((data_dir / "views" / "numbers.snapshot.json").read_bytes())["version"]

    assert same is builder
    assert states == (2, [5])
    assert version == 2


async def test_the_builder_s_modes_are_those_of_the_writer(data_dir: Path, faults: FaultInjector) -> None:
    """The log is opened without a lock and without syncs, as the builder was told."""
    log = await EventLog.builder(data_dir).lock_mode(LockMode.NONE).sync_mode(SyncMode.OS).open()
    await log.append(event(0))  # The first line of a new active log is synced in every mode.
    syncs = faults.count("sync")
    await log.append(event(1))
    cost = len(syncs)
    async with EventLog.open(data_dir, lock=LockMode.NONE):
        pass
    await log.aclose()

    assert cost == 0


async def test_the_builder_opens_read_only_logs(tmp_path: Path) -> None:
    """Read-only logs can keep their own snapshots, separate from the writer's."""
    async with EventLog.open(tmp_path / "data") as log:
        await log.append(event(0))
    builder = EventLog.builder(tmp_path / "data").view("count", count, 0)
    async with builder.read_only(snapshots=tmp_path / "own").open() as log:
        assert log.view("count") == 1
        with pytest.raises(EventfoldError, match="read-only"):
            await log.append(event(1))
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["count.snapshot.json"]
    assert not list(tmp_path.glob("data/views/*"))


async def test_the_builder_has_every_option_of_open(data_dir: Path) -> None:
    """Otherwise people would have to go back to `open` for a missing one."""
    async with EventLog.builder(data_dir).max_event_size(100).open() as log:
        with pytest.raises(InvalidEventError):
            await log.append(Event("added", "x" * 100))
    given = inspect.signature(EventLog.open).parameters.keys() - {"dir", "views", "lock", "sync"}
    methods = {name for name in given if hasattr(EventLogBuilder, name)}
    assert given - methods == {"snapshots", "on_mismatch", "unique_ids"}  # goes with another one


async def test_the_builder_s_max_log_size_rotates(data_dir: Path) -> None:
    """If the active log is larger, it is moved into the archive; no event is lost."""
    async with EventLog.builder(data_dir).max_log_size(500).open() as log:
        for n in range(50):
            await log.append(event(n))
        found = await numbers(log)
    archived = log.archive_path.exists()

    assert found == list(range(50))
    assert archived


# Common mistakes


async def test_a_log_can_be_awaited_in_async_with(data_dir: Path) -> None:
    """`async with await EventLog.open(d)` closes the log at the end, just as it does without the await."""
    async with await EventLog.open(data_dir, views=views()) as log:
        await log.append(event(0))
    with pytest.raises(LogClosedError):
        await log.append(event(1))


def test_the_constructor_says_how_to_open_a_log(data_dir: Path) -> None:
    """`EventLog(d)` is what people try first."""
    with pytest.raises(TypeError, match=r"await EventLog\.open"):
        EventLog(data_dir)


def test_a_forgotten_await_is_named(data_dir: Path) -> None:
    """Any use of a log that is not open yet raises an error that says so."""
    with pytest.raises(AttributeError, match="await"):
        EventLog.open(data_dir).append(event(0))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "wrong",
    [View("v", count, 0), {"v": View("v", count, 0)}, [count], "v", 5],
    ids=["view", "dict", "function", "str", "int"],
)
def test_views_that_are_not_a_list_of_views_are_refused(data_dir: Path, wrong: Any) -> None:
    """Nothing has been opened by then, and the message shows the argument."""
    with pytest.raises(TypeError, match="views must be a collection of View objects"):
        EventLog.open(data_dir, views=wrong)


@pytest.mark.parametrize("read_only", [False, True])
async def test_the_error_about_a_file_in_place_of_the_directory_names_it(tmp_path: Path, read_only: bool) -> None:
    """A common mistake is to give the path of `app.jsonl`."""
    (tmp_path / "app.jsonl").write_bytes(line(0))
    with pytest.raises(NotADirectoryError, match="this is a file") as caught:
        await EventLog.open(tmp_path / "app.jsonl", read_only=read_only, views=views())

    assert caught.value.filename == str(tmp_path / "app.jsonl")


async def test_one_view_in_two_logs_is_refused(tmp_path: Path) -> None:
    """The message names the view and both logs, and the first log continues."""
    view = View("v", count, 0)
    async with EventLog.open(tmp_path / "one", views=[view]) as log:
        with pytest.raises(EventfoldError, match=r"'v'.*two.*one"):
            await EventLog.open(tmp_path / "two", views=[view])
        await log.append(event(0))
        state = await log.wait_until(view)

    assert state == 1


async def test_a_view_can_move_to_another_log_once_the_first_is_closed(tmp_path: Path) -> None:
    """In the other log, it starts from the beginning."""
    view = View("v", count, 0)
    states = []
    for name, events in (("one", 3), ("two", 1)):
        async with EventLog.open(tmp_path / name, views=[view]) as log:
            await log.append_many([event(n) for n in range(events)])
            states.append(await log.wait_until(view))

    assert states == [3, 1]


async def test_the_error_about_an_unknown_view_names_the_registered_ones(data_dir: Path) -> None:
    """A view object with the name of a registered one is unknown too."""
    async with EventLog.open(data_dir, views=views()) as log:
        with pytest.raises(UnknownViewError, match="'count', 'numbers'"):
            log.view("numbrs")
        with pytest.raises(UnknownViewError, match="a different one"):
            log.view(View("count", count, 0))


async def test_a_locked_log_says_what_to_do(data_dir: Path) -> None:
    """The message suggests opening it read-only."""
    async with EventLog.open(data_dir):
        with pytest.raises(LogLockedError, match="read_only=True"):
            await EventLog.open(data_dir)


@pytest.mark.parametrize("read_only", [False, True])
async def test_waiting_without_an_offset_returns_the_current_state(data_dir: Path, read_only: bool) -> None:
    """The state includes everything that was appended before the call."""
    async with EventLog.open(data_dir, views=views()) as log:
        await log.append_many([event(0), event(1)])
        if not read_only:
            state = await log.wait_until("numbers")
        else:
            async with EventLog.open(data_dir, read_only=True, views=views()) as reading:
                await log.append(event(2))
                state = await reading.wait_until("numbers")

    assert state == ([0, 1, 2] if read_only else [0, 1])


async def test_a_view_object_can_be_passed_instead_of_its_name(data_dir: Path) -> None:
    """Tested for every method that takes a name."""
    made = views()
    async with EventLog.open(data_dir, views=made) as log:
        await log.append(event(0))
        found = [await log.wait_until(made[0]), log.view(made[0]), await log.rebuild(made[0])]
        watching = log.watch(made[0])
        found.append(await anext(watching))
        await watching.aclose()

        assert log.views[made[1]] is made[1]
    assert found == [1, 1, 1, 1]
