"""Waiting: one watcher wakes all waits on a directory, after an append here, on hints, or by regular checks."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import watchfiles
from anyio.to_thread import current_default_thread_limiter
from tests.processes import add_lines, other_writer, resources_at_rest, wait_for_resources, watchers
from tests.support import FaultInjector, event, line, settle, write_log

from eventfold import CorruptLogError, EventLog, EventReader, LogClosedError, SyncMode
from eventfold._files import inotify, watcher
from eventfold._files.head_cache import Change, HeadCache


async def watching(count: int = 1) -> None:
    """Waits until there are `count` watcher threads."""
    async with asyncio.timeout(5):
        while len(watchers()) != count:
            await asyncio.sleep(0.005)


async def test_a_thousand_tails_of_a_directory_have_one_watcher(data_dir: Path) -> None:
    """One thread watches for any number of waits, and all of them are woken."""
    write_log(data_dir, line(0))
    before = await resources_at_rest()
    tails = [EventReader(data_dir).tail(0) for _ in range(1000)]
    await asyncio.gather(*(anext(tail) for tail in tails))
    waiting = [asyncio.ensure_future(anext(tail)) for tail in tails]
    await settle()
    meanwhile = len(watchers())
    add_lines(data_dir, line(1))
    async with asyncio.timeout(20):
        found = [(await record).event.data["n"] for record in waiting]
    for tail in tails:
        await tail.aclose()
    del waiting
    left = await wait_for_resources(before)

    assert meanwhile == 1
    assert found == [1] * 1000
    assert left == before


async def test_no_watcher_runs_while_the_writer_is_in_the_process(data_dir: Path) -> None:
    """The writer itself wakes the waiters, so no thread looks at the file system; once it is closed, one does."""
    await watching(0)
    reader = EventReader(data_dir)
    async with EventLog.open(data_dir) as log:
        waiting = asyncio.ensure_future(reader.wait_for_events(0))
        await settle()
        await asyncio.sleep(0.05)
        meanwhile = watchers()
        await log.append(event(0))
        await waiting
        still_waiting = asyncio.ensure_future(reader.wait_for_events(log.head.offset))
        await settle()
    await watching()
    still_waiting.cancel()

    assert meanwhile == []


async def test_the_watcher_begins_with_the_first_wait_and_ends_with_the_last(data_dir: Path) -> None:
    """While nobody waits, there is no watcher thread, and its descriptors are closed."""
    data_dir.mkdir()
    reader = EventReader(data_dir)
    await reader.head()
    before = await resources_at_rest()
    waits = [asyncio.create_task(reader.wait_for_events(0)) for _ in range(2)]
    await watching()
    waits[0].cancel()
    await settle()
    with_one = watchers()
    waits[1].cancel()
    await asyncio.wait(waits)
    left = await wait_for_resources(before)

    assert len(with_one) == 1
    assert before.watchers == 0
    assert left == before


async def test_a_tail_without_a_watcher_raises_and_does_not_affect_later_tails(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no thread can be started, a tail raises `OSError`; the watcher of a later one ends with it."""
    write_log(data_dir, line(0))
    reader = EventReader(data_dir)
    await reader.head()
    before = await resources_at_rest()
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("eventfold watcher"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(OSError, match="no thread can be started"):
            await anext(reader.tail(0))
    async with aclosing(reader.tail(0)) as tail:
        record = await anext(tail)
    left = await wait_for_resources(before)

    assert record.event == event(0)
    assert left == before


async def test_waiting_takes_no_thread_from_anyios_limiter(data_dir: Path) -> None:
    """Fifty waits would exhaust its forty threads if they used them, but all of them share one thread of ours."""
    directories = [data_dir / str(number) for number in range(50)]
    waits = [asyncio.create_task(EventReader(path).wait_for_events(0)) for path in directories]
    await settle()
    await asyncio.sleep(0.1)
    meanwhile = len(watchers())
    borrowed = current_default_thread_limiter().borrowed_tokens
    for wait in waits:
        wait.cancel()
    await asyncio.wait(waits)
    await watching(0)

    assert (borrowed, meanwhile) == (0, 1 if watcher.USES_INOTIFY else 50)


async def test_a_wait_for_existing_events_returns_at_once(data_dir: Path) -> None:
    write_log(data_dir, line(0))

    result = await EventReader(data_dir).wait_for_events(0)

    assert (result.new_data, result.size) == (True, len(line(0)))


async def test_a_wait_ends_with_the_append_of_its_own_process(data_dir: Path) -> None:
    """The result contains the head that the wait was for."""
    async with EventLog.open(data_dir) as log:
        waiting = asyncio.ensure_future(log.wait_for_events(0))
        await settle()
        appended = await log.append(event(0))
        result = await waiting

    assert (result.new_data, result.size) == (True, appended.end_offset)


async def test_a_wait_ends_with_the_append_of_another_process(data_dir: Path) -> None:
    """The watcher finds the new head in the file."""
    async with other_writer(data_dir) as writer:
        waiting = asyncio.ensure_future(EventReader(data_dir).wait_for_events(0))
        await watching()
        head = await writer.append()
        result = await waiting

    assert (result.new_data, result.size) == (True, head)


@pytest.mark.parametrize("lives_here", [True, False])
async def test_a_wait_gives_up_after_its_timeout(data_dir: Path, lives_here: bool) -> None:
    """The result says that there is nothing new, and where the head is."""
    log = await EventLog.open(data_dir)
    await log.append(event(0))
    offset = log.head.offset
    if not lives_here:
        await log.aclose()
    since = monotonic()
    result = await EventReader(data_dir).wait_for_events(offset, timeout=0.1)
    waited = monotonic() - since
    await log.aclose()

    assert (result.new_data, result.size) == (False, offset)
    assert 0.1 <= waited < 2


async def test_a_wait_with_a_timeout_of_0_returns_at_once(data_dir: Path) -> None:
    """A time-out of 0 gives the current answer."""
    write_log(data_dir, line(0))
    reader = EventReader(data_dir)

    assert (await reader.wait_for_events(0, timeout=0)).new_data
    assert not (await reader.wait_for_events(len(line(0)), timeout=0)).new_data


@pytest.mark.parametrize("read_only", [False, True])
async def test_a_wait_raises_when_its_log_is_closed(data_dir: Path, read_only: bool) -> None:
    """The wait raises LogClosedError instead of waiting forever."""
    log = await EventLog.open(data_dir, read_only=read_only)
    waiting = asyncio.ensure_future(log.wait_for_events(0))
    await settle()
    await log.aclose()

    with pytest.raises(LogClosedError):
        await asyncio.wait_for(waiting, 5)


@pytest.mark.parametrize("offset", [-1, 1.5, "0", True])
async def test_a_wait_for_an_invalid_offset_is_refused(data_dir: Path, offset: Any) -> None:
    """An offset is an integer of 0 or more."""
    with pytest.raises(ValueError, match="offset"):
        await EventReader(data_dir).wait_for_events(offset)


async def test_a_cancelled_wait_leaves_nothing_behind(data_dir: Path) -> None:
    """No task, thread or descriptor outlives it."""
    data_dir.mkdir()
    before = await resources_at_rest()
    waiting = asyncio.create_task(EventReader(data_dir).wait_for_events(0, timeout=60))
    await watching()
    waiting.cancel()
    await asyncio.wait([waiting])
    left = await wait_for_resources(before)

    assert left == before


def lose_all_hints(
    path: Path, *, stop_event: threading.Event, rust_timeout: int, yield_on_timeout: bool, **options: Any
) -> Iterator[set]:
    """Replaces `watchfiles.watch` as on a mount whose events get lost: only its time-outs occur."""
    while not stop_event.wait(rust_timeout / 1000):
        if yield_on_timeout:
            yield set()


@pytest.fixture(params=["inotify", "watchfiles"])
def hints_get_lost(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount whose events get lost, for either source of hints."""
    if request.param == "inotify" and not watcher.USES_INOTIFY:
        pytest.skip("inotify is Linux's")
    monkeypatch.setattr(watcher, "USES_INOTIFY", request.param == "inotify")
    monkeypatch.setattr(watcher, "watch", lose_all_hints)
    monkeypatch.setattr(inotify.Hub, "_hinted", lambda *args: set())


async def test_new_events_are_found_even_if_all_hints_get_lost(data_dir: Path, hints_get_lost: None) -> None:
    """The file is looked at regularly, so that nobody waits for ever."""
    write_log(data_dir, line(0))
    async with aclosing(EventReader(data_dir).tail(0)) as tail:
        await anext(tail)
        add_lines(data_dir, line(1))
        record = await asyncio.wait_for(anext(tail), 5)

    assert record.event.data["n"] == 1


async def test_new_events_are_found_even_if_watching_fails(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For example, no inotify instance is left: one warning says so, and the file is looked at regularly."""

    def fail(*args: Any, **options: Any) -> Iterator[set]:
        raise OSError("no instances left")

    monkeypatch.setattr(watcher, "watch", fail)
    monkeypatch.setattr("inotify_simple.INotify", fail)
    write_log(data_dir, line(0))
    await watching(0)  # The thread of the previous test still has inotify.
    with caplog.at_level(logging.WARNING, "eventfold"):
        async with aclosing(EventReader(data_dir).tail(0)) as tail:
            await anext(tail)
            add_lines(data_dir, line(1))
            record = await asyncio.wait_for(anext(tail), 5)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(tail), 3 * watcher.CHECK_INTERVAL)

    assert record.event.data["n"] == 1
    assert caplog.text.count("no instances left") == 1


async def test_a_directory_that_replaces_another_is_watched(damaged_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the directory was moved and created again, its events are found, and `watchfiles` watches the new one."""
    watched: list[int] = []

    def watch(path: Path, **options: Any) -> Iterator[Any]:
        watched.append(path.stat().st_ino)
        return watchfiles.watch(path, **options)

    monkeypatch.setattr(watcher, "watch", watch)
    monkeypatch.setattr(watcher, "USES_INOTIFY", False)
    write_log(damaged_dir, line(0))
    async with aclosing(EventReader(damaged_dir).tail(0)) as tail, asyncio.timeout(10):
        await anext(tail)
        first = asyncio.ensure_future(anext(tail))
        while not watched:
            await asyncio.sleep(0.005)
        write_log(damaged_dir.with_name("another"), line(0), line(1))
        damaged_dir.rename(damaged_dir.with_name("away"))
        damaged_dir.with_name("another").rename(damaged_dir)
        record = await first
        while len(watched) < 2:
            await asyncio.sleep(0.005)

    assert record.event.data["n"] == 1
    assert watched[-1] == damaged_dir.stat().st_ino


@pytest.mark.skipif(not watcher.USES_INOTIFY, reason="inotify is Linux's")
async def test_a_directory_that_replaces_another_gives_hints(
    damaged_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new directory's hints arrive after the old one was moved; in this test, no other hint comes."""
    write_log(damaged_dir, line(0))
    async with aclosing(EventReader(damaged_dir).tail(0)) as tail, asyncio.timeout(10):
        await anext(tail)
        first = asyncio.ensure_future(anext(tail))
        await watching()
        await asyncio.sleep(0.05)
        monkeypatch.setattr(watcher.FileWatcher, "_check_without_hint", lambda self: False)
        write_log(damaged_dir.with_name("another"), line(0))
        damaged_dir.rename(damaged_dir.with_name("away"))
        damaged_dir.with_name("another").rename(damaged_dir)
        await asyncio.sleep(6 * watcher.CHECK_INTERVAL)
        add_lines(damaged_dir, line(1))
        record = await first

    assert record.event.data["n"] == 1


@pytest.mark.parametrize("error", [errno.EMFILE, errno.EIO])
async def test_a_temporary_failure_ends_no_wait(data_dir: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """If there are no descriptors for a moment, the watcher looks again, and no wait notices."""
    write_log(data_dir, line(0))
    poll, failures = HeadCache.poll, 0

    def fail_twice(cache: HeadCache) -> Change | None:
        nonlocal failures
        if failures < 2:
            failures += 1
            raise OSError(error, os.strerror(error))
        return poll(cache)

    waiting = asyncio.ensure_future(EventReader(data_dir).wait_for_events(len(line(0))))
    await watching()
    await asyncio.sleep(0.1)
    monkeypatch.setattr(HeadCache, "poll", fail_twice)
    add_lines(data_dir, line(1))
    result = await asyncio.wait_for(waiting, 5)

    assert (result.new_data, failures) == (True, 2)


async def test_a_lasting_failure_is_raised_by_waits(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some seconds, a wait raises the error that keeps the watcher from looking."""
    monkeypatch.setattr(watcher, "FAILURE_TIMEOUT", 0.5)
    write_log(data_dir, line(0))

    def fail(cache: HeadCache) -> Change | None:
        raise OSError(errno.EIO, "the disk is gone")

    waiting = asyncio.ensure_future(EventReader(data_dir).wait_for_events(len(line(0))))
    await watching()
    monkeypatch.setattr(HeadCache, "poll", fail)

    with pytest.raises(OSError, match="the disk is gone"):
        await asyncio.wait_for(waiting, 5)


async def test_a_watcher_that_is_stopped_during_a_look_reports_nothing(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, faults: FaultInjector
) -> None:
    """The watcher may have seen lines that a new writer of this process has not synced yet."""
    write_log(data_dir, line(0))
    poll, looking, look_on = HeadCache.poll, threading.Event(), threading.Event()

    def look_slowly(cache: HeadCache) -> Change | None:
        looking.set()
        look_on.wait(10)
        return poll(cache)

    waiting = asyncio.ensure_future(EventReader(data_dir).wait_for_events(len(line(0))))
    await watching()
    monkeypatch.setattr(HeadCache, "poll", look_slowly)
    await asyncio.to_thread(looking.wait, 10)
    async with EventLog.open(data_dir) as log:
        gate = faults.freeze("sync")
        append = asyncio.ensure_future(log.append(event(1)))
        await gate.reached()
        look_on.set()
        await asyncio.sleep(0.1)
        woken_early = waiting.done()
        gate.open()
        await append
        result = await waiting

    assert not woken_early
    assert result.new_data


@pytest.mark.skipif(not watcher.USES_INOTIFY, reason="elsewhere each directory has its thread")
async def test_consecutive_waits_share_one_thread(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread stays for a while, so that repeated waits don't start one each time."""
    await resources_at_rest()
    monkeypatch.setattr(inotify, "IDLE_TIMEOUT", 60.0)
    write_log(data_dir, line(0))
    reader, threads = EventReader(data_dir), set()
    for _ in range(5):
        await reader.wait_for_events(len(line(0)), timeout=0.01)
        threads.update(thread.ident for thread in watchers())
    monkeypatch.setattr(inotify, "IDLE_TIMEOUT", 0.0)
    await reader.wait_for_events(len(line(0)), timeout=0.01)  # the thread ends after this one

    assert len(threads) == 1


@pytest.mark.skipif(not watcher.USES_INOTIFY, reason="inotify is Linux's")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_a_forked_child_inherits_nothing_of_its_parents_watcher(data_dir: Path) -> None:
    """The child has neither descriptors nor watches, and the parent is still woken."""
    write_log(data_dir, line(0))
    waiting = asyncio.ensure_future(EventReader(data_dir).wait_for_events(len(line(0))))
    await watching()
    await asyncio.sleep(0.1)
    pid = os.fork()
    if not pid:
        os._exit("anon_inode:inotify" in open_files())
    _, status = await asyncio.to_thread(os.waitpid, pid, 0)
    add_lines(data_dir, line(1))
    result = await asyncio.wait_for(waiting, 5)

    assert os.waitstatus_to_exitcode(status) == 0
    assert result.new_data


def open_files() -> list[str]:
    """Returns the files that the descriptors of this process refer to."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # the descriptor of this listing
            pass
    return found


async def test_waits_report_a_damaged_log(damaged_dir: Path) -> None:
    """If the head can't be found, a wait raises the error of the search."""
    write_log(damaged_dir, line(0))
    waiting = asyncio.ensure_future(EventReader(damaged_dir).wait_for_events(len(line(0))))
    await watching()
    damaged_dir.joinpath("archive.jsonl.zst").write_bytes(b"no archive at all")
    add_lines(damaged_dir, line(1))

    with pytest.raises(CorruptLogError):
        await asyncio.wait_for(waiting, 5)


async def test_two_names_of_a_directory_share_one_watcher(data_dir: Path) -> None:
    """A symbolic link and a relative path lead to the same directory."""
    write_log(data_dir, line(0))
    link = data_dir.with_name("link")
    link.symlink_to(data_dir)
    head = len(line(0))
    waits = [asyncio.create_task(EventReader(path).wait_for_events(head)) for path in (data_dir, link)]
    await asyncio.sleep(0.1)
    meanwhile = len(watchers())
    for wait in waits:
        wait.cancel()
    await asyncio.wait(waits)

    assert meanwhile == 1


async def test_a_writer_wakes_waits_under_another_name_of_its_directory(data_dir: Path) -> None:
    """The file system is not needed for that."""
    await watching(0)
    async with EventLog.open(data_dir, sync=SyncMode.OS) as log:
        link = data_dir.with_name("link")
        link.symlink_to(data_dir)
        waiting = asyncio.ensure_future(EventReader(link).wait_for_events(0))
        await settle()
        await asyncio.sleep(0.05)
        meanwhile = watchers()
        await log.append(event(0))
        result = await asyncio.wait_for(waiting, 5)

    assert meanwhile == []
    assert result.new_data


async def test_a_tail_that_is_busy_when_the_writer_is_closed_yields_the_last_events(data_dir: Path) -> None:
    """Somebody who looked at the files before the writer was opened may have found these events already."""
    async with EventLog.open(data_dir) as log:
        await log.append(event(0))
        async with aclosing(EventReader(data_dir).tail(0)) as tail:
            await anext(tail)
            await log.append(event(1))
            await asyncio.to_thread(lambda: watcher.directory_at(data_dir).head_cache.head())
            await log.aclose()
            async with asyncio.timeout(5):
                record = await anext(tail)

    assert record.event.data["n"] == 1


async def test_event_loops_of_other_threads_are_woken_too(data_dir: Path) -> None:
    """A wait belongs to the loop in which it began, wherever the writer runs."""
    begun = threading.Event()

    async def wait() -> int:
        reader = EventReader(data_dir)
        await reader.head()
        asyncio.get_running_loop().call_later(0.05, begun.set)
        return (await reader.wait_for_events(0, timeout=10)).size

    async with EventLog.open(data_dir) as log:
        elsewhere = asyncio.create_task(asyncio.to_thread(asyncio.run, wait()))
        await asyncio.to_thread(begun.wait, 10)
        appended = await log.append(event(0))
        size = await elsewhere

    assert size == appended.end_offset


async def test_a_wait_does_not_end_before_the_event_is_durable(data_dir: Path, faults: FaultInjector) -> None:
    """In the writer's process, the head advances when the sync is done, not when the line is written."""
    async with EventLog.open(data_dir) as log:
        waiting = asyncio.ensure_future(EventReader(data_dir).wait_for_events(0))
        await settle()
        gate = faults.freeze("sync")
        append = asyncio.ensure_future(log.append(event(0)))
        await gate.reached()
        await asyncio.sleep(0.05)
        woken_early = waiting.done()
        gate.open()
        await append
        result = await waiting

    assert not woken_early
    assert result.new_data


async def test_has_new_events_answers_without_waiting(data_dir: Path) -> None:
    """The result is true before the head and false at the head; an offset beyond the head raises ValueError."""
    write_log(data_dir, line(0))
    reader = EventReader(data_dir)

    assert await reader.has_new_events(0)
    assert not await reader.has_new_events(len(line(0)))
    with pytest.raises(ValueError, match="beyond the head"):
        await reader.has_new_events(len(line(0)) + 1)


async def test_a_log_that_replaces_another_is_never_read_from_memory(damaged_dir: Path) -> None:
    """When a writer of this process is closed, what it wrote last is removed from memory."""
    for n in range(3):
        async with EventLog.open(damaged_dir) as log:
            await log.append(event(n))
            first = [record.event.data["n"] async for record in log.read_full()]
        shutil.rmtree(damaged_dir)
        write_log(damaged_dir, line(n + 5))
        second = [record.event.data["n"] async for record in EventReader(damaged_dir).read_full()]
        shutil.rmtree(damaged_dir)

        assert (first, second) == ([n], [n + 5])
