"""`eventfold.testing`: what it provides for tests of applications, and the messages with which those tests fail."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from tests.support import event

from eventfold import Event, EventLog, EventReader, LogLockedError, View, testing
from eventfold.testing import given

ROOT = Path(__file__).parents[1]


class FullError(Exception):
    """The list is full."""


def added(text: str, **options: Any) -> Event:
    return Event("added", {"text": text}, **options)


def reduce(state: list[str], event: Event) -> list[str]:
    state.append(event.data["text"])
    return state


def add(text: str) -> Any:
    def decide(todos: list[str]) -> Event | None:
        if len(todos) == 2:
            raise FullError(f"no room for {text}")
        return None if text in todos else added(text)

    return decide


async def test_a_log_for_a_test_keeps_what_is_appended_and_its_views() -> None:
    """The log is an ordinary one with the usual options."""
    async with testing.log(views=[View("todos", reduce, list)], max_log_size=200) as log:
        for n in range(10):
            await log.append(added(str(n)))

        assert await log.wait_until("todos", log.head.offset) == [str(n) for n in range(10)]
        assert log.archive_path.exists()


async def test_a_log_for_a_test_is_locked_and_read_as_any_other() -> None:
    """Other logs and readers in its directory behave as usual."""
    async with testing.log() as log:
        await log.append(event(1))
        with pytest.raises(LogLockedError):
            await EventLog.open(log.dir)

        assert (await EventReader(log.dir).head()) == log.head


async def test_two_logs_for_tests_are_separate() -> None:
    """Each has its own directory."""
    async with testing.log() as one, testing.log() as other:
        await one.append(event(1))

        assert other.head.offset == 0


async def test_the_directory_is_removed_at_the_end() -> None:
    """The directory is also removed if the test failed."""
    with pytest.raises(FullError):
        async with testing.log() as log:
            await log.append(event(1))
            raise FullError
    assert not log.dir.exists()


async def test_the_directory_is_removed_when_the_test_is_cancelled() -> None:
    """The test is cancelled by an anyio scope, which cancels every later await too."""
    with anyio.CancelScope() as scope:
        async with testing.log() as log:
            scope.cancel()
            await asyncio.sleep(10)

    assert scope.cancelled_caught
    assert not log.dir.exists()


async def test_a_wrong_option_leaves_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is the one that `EventLog.open` raises."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ValueError, match="max_event_size"):
        async with testing.log(max_event_size=-1):
            pass

    assert not list(tmp_path.iterdir())


def test_events_are_folded_into_a_state() -> None:
    """The initial state may be a value or a function that returns one."""
    assert given(added("a"), added("b")).fold(reduce, list).state == ["a", "b"]
    assert given(added("b")).fold(reduce, ["a"]).state == ["a", "b"]
    given(added("a")).fold(reduce, list).gives(["a"])


def test_the_initial_value_is_not_changed() -> None:
    """Each fold begins with a copy of it."""
    initial: list[str] = []
    given(added("a")).fold(reduce, initial)

    assert initial == []


def test_a_reducer_gets_events_as_from_a_log() -> None:
    """Tuples become lists, and changes to an event affect nothing else."""

    def greedy(state: list[Any], event: Event) -> list[Any]:
        event.data["items"].append("more")
        return [*state, event.data["items"]]

    bought = Event("bought", {"items": ("milk",)})

    assert given(bought).fold(greedy, list).state == [["milk", "more"]]
    assert bought.data == {"items": ("milk",)}


def test_a_state_that_differs_is_shown_line_by_line() -> None:
    """Lines that are missing have a minus, and superfluous ones a plus."""
    with pytest.raises(AssertionError) as caught:
        given(added("a" * 40), added("b" * 40)).fold(reduce, list).gives(["a" * 40, "c" * 40])

    assert f"\n-['{'c' * 40}" not in str(caught.value)
    assert f"\n- '{'c' * 40}']" in str(caught.value)
    assert f"\n+ '{'b' * 40}']" in str(caught.value)


def test_states_that_differ_but_print_alike_are_named_by_their_types() -> None:
    """Otherwise the message would show no difference."""

    class Odd:
        def __repr__(self) -> str:
            return "odd"

    with pytest.raises(AssertionError, match="both print as odd"):
        given().fold(lambda state, event: state, Odd).gives(Odd())


def test_an_error_of_the_reducer_names_the_event() -> None:
    """The original error is raised, with a note."""
    with pytest.raises(KeyError) as caught:
        given(added("a"), Event("added", {})).fold(reduce, list)

    assert "event 2 of 2: Event('added', {}" in caught.value.__notes__[0]


def test_a_reducer_that_returns_nothing_is_refused() -> None:
    """The message names the event, as it does in a view."""
    with pytest.raises(TypeError, match=r"returned None.*event 1 of 1"):
        given(added("a")).fold(lambda state, event: state.append(event), list)  # type: ignore[arg-type, return-value]


def test_a_decision_is_compared_with_the_expected_events() -> None:
    """There may be one event, several or none; their times don't count."""
    given().fold(reduce, list).when(add("a")).then(added("a", ts=5))
    given(added("a")).fold(reduce, list).when(add("a")).then()
    given().fold(reduce, list).when(lambda todos: [added("a"), added("b")]).then(added("a"), added("b"))


def test_a_decision_may_be_a_generator() -> None:
    """The generator is exhausted at once, so that its errors are raised."""

    def two(todos: list[str]) -> Iterator[Event]:
        yield added("a")
        yield added("b")

    given().fold(reduce, list).when(two).then(added("a"), added("b"))


def test_the_time_is_compared_on_request() -> None:
    """`ignore` lists the fields that are not compared."""
    outcome = given().fold(reduce, list).when(lambda todos: added("a", ts=1, id="x"))

    outcome.then(added("a", ts=1), ignore=["id"])
    with pytest.raises(AssertionError, match=r"\+.*'ts': 1"):
        outcome.then(added("a", ts=2, id="x"), ignore=())
    with pytest.raises(ValueError, match="'time'"):
        outcome.then(added("a"), ignore=["time"])


def test_other_events_than_expected_are_shown_line_by_line() -> None:
    """The message contains the fields that differ."""
    with pytest.raises(AssertionError) as caught:
        given().fold(reduce, list).when(add("b")).then(added("a"))

    assert "-[{'type': 'added', 'data': {'text': 'a'}}]" in str(caught.value)
    assert "+[{'type': 'added', 'data': {'text': 'b'}}]" in str(caught.value)


def test_a_decision_that_is_refused_raises_the_expected_error() -> None:
    """The caller can inspect the error."""
    refused = given(added("a"), added("b")).fold(reduce, list).when(add("c"))

    assert str(refused.raises(FullError)) == "no room for c"
    assert isinstance(refused.raises((KeyError, FullError), match="room"), FullError)
    with pytest.raises(AssertionError, match="does not match 'space'"):
        refused.raises(FullError, match="space")


def test_an_unexpected_error_fails_the_test_and_is_its_cause() -> None:
    """Tested with expected events, and with another expected error."""
    refused = given(added("a"), added("b")).fold(reduce, list).when(add("c"))
    for check in (lambda: refused.then(added("c")), lambda: refused.raises(KeyError)):
        with pytest.raises(AssertionError, match="FullError") as caught:
            check()

        assert isinstance(caught.value.__cause__, FullError)
    with pytest.raises(FullError):
        _ = refused.events


def test_if_an_expected_error_is_not_raised_the_message_shows_the_events() -> None:
    """The message contains the events that the decision returned."""
    with pytest.raises(AssertionError, match=r"(?s)expected FullError.*'text': 'a'"):
        given().fold(reduce, list).when(add("a")).raises(FullError)


async def decide_later(todos: list[str]) -> None: ...


@pytest.mark.parametrize("decide", [lambda todos: "added", lambda todos: 5, decide_later])
def test_a_decision_that_is_not_an_event_is_refused(decide: Any) -> None:
    """Otherwise a coroutine or a string could pass for no events."""
    with pytest.raises(TypeError, match="decide"):
        given().fold(reduce, list).when(decide)


@pytest.mark.parametrize("wrong", ["added", Event("added", {"when": object()})])
def test_given_refuses_events_that_no_log_accepts(wrong: Any) -> None:
    """The message says what is wrong with the event."""
    with pytest.raises(TypeError, match="added"):
        given(wrong)


TESTS = """
import pytest
from eventfold import Event

@pytest.mark.asyncio
async def test_reopened(eventfold_log, tmp_path):
    async with eventfold_log(max_log_size=1000) as log:
        await log.append(Event("a", {}))
        assert log.dir.parent == tmp_path
    async with eventfold_log() as log, eventfold_log("other") as other:
        assert [record.event.type async for record in log.read_full()] == ["a"]
        assert other.head.offset == 0

def test_fails():
    from eventfold.testing import given
    given().fold(lambda state, event: state, list).gives(["milk"])
"""


def test_pytest_finds_the_fixture_through_the_entry_point(tmp_path: Path) -> None:
    """The project has eventfold installed and imports nothing for the fixture; a failed test shows the difference."""
    plugins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    installed = tmp_path / "site" / "eventfold-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: eventfold\nVersion: 0\n")
    (installed / "entry_points.txt").write_text(
        "[pytest11]\n" + "".join(f"{name} = {module}\n" for name, module in plugins.items())
    )
    project = tmp_path / "project"
    project.mkdir()
    (project / "test_todos.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(project), str(project)],
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{installed.parent}"},
        cwd=project,
        capture_output=True,
        text=True,
    )

    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "-['milk']" in done.stdout
    assert "testing.py" not in done.stdout
