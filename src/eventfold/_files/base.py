"""The base file, `app.jsonl.base`: where in the whole log the active log begins.

The archive's end says so too, until somebody copies the two files at different moments. So this file lists the last
generations of the active log, one for each rotation, oldest first:

    {"generations": [[BASE, BEFORE, FIRST, WRITTEN], …], "checksum": CHECKSUM}

BASE is the offset of the generation's first byte, BEFORE the hash of the line before it ("" at 0), and FIRST the hash
of its first line ("" while it has none). WRITTEN becomes true when that line is on disk, and before its append is
acknowledged. CHECKSUM is the xxh64 of the encoded list. The first line ties a generation to the content of `app.jsonl`:
it is listed here before it is written there, and the next generation is listed before the rename. An active log without
a line belongs to the newest generation, unless that one's first line has been written.

Promise: the file is replaced atomically, and is durable before what it announces. Two generations with the same first
line can't be distinguished; the one that matches the archive is used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeAlias

import msgspec

from .._errors import CorruptLogError
from .._event import line_hash
from . import operations
from .archive import Archive
from .paths import Layout, NextFile

GENERATIONS = 64  # how many are listed
_READ_SIZE = 4096


class Generation(NamedTuple):
    """One active log between two rotations."""

    base: int
    before: str
    first: str = ""
    written: bool = False


class _File(msgspec.Struct):
    generations: msgspec.Raw
    checksum: str


_Key: TypeAlias = tuple[int, int, int, int]
_decode = msgspec.json.Decoder(_File).decode
_decode_generations = msgspec.json.Decoder(list[Generation]).decode


class BaseFile:
    """The base file of one directory."""

    # Readers look at it often, and it changes once per rotation.
    _known: ClassVar[dict[Path, tuple[_Key, list[Generation]]]] = {}

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Generation] | None:
        """The listed generations; None if there is no file. Raises `CorruptLogError` for a damaged one."""
        try:
            stat = os.stat(self.path)
        except FileNotFoundError:
            return None
        key = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
        known = self._known.get(self.path)
        if known is not None and known[0] == key:
            return known[1]
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        try:
            stat = os.fstat(fd)
            data = os.pread(fd, stat.st_size, 0)
        finally:
            os.close(fd)
        generations = self._decoded(data)
        while len(self._known) >= 64:
            self._known.pop(next(iter(self._known)), None)
        self._known[self.path] = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns), generations
        return generations

    def _decoded(self, data: bytes) -> list[Generation]:
        try:
            file = _decode(data)
            encoded = bytes(file.generations)
            generations = _decode_generations(encoded)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self._damaged(str(error)) from error
        if file.checksum != line_hash(encoded) or not generations:
            raise self._damaged("its checksum does not match its content")
        return generations

    def _damaged(self, reason: str) -> CorruptLogError:
        return CorruptLogError(
            self.path,
            0,
            f"{reason}. It says where app.jsonl begins: delete it if app.jsonl and the archive belong together, and "
            "the next writer will create it again",
        )

    def write(self, generation: Generation) -> None:
        """Lists a generation, durably; one with the same base, or with a later one, is replaced."""
        earlier = [known for known in self.read() or () if known.base < generation.base]
        encoded = msgspec.json.encode([*earlier, generation][-GENERATIONS:])
        operations.replace_file(self.path, msgspec.json.encode(_File(msgspec.Raw(encoded), line_hash(encoded))))


def find_generations(generations: Sequence[Generation], first: str) -> list[Generation]:
    """The generations whose first line has this hash, newest first; for "" (no line yet), the newest if it has none."""
    if not first:
        return [] if generations[-1].written else [generations[-1]]
    return [generation for generation in reversed(generations) if generation.first == first]


def first_line_hash(fd: int) -> str | None:
    """The hash of a file's first line; "" if it has no whole line yet, None for a hole left by a power cut."""
    data, size = b"", _READ_SIZE
    while True:
        data = os.pread(fd, size, 0)
        newline = data.find(b"\n")
        if newline >= 0:
            return None if data.startswith(b"\0") else line_hash(data[:newline])
        if len(data) < size:
            return ""
        size *= 4


def find_base(layout: Layout, fd: int, archive: Archive | None, under_way: NextFile | None) -> int | None:
    """The offset at which an opened active log begins, by the base file; None if that does not say.

    Without a rotation under way, a base below the archive's end means that the archive was copied after a rotation and
    the active log before: the active log begins with the lines that the archive has from there on.

    Raises `CorruptLogError` if the files were copied at different moments, so that events are missing between them, and
    `ChangedError` if the base file changed meanwhile.
    """
    base_file = BaseFile(layout.base_path)
    generations = base_file.read()
    # Read after the list: a line that is there was listed before it was written.
    first = first_line_hash(fd)
    if generations is None or first is None:
        return None
    end = 0 if archive is None else archive.head.offset
    expected = end if under_way is None else under_way.base
    found = find_generations(generations, first)
    if not found:
        if base_file.read() != generations:
            raise ChangedError
        if archive is not None and not archive.recorded:
            return None  # the Rust crate has rotated since
        raise CorruptLogError(
            layout.log_path,
            expected,
            f"it has no line, and {layout.base_path} lists one: the files were copied at different moments; copy "
            "them again"
            if not first
            else f"its first line is not one that {layout.base_path} lists: the line was changed, or the files were "
            "copied at different moments; copy them again",
        )
    base = next((generation.base for generation in found if generation.base == expected), found[0].base)
    if base > end if under_way is None else base != under_way.base:
        raise CorruptLogError(
            layout.archive_path,
            min(end, base),
            f"{layout.archive_path} ends at offset {expected}, and {layout.log_path} begins at offset {base}: they "
            "were copied at different moments; copy them again",
        )
    return base


class ChangedError(Exception):
    """The base file was replaced while it was being compared with the active log: try again."""
