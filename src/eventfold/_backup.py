"""Copies a log that may be in use; the copy can be opened without a repair. An older copy is brought up to date.

The archive and the active log are opened in a consistent state and copied up to the head of that moment. The open files
stay valid while events are appended and the log is rotated. The copy gets its own base file, which says where its
active log begins.

The order matters if there is an older copy. First, the archive is extended, so that the older `app.jsonl` begins with
lines that are also in the archive. Then the base file lists the new generation. Last, `app.jsonl` is replaced. The copy
can be opened after each of these steps. Only after a power cut or a kill may the archive end with an incomplete frame,
which the next backup cuts off.

Promises: the copy has exactly the events before the head as it is when copying begins; an archive that was copied is
never rewritten, only extended.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeAlias

import msgspec

from ._address import directory_of
from ._consumer import CommittedOffset
from ._engine import Paths
from ._errors import CorruptLogError, EventfoldError
from ._event import Head, line_hash
from ._files import operations
from ._files.active import open_locked
from ._files.archive import Archive
from ._files.base_file import BaseFile, Generation
from ._files.line_scan import first_line_hash, line_before
from ._files.named_lock import NamedLock
from ._files.paths import Layout
from ._files.segments import LogSegments
from ._reader import EventReader
from ._threads import in_thread
from ._view_snapshot import with_base
from .snapshot import BadSnapshotError, parse

Progress: TypeAlias = Callable[[int, int], object]

# How many bytes are copied in one step.
_CHUNK_SIZE = 4 * 2**20


async def backup(reader: EventReader, target: str | os.PathLike[str], progress: Progress | None = None) -> Head:
    """Copies a log in files to a directory, or brings the copy there up to date.

    The snapshots and consumers' offsets that fit the copied log are copied too. If cancelled, it stops soon and leaves
    an older copy; call it again to finish the copy.

    Args:
        reader: A reader of the log.
        target: The directory of the copy: a new one, an empty one, or an older copy of this log.
        progress: Called repeatedly with the number of bytes copied so far and in total.

    Returns:
        The head of the copy.

    Raises:
        EventfoldError: The log is not kept in files, `target` contains something other than an older copy of it, or
            another backup is being written there.
        LogLockedError: The copy is open for writing.
        CorruptLogError: The log, or the copy, is damaged.
        OSError: A file could not be read or written.
    """
    paths = getattr(reader._source, "layout", None)
    if not isinstance(paths, Paths):
        raise EventfoldError(
            f"{reader._source.location} is not kept in files: back it up with the tools of its server, or export it"
        )
    source, copy = Layout(paths.dir), Layout(directory_of(target))
    await in_thread(_check_target, source, copy)
    head = await reader.head()
    copying = _Copying(source, copy, head)
    try:
        await in_thread(copying.begin)
        while await in_thread(copying.step):
            if progress is not None:
                progress(copying.done, copying.total)
        await in_thread(copying.finish)
        head, base = copying.end, copying.base
    finally:
        await in_thread(copying.close)
    if progress is not None:
        progress(copying.total, copying.total)
    await _copy_documents(reader, EventReader(copy.dir), head, base)
    return head


def _check_target(source: Layout, copy: Layout) -> None:
    one, other = Path(os.path.realpath(source.dir)), Path(os.path.realpath(copy.dir))
    if one == other or one in other.parents or other in one.parents:
        raise EventfoldError(
            f"{copy.dir} is the directory of the log, or inside it, or around it: choose a separate directory"
        )
    if not one.is_dir():
        raise EventfoldError(f"there is no log in {source.dir}")
    try:
        names = os.listdir(other)
    except FileNotFoundError:
        return
    ours = {copy.log_path.name, copy.archive_path.name}
    if names and not ours.intersection(names):
        raise EventfoldError(f"{copy.dir} contains something other than a copy of a log: choose an empty directory")


class _Copying:
    """Copies the archive and the active log. Every method blocks, so it runs in a thread. `close` must be called."""

    def __init__(self, source: Layout, copy: Layout, head: Head) -> None:
        self._source, self._copy = source, copy
        self.end = head
        self.base = 0
        self.done = self.total = 0
        self._segments: LogSegments | None = None
        self._claim: NamedLock | None = None
        self._lock: int | None = None
        self._archive_fd: int | None = None
        self._archive_end = 0  # the end of the last complete span in the copy's archive
        self._temporary: Path | None = None
        self._chunks: Generator[int, None, None] | None = None

    def close(self) -> None:
        """Closes all files, and cuts off what is incomplete."""
        if self._chunks is not None:
            self._chunks.close()
        if self._segments is not None:
            self._segments.close()
        if self._archive_fd is not None:
            try:
                if os.fstat(self._archive_fd).st_size > self._archive_end:
                    operations.truncate(self._archive_fd, self._archive_end)
            finally:
                os.close(self._archive_fd)
                self._archive_fd = None
        if self._temporary is not None:
            operations.discard(self._temporary)
            self._temporary = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._claim is not None:
            self._claim.release()

    def begin(self) -> None:
        """Opens the log and the copy, and finds what has to be copied."""
        self._segments = segments = LogSegments(self._source)
        if segments.damage is not None:
            raise segments.damage
        self.base = segments.base
        if self.end.offset < segments.base:
            # The log was rotated after its head was looked up. Everything in the archive is durable.
            assert segments.archive is not None
            self.end = segments.archive.head
        self._claim = NamedLock.acquire_directory(self._copy.dir)
        if self._claim is None:
            raise EventfoldError(f"another backup is being written to {self._copy.dir}: let it finish")
        if self._copy.log_path.exists():
            self._lock = open_locked(self._copy, True)
        self._check_older(segments)
        archive_size = 0 if segments.archive is None else segments.archive.end_position
        start = self._older_archive(segments.archive)
        active_size = 0 if segments.fd is None else self.end.offset - segments.base
        self.total = archive_size - start + active_size
        self._chunks = self._copy_all(start, active_size)

    def step(self) -> bool:
        """Copies a chunk; returns false if nothing is left."""
        assert self._chunks is not None
        size = next(self._chunks, None)
        if size is None:
            return False
        self.done += size
        return True

    def _check_older(self, segments: LogSegments) -> None:
        """Raises `EventfoldError` if the copy ends with an event that is not in the log."""
        with LogSegments(self._copy) as older:
            if older.damage is not None:
                return  # the end of its archive is torn, or the later checks report the damage
            try:
                segments.check_line_before(older.head())
            except CorruptLogError as error:
                raise EventfoldError(
                    f"{self._copy.dir} has events that are not in {self._source.dir}, so it is not an older copy: "
                    "choose another directory"
                ) from error

    def _older_archive(self, archive: Archive | None) -> int:
        """Opens the copy's archive; returns its size. Raises `EventfoldError` if it is the archive of another log."""
        if self._copy.next_file() is not None:
            raise EventfoldError(
                f"{self._copy.dir} is being rotated, so it is in use as a log: choose another directory"
            )
        try:
            fd = operations.open_regular(self._copy.archive_path, os.O_RDWR)
        except FileNotFoundError:
            return 0
        self._archive_fd = fd  # from now on, `close` closes it
        self._archive_end = os.fstat(fd).st_size
        older = Archive(self._copy.archive_path, fd, self._archive_end)
        if older.damage is not None:
            raise older.damage
        if archive is None or not _begins_with(archive, older):
            raise EventfoldError(
                f"{self._copy.archive_path} is not an older copy of {self._source.archive_path}: "
                "choose another directory"
            )
        if older.size > older.end_position:
            operations.truncate(fd, older.end_position)
        self._archive_end = older.end_position
        return older.end_position

    def _copy_all(self, start: int, active_size: int) -> Generator[int, None, None]:
        segments = self._segments
        assert segments is not None
        if segments.archive is not None and segments.archive.end_position > start:
            yield from self._copy_archive(segments.archive, start)
        self._temporary = operations.temporary_path(self._copy.log_path)
        fd = operations.create_file(self._temporary)
        try:
            position = 0
            while position < active_size:
                assert segments.fd is not None
                data = os.pread(segments.fd, min(_CHUNK_SIZE, active_size - position), position)
                if not data:
                    reason = "the file was cut while it was being copied"
                    raise CorruptLogError(self._source.log_path, segments.base + position, reason)
                operations.write(fd, data, position)
                position += len(data)
                yield len(data)
            self._check_end(fd, active_size)
            operations.sync(fd)
        finally:
            os.close(fd)

    def _check_end(self, fd: int, size: int) -> None:
        """Checks that the last copied line is that of the head."""
        if size and (os.pread(fd, 1, size - 1) != b"\n" or line_hash(line_before(fd, size)[1]) != self.end.line_hash):
            reason = "the file was cut or replaced while it was being copied; copy it again"
            raise CorruptLogError(self._source.log_path, self.end.offset, reason)

    def _copy_archive(self, archive: Archive, start: int) -> Generator[int, None, None]:
        """Extends the copy's archive, one frame and its commit record at a time, each of which is synced."""
        if self._archive_fd is None:
            self._archive_fd = operations.create_file(self._copy.archive_path)
        ends = [span.after for span in archive.spans() if span.after > start]
        position = start
        for end in ends:
            while position < end:
                data = os.pread(archive.fd, min(_CHUNK_SIZE, end - position), position)
                if not data:
                    raise CorruptLogError(archive.path, 0, "the file was cut while it was being copied")
                operations.write(self._archive_fd, data, position)
                position += len(data)
                yield len(data)
            operations.sync(self._archive_fd)
            self._archive_end = end
        operations.sync_dir(self._copy.dir)

    def finish(self) -> None:
        """Writes the copy's base file and moves the copied active log to its name."""
        assert self._temporary is not None
        assert self._segments is not None
        fd = operations.open_to_read(self._temporary)
        try:
            first = first_line_hash(fd) or ""
        finally:
            os.close(fd)
        before = self._segments.line_hash_before(self.base) if self.base else ""
        base_file = BaseFile(self._copy.base_path)
        # Not marked as written yet: until the rename, there may be no line in app.jsonl.
        base_file.write(Generation(self.base, before, first))
        # A writer that opens the directory first creates app.jsonl and then reads the base file. So either app.jsonl is
        # seen here, or that writer fails because of the base file.
        if self._lock is None and self._copy.log_path.exists():
            operations.unlink(self._copy.base_path)
            raise EventfoldError(
                f"a log was created in {self._copy.dir} while the backup was running: choose another directory"
            )
        operations.rename(self._temporary, self._copy.log_path)
        self._temporary = None
        operations.sync_dir(self._copy.dir)
        if first:
            base_file.write(Generation(self.base, before, first, written=True))


def _begins_with(archive: Archive, older: Archive) -> bool:
    """Whether an archive begins with the same frames as an older one."""
    if older.end_position > archive.end_position:
        return False
    if older.recorded:
        spans = archive.spans()
        return all(span == next(spans, None) for span in older.spans())
    # The Rust crate writes no commit records, so the bytes are compared.
    for start in range(0, older.end_position, _CHUNK_SIZE):
        size = min(_CHUNK_SIZE, older.end_position - start)
        if os.pread(older.fd, size, start) != os.pread(archive.fd, size, start):
            return False
    return True


async def _copy_documents(reader: EventReader, copy: EventReader, head: Head, base: int) -> None:
    """Copies the snapshots and the consumers' offsets that fit the log up to the head."""
    for name in await reader._documents.names("view"):
        data = await reader._documents.load("view", name)
        try:
            found = None if data is None else parse(data)
        except BadSnapshotError:
            continue
        if found is None or found.position is None or not await _fits(reader, found.position, found.position_hash):
            continue
        if found.position <= head.offset:
            await copy._documents.store("view", name, with_base(found, base))
    for name in await reader._documents.names("consumer"):
        data = await reader._documents.load("consumer", name)
        try:
            committed = None if data is None else msgspec.json.decode(data, type=CommittedOffset)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
        if data is None or committed is None or committed.offset > head.offset:
            continue
        if await _fits(reader, committed.offset, committed.hash):
            await copy._documents.store("consumer", name, data)


async def _fits(reader: EventReader, offset: int, expected: str | None) -> bool:
    """Whether a line with the expected hash ends at an offset of the log."""
    try:
        return (await reader.read_line_hash_before(offset) or "") == (expected or "")
    except ValueError:
        return False
