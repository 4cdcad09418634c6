"""The base file, `app.jsonl.base`: where in the whole log the active log begins.

The end of the archive says so too, unless somebody has copied the two files at different moments. So this file lists
the last generations of the active log, oldest first; each rotation adds one:

    {"generations": [[BASE, BEFORE, FIRST, WRITTEN], …], "checksum": CHECKSUM}

BASE is the offset of the generation's first byte, BEFORE the hash of the line before it ("" at 0), and FIRST the hash
of its first line ("" while it has none). WRITTEN becomes true after that line is on disk, and before its append is
acknowledged. CHECKSUM is the xxh64 of the encoded list.

The first line ties a generation to the content of `app.jsonl`. Its hash is listed before the line is written, and a new
generation is listed before the rename that makes it current. An active log without a line belongs to the newest
generation, unless that generation's first line has been written.

Promise: the file is replaced atomically, and is durable before the change to `app.jsonl` that it announces. If two
generations have the same first line, the one that matches the archive is used.
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
from .line_scan import first_line_hash
from .paths import Layout, NextFile

GENERATIONS = 64
"""How many generations are listed."""
_CACHED_FILES = 64


class Generation(NamedTuple):
    """One active log between two rotations; see above."""

    base: int
    hash_before: str
    first_hash: str = ""
    written: bool = False


class _File(msgspec.Struct):
    generations: msgspec.Raw
    checksum: str


_FileVersion: TypeAlias = tuple[int, int, int, int]
_decode = msgspec.json.Decoder(_File).decode
_decode_generations = msgspec.json.Decoder(list[Generation]).decode


class BaseFile:
    """The base file of one directory."""

    # It is read often, and changes only about once per rotation.
    _cache: ClassVar[dict[Path, tuple[_FileVersion, list[Generation]]]] = {}

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Generation] | None:
        """The listed generations; None if there is no file. Raises `CorruptLogError` if the file is damaged."""
        try:
            version = _version(os.stat(self.path))
        except FileNotFoundError:
            return None
        cached = self._cache.get(self.path)
        if cached is not None and cached[0] == version:
            return cached[1]
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
        while len(self._cache) >= _CACHED_FILES:
            self._cache.pop(next(iter(self._cache)), None)
        self._cache[self.path] = _version(stat), generations
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
            "the next writer will recreate it",
        )

    def write(self, generation: Generation) -> None:
        """Adds a generation durably, in place of those whose base is the same or greater."""
        earlier = [listed for listed in self.read() or () if listed.base < generation.base]
        encoded = msgspec.json.encode([*earlier, generation][-GENERATIONS:])
        operations.replace_file(self.path, msgspec.json.encode(_File(msgspec.Raw(encoded), line_hash(encoded))))


def _version(stat: os.stat_result) -> _FileVersion:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def find_generations(generations: Sequence[Generation], first_hash: str) -> list[Generation]:
    """The generations to which an active log with this first line can belong, newest first; "" means no line yet."""
    if not first_hash:
        return [] if generations[-1].written else [generations[-1]]
    return [generation for generation in reversed(generations) if generation.first_hash == first_hash]


def find_base(layout: Layout, fd: int, archive: Archive | None, next_file: NextFile | None) -> int | None:
    """The offset at which an opened active log begins according to the base file; None if the file does not say it.

    `next_file` is that of a rotation under way. Without a rotation, a base below the archive's end means that the
    active log was copied before a rotation and the archive after it: the active log begins with lines that the archive
    has too.

    Raises `CorruptLogError` if events are missing between the files, because they were copied at different moments, and
    `BaseFileChangedError` if the base file was replaced meanwhile.
    """
    base_file = BaseFile(layout.base_path)
    generations = base_file.read()
    # Read after the list, since a line is listed before it is written.
    first_hash = first_line_hash(fd)
    if generations is None or first_hash is None:
        return None
    archive_end = 0 if archive is None else archive.head.offset
    expected = archive_end if next_file is None else next_file.base
    candidates = find_generations(generations, first_hash)
    if not candidates:
        if base_file.read() != generations:
            raise BaseFileChangedError
        if archive is not None and not archive.recorded:
            return None  # the Rust crate has rotated since then
        if not first_hash:
            reason = (
                f"it has no line, and {layout.base_path} lists one: the files were copied at different moments; copy "
                "them again"
            )
        else:
            reason = (
                f"its first line is not one that {layout.base_path} lists: the line was changed, or the files were "
                "copied at different moments; copy them again"
            )
            if not generations[-1].first_hash:
                # The first line after a rotation, for example. In copied files, it would look the same.
                reason += f"; or if another program wrote that line, such as the Rust crate, delete {layout.base_path}"
        raise CorruptLogError(layout.log_path, expected, reason)
    base = expected if any(candidate.base == expected for candidate in candidates) else candidates[0].base
    if base > archive_end if next_file is None else base != next_file.base:
        raise CorruptLogError(
            layout.archive_path,
            min(archive_end, base),
            f"{layout.archive_path} ends at offset {expected}, and {layout.log_path} begins at offset {base}: they "
            "were copied at different moments; copy them again",
        )
    return base


class BaseFileChangedError(Exception):
    """The base file was replaced while it was compared with the active log: try again."""
