"""Every call is cancelled at each of its suspensions and during each of its file operations.

The cancellation comes from `task.cancel()`, from an anyio scope, or from cancelling every task of the loop, as shutdown
recipes do. Afterwards, every acknowledged event is in the log once, the log either continues or is closed, and no lock,
descriptor, thread or task is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import threading
from collections.abc import Callable, Coroutine, Generator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import pytest
from tests.support import event, numbers

from eventfold import Event, EventLog, View, WriterFailedError, _aio, _threads
from eventfold._files import operations

OPERATIONS = ("open_file", "write", "sync", "truncate", "rename", "unlink", "sync_dir", "lock", "unlock")
MOST_POINTS = 200


def fold(state: list[int], event: Event) -> list[int]:
    return [*state, event.data["n"]]


class Suspensions:
    """Awaits a coroutine, and calls `reached` when it is suspended for the n-th time."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], number: int, reached: Callable[[], None]) -> None:
        self._coroutine, self._left, self._reached = coroutine, number, reached

    def __await__(self) -> Generator[Any, Any, Any]:
        step: Callable[[], Any] = lambda: self._coroutine.send(None)  # noqa: E731
        while True:
            try:
                waited_for = step()
            except StopIteration as end:
                return end.value
            self._left -= 1
            if not self._left:
                self._reached()
            try:
                value = yield waited_for
            except BaseException as error:
                step = lambda error=error: self._coroutine.throw(error)  # type: ignore[misc] # noqa: E731
            else:
                step = lambda value=value: self._coroutine.send(value)  # type: ignore[misc] # noqa: E731


class Program:
    """A log in use, and the numbers of the acknowledged events."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.acknowledged: list[int] = []
        self.log: EventLog | None = None
        self.next = 0

    def new_events(self, count: int = 1) -> list[Event]:
        self.next += count
        return [event(n) for n in range(self.next - count, self.next)]

    async def open(self) -> None:
        self.log = await EventLog.open(self.directory, views=[View("numbers", fold, list)])

    async def append(self) -> None:
        events = self.new_events()
        await self.log.append(events[0])
        self.acknowledge(events)

    async def append_many(self) -> None:
        events = self.new_events(3)
        await self.log.append_many(events)
        self.acknowledge(events)

    async def append_if(self) -> None:
        events = self.new_events()
        await self.log.append_if(events[0], *self.log.head)
        self.acknowledge(events)

    def acknowledge(self, events: list[Event]) -> None:
        self.acknowledged += [event.data["n"] for event in events]

    async def rotate(self) -> None:
        await self.log.rotate()

    async def rotate_by_itself(self) -> None:
        """Appends until the log is large enough to rotate; the rotation runs beside the next append."""
        self.log._writer._committer._max_log_size = 1
        try:
            await self.append()
            await self.append()
        finally:
            self.log._writer._committer._max_log_size = 0

    async def refresh(self) -> None:
        await self.log.refresh_all()

    async def rebuild(self) -> None:
        assert await self.log.rebuild("numbers") == self.acknowledged

    async def watch(self) -> None:
        async with aclosing(self.log.watch("numbers")) as states:
            assert await anext(states) == self.acknowledged

    async def wait(self) -> None:
        await self.log.wait_for_events(self.log.head.offset, timeout=0.001)

    async def tail(self) -> None:
        async with aclosing(self.log.tail(0)) as tail:
            for _ in self.acknowledged:
                await anext(tail)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.001):
                    await anext(tail)

    async def consume(self) -> None:
        consumer = self.log.consumer("mailer")
        await consumer.commit(await anext(consumer))

    async def aclose(self) -> None:
        await self.log.aclose()

    async def enter_and_leave(self) -> None:
        async with EventLog.open(self.directory) as log:
            events = self.new_events()
            await log.append(events[0])
            self.acknowledge(events)


CALLS = ["open", "enter_and_leave", "append", "append_many", "append_if", "rotate", "refresh", "wait", "tail"]
CALLS += ["consume", "aclose", "rebuild", "watch", "rotate_by_itself"]
KINDS = ["task", "scope", "all"]
# If the operation fails as well, the kinds of cancellation hardly differ, so one kind stands for all by default.
KINDS_WITH_FAILURE = KINDS if os.environ.get("EVENTFOLD_CANCELLATIONS") == "all" else ["scope"]


class Canceller:
    """Runs a call in a task, and cancels it once."""

    def __init__(self, kind: str, call: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.kind, self.call = kind, call
        self.scope = anyio.CancelScope()
        self.loop = asyncio.get_running_loop()
        self.main = asyncio.current_task()
        self.reached = False
        self.done = threading.Event()

    async def run(self, suspension: int = 0) -> None:
        async def main() -> None:
            with self.scope:
                await Suspensions(self.call(), suspension, self.cancel_soon)

        self.task = asyncio.create_task(main())
        await asyncio.wait([self.task])
        if not self.task.cancelled() and (error := self.task.exception()) is not None:
            raise error

    def cancel_soon(self) -> None:
        self.reached = True
        self.loop.call_soon(self.cancel)

    def cancel(self) -> None:
        if self.kind == "task":
            self.task.cancel()
        elif self.kind == "scope":
            self.scope.cancel()
        else:
            for task in asyncio.all_tasks() - {self.main}:
                task.cancel()
        # The cancellation takes effect a few turns later, so that code that ignores it has gone on by then.
        self.loop.call_later(0.005, self.done.set)

    def cancel_in_operation(self) -> None:
        """Cancels the call; runs in the thread of a file operation, while that operation is under way."""
        self.reached = True
        self.loop.call_soon_threadsafe(self.cancel)
        assert self.done.wait(10)


def open_files(directory: Path) -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if (path := os.readlink(f"/proc/self/fd/{fd}")).startswith(str(directory)):
                found.append(path)
    return found


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("eventfold writer")]


async def check(program: Program, tolerated: tuple[type[Exception], ...] = ()) -> None:
    """Checks that the log continues or, if it is closed, has released everything, and that it has each event once."""
    if program.log is not None:
        # After an operation failed, the writer may have failed too, and closing reports a sync that failed.
        with contextlib.suppress(*tolerated):
            if program.log._writer._closing is None:
                await program.append()
        with contextlib.suppress(*tolerated):
            await program.log.aclose()
    # Close the tail that a cancelled consumer leaves in the loop's thread; the garbage collector might do it in another
    # thread while the tail's generators run.
    gc.collect()
    async with asyncio.timeout(3):
        # A cancelled close continues in the background.
        while rest := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(rest)
        while own_threads() or open_files(program.directory):
            await asyncio.sleep(0.001)
    async with EventLog.open(program.directory) as log:
        found = await numbers(log)
    assert found == sorted(set(found))
    assert set(program.acknowledged) <= set(found)
    assert set(found) <= set(range(program.next))


async def prepared(directory: Path, name: str) -> Program:
    program = Program(directory)
    if name in ("open", "enter_and_leave"):
        async with EventLog.open(directory) as log:
            await log.append(program.new_events()[0])
        program.acknowledged.append(0)
    else:
        await program.open()
        await program.append()
        await program.append_many()
    if name == "tail":  # It must read the files, and not what is still in memory.
        await program.aclose()
        await program.open()
    return program


@pytest.fixture
def closed_twice(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns the descriptors that were closed although they were not open."""
    close, found = os.close, []

    def noted(fd: int) -> None:
        try:
            close(fd)
        except OSError as error:
            if error.errno == errno.EBADF:
                found.append(fd)
            raise

    monkeypatch.setattr(os, "close", noted)
    return found


async def cancel_at_each_suspension(tmp_path: Path, name: str, kind: str) -> int:
    for point in range(1, MOST_POINTS):
        program = await prepared(tmp_path / str(point), name)
        canceller = Canceller(kind, getattr(program, name))
        await canceller.run(point)
        await check(program)
        if not canceller.reached:
            return point - 1
    raise AssertionError("the call has no end")


async def cancel_in_each_operation(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kind: str,
    programs: list[Program] | None = None,
    *,
    failing: bool = False,
) -> int:
    tolerated = (OSError, WriterFailedError) if failing else ()
    for point in range(1, MOST_POINTS):
        program = await prepared(tmp_path / str(point), name)
        if programs is not None:
            programs.append(program)
        canceller = Canceller(kind, getattr(program, name))
        calls: list[str] = []
        under_way: list[str] = []

        def noted(original: Callable[..., Any], *args: Any) -> Any:
            calls.append(original.__name__)  # noqa: B023
            under_way.append(original.__name__)  # noqa: B023
            try:
                if len(calls) == point:  # noqa: B023
                    canceller.cancel_in_operation()  # noqa: B023
                    if failing:
                        raise OSError(errno.EIO, "made to fail")
                return original(*args)
            finally:
                under_way.pop()  # noqa: B023

        with monkeypatch.context() as patch:
            for operation in OPERATIONS:
                if failing and operation == "unlock":
                    continue  # A second close raises nothing.
                original = getattr(operations, operation)
                patch.setattr(operations, operation, lambda *args, original=original: noted(original, *args))
            with contextlib.suppress(*tolerated):
                await canceller.run()
            if program.log is not None:  # A rotation or a close that was cancelled continues.
                while program.log._writer._rotator.running:
                    await asyncio.wait(list(program.log._writer._rotator.running))
                if program.log._writer._closing is not None:
                    with contextlib.suppress(*tolerated):
                        await program.log.aclose()
                while program.log._writer._commits._task is not None:
                    await asyncio.wait([program.log._writer._commits._task])
            if name not in ("consume", "enter_and_leave"):  # Let the background work of these calls go on.
                assert not under_way
        await check(program, tolerated)
        if not canceller.reached:
            return point - 1
    raise AssertionError("the call has no end")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
async def test_a_call_may_be_cancelled_at_each_suspension(
    tmp_path: Path, closed_twice: list[int], name: str, kind: str
) -> None:
    """No acknowledged event is lost, and nothing stays open."""
    points = await cancel_at_each_suspension(tmp_path, name, kind)

    assert points >= 1
    assert not closed_twice


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["open", "enter_and_leave", "append", "rotate", "rotate_by_itself", "rebuild", "consume", "aclose"]
)
async def test_a_call_may_be_cancelled_during_each_file_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed_twice: list[int], name: str, kind: str
) -> None:
    """The thread finishes what it has begun before anything else continues."""
    points = await cancel_in_each_operation(tmp_path, monkeypatch, name, kind)

    assert points >= 1
    assert not closed_twice


@pytest.mark.parametrize("kind", KINDS_WITH_FAILURE)
@pytest.mark.parametrize("name", ["open", "append", "append_many", "rotate", "rotate_by_itself", "consume"])
async def test_a_call_may_be_cancelled_during_each_file_operation_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed_twice: list[int], name: str, kind: str
) -> None:
    """The cancelled caller does not see the failure; the log either continues or reports that it can't."""
    points = await cancel_in_each_operation(tmp_path, monkeypatch, name, kind, failing=True)

    assert points >= 1
    assert not closed_twice


@pytest.mark.parametrize("left_out", ["wait", "task"])
async def test_the_tests_notice_a_missing_protection_against_cancellation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    """This shows that the tests above can fail: nobody waits for a thread, or the writer's task is an ordinary one."""

    def interruptible(call: _threads.ThreadCall[Any]) -> Generator[Any, None, Any]:
        yield from call.settled().__await__()
        return call.result()

    programs: list[Program] = []
    monkeypatch.setattr(_aio.UncancellableTask, "cancel", asyncio.Task.cancel)
    if left_out == "wait":
        monkeypatch.setattr(_threads.ThreadCall, "__await__", interruptible)
    with pytest.raises((Exception, asyncio.CancelledError)):
        async with asyncio.timeout(10):
            await cancel_in_each_operation(tmp_path, monkeypatch, "append", "all", programs)
    for program in programs:
        await asyncio.to_thread(program.log._writer._abandon)


async def test_waiting_for_a_thread_in_a_cancelled_anyio_scope_does_not_spin() -> None:
    """anyio repeats a cancellation in every iteration of the loop, and the wait must not run in each of them."""
    loop, begun, go_on = asyncio.get_running_loop(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait(10)

    with anyio.CancelScope() as scope:
        loop.call_later(0.01, scope.cancel)
        cancelled_at = loop.time() + 0.02
        loop.call_at(cancelled_at + 0.05, go_on.set)
        selects = 0
        select = loop._selector.select  # type: ignore[attr-defined]

        def counted(timeout: float | None) -> Any:
            nonlocal selects
            selects += 1
            return select(timeout)

        loop._selector.select = counted  # type: ignore[attr-defined]
        try:
            await _threads.in_thread(work)
        finally:
            loop._selector.select = select  # type: ignore[attr-defined]

    assert scope.cancelled_caught
    assert selects < 50
