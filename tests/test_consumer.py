"""Consumers: they continue after the last commit, deliver at least once, and notice another log's offset."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from tests.processes import other_writer, resources_at_rest, wait_for_resources
from tests.support import FaultInjector, event, settle

from eventfold import Consumer, CorruptLogError, EventfoldError, EventLog, EventReader, Query, Record
from eventfold._files.named_lock import NamedLock


async def consume(consumer: Consumer, count: int, *, commit: bool = True) -> list[Record]:
    """Returns the next records, and commits each of them if asked to; they must arrive within seconds."""
    found: list[Record] = []
    async with asyncio.timeout(10):
        async for record in consumer:
            found.append(record)
            if commit:
                await consumer.commit(record)
            if len(found) == count:
                break
    return found


async def fill(directory: Path, count: int, start: int = 0) -> None:
    async with EventLog.open(directory) as log:
        await log.append_many([event(n) for n in range(start, start + count)])


def numbers_of(records: list[Record]) -> list[int]:
    return [record.event.data["n"] for record in records]


def place(directory: Path, name: str = "mailer") -> dict[str, Any]:
    """Returns the content of the consumer's file."""
    return json.loads(directory.joinpath("consumers", f"{name}.json").read_bytes())


@pytest.mark.parametrize(("start", "expected"), [(0, [0, 1, 2, 3]), ("second", [1, 2, 3]), (None, [3])])
async def test_without_a_commit_a_consumer_begins_at_its_start(data_dir: Path, start: Any, expected: list[int]) -> None:
    """The start is the beginning of the log, an offset, or the current head."""
    async with EventLog.open(data_dir) as log:
        results = await log.append_many([event(n) for n in range(3)])
        start = results[1].start_offset if start == "second" else start
        consuming = asyncio.ensure_future(consume(log.consumer("mailer", start=start), len(expected)))
        await asyncio.sleep(0.05)
        await log.append(event(3))

        assert numbers_of(await consuming) == expected


async def test_a_consumer_continues_after_its_last_commit(data_dir: Path) -> None:
    """No committed event is delivered again, even after the log was reopened; `start` no longer matters."""
    await fill(data_dir, 5)
    async with EventLog.open(data_dir) as log:
        first = await consume(log.consumer("mailer"), 2)
    async with EventLog.open(data_dir) as log:
        second = await consume(log.consumer("mailer", start=0), 3)

    assert numbers_of(first + second) == [0, 1, 2, 3, 4]


async def test_uncommitted_events_are_delivered_again(data_dir: Path) -> None:
    """The event that was being processed when the process stopped is delivered again, and so are all later ones."""
    await fill(data_dir, 4)
    async with EventLog.open(data_dir) as log:
        await consume(log.consumer("mailer"), 1)
        await consume(log.consumer("mailer"), 2, commit=False)
    async with EventLog.open(data_dir) as log:
        again = await consume(log.consumer("mailer"), 3)

    assert numbers_of(again) == [1, 2, 3]


async def test_one_commit_covers_all_records_before_it(data_dir: Path) -> None:
    """A program may commit, for example, only every tenth record."""
    await fill(data_dir, 5)
    async with EventLog.open(data_dir) as log:
        consumer = log.consumer("mailer")
        records = await consume(consumer, 3, commit=False)
        await consumer.commit(records[-1])
        rest = await consume(log.consumer("mailer"), 2)

    assert numbers_of(rest) == [3, 4]


async def test_a_commit_is_on_disk_when_it_returns(data_dir: Path) -> None:
    """The file contains the offset after the record and the hash of its line."""
    await fill(data_dir, 2)
    async with EventLog.open(data_dir) as log:
        [record] = await consume(log.consumer("mailer"), 1)

        assert place(data_dir) == {"offset": record.end_offset, "hash": record.line_hash}


@pytest.mark.parametrize("operation", ["write", "sync", "rename"])
async def test_a_failed_commit_leaves_the_previous_offset(
    data_dir: Path, faults: FaultInjector, operation: str
) -> None:
    """The file is replaced as a whole or not at all, no temporary file remains, and the commit can be repeated."""
    await fill(data_dir, 3)
    async with EventLog.open(data_dir) as log:
        consumer = log.consumer("mailer")
        await consume(consumer, 1)
        before = place(data_dir)
        [record] = await consume(consumer, 1, commit=False)
        faults.fail(operation)
        with pytest.raises(OSError, match="made to fail"):
            await consumer.commit(record)
        after = place(data_dir)
        files = {path.name for path in data_dir.joinpath("consumers").iterdir()}
        await consumer.commit(record)

        assert after == before
        assert files == {"mailer.json", ".mailer.json.lock"}
        assert place(data_dir)["offset"] == record.end_offset


async def test_a_commit_under_way_leaves_the_previous_offset_in_place(data_dir: Path, faults: FaultInjector) -> None:
    """The file keeps the old offset until it is renamed."""
    await fill(data_dir, 2)
    async with EventLog.open(data_dir) as log:
        consumer = log.consumer("mailer")
        await consume(consumer, 1)
        before = place(data_dir)
        [record] = await consume(consumer, 1, commit=False)
        gate = faults.freeze("rename")
        commit = asyncio.ensure_future(consumer.commit(record))
        await gate.reached()
        meanwhile = place(data_dir)
        gate.open()
        await commit

        assert meanwhile == before
        assert place(data_dir)["offset"] == record.end_offset


async def test_a_commit_of_an_older_record_is_refused(data_dir: Path) -> None:
    """The commit raises ValueError, and the file stays as it is."""
    await fill(data_dir, 3)
    async with EventLog.open(data_dir) as log:
        consumer = log.consumer("mailer")
        records = await consume(consumer, 3)
        with pytest.raises(ValueError, match="can't go back"):
            await consumer.commit(records[1])

        assert place(data_dir)["offset"] == records[2].end_offset


async def test_an_older_record_is_refused_after_a_restart_too(data_dir: Path) -> None:
    """The offset on disk decides, not what this consumer object has committed itself."""
    await fill(data_dir, 3)
    async with EventLog.open(data_dir) as log:
        records = await consume(log.consumer("mailer"), 3)
    async with EventLog.open(data_dir) as log:
        with pytest.raises(ValueError, match="can't go back"):
            await log.consumer("mailer").commit(records[0])


async def test_a_commit_never_goes_back_before_that_of_another_consumer_object(data_dir: Path) -> None:
    """The two objects have the same name; the older one compares with the file, not with its own commits."""
    await fill(data_dir, 3)
    async with EventLog.open(data_dir) as log:
        older = log.consumer("mailer")
        records = await consume(older, 1)
        records += await consume(log.consumer("mailer"), 2)
        before = place(data_dir)
        with pytest.raises(ValueError, match="can't go back"):
            await older.commit(records[1])

        assert place(data_dir) == before


async def test_a_commit_never_goes_back_before_a_cancelled_one(data_dir: Path, faults: FaultInjector) -> None:
    """A cancelled commit may reach the disk anyway, and then it counts."""
    await fill(data_dir, 3)
    async with EventLog.open(data_dir) as log:
        consumer = log.consumer("mailer")
        records = await consume(consumer, 3, commit=False)
        await consumer.commit(records[0])
        gate = faults.freeze("rename")
        commit = asyncio.create_task(consumer.commit(records[2]))
        await gate.reached()
        commit.cancel()
        gate.open()
        with suppress(asyncio.CancelledError):
            await commit
        made = place(data_dir)
        with pytest.raises(ValueError, match="can't go back"):
            await consumer.commit(records[1])

        assert made["offset"] == records[2].end_offset
        assert place(data_dir) == made


async def test_concurrent_commits_of_two_consumer_objects_leave_the_newest(data_dir: Path) -> None:
    """Whatever their order, the older commit is refused, and the offset in the file never decreases."""
    await fill(data_dir, 2)
    async with EventLog.open(data_dir) as log:
        one, other = log.consumer("mailer"), Consumer(EventReader(data_dir), "mailer")
        records = await consume(one, 2, commit=False)
        await asyncio.gather(other.commit(records[1]), one.commit(records[0]), return_exceptions=True)

        assert place(data_dir)["offset"] == records[1].end_offset


@pytest.mark.parametrize("wrong", ["event", "offset"])
async def test_committing_something_other_than_a_record_says_what_to_do(data_dir: Path, wrong: str) -> None:
    """`commit(record.event)` and `commit(record.end_offset)` are mistakes that people make first."""
    await fill(data_dir, 1)
    async with EventLog.open(data_dir) as log:
        consumer = log.consumer("mailer")
        [record] = await consume(consumer, 1, commit=False)
        given: Any = record.event if wrong == "event" else record.end_offset
        with pytest.raises(TypeError, match="takes a Record"):
            await consumer.commit(given)


async def test_committing_a_record_twice_writes_once(data_dir: Path, faults: FaultInjector) -> None:
    """The second commit does nothing."""
    await fill(data_dir, 1)
    async with EventLog.open(data_dir) as log:
        consumer = log.consumer("mailer")
        [record] = await consume(consumer, 1)
        renames = faults.count("rename")
        await consumer.commit(record)

    assert renames == []


async def test_two_live_consumers_of_a_name_are_refused(data_dir: Path) -> None:
    """The second one raises an error at its first record, and the first one continues."""
    await fill(data_dir, 2)
    async with EventLog.open(data_dir) as log:
        first = log.consumer("mailer")
        one = await anext(first)
        with pytest.raises(EventfoldError, match="mailer"):
            await consume(log.consumer("mailer"), 1)
        with pytest.raises(EventfoldError, match="mailer"):
            await consume(Consumer(EventReader(data_dir), "mailer"), 1)
        two = await anext(first)

    assert numbers_of([one, two]) == [0, 1]


async def cancel_a_wait_for(consumer: Consumer) -> None:
    """Cancels the consumer while it waits for its next record."""
    waiting = asyncio.create_task(anext(consumer))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting


async def test_a_name_is_free_again_once_its_consumer_was_cancelled(data_dir: Path) -> None:
    """A supervisor can start it again in the same process, even if the old object still exists."""
    await fill(data_dir, 1)
    async with EventLog.open(data_dir) as log:
        first = log.consumer("mailer")
        await first.commit(await anext(first))
        await cancel_a_wait_for(first)
        second = asyncio.ensure_future(consume(log.consumer("mailer"), 1))
        await log.append(event(1))

        assert numbers_of(await second) == [1]


async def test_a_cancelled_wait_does_not_end_the_consumer(data_dir: Path) -> None:
    """A time-out around one step doesn't end the iteration: the next step continues after the last commit."""
    await fill(data_dir, 1)
    async with EventLog.open(data_dir) as log:
        consumer = log.consumer("mailer")
        await consumer.commit(await anext(consumer))
        await cancel_a_wait_for(consumer)
        await log.append(event(1))
        record = await anext(consumer, None)

    assert record is not None
    assert record.event.data["n"] == 1


async def test_a_name_is_free_again_once_its_log_was_closed(data_dir: Path) -> None:
    """The old consumer object may still exist, but it no longer uses the name."""
    await fill(data_dir, 2)
    async with EventLog.open(data_dir) as log:
        first = log.consumer("mailer")
        await anext(first)
    async with EventLog.open(data_dir) as log:
        again = await consume(log.consumer("mailer"), 2)

    assert numbers_of(again) == [0, 1]
    assert first.name == "mailer"


async def test_consumers_of_two_names_are_independent(data_dir: Path) -> None:
    """Each consumer has its own offset and gets every event."""
    await fill(data_dir, 3)
    async with EventLog.open(data_dir) as log:
        found = await asyncio.gather(consume(log.consumer("mailer"), 3), consume(log.consumer("printer"), 2))

    assert [numbers_of(records) for records in found] == [[0, 1, 2], [0, 1]]
    assert place(data_dir, "printer")["offset"] < place(data_dir, "mailer")["offset"]


@pytest.mark.parametrize("name", ["", "../mailer", ".mailer", "a/b", "x" * 129])
async def test_a_name_that_cannot_be_a_file_name_is_refused(data_dir: Path, name: str) -> None:
    """The constructor raises the error."""
    async with EventLog.open(data_dir) as log:
        with pytest.raises(ValueError, match="consumer name"):
            log.consumer(name)


async def test_an_offset_beyond_the_head_is_an_error(data_dir: Path) -> None:
    """A log that was restored from an older backup may lack consumed events; the consumer raises instead of waiting."""
    await fill(data_dir, 2)
    shutil.copy(data_dir / "app.jsonl", data_dir / "backup")
    await fill(data_dir, 2, start=2)
    async with EventLog.open(data_dir) as log:
        await consume(log.consumer("mailer"), 4)
    data_dir.joinpath("backup").rename(data_dir / "app.jsonl")
    async with EventLog.open(data_dir) as log:
        with pytest.raises(CorruptLogError, match="not in this log") as caught:
            await consume(log.consumer("mailer"), 1)

    assert caught.value.file.endswith("mailer.json")


@pytest.mark.parametrize("n", [1, 10], ids=["of the same length", "of another length"])
async def test_an_offset_in_another_log_is_an_error(data_dir: Path, n: int) -> None:
    """If the line before the offset has another hash, or no line ends there, the offset belongs to another log."""
    async with EventLog.open(data_dir) as log:
        await log.append(event(0))
        await consume(log.consumer("mailer"), 1)
    data_dir.joinpath("app.jsonl").unlink()
    data_dir.joinpath("app.jsonl.base").unlink()
    async with EventLog.open(data_dir) as log:
        await log.append(event(n))
        await log.append(event(n))
        with pytest.raises(CorruptLogError, match="not in this log"):
            await consume(log.consumer("mailer"), 1)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"offset":"x","hash":""}', b"\xff"])
async def test_a_damaged_consumer_file_is_an_error(data_dir: Path, content: bytes) -> None:
    """The error names the file, since starting over would repeat everything."""
    await fill(data_dir, 1)
    data_dir.joinpath("consumers").mkdir()
    data_dir.joinpath("consumers", "mailer.json").write_bytes(content)
    async with EventLog.open(data_dir) as log:
        with pytest.raises(CorruptLogError, match=r"mailer\.json"):
            await consume(log.consumer("mailer"), 1)


async def test_a_name_is_free_again_after_an_error_about_its_offset(data_dir: Path) -> None:
    """If the file is deleted, the same process can consume again."""
    await fill(data_dir, 1)
    data_dir.joinpath("consumers").mkdir()
    data_dir.joinpath("consumers", "mailer.json").write_bytes(b"{}")
    async with EventLog.open(data_dir) as log:
        consumer = log.consumer("mailer")
        with pytest.raises(CorruptLogError):
            await consume(consumer, 1)
        data_dir.joinpath("consumers", "mailer.json").unlink()

        assert numbers_of(await consume(consumer, 1)) == [0]


async def test_a_consumer_continues_through_rotations(data_dir: Path) -> None:
    """An offset keeps its meaning when the events around it move into the archive."""
    await fill(data_dir, 3)
    async with EventLog.open(data_dir) as log:
        first = await consume(log.consumer("mailer"), 2)
        await log.rotate()
    await fill(data_dir, 2, start=3)
    async with EventLog.open(data_dir) as log:
        await log.rotate()
        second = await consume(log.consumer("mailer"), 3)

    assert numbers_of(first + second) == [0, 1, 2, 3, 4]


async def test_a_consumer_works_while_another_process_writes(data_dir: Path) -> None:
    """A read-only log can have consumers, since their offsets are not part of the log."""
    async with other_writer(data_dir) as writer, EventLog.open(data_dir, read_only=True) as log:
        consuming = asyncio.ensure_future(consume(log.consumer("mailer"), 3))
        head = await writer.append(3)
        found = await consuming

    assert numbers_of(found) == [0, 1, 2]
    assert place(data_dir)["offset"] == head


async def test_a_consumer_ends_when_its_log_is_closed(data_dir: Path) -> None:
    """Iteration ends without an error."""
    await fill(data_dir, 1)
    log = await EventLog.open(data_dir)
    consumer = log.consumer("mailer")
    await anext(consumer)
    waiting = asyncio.ensure_future(anext(consumer, None))
    await settle()
    await log.aclose()

    assert await asyncio.wait_for(waiting, 5) is None


@pytest.mark.parametrize("lives_here", [True, False])
async def test_a_cancelled_consumer_leaves_nothing_behind(data_dir: Path, lives_here: bool) -> None:
    """No task, thread or descriptor outlives it."""
    await fill(data_dir, 3)
    async with EventLog.open(data_dir, read_only=not lives_here) as log:
        await consume(log.consumer("other"), 1)
        before = await resources_at_rest()
        consuming = asyncio.create_task(consume(log.consumer("mailer"), 99))
        while not data_dir.joinpath("consumers", "mailer.json").exists():
            await asyncio.sleep(0.005)
        consuming.cancel()
        with suppress(asyncio.CancelledError):
            await consuming
        left = await wait_for_resources(before)

    assert left == before


async def test_a_consumer_that_is_dropped_closes_its_files_at_once(data_dir: Path) -> None:
    """Tested with a consumer that was advanced with `anext` and then dropped, without a garbage collection."""
    await fill(data_dir, 3)
    before = await resources_at_rest()
    gc.disable()
    try:
        async with EventLog.open(data_dir, read_only=True) as log:
            await anext(log.consumer("mailer"))
        left = await wait_for_resources(before)
    finally:
        gc.enable()

    assert left == before


async def test_a_consumer_with_a_query_yields_matching_events(data_dir: Path) -> None:
    """A commit covers all events before it, so the consumer continues with the next match after it."""
    query = Query({"a"}) | Query(tags={"x"})
    async with EventLog.open(data_dir) as log:
        await log.append_many([event(n, "abc"[n % 3], tags=("x",) if n == 4 else ()) for n in range(9)])
        given = []
        async for record in log.consumer("mailer", query=query):
            given.append(record.event.data["n"])
            await log.consumer("mailer").commit(record)
            if len(given) == 3:
                break
        async for record in log.consumer("mailer", query=query):
            given.append(record.event.data["n"])
            break
        async for record in log.consumer("mailer"):
            given.append(record.event.data["n"])
            break

    assert given == [0, 3, 4, 6, 5]


# Several processes

READER = """
import asyncio, sys
from eventfold import EventLog
async def main():
    async with EventLog.open(sys.argv[1], read_only=True) as log:
        async for record in (consumer := log.consumer("mailer")):
            await consumer.commit(record)
            print(record.event.data["n"], flush=True)
asyncio.run(main())
"""


@pytest.fixture
async def other_process(data_dir: Path) -> AsyncIterator[subprocess.Popen[str]]:
    """Starts a process that consumes as `mailer`, with or without commits, and has read event 0."""
    await fill(data_dir, 1)
    process = subprocess.Popen([sys.executable, "-c", READER, str(data_dir)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert await asyncio.to_thread(process.stdout.readline) == "0\n"
    yield process
    process.kill()
    with process:
        pass


async def test_a_consumer_waits_while_another_process_reads_under_its_name(
    data_dir: Path, other_process: subprocess.Popen[str]
) -> None:
    async with EventLog.open(data_dir) as log:
        waiting = asyncio.ensure_future(anext(log.consumer("mailer")))
        await log.append(event(1))
        assert other_process.stdout is not None
        assert await asyncio.to_thread(other_process.stdout.readline) == "1\n"
        assert not waiting.done()

        other_process.kill()
        await log.append(event(2))
        # The other process may have committed the record before it died.
        await log.append(event(3))
        assert (await waiting).event.data["n"] in (2, 3)


async def test_another_name_is_read_at_the_same_time(data_dir: Path, other_process: subprocess.Popen[str]) -> None:
    async with EventLog.open(data_dir) as log:
        assert (await anext(log.consumer("biller"))).event.data["n"] == 0


@pytest.mark.parametrize("kind", ["asyncio", "anyio"])
async def test_waiting_for_another_process_can_be_cancelled(
    data_dir: Path, other_process: subprocess.Popen[str], kind: str
) -> None:
    async with EventLog.open(data_dir) as log:
        consumer = log.consumer("mailer")
        if kind == "asyncio":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await anext(consumer)
        else:
            with anyio.move_on_after(0.2) as scope:
                await anext(consumer)
            assert scope.cancelled_caught


async def test_closing_the_log_ends_a_consumer_that_waits_for_another_process(
    data_dir: Path, other_process: subprocess.Popen[str]
) -> None:
    log = await EventLog.open(data_dir)

    async def consume_all() -> list[Record]:
        return [record async for record in log.consumer("mailer")]

    consuming = asyncio.ensure_future(consume_all())
    await asyncio.sleep(0.05)
    await log.aclose()
    assert await consuming == []


async def lock_is_free(data_dir: Path) -> bool:
    lock = await asyncio.to_thread(NamedLock.acquire, data_dir / "consumers" / ".mailer.json.lock")
    if lock is not None:
        lock.release()
    return lock is not None


async def test_the_name_is_free_for_others_once_an_iteration_has_ended(data_dir: Path) -> None:
    await fill(data_dir, 3)
    async with EventLog.open(data_dir) as log:
        consumer = log.consumer("mailer")
        iteration = aiter(consumer)
        await anext(iteration)
        assert not await lock_is_free(data_dir)
        del iteration
        assert await lock_is_free(data_dir)

        async for record in consumer:
            assert not await lock_is_free(data_dir)
            await consumer.commit(record)
            break
        assert await lock_is_free(data_dir)

        task = asyncio.ensure_future(consume(log.consumer("mailer"), 5))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])
        assert await lock_is_free(data_dir)


async def test_the_name_is_free_for_others_once_the_log_is_closed(data_dir: Path) -> None:
    await fill(data_dir, 3)
    log = await EventLog.open(data_dir)
    iteration = aiter(log.consumer("mailer"))
    await anext(iteration)
    await log.aclose()
    assert await lock_is_free(data_dir)
