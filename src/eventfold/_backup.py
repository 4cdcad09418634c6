"""Copies a live log so that the copy opens at once; an older copy is brought up to date.

The archive and the active log are opened as they belong together at one moment, and copied up to the head of that
moment: the open files stay valid, whatever is appended or rotated meanwhile. The copy gets its own base file, which
says where its active log begins.

The order matters if there is an older copy: first the archive is extended, so that the older `app.jsonl` begins with
lines that the archive has too; then the base file lists the new generation; then `app.jsonl` is replaced. The copy can
be opened after each of these steps. Only a frame that a power cut or a kill has torn can't be read: the next backup
cuts it off.

Promises: the copy has exactly the events before the head at the beginning of the copying; an archive that was copied is
never rewritten, only extended.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from itertools import zip_longest
from pathlib import Path
from typing import TypeAlias

import msgspec

from ._address import directory_of
from ._engine import Paths
from ._errors import CorruptLogError, EventfoldError
from ._event import Head, line_hash
from ._files import operations
from ._files.active import open_locked
from ._files.archive import Archive
from ._files.base import BaseFile, Generation, first_line_hash
from ._files.named_lock import NamedLock
from ._files.paths import Layout
from ._files.segments import LogSegments, line_before
from ._reader import EventReader
from ._threads import in_thread
from ._view_snapshot import offset_for_the_crate
from .snapshot import BadSnapshotError, encode, parse

Progress: TypeAlias = Callable[[int, int], object]

# How much is copied at once (bytes).
_CHUNK_SIZE = 4 * 2**20


async def backup(reader: EventReader, target: str | os.PathLike[str], progress: Progress | None = None) -> Head:
    """Copies a log in files to a directory, or brings the copy there up to date.

    Snapshots and consumers' offsets within the copied log are copied too. If cancelled, it stops after the current
    chunk and leaves an older copy; copy again to finish it.

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
        raise EventfoldError(f"{copy.dir} and {source.dir} contain one another: choose a directory outside the log")
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
    """Copies the archive and the active log once. Every method blocks, and runs in a thread. Close it."""

    def __init__(self, source: Layout, copy: Layout, head: Head) -> None:
        self._source, self._copy = source, copy
        self.end = head
        self.base = 0
        self.done = self.total = 0
        self._segments: LogSegments | None = None
        self._claim: NamedLock | None = None
        self._lock: int | None = None
        self._archive_fd: int | None = None
        self._archive_end = 0  # where the last whole span in the copy's archive ends
        self._temporary: Path | None = None
        self._chunks: Generator[int, None, None] | None = None

    def close(self) -> None:
        """Closes all files; whatever is unfinished is cut off."""
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
        """Opens both, and finds what has to be copied."""
        self._segments = segments = LogSegments(self._source)
        if segments.damage is not None:
            raise segments.damage
        self.base = segments.base
        if self.end.offset < segments.base:
            # A rotation came in between: what it archived was durable.
            assert segments.archive is not None
            self.end = segments.archive.head
        self._claim = NamedLock.take_directory(self._copy.dir)
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
        """Copies a chunk; false when nothing is left."""
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
                return  # The end of its archive is torn, or the checks that follow report what is wrong.
            try:
                segments.check_line_before(older.head())
            except CorruptLogError as error:
                raise EventfoldError(
                    f"{self._copy.dir} has events that are not in {self._source.dir}, so it is not an older copy: "
                    "choose another directory"
                ) from error

    def _older_archive(self, archive: Archive | None) -> int:
        """Opens the copy's archive; returns how much there is. Raises `EventfoldError` if it is of another log."""
        if self._copy.next_file() is not None:
            raise EventfoldError(f"{self._copy.dir} has a rotation under way, so it is in use as a log")
        try:
            fd = operations.open_regular(self._copy.archive_path, os.O_RDWR)
        except FileNotFoundError:
            return 0
        self._archive_fd = fd  # This way it is closed with the rest.
        self._archive_end = os.fstat(fd).st_size
        older = Archive(self._copy.archive_path, fd, self._archive_end)
        if older.damage is not None:
            raise older.damage
        if archive is None or older.end_position > archive.end_position:
            raise self._of_another_log()
        if older.recorded:
            for one, other in zip_longest(older.spans(), archive.spans()):
                if one is None:
                    break
                if one != other:
                    raise self._of_another_log()
        else:
            # Frames of the Rust crate, which have no records.
            for start in range(0, older.end_position, _CHUNK_SIZE):
                size = min(_CHUNK_SIZE, older.end_position - start)
                if os.pread(fd, size, start) != os.pread(archive.fd, size, start):
                    raise self._of_another_log()
        if older.size > older.end_position:
            operations.truncate(fd, older.end_position)
        self._archive_end = older.end_position
        return older.end_position

    def _of_another_log(self) -> EventfoldError:
        return EventfoldError(
            f"{self._copy.archive_path} is not an older copy of {self._source.archive_path}: choose another directory"
        )

    def _copy_all(self, start: int, active_size: int) -> Generator[int, None, None]:
        segments = self._segments
        assert segments is not None
        if segments.archive is not None and segments.archive.end_position > start:
            yield from self._copy_archive(segments.archive, start)
        self._temporary = operations.temporary_path(self._copy.log_path)
        fd = operations.create_file(self._temporary)
        try:
            at = 0
            while at < active_size:
                assert segments.fd is not None
                data = os.pread(segments.fd, min(_CHUNK_SIZE, active_size - at), at)
                if not data:
                    reason = "the file was cut while it was being copied"
                    raise CorruptLogError(self._source.log_path, segments.base + at, reason)
                operations.write(fd, data, at)
                at += len(data)
                yield len(data)
            self._check_end(fd, active_size)
            operations.sync(fd)
        finally:
            os.close(fd)

    def _check_end(self, fd: int, size: int) -> None:
        """Checks that the copied lines end with the line that was the last when the head was looked up."""
        if size and (os.pread(fd, 1, size - 1) != b"\n" or line_hash(line_before(fd, size)[1]) != self.end.line_hash):
            reason = "the file was cut or replaced while it was being copied; copy it again"
            raise CorruptLogError(self._source.log_path, self.end.offset, reason)

    def _copy_archive(self, archive: Archive, start: int) -> Generator[int, None, None]:
        """Extends the copy's archive frame by frame, each with its record, so that it always ends with a whole one."""
        if self._archive_fd is None:
            self._archive_fd = operations.create_file(self._copy.archive_path)
        ends = [span.after for span in archive.spans() if span.after > start]
        at = start
        for end in ends:
            while at < end:
                data = os.pread(archive.fd, min(_CHUNK_SIZE, end - at), at)
                if not data:
                    raise CorruptLogError(archive.path, 0, "the file was cut while it was being copied")
                operations.write(self._archive_fd, data, at)
                at += len(data)
                yield len(data)
            operations.sync(self._archive_fd)
            self._archive_end = end
        operations.sync_dir(self._copy.dir)

    def finish(self) -> None:
        """Puts the copied active log into its place."""
        assert self._temporary is not None
        assert self._segments is not None
        fd = operations.open_to_read(self._temporary)
        try:
            first = first_line_hash(fd) or ""
        finally:
            os.close(fd)
        before = self._segments.line_hash_before(self.base) if self.base else ""
        base_file = BaseFile(self._copy.base_path)
        # Not yet marked as written: until the rename, app.jsonl may be without a line.
        base_file.write(Generation(self.base, before, first))
        # A writer that opens the directory creates app.jsonl first and then reads the base file: so either we see
        # app.jsonl here, or the base file keeps that writer from opening it.
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


async def _copy_documents(reader: EventReader, copy: EventReader, head: Head, base: int) -> None:
    """Copies the snapshots and the consumers' offsets that are within the copied log."""
    for name in await reader.documents.names("view"):
        data = await reader.documents.load("view", name)
        try:
            found = None if data is None else parse(data)
        except BadSnapshotError:
            continue
        if found is None or found.position is None or not await _within(reader, found.position, found.position_hash):
            continue
        if found.position <= head.offset:
            offset = offset_for_the_crate(found.position, base)
            known = found.position_hash if 0 < offset <= head.offset else None
            moved = msgspec.structs.replace(found, state=None, offset=offset, hash=known or "")
            await copy.documents.store("view", name, encode(moved, found.state))
    for name in await reader.documents.names("consumer"):
        data = await reader.documents.load("consumer", name)
        try:
            place = None if data is None else msgspec.json.decode(data, type=_Place)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
        if data is None or place is None or place.offset > head.offset:
            continue
        if await _within(reader, place.offset, place.hash):
            await copy.documents.store("consumer", name, data)


class _Place(msgspec.Struct):
    offset: int
    hash: str


async def _within(reader: EventReader, offset: int, expected: str | None) -> bool:
    """Returns whether a line with this hash ends at an offset of the log."""
    try:
        return (await reader.read_line_hash_before(offset) or "") == (expected or "")
    except ValueError:
        return False
