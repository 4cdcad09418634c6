"""A disk that forgets: file operations are recorded, and every state that a crash can leave is computed from them.

A killed process leaves all that it did. A power cut leaves what was synced, and of the rest anything: any of the
changes to names, and of what was written to each file everything, nothing, a part, or the size without the data.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from eventfold import _layout

Files = dict[str, bytes]
ARCHIVE = "archive.jsonl.zst"
_SERIAL = re.compile(r"\.\d+\.\d+\.tmp$")


class Op(NamedTuple):
    """One operation; `file` is a number that an opening gives, or a name."""

    kind: str
    file: Any = None
    value: Any = None
    position: int = 0


def write_files(directory: Path, files: Files) -> Path:
    """Makes a directory with these files."""
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def read_files(directory: Path) -> Files:
    """The names and contents of all files in a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


class Journal:
    """Records the operations on one directory's files, in the order in which they were done; syncs nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.ops: list[Op] = []
        self.before_archive_write: list[Callable[[], None]] = []
        self._directory = directory
        self._lock = threading.RLock()
        self._open: dict[int, tuple[int, str]] = {}
        self._numbers = itertools.count()
        self._originals: dict[str, Callable[..., Any]] = {}
        for name in ("open_file", "write", "sync", "truncate", "rename", "unlink", "sync_dir", "make_dir"):
            self._originals[name] = getattr(_layout, name)
            monkeypatch.setattr(_layout, name, getattr(self, f"_{name}"))

    def acknowledge(self, offset: int) -> None:
        """From here on the log must never again end before this offset."""
        self.ops.append(Op("acknowledge", value=offset))

    def _open_file(self, path: Path, flags: int) -> int:
        with self._lock:
            new = not path.exists()
            fd = self._originals["open_file"](path, flags)
            self._open[fd] = next(self._numbers), path.name
            self.ops.append(Op("create" if new else "open", self._open[fd][0], path.name))
            if flags & os.O_TRUNC and not new:
                self.ops.append(Op("truncate", self._open[fd][0], 0))
            return fd

    def _write(self, fd: int, data: bytes, position: int) -> None:
        if self.before_archive_write and ARCHIVE in self._open[fd][1]:
            self.before_archive_write.pop(0)()
        with self._lock:
            self._originals["write"](fd, data, position)
            self.ops.append(Op("write", self._open[fd][0], bytes(data), position))

    def _sync(self, fd: int) -> None:
        self.ops.append(Op("sync", self._open[fd][0]))

    def _truncate(self, fd: int, size: int) -> None:
        with self._lock:
            self._originals["truncate"](fd, size)
            self.ops.append(Op("truncate", self._open[fd][0], size))

    def _rename(self, source: Path, target: Path) -> None:
        with self._lock:
            self._originals["rename"](source, target)
            self.ops.append(Op("rename", source.name, target.name))

    def _unlink(self, path: Path) -> None:
        with self._lock:
            self._originals["unlink"](path)
            self.ops.append(Op("unlink", path.name))

    def _sync_dir(self, path: Path) -> None:
        if path == self._directory:
            self.ops.append(Op("sync_dir"))

    def _make_dir(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)


class _Inode:
    """A file: what is surely on disk, and what was done to it since."""

    def __init__(self, data: bytes) -> None:
        self.synced = data
        self.pending: list[Op] = []

    @staticmethod
    def _apply(data: bytes, op: Op) -> bytes:
        if op.kind == "truncate":
            return data[: op.value].ljust(op.value, b"\0")
        return data[: op.position].ljust(op.position, b"\0") + op.value + data[op.position + len(op.value) :]

    def now(self) -> bytes:
        data = self.synced
        for op in self.pending:
            data = self._apply(data, op)
        return data

    def after_power_cut(self, pages: bool) -> Iterator[bytes]:
        """What may be on disk; with `pages`, also a later part of the last write without an earlier one."""
        yield self.now()
        if not self.pending:
            return
        yield self.synced
        *before, last = self.pending
        data = self.synced
        for op in before:
            data = self._apply(data, op)
            yield data
        if last.kind == "write" and last.value:
            size = len(last.value)
            for cut in sorted(
                {0, 1, size - 81, size - 80, size - 40, size - 1, *range(0, size, max(size // 7, 1))} & {*range(size)}
            ):
                yield self._apply(data, last._replace(value=last.value[:cut]))
                yield self._apply(data, last._replace(value=last.value[:cut] + bytes(size - cut)))
            if pages:
                yield self._apply(data, last._replace(value=bytes(size // 2) + last.value[size // 2 :]))


class State(NamedTuple):
    """What a crash leaves: the files, and the offset up to which appends were acknowledged."""

    files: Files
    acknowledged: int
    after: str


def _key(state: State) -> tuple[frozenset[tuple[str, bytes]], int]:
    files = frozenset((_SERIAL.sub("", name), data) for name, data in state.files.items())
    return files, state.acknowledged


class States:
    """Every different state that a crash can leave; knows those that it has given."""

    def __init__(self) -> None:
        self._seen: set[Any] = set()

    def __len__(self) -> int:
        return len(self._seen)

    def after(self, files: Files, ops: list[Op], acknowledged: int) -> Iterator[State]:
        """The states after each of the operations on these files, without those that were given before."""
        for state in self._all(files, ops, acknowledged):
            key = _key(state)
            if key not in self._seen:
                self._seen.add(key)
                yield state

    def _all(self, files: Files, ops: list[Op], acknowledged: int) -> Iterator[State]:
        names = {name: _Inode(data) for name, data in files.items()}
        synced = dict(names)
        renamed: list[tuple[Op, _Inode | None]] = []
        opened: dict[int, _Inode] = {}
        for index, op in enumerate(ops):
            if op.kind == "acknowledge":
                acknowledged = op.value
            elif op.kind in ("open", "create"):
                if op.kind == "create":
                    opened[op.file] = _Inode(b"")
                    renamed.append((op, opened[op.file]))
                    self._rename(names, *renamed[-1])
                else:
                    opened[op.file] = names[op.value]
            elif op.kind == "sync":
                inode = opened[op.file]
                inode.synced, inode.pending = inode.now(), []
            elif op.kind in ("write", "truncate"):
                opened[op.file].pending.append(op)
            elif op.kind == "sync_dir":
                synced, renamed = dict(names), []
            else:
                renamed.append((op, names[op.file] if op.kind == "rename" else None))
                self._rename(names, *renamed[-1])
            label = f"operation {index}, {op.kind} {op.file if isinstance(op.file, str) else op.value!r:.40}"
            for chosen in itertools.product((True, False), repeat=len(renamed)):
                left = dict(synced)
                for change in itertools.compress(renamed, chosen):
                    self._rename(left, *change)
                choices = [
                    [(name, data) for data in dict.fromkeys(inode.after_power_cut(ARCHIVE in name))]
                    for name, inode in left.items()
                ]
                for choice in itertools.product(*choices):
                    yield State(dict(choice), acknowledged, label)

    @staticmethod
    def _rename(names: dict[str, _Inode], op: Op, inode: _Inode | None) -> None:
        if op.kind != "create":
            names.pop(op.file, None)
        if inode is not None:
            names[op.value] = inode
