"""`copy_log`: copies a log with its snapshots and consumers from one engine to another.

Lines are copied as they are, so offsets and hashes stay the same and every snapshot and consumer continues where it
was. This works between engines whose offsets count bytes: directories and PostgreSQL.

Promises: what the target has already is never changed; the next call continues an interrupted copy; the target never
ends inside a batch; at the end, both logs have been read and compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing

import xxhash

from ._address import Address, engine_of
from ._aio import UncancellableTask, uninterrupted
from ._codec.decode import batch_position
from ._engine import Committer, DocumentKind, Source
from ._errors import CorruptLogError, EventfoldError
from ._event import Head
from ._judge import Append, Requirements

_KINDS: tuple[DocumentKind, ...] = ("view", "consumer")
_COMMIT_SIZE = 4 * 2**20  # bytes


async def copy_log(source: Address, target: Address, progress: Callable[[int, int], object] | None = None) -> Head:
    """Copies a log, its snapshots and its consumers' offsets to another engine or directory.

    The source may be in use: what is appended meanwhile is copied by the next call. Nobody else may append to the
    target.

    Args:
        source: The log: a directory, an address, or an engine.
        target: Where to put the copy; created if necessary. It may already have the beginning of the same log, which is
            what an interrupted copy leaves.
        progress: Called repeatedly with the number of bytes read so far and in total. Everything is read once to copy
            it, and once in each log to compare them.

    Returns:
        The head of the copy, which is that of the source when the copying began.

    Raises:
        EventfoldError: The target has another log, or one that is longer than the source; or the offsets of one of the
            two don't count bytes, and then nothing is created.
        CorruptLogError: The source is damaged, or the copy does not have the same lines.
        OSError: Reading or writing failed.
        ValueError: No engine has this kind of address.

    If cancelled, it leaves a part of the copy, which the next call continues.
    """
    from_engine, to_engine = engine_of(source), engine_of(target)
    for engine in (from_engine, to_engine):
        if not getattr(engine, "counts_bytes", True):
            raise EventfoldError(
                f"the offsets of {engine!r} don't count bytes, so nothing can be copied from there or to there: only "
                "logs in directories and in PostgreSQL can be copied"
            )
    original = from_engine.source()
    try:
        committer = await to_engine.open_committer()
        try:
            # The documents first, so that their offsets are before the head.
            documents = [
                (kind, name, await original.documents.load(kind, name))
                for kind in _KINDS
                for name in await original.documents.names(kind)
            ]
            head = await original.head()
            await _check_beginning(original, committer, head)
            count = _Counter(head.offset - committer.head.offset + 2 * head.offset, progress)
            await _copy_lines(original, committer, head, count)
            await _compare(original, committer.source, head, count)
            for kind, name, data in documents:
                if data is not None:
                    await committer.source.documents.store(kind, name, data)
        finally:
            await uninterrupted(UncancellableTask(committer.aclose(), "eventfold close"))
    finally:
        await uninterrupted(UncancellableTask(original.aclose(), "eventfold close"))
    return head


class _Counter:
    """Counts the bytes that were read."""

    def __init__(self, total: int, progress: Callable[[int, int], object] | None) -> None:
        self._read = 0
        self._total = total
        self._progress = progress

    def add(self, size: int) -> None:
        self._read += size
        if self._progress is not None:
            self._progress(self._read, self._total)


async def _check_beginning(source: Source, committer: Committer, head: Head) -> None:
    """Makes sure that the target contains nothing but the beginning of the source."""
    there = committer.head
    if there.offset > head.offset:
        raise EventfoldError(
            f"{committer.source.location} ends at offset {there.offset}, and {source.location} at {head.offset}: the "
            "target has more than the source; choose another target"
        )
    if there.offset:
        try:
            found = await source.line_hash_before(there.offset)
        except ValueError:
            found = ""
        if found != there.line_hash:
            raise EventfoldError(
                f"{committer.source.location} has a different log than {source.location}: choose another target"
            )


async def _copy_lines(source: Source, committer: Committer, head: Head, count: _Counter) -> None:
    start = committer.head
    if start.offset == head.offset:
        return
    pending = b""
    async with aclosing(source.blocks(start, head.offset)) as blocks:
        async for block in blocks:
            if block.offset_map:
                raise EventfoldError(f"the offsets of {source.location} don't count bytes: it can't be copied")
            pending += block.data
            if len(pending) >= _COMMIT_SIZE and (end := _end_of_batches(pending)):
                await _commit(committer, pending[:end])
                pending = pending[end:]
            count.add(len(block.data))
    if pending:
        await _commit(committer, pending)
    if committer.head != head:
        raise CorruptLogError(
            source.location, committer.head.offset, f"the copy ends here, but should continue to {head.offset}"
        )


def _end_of_batches(data: bytes) -> int:
    """Returns the position in complete lines after the last line that is not in an open batch."""
    last = data.rfind(b"\n", 0, -1) + 1
    batch = batch_position(data[last:])
    if batch is None or batch[0] == batch[1]:
        return len(data)
    end = len(data)
    for _ in range(batch[0]):
        end = data.rfind(b"\n", 0, max(end - 1, 0)) + 1
    return end


async def _commit(committer: Committer, data: bytes) -> None:
    head = committer.head
    commit = await committer.commit([Append(data, asyncio.get_running_loop().create_future(), Requirements(head))])
    [outcome] = commit.outcomes
    if isinstance(outcome, Exception):
        raise EventfoldError(f"somebody else is appending to {committer.source.location}: {outcome}") from outcome
    if commit.head.offset != head.offset + len(data):
        raise EventfoldError(
            f"the offsets of {committer.source.location} don't count bytes: nothing can be copied there"
        )


async def _compare(source: Source, copy: Source, head: Head, count: _Counter) -> None:
    if head.offset and await _digest(source, head, count) != await _digest(copy, head, count):
        raise CorruptLogError(copy.location, 0, f"the copy does not have the same lines as {source.location}")


async def _digest(source: Source, head: Head, count: _Counter) -> tuple[int, str]:
    digest, size = xxhash.xxh3_128(), 0
    async with aclosing(source.blocks(Head(0, ""), head.offset)) as blocks:
        async for block in blocks:
            digest.update(block.data)
            size += len(block.data)
            count.add(len(block.data))
    return size, digest.hexdigest()
