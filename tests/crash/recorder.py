"""The recorder: records file operations, and computes every state of the disk that a crash can leave.

A killed process leaves everything that it did, and any prefix of its last write. A power cut leaves what was synced,
and any part of the rest: any subset of the changes to names that no sync of their directory followed, and of the writes
to each file everything, nothing, a part, or the size without the data.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
from tests.crash.oracle import Oracle

from eventfold._files import operations

Files = dict[str, bytes]
ARCHIVE = "archive.jsonl.zst"
LOG = "app.jsonl"
MARK = "app.jsonl.lock"
_RANDOM = re.compile(r"\.[0-9a-f]{16}\.tmp$")


class Op(NamedTuple):
    """One operation; `file` is a name, or a number that is given at each opening."""

    kind: str
    file: Any = None
    value: Any = None
    position: int = 0


class Expected(NamedTuple):
    """What must be found after a crash.

    The log is the oracle's, up to an end at or after `acknowledged` (after a power cut) or `written` (after a kill).
    `kept` maps file names to their only allowed contents; None stands for no file.
    """

    oracle: Oracle
    acknowledged: int = 0
    written: int = 0
    kept: Mapping[str, tuple[bytes | None, ...]] = {}


class Recorded(NamedTuple):
    """An operation, with what was expected when it began."""

    files: Files
    ops: list[Op]
    expected: Expected


def write_files(directory: Path, files: Files) -> Path:
    """Creates a directory with these files."""
    directory.mkdir()
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return directory


def read_files(directory: Path) -> Files:
    """The names and contents of all files in a directory and those below it."""
    paths = sorted(directory.rglob("*"))
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths if path.is_file()}


@contextmanager
def scratch_directory(otherwise: Path) -> Iterator[Path]:
    """A directory for many short-lived files, in memory if possible."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield otherwise
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


class Recorder:
    """Records the operations below one directory, in order; syncs nothing."""

    _numbers: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.ops: list[Op] = []
        self.before_archive_write: list[Callable[[], None]] = []
        self.log_write_ends_after: int | None = None
        self._directory = directory
        self._lock = threading.RLock()
        self._open: dict[int, tuple[int, str]] = {}
        self._originals: dict[str, Callable[..., Any]] = {}
        for name in ("open_file", "write", "sync", "truncate", "rename", "unlink", "sync_dir"):
            self._originals[name] = getattr(operations, name)
            monkeypatch.setattr(operations, name, getattr(self, f"_{name}"))
        self._mark: tuple[int, str] | None = None
        self._originals["write_mapped"] = operations.write_mapped
        monkeypatch.setattr(operations, "write_mapped", self._write_mapped)
        self._originals["mkdir"] = os.mkdir
        monkeypatch.setattr(os, "mkdir", self._mkdir)

    def acknowledge(self, offset: int) -> None:
        """From now on, the log must not end before this offset."""
        self.ops.append(Op("acknowledge", value=offset))

    def written(self, offset: int) -> None:
        """From now on, the log of a killed process must not end before this offset."""
        self.ops.append(Op("written", value=offset))

    def expect(self, oracle: Oracle) -> None:
        """From now on, the log must be this oracle's, up to an allowed end."""
        self.ops.append(Op("expect", value=oracle))

    def keep(self, name: str) -> None:
        """From now on, the file must have its current content, or what later replaces it."""
        self.ops.append(Op("keep", name))

    def _name(self, path: Path) -> str:
        return path.relative_to(self._directory).as_posix()

    def _open_file(self, path: Path, flags: int) -> int:
        with self._lock:
            new = not path.exists()
            fd = self._originals["open_file"](path, flags)
            if path == self._directory:  # The file exists in every state; it is opened for its lock.
                return fd
            self._open[fd] = next(self._numbers), self._name(path)
            self.ops.append(Op("create" if new else "open", *self._open[fd]))
            if path.name == MARK:  # the only file that is mapped
                self._mark = self._open[fd]
            if flags & os.O_TRUNC and not new:
                self.ops.append(Op("truncate", self._open[fd][0], 0))
            return fd

    def _write(self, fd: int, data: bytes, position: int) -> None:
        file, name = self._open[fd]
        if self.before_archive_write and ARCHIVE in name:
            self.before_archive_write.pop(0)()
        with self._lock:
            end = self.log_write_ends_after if name.endswith(LOG) else None
            data = bytes(data[:end])
            self._originals["write"](fd, data, position)
            self.ops.append(Op("write", file, data, position))
            if end is not None:
                self.log_write_ends_after = None
                raise OSError(errno.ENOSPC, "made to end early")

    def _write_mapped(self, memory: mmap.mmap, data: bytes, position: int) -> None:
        self._originals["write_mapped"](memory, data, position)
        self.ops.append(Op("write", self._mark[0], data, position))

    def _sync(self, fd: int) -> None:
        self.ops.append(Op("sync", self._open[fd][0]))

    def _truncate(self, fd: int, size: int) -> None:
        with self._lock:
            self._originals["truncate"](fd, size)
            self.ops.append(Op("truncate", self._open[fd][0], size))

    def _rename(self, source: Path, target: Path) -> None:
        with self._lock:
            self._originals["rename"](source, target)
            self.ops.append(Op("rename", self._name(source), self._name(target)))

    def _unlink(self, path: Path) -> None:
        with self._lock:
            self._originals["unlink"](path)
            self.ops.append(Op("unlink", self._name(path)))

    def _mkdir(self, path: Path, mode: int = 0o777) -> None:
        with self._lock:
            self._originals["mkdir"](path, mode)
            if self._directory in Path(path).parents:
                self.ops.append(Op("mkdir", None, self._name(Path(path))))

    def _sync_dir(self, path: Path) -> None:
        if path == self._directory or self._directory in path.parents:
            self.ops.append(Op("sync_dir", self._name(path)))


class _Inode:
    """A file: what is certainly on disk, and what was done to it since. A directory has neither."""

    def __init__(self, data: bytes = b"", is_directory: bool = False) -> None:
        self.is_directory = is_directory
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

    def after_power_cut(self, pages: bool, fine: bool, mark: bool) -> Iterator[bytes]:
        """The contents that may be on disk; with `pages`, also a later part of the last write without an earlier one.

        With `fine`, the last write is torn in more places. A `mark`, which is checksummed and changes with each turn,
        has either all of its changes or none.
        """
        yield self.now()
        if not self.pending:
            return
        yield self.synced
        if mark:
            return
        *before, last = self.pending
        data = self.synced
        for op in before:
            data = self._apply(data, op)
            yield data
        if last.kind == "write" and last.value:
            size = len(last.value)
            cuts = {0, size // 2, size - 80, size - 1}
            if fine:
                cuts |= {1, size - 81, size - 40, *range(0, size, max(size // 7, 1))}
            for cut in sorted(cuts & {*range(size)}):
                yield self._apply(data, last._replace(value=last.value[:cut]))
                yield self._apply(data, last._replace(value=last.value[:cut] + bytes(size - cut)))
            if pages:
                yield self._apply(data, last._replace(value=bytes(size // 2) + last.value[size // 2 :]))


class State(NamedTuple):
    """A state that a crash leaves: the files, what they must contain, and when the crash came."""

    files: Files
    expected: Expected
    after: str

    def check_kept(self) -> None:
        """Asserts that the files that must be kept are there."""
        for name, contents in self.expected.kept.items():
            assert self.files.get(name) in contents, f"{name} is {self.files.get(name)!r:.100}"


class _Disk:
    """All names and files, what is certainly on disk, and what is expected."""

    def __init__(self, files: Files, expected: Expected) -> None:
        directories = {parent.as_posix() for name in files for parent in Path(name).parents} - {"."}
        self._names = {name: _Inode(is_directory=True) for name in directories}
        self._names |= {name: _Inode(data) for name, data in files.items()}
        self._synced = dict(self._names)
        self._changes: list[tuple[Op, _Inode | None]] = []
        self._opened: dict[int, _Inode] = {}
        self.expected = expected

    def do(self, op: Op) -> None:
        """Applies one operation."""
        expected = self.expected
        if op.kind == "acknowledge":
            latest = max(op.value, expected.acknowledged)
            self.expected = expected._replace(acknowledged=latest, written=max(latest, expected.written))
        elif op.kind == "written":
            self.expected = expected._replace(written=max(op.value, expected.written))
        elif op.kind == "expect":
            self.expected = expected._replace(oracle=op.value)
        elif op.kind == "keep":
            self.expected = expected._replace(kept={**expected.kept, op.file: (self._content(op.file),)})
        elif op.kind == "open":
            self._opened[op.file] = self._names[op.value]
        elif op.kind == "sync":
            inode = self._opened[op.file]
            inode.synced, inode.pending = inode.now(), []
        elif op.kind in ("write", "truncate"):
            self._opened[op.file].pending.append(op)
        elif op.kind == "sync_dir":
            for change in self._changes:
                if self._directory(change[0]) == op.file:
                    self._change(self._synced, *change)
            self._changes = [change for change in self._changes if self._directory(change[0]) != op.file]
        else:
            self._change_name(op)

    def _change_name(self, op: Op) -> None:
        inode = self._names[op.file] if op.kind == "rename" else None
        if op.kind in ("create", "mkdir"):
            inode = _Inode(is_directory=op.kind == "mkdir")
            if op.kind == "create":
                self._opened[op.file] = inode
        self._changes.append((op, inode))
        self._change(self._names, op, inode)
        name = op.file if op.kind == "unlink" else op.value
        if name in self.expected.kept:
            contents = (*self.expected.kept[name], self._content(name))
            self.expected = self.expected._replace(kept={**self.expected.kept, name: contents})

    def _content(self, name: str) -> bytes | None:
        return self._names[name].now() if name in self._names else None

    @staticmethod
    def _directory(op: Op) -> str:
        return Path(op.file if op.kind == "unlink" else op.value).parent.as_posix()

    @staticmethod
    def _change(names: dict[str, _Inode], op: Op, inode: _Inode | None) -> None:
        if op.kind in ("rename", "unlink"):
            names.pop(op.file, None)
        if inode is not None:
            names[op.value] = inode

    @staticmethod
    def _reachable(names: dict[str, _Inode]) -> dict[str, _Inode]:
        """Returns the files, without directories and without files in a directory that does not exist."""
        return {
            name: inode
            for name, inode in names.items()
            if not inode.is_directory and {parent.as_posix() for parent in Path(name).parents} - {"."} <= names.keys()
        }

    def killed(self) -> Files:
        """Returns the state if the process is killed now."""
        return {name: inode.now() for name, inode in self._reachable(self._names).items()}

    def after_power_cut(self, fine: bool) -> Iterator[Files]:
        """Yields the possible states if the power fails now."""
        for chosen in itertools.product((True, False), repeat=len(self._changes)):
            left = dict(self._synced)
            for change in itertools.compress(self._changes, chosen):
                self._change(left, *change)
            choices = [
                [(name, data) for data in dict.fromkeys(inode.after_power_cut(ARCHIVE in name, fine, MARK in name))]
                for name, inode in self._reachable(left).items()
            ]
            for choice in itertools.product(*choices):
                yield dict(choice)


def _key(state: State) -> Any:
    files = frozenset((_RANDOM.sub("", name), data) for name, data in state.files.items())
    expected = state.expected
    return files, expected.oracle.data, expected.acknowledged, tuple(expected.kept.items())


class States:
    """Every distinct state that a crash can leave; remembers those that it has yielded."""

    def __init__(self) -> None:
        self._seen: set[Any] = set()

    def __len__(self) -> int:
        return len(self._seen)

    def after(self, recorded: Recorded, since: int = 0, fine: bool = False) -> Iterator[State]:
        """Yields the states after each operation from `since` on, except those that were yielded before.

        With `fine`, writes are torn in more places.
        """
        for state in self._all(recorded, since, fine):
            key = _key(state)
            if key not in self._seen:
                self._seen.add(key)
                yield state

    @staticmethod
    def _all(recorded: Recorded, since: int, fine: bool) -> Iterator[State]:
        disk = _Disk(recorded.files, recorded.expected)
        for index, op in enumerate(recorded.ops):
            disk.do(op)
            if index < since:
                continue
            label = f"operation {index}, {op.kind} {op.file if isinstance(op.file, str) else op.value!r:.40}"
            expected = disk.expected
            yield State(disk.killed(), expected._replace(acknowledged=expected.written), f"{label}, killed")
            for files in disk.after_power_cut(fine):
                yield State(files, expected, label)


def kills(recorded: Recorded) -> Iterator[tuple[State, list[Op]]]:
    """Yields the states if the process is killed after or during each operation, with the operations that led there.

    Unsynced data is not on disk then, although everybody can read it.
    """
    for end in range(1, len(recorded.ops) + 1):
        for ops in _ways_to_end(recorded.ops[:end]):
            disk = _Disk(recorded.files, recorded.expected)
            for op in ops:
                disk.do(op)
            expected = disk.expected
            label = f"a kill in operation {end - 1}, {ops[-1].kind}"
            yield State(disk.killed(), expected._replace(acknowledged=expected.written), label), ops


def _ways_to_end(ops: list[Op]) -> Iterator[list[Op]]:
    last = ops[-1]
    if last.kind not in ("expect", "keep", "open", "sync", "sync_dir"):
        yield ops
    if last.kind == "write" and len(last.value) > 1:
        yield [*ops[:-1], last._replace(value=last.value[: len(last.value) * 2 // 3])]
