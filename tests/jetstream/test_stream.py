"""Reading a stream: blocks of complete lines whose offsets jump from message to message."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.jetstream.appends import append, line, read

from eventfold import CorruptLogError, Head
from eventfold._waiters import Scope
from eventfold.jetstream import JetStream
from eventfold.jetstream._committer import StreamCommitter


async def test_an_empty_stream_has_an_empty_head(committer: StreamCommitter) -> None:
    assert await committer.source.head() == Head(0, "")


async def test_a_block_contains_the_offset_of_each_line(committer: StreamCommitter) -> None:
    await append(committer, 1, 2)
    await append(committer, 3)

    [block] = [block async for block in committer.source.blocks(Head(0, ""), 2 << 24)]

    size = len(line(1))
    assert [block.offset_at(i * size) for i in range(4)] == [0, size, 1 << 24, 2 << 24]


async def test_reading_begins_and_ends_within_a_message(committer: StreamCommitter) -> None:
    await append(committer, 1, 2, 3)

    size = len(line(1))
    assert await read(committer.source, Head(size, ""), 2 * size) == line(2)


async def test_many_messages_are_read_in_several_batches(
    committer: StreamCommitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventfold.jetstream._stream._MESSAGES", 7)
    for n in range(30):
        await append(committer, n)

    assert await read(committer.source) == b"".join(map(line, range(30)))


async def test_an_offset_within_a_line_is_refused(committer: StreamCommitter) -> None:
    await append(committer, 1, 2)

    with pytest.raises(ValueError, match="not where a line begins"):
        await committer.source.line_hash_before(5)


async def test_a_different_line_before_the_start_is_reported(committer: StreamCommitter) -> None:
    await append(committer, 1)
    await append(committer, 2)

    with pytest.raises(CorruptLogError, match="a different line"):
        await read(committer.source, Head(1 << 24, "0" * 16))


async def test_a_message_of_another_process_wakes_waits(engine: JetStream, server: Any) -> None:
    reading = await JetStream(server.addresses, engine._settings.log).open_committer()
    writing = await engine.open_committer()
    waiters = await reading.source.waiters()
    with waiters.watched(), waiters.waiter(Scope()) as waiter:
        head_beyond = waiter.head_beyond(0)
        await asyncio.sleep(0.2)
        head = (await append(writing, 1)).head

        assert await asyncio.wait_for(head_beyond, 5) == head
    await reading.aclose()
    await writing.aclose()


async def test_the_blocks_before_an_offset_are_complete(
    committer: StreamCommitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks come from the end to the beginning, several messages at a time, or one if messages are large."""
    for n in range(20):
        await append(committer, 2 * n, 2 * n + 1)
    for messages_back, most_bytes in ((1000, 2**21), (7, 2**21), (7, 1)):
        monkeypatch.setattr("eventfold.jetstream._stream._MESSAGES_BACK", messages_back)
        monkeypatch.setattr("eventfold.jetstream._stream._BYTES", most_bytes)
        offset, data = committer.head.offset, b""
        while offset:
            block = await committer.source.block_before(offset)
            assert block.offset_at(len(block.data)) == offset
            offset, data = block.start_offset, block.data + data

        assert data == b"".join(map(line, range(40)))


async def test_a_block_may_end_inside_a_message_at_the_end_of_a_line(committer: StreamCommitter) -> None:
    await append(committer, 1)
    await append(committer, 2, 3)

    size = len(line(2))
    assert (await committer.source.block_before((1 << 24) + size)).data == line(1) + line(2)
    with pytest.raises(ValueError, match="not where a line ends"):
        await committer.source.block_before((1 << 24) + 5)
