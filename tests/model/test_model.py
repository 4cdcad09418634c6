"""A log against a plain list: whatever happens, and however often the writer dies, both have the same content."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Awaitable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from tests.support import small_frames

from eventfold import ConditionalAppendError, Event, EventLog, EventReader, Head, LogClosedError, View
from eventfold import line_hash as hash_of
from eventfold._codec.encode import encode_line
from eventfold._files import operations
from eventfold._files.base_file import BaseFile, Generation

EXAMPLES = int(os.environ.get("EVENTFOLD_MODEL_EXAMPLES", "60"))
STEPS = int(os.environ.get("EVENTFOLD_MODEL_STEPS", "40"))
MAX_SIZE = 16 * 2**20

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
events = st.builds(
    Event,
    st.sampled_from(["made", "changed", "löschen"]),
    values,
    ts=st.integers(0, 2**33),
    id=st.none() | st.text(max_size=4),
    actor=st.none() | st.text(max_size=4),
    meta=values,
)
batches = st.lists(events, min_size=2, max_size=5)


def fold_all(state: list[str], event: Event) -> list[str]:
    """The reducer of a view that holds the whole log."""
    return [*state, event.type]


def fold_made(state: int, event: Event) -> int:
    """The reducer of a view that selects one type."""
    return state + 1


class LogMachine(RuleBasedStateMachine):
    """Applies the same steps to a log and to a list of lines, and compares them."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.place = tempfile.TemporaryDirectory()
        self.dir = Path(self.place.name) / "data"
        self.lines: list[tuple[Event, int, int, str]] = []
        self.other = EventReader(self.dir)
        self.lowest = 0

    def run(self, awaitable: Awaitable[Any]) -> Any:
        """Lets the event loop run until the coroutine has finished."""
        return self.runner.run(awaitable)

    @property
    def head(self) -> Head:
        """Returns the head of the list."""
        return Head(*self.lines[-1][2:]) if self.lines else Head(0, "")

    def note(self, *new: Event) -> None:
        """Adds events to the list, with the offsets that they must have in the log."""
        for i, event in enumerate(new, 1):
            text = encode_line(event, MAX_SIZE, (i, len(new)) if len(new) > 1 else None)
            start = self.head.offset
            self.lines.append((event, start, start + len(text), hash_of(text)))

    @initialize(max_log_size=st.sampled_from([0, 0, 300, 2000]))
    def open(self, max_log_size: int) -> None:
        """Opens the log for the first time."""
        self.max_log_size = max_log_size
        self.log = self.run(self._open())

    async def _open(self) -> EventLog:
        views = [View("all", fold_all, list), View("made", fold_made, 0, event_types=["made"])]
        log = await EventLog.open(self.dir, views=views, max_log_size=self.max_log_size)
        assert log.head == self.head
        return log

    @rule(event=events)
    def append(self, event: Event) -> None:
        """Appends one event."""
        result = self.run(self.log.append(event))
        self.note(event)
        assert (result.start_offset, result.end_offset, result.line_hash) == self.lines[-1][1:]

    @rule(new=st.lists(events, min_size=1, max_size=8))
    def append_from_many_tasks(self, new: list[Event]) -> None:
        """Appends several events at once, in the order in which the calls are made."""

        async def append_all() -> None:
            await asyncio.gather(*map(self.log.append, new))

        self.run(append_all())
        for event in new:
            self.note(event)

    @rule(new=batches)
    def append_many(self, new: list[Event]) -> None:
        """Appends a batch."""
        results = self.run(self.log.append_many(new))
        self.note(*new)
        assert [(r.start_offset, r.end_offset, r.line_hash) for r in results] == [
            line[1:] for line in self.lines[-len(new) :]
        ]

    @rule(event=events)
    def append_if_the_head_is_right(self, event: Event) -> None:
        """A conditional append that must succeed."""
        self.run(self.log.append_if(event, *self.log.head))
        self.note(event)

    @rule(event=events, choice=st.integers(0), wrong_hash=st.booleans())
    def append_if_the_head_is_wrong(self, event: Event, choice: int, wrong_hash: bool) -> None:
        """A conditional append that must be refused with the right error."""
        offset, right = self.head
        expected = Head(offset, "0" * 16) if wrong_hash else Head(offset + 1 + choice % 100, right)
        with pytest.raises(ConditionalAppendError) as caught:
            self.run(self.log.append_if(event, *expected))
        assert caught.value.conflict.actual_offset == offset
        assert caught.value.conflict.actual_hash == (right if wrong_hash else None)

    @rule()
    def rotate(self) -> None:
        """Rotates the log."""
        self.run(self.log.rotate())
        assert self.run(self.log.active_log_size()) == 0

    @rule(new=st.lists(events, min_size=1, max_size=4))
    def rotate_while_appending(self, new: list[Event]) -> None:
        """Rotates the log while events are appended."""

        async def both() -> None:
            await asyncio.gather(self.log.rotate(), *map(self.log.append, new))

        self.run(both())
        for event in new:
            self.note(event)

    @rule(operation=st.sampled_from(["write", "sync", "rename"]), number=st.integers(1, 4), event=events)
    def rotate_on_a_bad_disk(self, operation: str, number: int, event: Event) -> None:
        """The archive's or the new log's file can't be written during a rotation, and appends continue."""
        original, calls = getattr(operations, operation), []
        active = self.log._writer._committer.active

        def failing(*args: Any) -> Any:
            if operation == "rename" or args[0] != active.fd:
                calls.append(args)
                if len(calls) >= number:
                    raise OSError("made to fail")
            return original(*args)

        with mock.patch.object(operations, operation, failing), contextlib.suppress(OSError):
            self.run(self.log.rotate())
        self.append(event)

    @rule()
    def refresh(self) -> None:
        """The views have the state that the list gives."""
        self.run(self.log.refresh_all())
        assert self.log.view("all") == [line[0].type for line in self.lines]
        assert self.log.view("made") == sum(line[0].type == "made" for line in self.lines)

    @rule(choice=st.integers(0), by_other=st.booleans())
    def read_from_anywhere(self, choice: int, by_other: bool) -> None:
        """From any event on, the log's reader, or another one, returns what the list has."""
        index = choice % (len(self.lines) + 1)
        self._check(self.other if by_other else self.log, index)

    @precondition(lambda self: self.lines)
    @rule(choice=st.integers(0), by_other=st.booleans())
    def look_up_a_hash(self, choice: int, by_other: bool) -> None:
        """The hash of the line before any offset is the one from the list."""
        line = self.lines[choice % len(self.lines)]
        reader = self.other if by_other else self.log
        assert self.run(reader.read_line_hash_before(line[2])) == line[3]

    @rule()
    def reopen(self) -> None:
        """Closes the log properly, and opens it again."""
        self.run(self.log.aclose())
        self.log = self.run(self._open())

    @rule(new=st.lists(events, max_size=3), batch=st.booleans(), cut=st.integers(0), nul=st.integers(0, 40))
    def crash_in_a_write(self, new: list[Event], batch: bool, cut: int, nul: int) -> None:
        """The writer dies with unacknowledged events half written, and the rest of the file may be NULs."""
        self._kill()
        groups = [new] if batch and len(new) > 1 else [[event] for event in new]
        data, ends = b"", []
        for group in groups:
            data += b"".join(
                encode_line(event, MAX_SIZE, (i, len(group)) if len(group) > 1 else None)
                for i, event in enumerate(group, 1)
            )
            ends.append(len(data))
        cut %= len(data) + 1
        log_path = self.dir / "app.jsonl"
        if data and not log_path.stat().st_size:
            # A writer stores the first line's hash before it writes the line.
            first = hash_of(data[: data.index(b"\n")])
            BaseFile(self.dir / "app.jsonl.base").write(Generation(*self.head, first))
        with log_path.open("ab") as file:
            file.write(data[:cut] + b"\0" * nul)
        for group, end in zip(groups, ends, strict=True):
            if end <= cut:
                self.note(*group)
        self._check(self.other, 0)
        self.log = self.run(self._open())

    @rule(garbage=st.binary(max_size=60).filter(lambda garbage: b"\n" not in garbage))
    def crash_with_garbage(self, garbage: bytes) -> None:
        """The writer dies, and anything may follow the last newline."""
        self._kill()
        with (self.dir / "app.jsonl").open("ab") as file:
            file.write(garbage)
        self._check(self.other, 0)
        self.log = self.run(self._open())

    @rule(keep=st.integers(1, 6), cut=st.integers(0), event=events)
    def crash_in_a_rotation(self, keep: int, cut: int, event: Event) -> None:
        """The writer dies in a write of a rotation, part of which is on disk, and an event was appended after that."""
        original, calls = operations.write, []
        active = self.log._writer._committer.active

        def write(fd: int, data: bytes, position: int) -> None:
            if fd != active.fd:
                calls.append(fd)
                if len(calls) == keep:
                    original(fd, data[: cut % (len(data) + 1)], position)
                if len(calls) >= keep:
                    raise OSError("dead")
            original(fd, data, position)

        def unless_dead(name: str) -> Any:
            operation = getattr(operations, name)

            def guarded(*args: Any) -> Any:
                if len(calls) >= keep:
                    raise OSError("dead")
                return operation(*args)

            return mock.patch.object(operations, name, guarded)

        # A dead process undoes nothing.
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(operations, "write", write))
            for name in ("truncate", "rename", "unlink"):
                stack.enter_context(unless_dead(name))
            with contextlib.suppress(OSError):
                self.run(self.log.rotate(()))
        self.append(event)
        self._kill()
        self._check(self.other, 0)
        self.log = self.run(self._open())

    def _kill(self) -> None:
        """Drops the writer as the death of its process would: it finishes and saves nothing; the lock is released."""

        async def kill() -> None:
            writer = self.log._writer
            if writer._rotator.running:
                await asyncio.wait(list(writer._rotator.running))
            writer._commits.fail(LogClosedError("the process was killed"))
            await asyncio.to_thread(writer._abandon)

        self.run(kill())
        del self.log

    def _check(self, reader: EventLog | EventReader, index: int) -> None:
        async def read() -> list[tuple[Event, int, int, str]]:
            offset = self.lines[index][1] if index < len(self.lines) else self.head.offset
            return [
                (record.event, record.start_offset, record.end_offset, record.line_hash)
                async for record in reader.read_from(offset)
            ]

        assert self.run(read()) == self.lines[index:]
        if isinstance(reader, EventReader):
            assert self.run(reader.head()) == self.head

    def teardown(self) -> None:
        """Closes the log and reads it once more."""
        if hasattr(self, "log"):
            self.run(self.log.aclose())
            self._check(self.other, 0)
        self.runner.close()
        self.place.cleanup()


def test_a_log_has_the_same_content_as_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of steps include crashes, failing disks, rotations, refreshes and reads by others."""
    small_frames(monkeypatch, 300)
    steps = []
    original = LogMachine.run
    monkeypatch.setattr(LogMachine, "run", lambda self, awaitable: (steps.append(1), original(self, awaitable))[1])
    run_state_machine_as_test(
        LogMachine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            derandomize="EVENTFOLD_MODEL_EXAMPLES" not in os.environ,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{len(steps)} steps")

    assert len(steps) >= 2000
