"""Finds an offset in the archive or the active log, and reads the lines from there on, in blocks of whole lines.

Everything here only reads, without locks, while a writer in any process may continue. Opened files stay valid, since a
rotation replaces `app.jsonl` and only appends to the archive.

Promise: no block ends inside a line, or beyond the head, which is the end of the last whole line or batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from .._codec.lines import Lines
from .._errors import CorruptLogError
from .._event import Head, line_hash
from . import operations
from .archive import Archive
from .base_file import BaseFileChangedError, find_base
from .line_scan import complete_size, last_line_end, line_before
from .paths import Layout, NextFile

# The size in bytes of one read from the active log: large enough to make the switch to a thread cheap.
BLOCK_SIZE = 8 * 1024 * 1024
# The size in bytes of the first read of a single line; a longer line is read again.
_LINE_SIZE = 4096
# The size in bytes of one read from the end of the active log towards its beginning.
_BACKWARD_BLOCK_SIZE = 64 * 1024


def _open_if_there(path: Path) -> int | None:
    try:
        return operations.open_to_read(path)
    except FileNotFoundError:
        return None


def check_archived(layout: Layout, archive: Archive, fd: int, base: int) -> None:
    """Checks that an active log that begins before the end of the archive begins with the archive's lines.

    Raises `CorruptLogError` if the last line that both should have is not the same in both.
    """
    end = min(archive.head.offset, base + complete_size(fd, os.fstat(fd).st_size))
    if end == base:
        return
    archived = archive.head.line_hash if end == archive.head.offset else line_hash(archive.line_before(end))
    if os.pread(fd, 1, end - base - 1) != b"\n" or line_hash(line_before(fd, end - base)[1]) != archived:
        reason = f"a different line ends here than in {layout.archive_path}: they are not of the same log"
        raise CorruptLogError(layout.log_path, end, reason)


class LogSegments:
    """The archive and the active log, opened so that they fit together. Close it, or use it as a context manager.

    `base` is the offset of the active log's first byte, and `next_file` the file of a rotation under way. If there is
    `damage`, the base is unknown, and only the archive can be read, up to the damage.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.fd: int | None = None
        self.archive: Archive | None = None
        self.base = 0
        self.next_file: NextFile | None = None
        self.damage: CorruptLogError | None = None
        try:
            while not self._resolve():
                self.close()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LogSegments:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        if self.archive is not None:
            self.archive.close()
            self.archive = None

    def _resolve(self) -> bool:
        """Opens both files and finds the base; false if a rotation changed them meanwhile.

        The order matters: open the active log, open the archive, look for a rotation under way, and check that the
        active log still has its name.
        """
        path = self._layout.archive_path
        self.fd = _open_if_there(self._layout.log_path)
        archive_fd = _open_if_there(path)
        try:
            archive_size = 0 if archive_fd is None else os.fstat(archive_fd).st_size
            self.next_file = next_file = self._layout.next_file()
            if not self._is_current():
                return False
            if next_file is not None:
                archive_size = next_file.archive_size
            if archive_fd is not None:
                self.archive, archive_fd = Archive(path, archive_fd, archive_size), None
                if next_file is None and (damage := self.archive.missing_record()):
                    if os.stat(path).st_size != archive_size:
                        return False  # a recovery has just cut the frame off
                    self.archive.damage = damage
        finally:
            if archive_fd is not None:
                os.close(archive_fd)
        if next_file is not None:
            self.base = next_file.base
            self.damage = self._missing_data(next_file)
        elif self.archive is not None:
            self.base = self.archive.head.offset
            self.damage = self.archive.damage
        if self.fd is not None and self.damage is None:
            try:
                base = find_base(self._layout, self.fd, self.archive, next_file)
                if base is not None and base != self.base:
                    self._skip_archived(base)
            except BaseFileChangedError:
                return False
            except CorruptLogError as error:
                self.damage = error
        return True

    def _missing_data(self, next_file: NextFile) -> CorruptLogError | None:
        """The error if data is missing that existed when the rotation began: a file was cut, or copied earlier."""
        if self.size < next_file.size:
            reason = f"the file ends here, but {next_file.path.name} says that it continues"
            return CorruptLogError(self._layout.log_path, next_file.base + self.size, reason)
        if self.archive is None and next_file.archive_size:
            reason = f"the file that {next_file.path.name} refers to is missing"
            return CorruptLogError(self._layout.archive_path, 0, reason)
        return None

    def _skip_archived(self, base: int) -> None:
        """Skips lines of the active log that the archive has too, as they may occur in a copied directory."""
        assert self.fd is not None
        assert self.archive is not None
        check_archived(self._layout, self.archive, self.fd, base)
        if base + complete_size(self.fd, self.size) <= self.archive.head.offset:
            os.close(self.fd)
            self.fd = None
        else:
            self.base = base

    def _is_current(self) -> bool:
        """Whether `app.jsonl` still names the file that was opened, or still does not exist."""
        try:
            stat = os.stat(self._layout.log_path)
        except FileNotFoundError:
            return self.fd is None
        return self.fd is not None and os.path.samestat(stat, os.fstat(self.fd))

    @property
    def size(self) -> int:
        """The size of the active log in bytes, including an incomplete line."""
        return 0 if self.fd is None else os.fstat(self.fd).st_size

    def head(self) -> Head:
        """The end of the last whole line or batch. Raises `damage`."""
        if self.damage is not None:
            raise self.damage
        end = 0 if self.fd is None else complete_size(self.fd, self.size)
        if self.fd is None or not end:
            return self.archive.head if self.archive is not None else Head(0, "")
        return Head(self.base + end, line_hash(line_before(self.fd, end)[1]))

    def line_before(self, offset: int) -> bytes:
        """The line that ends at `offset` (bytes in the whole log, more than 0), without its newline.

        Raises `ValueError` if no line ends there.
        """
        if offset <= self.base:
            if self.archive is None:
                raise ValueError(f"offset {offset} is beyond the head at 0")
            return self.archive.line_before(offset)
        end = offset - self.base
        if self.fd is None or os.pread(self.fd, 1, end - 1) != b"\n":
            raise ValueError(f"offset {offset} is not where a line begins")
        return line_before(self.fd, end)[1]

    def line_at(self, offset: int) -> Lines:
        """The line that begins at `offset` (bytes in the whole log), and no others.

        Raises `ValueError` if no line begins there, `CorruptLogError` if it is damaged or missing.
        """
        if self.archive is not None and (offset < self.base or self.damage is not None):
            return self.archive.line_at(offset)
        if self.damage is not None:
            raise self.damage
        path, start = self._layout.log_path, offset - self.base
        if self.fd is None or start < 0:
            raise CorruptLogError(path, offset, "the file is missing, but the log continues here")
        if start and os.pread(self.fd, 1, start - 1) != b"\n":
            raise ValueError(f"offset {offset} is not where a line begins")
        size = _LINE_SIZE
        while True:
            data = os.pread(self.fd, size, start)
            if end := data.find(b"\n") + 1:
                return Lines(path, offset, data[:end])
            if len(data) < size:
                raise CorruptLogError(path, offset, "the file ends inside the line that begins here")
            size *= 4

    def block_before(self, offset: int) -> Lines:
        """One or more whole lines that end at `offset` (bytes in the whole log, more than 0).

        Raises `ValueError` if no line ends there, `CorruptLogError` at damage.
        """
        if self.archive is not None and offset <= self.base:
            return self.archive.block_before(offset)
        if self.damage is not None:
            raise self.damage
        path, end = self._layout.log_path, offset - self.base
        if self.fd is None or end <= 0:
            raise CorruptLogError(path, offset, "the file is missing, but the log ends here")
        step = _BACKWARD_BLOCK_SIZE
        while True:
            start = max(0, end - step)
            data = os.pread(self.fd, end - start, start)
            if len(data) != end - start:
                raise CorruptLogError(path, self.base + start + len(data), f"the file ends here, not at {offset}")
            if not data.endswith(b"\n"):
                raise ValueError(f"offset {offset} is not where a line ends")
            # The block may begin inside a line.
            begin = data.index(b"\n") + 1 if start else 0
            if begin < len(data):
                return Lines(path, self.base + start + begin, data[begin:])
            step *= 4

    def line_hash_before(self, offset: int) -> str:
        """The hash of the line that ends at `offset` (bytes in the whole log, more than 0)."""
        if self.archive is not None and offset == self.archive.head.offset == self.base:
            return self.archive.head.line_hash  # from the last record, without decompressing a frame
        return line_hash(self.line_before(offset))

    def check_line_before(self, head: Head) -> None:
        """Raises `CorruptLogError` if the line before a former head is no longer in the log."""
        offset, expected = head
        if not offset:
            return
        try:
            found = self.line_hash_before(offset)
        except ValueError:
            found = ""
        if found != expected:
            path = self._layout.log_path if offset > self.base else self._layout.archive_path
            raise CorruptLogError(path, offset, "a different line ended here before: the log was cut or replaced")

    def lines(self, offset: int, end: int, block_size: Callable[[], int] = lambda: BLOCK_SIZE) -> Iterator[Lines]:
        """Blocks of the lines from `offset`, where a line must begin, to `end`, where one must end.

        `block_size` is called before each block and returns how many bytes it should have.

        Raises `ValueError` for an offset inside a line, and `CorruptLogError` at damage, after yielding all lines
        before it.
        """
        if self.damage is not None:
            if self.archive is not None:
                yield from self.archive.lines(offset, block_size)
            raise self.damage
        if offset < min(end, self.base):
            reached = 0
            if self.archive is not None:
                stop = min(end, self.base)
                for lines in self.archive.lines(offset, block_size):
                    reached = min(lines.end_offset, stop)
                    yield lines if lines.end_offset <= stop else lines.part(0, stop - lines.start_offset)
                    if reached == stop:
                        break
                if reached == end:
                    return
            if reached < self.base:
                reason = f"the archive ends here, but the active log begins at {self.base}"
                raise CorruptLogError(self._layout.archive_path, reached, reason)
            offset = self.base
        if offset < end:
            yield from self._active_lines(offset, end, block_size)

    def _active_lines(self, offset: int, end: int, block_size: Callable[[], int]) -> Iterator[Lines]:
        path, base = self._layout.log_path, self.base
        if self.fd is None:
            raise CorruptLogError(path, offset, f"the file is missing, but the log continues to {end}")
        if offset > base and os.pread(self.fd, 1, offset - base - 1) != b"\n":
            raise ValueError(f"offset {offset} is not where a line begins")
        size = block_size()
        while offset < end:
            start = offset - base
            stop = min(start + size, end - base)
            # The end of the last line is found first, since cutting off the rest of a block would copy the block.
            line_end = last_line_end(self.fd, start, stop)
            if line_end > start:
                data = os.pread(self.fd, line_end - start, start)
                if data.endswith(b"\n"):  # otherwise the file was truncated just now
                    yield Lines(path, offset, data)
                    offset += len(data)
                    size = block_size()
                continue
            file_end = os.fstat(self.fd).st_size
            if start >= file_end:
                raise CorruptLogError(path, offset, f"the file ends here, but the log continues to {end}")
            if min(stop, file_end) < start + size:
                raise CorruptLogError(path, offset, f"no line ends here, but the log continues to {end}")
            size *= 4
