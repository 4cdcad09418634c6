"""Appends: their order, group commit, conditions and batches."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.support import FaultInjector, event, line, numbers, write_log
from tests.writer.calls import started

from eventfold import (
    AppendResult,
    ConditionalAppendError,
    Event,
    EventReader,
    EventWriter,
    Head,
    line_hash,
)

# Appending


async def test_append_returns_the_offsets_and_the_hash_of_the_line(data_dir: Path) -> None:
    """Start, end and hash match the bytes in the file."""
    async with EventWriter.open(data_dir) as writer:
        first = await writer.append(event(1))
        second = await writer.append(event(2))
        data = writer.log_path.read_bytes()

    assert first == AppendResult(0, len(line(1)), line_hash(line(1)))
    assert second == AppendResult(len(line(1)), len(data), line_hash(line(2)))
    assert data == line(1) + line(2)


async def test_the_head_follows_the_appends(data_dir: Path) -> None:
    """The head of an empty log is `(0, "")`; later it is the end of the last line with its hash."""
    async with EventWriter.open(data_dir) as writer:
        empty = writer.head
        result = await writer.append(event(1))
        head = writer.head

    assert empty == Head(0, "") == (0, "")
    assert head == (result.end_offset, result.line_hash)


async def test_a_thousand_concurrent_appends_cost_a_handful_of_syncs(data_dir: Path, faults: FaultInjector) -> None:
    """Appends that wait together are written and synced together."""
    async with EventWriter.open(data_dir) as writer:
        syncs, writes = faults.count("sync"), faults.count("write")
        await asyncio.gather(*(writer.append(event(n)) for n in range(1000)))
        cost = len(syncs), len(writes)
        found = await numbers(writer.reader())

    assert max(cost) < 10
    assert found == list(range(1000))


async def test_every_append_is_synced_before_it_returns(data_dir: Path, faults: FaultInjector) -> None:
    """With `SyncMode.ALWAYS`, an append waits for the sync and for nothing else."""
    async with EventWriter.open(data_dir) as writer:
        gate = faults.freeze("sync")
        [task] = await started(writer.append(event(1)))
        await gate.reached()
        waits, written, head = not task.done(), writer.log_path.read_bytes(), writer.head
        gate.open()
        result = await task

    assert waits
    assert written == line(1)
    assert head == (0, "")
    assert result.end_offset == len(line(1))


async def test_appends_are_in_the_log_in_the_order_of_their_calls(data_dir: Path) -> None:
    """Tested with a mix of single appends, batches and conditional appends."""
    async with EventWriter.open(data_dir) as writer:
        calls: list[Any] = []
        for n in range(0, 300, 3):
            calls += [writer.append(event(n)), writer.append_many([event(n + 1), event(n + 2)])]
        results = await asyncio.gather(*calls)
        found = await numbers(writer.reader())
    places = [r for result in results for r in (result if isinstance(result, list) else [result])]

    assert found == list(range(300))
    assert [place.start_offset for place in places] == [0, *(place.end_offset for place in places[:-1])]


async def test_appends_that_come_during_a_commit_keep_their_order(data_dir: Path, faults: FaultInjector) -> None:
    """These appends form the next group."""
    async with EventWriter.open(data_dir) as writer:
        gate = faults.freeze("sync")
        tasks = await started(writer.append(event(0)))
        await gate.reached()
        tasks += await started(*(writer.append(event(n)) for n in range(1, 50)))
        gate.open()
        await asyncio.gather(*tasks)
        found = await numbers(writer.reader())

    assert found == list(range(50))


async def test_changes_to_an_event_after_the_call_are_not_in_the_log(data_dir: Path, faults: FaultInjector) -> None:
    """The line is made when `append` is called, not when it is written."""
    async with EventWriter.open(data_dir) as writer:
        gate = faults.freeze("sync")
        data = {"n": 2}
        tasks = await started(writer.append(event(1)), writer.append(Event("counted", data)))
        data["n"] = 99
        gate.open()
        await asyncio.gather(*tasks)
        found = await numbers(writer.reader())

    assert found == [1, 2]


# Conditional appends


async def test_append_if_appends_at_the_expected_head(data_dir: Path) -> None:
    """`append_if(event, *head)` with the current head appends the event."""
    async with EventWriter.open(data_dir) as writer:
        first = await writer.append_if(event(1), *writer.head)
        second = await writer.append_if(event(2), first.end_offset, first.line_hash)
        head = writer.head

    assert head == (second.end_offset, second.line_hash)


async def test_append_if_on_an_empty_log_accepts_the_reader_s_hash_too(data_dir: Path) -> None:
    """`read_line_hash_before(0)` returns None, which is as good as the empty hash."""
    async with EventWriter.open(data_dir) as writer:
        result = await writer.append_if(event(1), 0, await writer.reader().read_line_hash_before(0))  # type: ignore[arg-type]

    assert result.start_offset == 0


async def test_append_if_at_another_offset_writes_nothing_and_names_both(data_dir: Path) -> None:
    """The error contains the expected and the actual offset, but no actual hash."""
    async with EventWriter.open(data_dir) as writer:
        result = await writer.append(event(1))
        with pytest.raises(ConditionalAppendError) as caught:
            await writer.append_if(event(2), 0, "")
        found = await numbers(writer.reader())
    conflict = caught.value.conflict

    assert found == [1]
    assert (conflict.expected_offset, conflict.actual_offset) == (0, result.end_offset)
    assert (conflict.expected_hash, conflict.actual_hash) == ("", None)
    assert str(result.end_offset) in str(caught.value)


async def test_append_if_with_another_hash_writes_nothing_and_names_both(data_dir: Path) -> None:
    """The offset is the same, so the error contains the hash that the log has there."""
    async with EventWriter.open(data_dir) as writer:
        result = await writer.append(event(1))
        with pytest.raises(ConditionalAppendError) as caught:
            await writer.append_if(event(2), result.end_offset, "0" * 16)
        found = await numbers(writer.reader())
    conflict = caught.value.conflict

    assert found == [1]
    assert conflict.expected_offset == conflict.actual_offset == result.end_offset
    assert (conflict.expected_hash, conflict.actual_hash) == ("0" * 16, result.line_hash)
    assert result.line_hash in str(caught.value)


async def test_of_several_conditional_appends_in_one_group_the_first_wins(
    data_dir: Path, faults: FaultInjector
) -> None:
    """Each condition is checked against the head at the moment when its own turn comes."""
    async with EventWriter.open(data_dir) as writer:
        syncs = faults.count("sync")
        results = await asyncio.gather(*(writer.append_if(event(n), 0, "") for n in range(5)), return_exceptions=True)
        cost = len(syncs)
        found = await numbers(writer.reader())

    assert found == [0]
    assert cost == 1
    assert isinstance(results[0], AppendResult)
    assert all(isinstance(result, ConditionalAppendError) for result in results[1:])
    assert all(result.conflict.actual_offset == len(line(0)) for result in results[1:])  # type: ignore[union-attr]


async def test_a_conditional_append_may_expect_the_previous_append_of_its_group(
    data_dir: Path, faults: FaultInjector
) -> None:
    """In one group, each condition expects the append before it, which is not written yet."""
    sizes = [len(line(n)) for n in range(4)]
    async with EventWriter.open(data_dir) as writer:
        syncs = faults.count("sync")
        await asyncio.gather(
            writer.append(event(0)),
            writer.append_if(event(1), sizes[0], line_hash(line(0))),
            writer.append_many([event(2)]),
            writer.append_if(event(3), sum(sizes[:3]), line_hash(line(2))),
        )
        cost = len(syncs)
        found = await numbers(writer.reader())

    assert found == [0, 1, 2, 3]
    assert cost == 1


async def test_a_refused_conditional_append_affects_no_other(data_dir: Path) -> None:
    """The other appends of the group are written without a gap."""
    async with EventWriter.open(data_dir) as writer:
        results = await asyncio.gather(
            writer.append(event(1)),
            writer.append_if(event(2), 0, ""),
            writer.append(event(3)),
            return_exceptions=True,
        )
        found = await numbers(writer.reader())

    assert found == [1, 3]
    assert isinstance(results[1], ConditionalAppendError)
    assert results[2].start_offset == results[0].end_offset  # type: ignore[union-attr]


# Batches


async def test_the_lines_of_a_batch_contain_their_positions(data_dir: Path) -> None:
    """Lines of a batch of two or more have `"batch":[i,n]`; a single event has nothing."""
    async with EventWriter.open(data_dir) as writer:
        alone = await writer.append_many([event(1)])
        results = await writer.append_many(event(n) for n in (2, 3, 4))
        data = writer.log_path.read_bytes()

    assert data == line(1) + line(2, batch="1,3") + line(3, batch="2,3") + line(4, batch="3,3")
    assert len(alone) == 1
    assert [result.line_hash for result in results] == [line_hash(each) for each in data.splitlines()[1:]]


async def test_an_empty_batch_changes_nothing(data_dir: Path) -> None:
    """`append_many([])` returns an empty list."""
    async with EventWriter.open(data_dir) as writer:
        results = await writer.append_many([])
        head = writer.head

    assert results == []
    assert head == (0, "")


async def test_a_batch_cut_anywhere_is_read_completely_or_not_at_all(damaged_dir: Path) -> None:
    """Wherever a crash has cut the batch, a reader sees the log without it or with all of it."""
    before, batch = line(0), [line(n, batch=f"{n},3") for n in (1, 2, 3)]
    whole = before + b"".join(batch)
    seen = []
    for size in range(len(before), len(whole) + 1):
        write_log(damaged_dir, whole[:size])
        seen.append(await numbers(EventReader(damaged_dir)))

    assert seen == [[0]] * (len(whole) - len(before)) + [[0, 1, 2, 3]]


@pytest.mark.parametrize("lines_left", [0, 1, 2])
@pytest.mark.parametrize("bytes_more", [0, 1, 40])
async def test_a_cut_batch_is_removed_when_a_writer_opens(damaged_dir: Path, lines_left: int, bytes_more: int) -> None:
    """The log then continues after the event before the batch."""
    batch = [line(n, batch=f"{n},3") for n in (1, 2, 3)]
    write_log(damaged_dir, line(0), *batch[:lines_left], batch[lines_left][:bytes_more])
    async with EventWriter.open(damaged_dir) as writer:
        await writer.append(event(9))
        found = await numbers(writer.reader())

    assert found == [0, 9]
