"""Views: when their states are saved, and which events a query selects."""

from __future__ import annotations

import asyncio
import collections
import enum
import logging
from collections import Counter, deque
from datetime import datetime
from pathlib import Path
from typing import Any, Self
from zoneinfo import ZoneInfo

import pydantic
import pytest
from tests.support import FaultInjector, counted_turns, event, line, numbers, write_log
from tests.views.states import Item, changed, fails_at, key

from eventfold import (
    Event,
    EventReader,
    EventWriter,
    Query,
    ReducerError,
    SyncMode,
    View,
    snapshot,
)
from eventfold._view import refresh_together

# Saving


async def test_a_state_that_would_read_back_as_another_is_not_saved(
    data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a plain dict, a tuple would become a list: a warning says so, and no snapshot is written."""
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(1))
        view: View[dict[str, Any]] = View("v", lambda s, e: {"pair": (1, 2)}, {})
        with caplog.at_level(logging.WARNING, "eventfold"):
            state = await view.refresh(writer.reader())
            await view.save(writer.reader())

    assert state == {"pair": (1, 2)}
    assert not (data_dir / "views").exists()
    assert "'v' could not be written" in caplog.text
    assert "state_type" in caplog.text


@pytest.mark.parametrize(
    "state",
    [
        {1: "integer key"},
        {"x": {1, 2}},
        {"x": b"bytes"},
        {"x": float("nan")},
        {"x": float("inf")},
        {"x": object()},
        {"x": Item(1)},
        {"x": "\ud800"},
    ],
    ids=["integer key", "set", "bytes", "NaN", "infinity", "object", "dataclass", "lone surrogate"],
)
async def test_other_states_that_json_cannot_hold_are_not_saved(
    data_dir: Path, caplog: pytest.LogCaptureFixture, state: Any
) -> None:
    """The view itself works, but it logs a warning and saves no snapshot."""
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(1))
        view: View[Any] = View("v", lambda s, e: state, {})
        with caplog.at_level(logging.WARNING, "eventfold"):
            await view.refresh(writer.reader())
            await view.save(writer.reader())

    assert view.state is state
    assert not (data_dir / "views").exists()
    assert "could not be written" in caplog.text


class Status(enum.StrEnum):
    OPEN = "open"


class Counted(pydantic.BaseModel, extra="allow"):
    count: int = 0
    _seen: int = pydantic.PrivateAttr(default=0)

    def see(self) -> Self:
        self._seen += 1
        return self


@pytest.mark.parametrize(
    ("state", "described"),
    [
        ({Status.OPEN: 1}, "<Status.OPEN: 'open'> became 'open'"),
        ({Status.OPEN}, "<Status.OPEN: 'open'> became 'open'"),
        (Counted(when=(1, 2)), "(1, 2) became [1, 2]"),  # type: ignore[call-arg]
        (Counted().see(), "1 became 0"),
        (datetime(2026, 7, 1, tzinfo=ZoneInfo("Europe/Berlin")), "Berlin"),
        (datetime(2026, 7, 1, fold=1), "fold=1"),
    ],
    ids=["key", "element of a set", "extra field of a model", "private attribute of a model", "time zone", "fold"],
)
async def test_no_part_of_a_state_comes_back_as_an_equal_or_a_default_value(
    data_dir: Path, caplog: pytest.LogCaptureFixture, state: Any, described: str
) -> None:
    """A reducer may use what the value would have lost. The warning says which value it is."""
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(1))
        view: View[Any] = View("v", lambda s, e: state, None, state_type=type(state))
        with caplog.at_level(logging.WARNING, "eventfold"):
            await view.refresh(writer.reader())

    assert not (data_dir / "views").exists()
    assert described in caplog.text


@pytest.mark.parametrize("kind", ["deque with maxlen", "Counter in a dict", "defaultdict in a dict"])
async def test_a_container_never_comes_back_as_a_plainer_one(data_dir: Path, kind: str) -> None:
    """A value that equals the state but behaves differently would be folded differently after a restart."""
    reducers: dict[str, tuple[Any, Any]] = {
        "deque with maxlen": (
            lambda s, e: changed(s, lambda s: s.append(e.data["n"])),
            lambda: deque(maxlen=2),
        ),
        "Counter in a dict": (
            lambda s, e: changed(s, lambda s: s["counts"].update([key(e)])),
            lambda: {"counts": Counter()},
        ),
        "defaultdict in a dict": (
            lambda s, e: changed(s, lambda s: s["lists"][str(e.data["n"])].append(1)),
            lambda: {"lists": collections.defaultdict(list)},
        ),
    }
    reducer, initial = reducers[kind]
    async with EventWriter.open(data_dir) as writer:
        await writer.append_many([event(n) for n in range(3)])
        first = View("v", reducer, initial)
        await first.refresh(writer.reader())
        await first.save(writer.reader())
        await writer.append_many([event(n) for n in range(3, 6)])
        in_one_go = await first.refresh(writer.reader())
        restarted = await View("v", reducer, initial).refresh(writer.reader())

    assert restarted == in_one_go


async def test_a_snapshot_is_not_rewritten_for_every_few_events(data_dir: Path, faults: FaultInjector) -> None:
    """The first one is saved soon, later ones only if there is enough new or when the caller asks."""
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(0))
        view: View[int] = View("v", lambda s, e: s + 1, 0)
        saves = faults.count("replace_file")
        await view.refresh(writer.reader())
        first = len(saves)
        for n in range(1, 20):
            await writer.append(event(n))
            await view.refresh(writer.reader())
        few = len(saves)
        await writer.append(Event("a", "x" * 300_000))
        await view.refresh(writer.reader())
        many = len(saves)
        await view.save(writer.reader())
        await view.save(writer.reader())
        asked = len(saves)

    assert (first, few, many, asked) == (1, 1, 2, 2)


async def test_a_snapshot_that_cannot_be_written_affects_nothing(
    data_dir: Path, faults: FaultInjector, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk costs the time to fold again, but no state."""
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(1))
        faults.fail("rename")
        view: View[int] = View("v", lambda s, e: s + 1, 0)
        with caplog.at_level(logging.WARNING, "eventfold"):
            state = await view.refresh(writer.reader())
        await view.save(writer.reader())
        saved = await snapshot.load(data_dir / "views" / "v.snapshot.json")

    assert state == 1
    assert "made to fail" in caplog.text
    assert saved is not None
    assert saved.state == 1


async def test_a_cancelled_refresh_keeps_what_it_has_folded(data_dir: Path) -> None:
    """The next one continues there, and each event is folded once."""
    write_log(data_dir, b"".join(line(n) for n in range(30_000)))
    reader = EventReader(data_dir)
    started = asyncio.Event()

    def reduce(state: int, event: Event) -> int:
        started.set()
        return state + 1

    view = View("v", reduce, 0)
    task = asyncio.create_task(view.refresh(reader))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    partly = view.state, view.offset
    state = await view.refresh(reader)

    assert 0 < partly[0] <= 30_000
    assert partly[1] == len(b"".join(line(n) for n in range(partly[0])))
    assert state == 30_000


async def test_a_long_refresh_lets_other_tasks_run(data_dir: Path) -> None:
    """The event loop is not blocked until the end of the log."""
    write_log(data_dir, b"".join(line(n) for n in range(30_000)))
    async with counted_turns() as turns:
        state = await View("v", lambda s, e: s + 1, 0).refresh(EventReader(data_dir))

    assert state == 30_000
    assert turns[0] > 5


async def test_rebuild_folds_the_whole_log_and_replaces_the_snapshot(data_dir: Path) -> None:
    """A reducer that was changed without a new version gets its state this way."""
    async with EventWriter.open(data_dir) as writer:
        await writer.append_many([event(n) for n in range(4)])
        old: View[int] = View("v", lambda s, e: s + 1, 0)
        await old.refresh(writer.reader())
        new: View[int] = View("v", lambda s, e: s + 100, 0)
        believed = await new.refresh(writer.reader())
        rebuilt = await new.rebuild(writer.reader())
        saved = await snapshot.load(data_dir / "views" / "v.snapshot.json")
        found = await numbers(writer.reader())

    assert (believed, rebuilt) == (4, 400)
    assert saved is not None
    assert saved.state == 400
    assert len(found) == 4


# Queries


async def test_only_what_the_query_matches_is_folded(data_dir: Path) -> None:
    """Tags and types select, in one view or in several that share a pass; the offset advances to the head."""
    async with EventWriter.open(data_dir, sync=SyncMode.OS) as writer:
        made = [event(n, "ab"[n % 2], tags=(f"order:{n % 3}", f"customer:{n % 5}")) for n in range(300)]
        await writer.append_many(made[:150])
        for each in made[150:]:
            await writer.append(each)
        head = writer.head
    queries = {
        "tag": Query(tags={"order:1"}),
        "tags": Query(tags={"order:1", "customer:2"}),
        "both": Query({"a"}, {"order:1"}),
        "either": Query({"a"}) | Query(tags={"customer:4"}),
        "type": Query({"b"}),
        "everything": Query(),
    }
    for shares in (False, True):
        views: list[View[list[int]]] = [
            View(name, lambda s, e: [*s, e.data["n"]], [], query=query, shares_events=shares)
            for name, query in queries.items()
        ]
        reader = EventReader(data_dir)
        await refresh_together(views, reader, save=False)

        for view in views:
            assert view.state == [e.data["n"] for e in made if queries[view.name].matches(e)]
            assert view.offset == head.offset


async def test_a_snapshot_of_another_query_is_not_used(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The view is rebuilt and a warning names the snapshot's query; a view with the same query uses the snapshot."""

    def view_of(query: Query | None) -> tuple[View[list[int]], list[int]]:
        folded: list[int] = []

        def reduce(state: list[int], event: Event) -> list[int]:
            folded.append(event.data["n"])
            return [*state, event.data["n"]]

        return View("v", reduce, [], query=query), folded

    async with EventWriter.open(data_dir) as writer:
        await writer.append_many([event(n, tags=(f"order:{n % 2}",)) for n in range(6)])
        reader = writer.reader()
        one, _ = view_of(Query(tags={"order:1"}))
        assert await one.rebuild(reader) == [1, 3, 5]
        same, folded = view_of(Query(tags={"order:1"}))
        assert await same.refresh(reader) == [1, 3, 5]
        assert (folded, caplog.text) == ([], "")
        for query, expected in ((Query(tags={"order:0"}), [0, 2, 4]), (None, [0, 1, 2, 3, 4, 5])):
            await one.rebuild(reader)
            caplog.clear()
            other, _ = view_of(query)
            assert await other.refresh(reader) == expected
            assert "order:1" in caplog.text


def test_event_types_are_short_for_a_query() -> None:
    """`event_types` and a query together are refused, since they could contradict each other."""
    short: View[int] = View("v", lambda s, e: s, 0, event_types={"a"})
    long: View[int] = View("v", lambda s, e: s, 0, query=Query({"a"}))

    assert short.query == long.query == Query({"a"})
    assert short.event_types == long.event_types == {"a"}
    with pytest.raises(ValueError, match="event_types and query"):
        View("v", lambda s, e: s, 0, event_types={"a"}, query=Query({"a"}))
    with pytest.raises(TypeError, match="query must be a Query"):
        View("v", lambda s, e: s, 0, query={"a"})  # type: ignore[arg-type]


async def test_the_reducers_failure_names_the_event_among_those_that_match(data_dir: Path) -> None:
    """The offset is that of the event in the log, not among the selected ones."""
    async with EventWriter.open(data_dir) as writer:
        results = [await writer.append(event(n, tags=(f"order:{n % 2}",))) for n in range(10)]
        view = View("v", fails_at(7), [], query=Query(tags={"order:1"}))
        with pytest.raises(ReducerError) as caught:
            await view.refresh(writer.reader())

    assert caught.value.offset == results[7].start_offset
    assert view.state == [1, 3, 5]
