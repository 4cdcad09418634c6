"""`copy_log`: copies a log with its snapshots and consumers from one engine to another.

Lines are copied without a change, so offsets and hashes stay the same, and snapshots and consumers are valid in the
copy. Only the offset that is for the Rust crate changes in a snapshot, because the copy has its own active log. This
works between engines whose offsets count bytes: directories and PostgreSQL.

Promises: events that are in the target already are never changed; the next call continues an interrupted copy; the
target never ends inside a batch; at the end, both logs are read and compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing

import xxhash

from ._address import Address, engine_of
from ._aio import UncancellableTask, uninterrupted
from ._codec.decode import batch_position
from ._documents import DocumentKind
from ._engine import Committer, Source
from ._errors import CorruptLogError, EventfoldError
from ._event import Head
from ._judge import Append, Requirements
from ._view_snapshot import with_base
from .snapshot import BadSnapshotError, parse

_KINDS: tuple[DocumentKind, ...] = ("view", "consumer")
_COMMIT_SIZE = 4 * 2**20  # bytes


async def copy_log(source: Address, target: Address, progress: Callable[[int, int], object] | None = None) -> Head:
    """Copies a log, its snapshots and its consumers' offsets to another engine or directory.

    The source may be in use: events that are appended during the call are copied by the next call. Nothing else may
    append to the target. If cancelled, a part of the copy remains, which the next call continues.

    Args:
        source: The log: a directory, an address, or an engine.
        target: The copy, which is created if necessary. It may contain the beginning of the same log, for example what
            an interrupted call has copied.
        progress: Called repeatedly with the number of bytes read so far and in total. The source is read once for
            copying, and then both logs are read for the comparison.

    Returns:
        The head of the copy, which is that of the source at the beginning of the call.

    Raises:
        EventfoldError: The target contains a different log, or more events than the source; or the offsets of one of
            the two don't count bytes, in which case nothing is created.
        CorruptLogError: The source is damaged, or the copy does not have the same lines.
        OSError: A log could not be read or written.
        ValueError: No engine has this kind of address.
    """
    from_engine, to_engine = engine_of(source), engine_of(target)
    for engine in (from_engine, to_engine):
        if not getattr(engine, "counts_bytes", True):
            raise EventfoldError(
                f"the offsets of {engine!r} don't count bytes, so its logs can't be copied: only logs in directories "
                "and in PostgreSQL can"
            )
    original = from_engine.source()
    try:
        committer = await to_engine.open_committer()
        try:
            # Loaded before the head is looked up, so that no offset in them is beyond the head.
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
            base = await committer.source.base()
            for kind, name, data in documents:
                if kind == "view" and data is not None:
                    data = _copied_snapshot(data, base)
                if data is not None:
                    await committer.source.documents.store(kind, name, data)
        finally:
            await uninterrupted(UncancellableTask(committer.aclose(), "eventfold close"))
    finally:
        await uninterrupted(UncancellableTask(original.aclose(), "eventfold close"))
    return head


class _Counter:
    """Counts the bytes that were read, and reports the progress."""

    def __init__(self, total: int, progress: Callable[[int, int], object] | None) -> None:
        self._read = 0
        self._total = total
        self._progress = progress

    def add(self, size: int) -> None:
        self._read += size
        if self._progress is not None:
            self._progress(self._read, self._total)


def _copied_snapshot(data: bytes, base: int) -> bytes | None:
    """The snapshot for a copy in which `app.jsonl` begins at `base`; None if the view must be rebuilt there."""
    try:
        return with_base(parse(data), base)
    except BadSnapshotError:
        return None


async def _check_beginning(source: Source, committer: Committer, head: Head) -> None:
    """Raises `EventfoldError` unless the target contains the beginning of the source, or nothing."""
    copied = committer.head
    if copied.offset > head.offset:
        raise EventfoldError(
            f"{committer.source.location} ends at offset {copied.offset}, but {source.location} ends at {head.offset}: "
            "the target has more events than the source; choose another target"
        )
    if copied.offset:
        try:
            found = await source.line_hash_before(copied.offset)
        except ValueError:
            found = ""
        if found != copied.line_hash:
            raise EventfoldError(
                f"{committer.source.location} contains a different log than {source.location}: choose another target"
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
            source.location, committer.head.offset, f"the copy ends here, but it should end at {head.offset}"
        )


def _end_of_batches(data: bytes) -> int:
    """The position of a batch that continues beyond these whole lines; the end of the lines if there is none."""
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
        raise EventfoldError(
            f"another process is appending to {committer.source.location}: {outcome}; stop it, and copy again"
        ) from outcome
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
