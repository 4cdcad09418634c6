"""The file of the index: pairs of a key and an offset in an SQLite database. Synchronous; one thread uses it at a time.

A key is the xxh64 of a tag (seed 0) or of an id (seed 1) as a signed number. Two tags or ids may have the same key, so
each event that is found must be checked in the log.

Promises: the file is complete up to the offset that it states, or opening it fails. A closed file has a checksum of all
its bytes, which takes little time to check. A file without a valid checksum, such as one that a killed process left, is
used only if SQLite's own check succeeds and the sums over all pairs are right, and only on the machine that wrote it,
until its next restart: SQLite's journal undoes an unfinished transaction, but nothing is synced to disk before the file
is closed.
"""

from __future__ import annotations

import os
import sqlite3
import struct
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

import xxhash

from .._event import Head

# The version of the file's format; a file of a different version is rebuilt.
VERSION = 2
# Seconds to wait for another process that writes.
BUSY_TIMEOUT = 5.0

# The offsets of each key. A single offset is not in a list, which would take twice the memory.
OffsetsByKey: TypeAlias = Mapping[int, int | list[int]]

_SCHEMA = """
CREATE TABLE pairs (key INTEGER, offset INTEGER, PRIMARY KEY (key, offset)) WITHOUT ROWID;
CREATE TABLE state (
    version INTEGER, offset INTEGER, line_hash TEXT, pairs INTEGER, low INTEGER, high INTEGER, offsets INTEGER,
    machine TEXT
);
"""
# A prime below 2**32: if a single bit of an offset changes, the remainder changes too.
_MODULUS = 4_294_967_291
# Sums of the lower halves of the keys, of the upper halves, and of the remainders of the offsets. They can't overflow.
_SUMS = f"count(*), ifnull(sum(key & 4294967295), 0), ifnull(sum(key >> 32), 0), ifnull(sum(offset % {_MODULUS}), 0)"

# The parts of SQLite's header that the checksum leaves out: the counter of changes, the two numbers for applications,
# which hold the checksum, and the version of the library that wrote the file last.
_NOT_IN_CHECKSUM = ((24, 28), (60, 64), (68, 72), (92, 100))
_BLOCK_SIZE = 2**20

# The number of keys that one statement looks up. It returns those that exist in the file, which are usually none.
_KEYS_AT_ONCE = 64
_WHICH_EXIST = f"""
WITH wanted (wanted_key, start) AS (VALUES {", ".join(["(?, ?)"] * _KEYS_AT_ONCE)})
SELECT wanted_key, start FROM wanted WHERE EXISTS (SELECT 1 FROM pairs WHERE key = wanted_key AND offset >= start)
"""  # noqa: S608 (a constant)

# Held during a transaction and during a fork. Otherwise, a child that ends would roll back its parent's transaction.
_fork_lock = threading.RLock()
# Only one connection of this process at a time uses a file: calculating the checksum closes a descriptor of the file,
# which releases all locks that SQLite holds on it in this process.
_file_locks: defaultdict[Path, threading.RLock] = defaultdict(threading.RLock)
os.register_at_fork(before=_fork_lock.acquire, after_in_parent=_fork_lock.release, after_in_child=_fork_lock.release)
os.register_at_fork(after_in_child=_file_locks.clear)


class StoredOffsets(NamedTuple):
    """The offsets of a key, in order; `complete` is false if there are more than these."""

    offsets: list[int]
    complete: bool


class UnusableIndexError(Exception):
    """The file is damaged or outdated and must be rebuilt."""


class Store:
    """The open file. Every method may raise `sqlite3.Error`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._identity_when_opened = ""
        # Whether the checksum in the file is right.
        self._has_checksum = False
        # The offset up to which the file is complete, or a smaller one: other processes add pairs too.
        self._end = 0

    @property
    def _lock(self) -> threading.RLock:
        return _file_locks[self._path.absolute()]

    def open(self) -> Head:
        """Opens or creates the file; returns the head up to which it is complete.

        Raises `UnusableIndexError` or `OSError`, after it has closed the file.
        """
        try:
            with self._lock:
                return self._open()
        except (sqlite3.OperationalError, OSError):
            self.abandon()
            raise
        except (sqlite3.Error, TypeError, ValueError) as error:
            self.abandon()
            raise UnusableIndexError(f"it is damaged: {error}") from error
        except BaseException:
            self.abandon()
            raise

    def _open(self) -> Head:
        if self._path.is_symlink() or (self._path.exists() and not self._path.is_file()):
            raise UnusableIndexError("it is not a regular file")  # SQLite would follow a link, and hang on a pipe
        connection = self._connection = sqlite3.connect(
            self._path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
        )
        # A text that is not UTF-8 is damage, but would raise the same error as a file that can't be used at the moment.
        connection.text_factory = lambda text: text.decode(errors="replace")
        self._identity_when_opened = self._identity()
        connection.execute("PRAGMA synchronous = OFF")
        if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            with self._transaction("BEGIN IMMEDIATE"):
                self._create()
        with self._descriptor() as descriptor, self._transaction("BEGIN"):
            return self._check(descriptor)

    def _create(self) -> None:
        connection = self._connected()
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return  # another process was faster
        for statement in _SCHEMA.split(";"):
            connection.execute(statement)
        connection.execute("INSERT INTO state VALUES (?, 0, '', 0, 0, 0, 0, ?)", (VERSION, self._identity()))

    def _check(self, descriptor: int) -> Head:
        connection = self._connected()
        # Reading also undoes the unfinished transaction of a killed process, before the bytes are checked.
        version, offset, line_hash, *sums, machine = connection.execute("SELECT * FROM state").fetchone()
        if version != VERSION:
            raise UnusableIndexError(f"it has version {version}, but this program needs version {VERSION}")
        self._end = offset
        self._has_checksum = _checksum_in(descriptor) == _checksum_of(descriptor)
        if self._has_checksum:
            return Head(offset, line_hash)
        if machine != self._identity():
            raise UnusableIndexError("it was not closed before the machine stopped, or before it was copied")
        [problem] = connection.execute("PRAGMA quick_check(1)").fetchone()
        if problem != "ok":
            raise UnusableIndexError(f"it is damaged: {problem}")
        if list(connection.execute(f"SELECT {_SUMS} FROM pairs").fetchone()) != sums:  # noqa: S608 (a constant)
            raise UnusableIndexError("it is damaged: its pairs are not those that were written")
        return Head(offset, line_hash)

    def _identity(self) -> str:
        """Identifies this file on this machine until the machine is restarted; a copy has a different identity."""
        info = os.stat(self._path)
        return f"{_machine()} {info.st_dev} {info.st_ino}"

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            raise sqlite3.OperationalError("the index is closed")
        return self._connection

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        connection = self._connected()
        with _fork_lock:
            connection.execute(begin)
            try:
                yield
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _descriptor(self) -> Iterator[int]:
        """Yields a descriptor to read the bytes. It must be closed after the transaction, since that releases locks."""
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def add(self, start: int, end: Head, pairs: OffsetsByKey) -> None:
        """Adds the pairs of the lines from an offset to a head, except for those that another process has added.

        Raises `UnusableIndexError` if another process has rebuilt the file.
        """
        with self._lock:
            if self._identity() != self._identity_when_opened:
                raise UnusableIndexError("another process has rebuilt it")
            with self._transaction("BEGIN IMMEDIATE"):
                self._add(start, end, pairs)
            self._end = end.offset

    def _add(self, start: int, end: Head, pairs: OffsetsByKey) -> None:
        connection = self._connected()
        [offset] = connection.execute("SELECT offset FROM state").fetchone()
        if offset < start:
            raise UnusableIndexError(f"it ends at offset {offset}, but the lines to add begin at {start}")
        if offset >= end.offset:
            return
        self._has_checksum = False
        count = low = high = offsets = 0

        def new() -> Iterator[tuple[int, int]]:
            """Yields the new pairs in the order of the keys, which is the fastest to insert, and adds up the sums."""
            nonlocal count, low, high, offsets
            for key in sorted(pairs):
                found = pairs[key]
                for new_offset in (found,) if isinstance(found, int) else sorted(set(found)):
                    if new_offset >= offset:
                        count += 1
                        low += key & 0xFFFFFFFF
                        high += key >> 32
                        offsets += new_offset % _MODULUS
                        yield key, new_offset

        connection.executemany("INSERT INTO pairs VALUES (?, ?)", new())
        connection.execute(
            "UPDATE state SET offset = ?, line_hash = ?, pairs = pairs + ?, low = low + ?, high = high + ?, "
            "offsets = offsets + ?, machine = ?",
            (*end, count, low, high, offsets, self._identity()),
        )

    def find(self, wanted: Collection[tuple[int, int]], limit: int) -> dict[tuple[int, int], StoredOffsets]:
        """Returns, for each pair of a key and a start offset, up to `limit` stored offsets from the start on."""
        execute = self._connected().execute
        found = {}
        with self._lock:
            for pair in self._existing(wanted) if len(wanted) > 1 else wanted:
                rows = execute(
                    "SELECT offset FROM pairs WHERE key = ? AND offset >= ? ORDER BY offset LIMIT ?", (*pair, limit + 1)
                ).fetchall()
                if rows:
                    found[pair] = StoredOffsets([offset for [offset] in rows[:limit]], len(rows) <= limit)
            if not execute("SELECT 1 FROM state WHERE offset >= ?", (self._end,)).fetchone():
                # For example, a program has emptied the file, and another process has created the tables in it again.
                raise sqlite3.DatabaseError(f"it is no longer complete up to offset {self._end}")
        return found

    def _existing(self, wanted: Collection[tuple[int, int]]) -> list[tuple[int, int]]:
        """Returns the wanted pairs for which at least one offset is stored."""
        execute = self._connected().execute
        numbers = [number for pair in wanted for number in pair]
        found = []
        size = 2 * _KEYS_AT_ONCE
        for start in range(0, len(numbers), size):
            some = numbers[start : start + size]
            # The last pair is repeated, so that the statement is always the same and SQLite compiles it only once.
            found += execute(_WHICH_EXIST, some + some[-2:] * ((size - len(some)) // 2)).fetchall()
        return list(dict.fromkeys(found))

    def close(self) -> None:
        """Closes the file. If it has changed, it is synced and gets its checksum first. Idempotent."""
        if self._connection is None:
            return
        try:
            if not self._has_checksum:
                with self._lock:
                    self._write_checksum()
        finally:
            self.abandon()

    def _write_checksum(self) -> None:
        connection = self._connected()
        connection.execute("PRAGMA synchronous = FULL")
        with self._descriptor() as descriptor, self._transaction("BEGIN IMMEDIATE"):
            # A file with a checksum is not checked any further, so a file that has lost pairs must not get one.
            [[written]], [[there]] = (
                connection.execute("SELECT pairs FROM state"),
                connection.execute("SELECT count(*) FROM pairs"),
            )
            if there != written:
                raise sqlite3.DatabaseError(f"it has {there} pairs, but {written} were written")
            first, second = struct.unpack(">ii", _checksum_of(descriptor))
            connection.execute(f"PRAGMA user_version = {first}")
            connection.execute(f"PRAGMA application_id = {second}")

    def abandon(self) -> None:
        """Closes the file without a checksum. Idempotent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with self._lock:
                connection.close()

    def drop(self) -> None:
        """Closes and removes the file. Raises `OSError`."""
        self.abandon()
        for path in (self._path, self._path.with_name(self._path.name + "-journal")):
            path.unlink(missing_ok=True)


def _checksum_in(descriptor: int) -> bytes:
    """The checksum that is stored in a file."""
    return os.pread(descriptor, 4, 60) + os.pread(descriptor, 4, 68)


def _checksum_of(descriptor: int) -> bytes:
    """The checksum of a file's bytes, except for the parts of the header that it leaves out."""
    block = bytearray(os.pread(descriptor, _BLOCK_SIZE, 0))
    position = len(block)
    for start, end in _NOT_IN_CHECKSUM:
        block[start:end] = bytes(end - start)
    hasher = xxhash.xxh3_64()
    while block:
        hasher.update(block)
        block = bytearray(os.pread(descriptor, _BLOCK_SIZE, position))
        position += len(block)
    return hasher.digest()


@cache
def _machine() -> str:
    """A value that is different after each start of the machine."""
    if sys.platform == "linux":
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return subprocess.run(["/usr/sbin/sysctl", "-n", "kern.boottime"], capture_output=True, text=True).stdout.strip()
