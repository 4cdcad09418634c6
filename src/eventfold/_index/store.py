"""The file of the index: pairs of a key and an offset in an SQLite database. Synchronous; one thread uses it at a time.

A key is the xxh64 of a tag (seed 0) or of an id (seed 1) as a signed number. Two texts may have the same key, so what
is found must be looked at in the log.

Promises: what the file holds is complete up to the place in the log that it names, or opening it fails. That holds
through kills, since SQLite's journal undoes a transaction that was not finished; through power cuts, since a file that
was not sealed is used only until the machine starts anew; and for damage, which sums over all pairs and SQLite's own
check find when it is opened. Nothing is synced but a seal: the file can be made again from the log.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

import xxhash

from .._event import Head

# Of the file's format; one with another version is made anew.
VERSION = 1
# Seconds to wait for another process that writes.
PATIENCE = 5.0

Pair: TypeAlias = tuple[int, int]

_SCHEMA = """
CREATE TABLE pairs (key INTEGER, offset INTEGER, PRIMARY KEY (key, offset)) WITHOUT ROWID;
CREATE TABLE state (
    version INTEGER, offset INTEGER, line_hash TEXT, pairs INTEGER, low INTEGER, high INTEGER, offsets INTEGER,
    sealed INTEGER, machine TEXT
);
"""
# Sums that can't overflow: of the lower and of the upper halves of the keys, and of the offsets in units of 2**20.
_SUMS = "count(*), ifnull(sum(key & 4294967295), 0), ifnull(sum(key >> 32), 0), ifnull(sum(offset & 1048575), 0)"


# Held during a transaction, and for a fork: a child that ends would roll back the transaction of its parent.
_no_fork = threading.RLock()
os.register_at_fork(before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_no_fork.release)


class Found(NamedTuple):
    """The offsets that are stored for a key, in order; `complete` is false if there are more."""

    offsets: list[int]
    complete: bool


class UnusableIndexError(Exception):
    """The file is damaged, or can't be trusted: it must be made again."""


def key_of_tag(tag: str) -> int:
    """The key under which events with a tag are found."""
    return _signed(xxhash.xxh64_intdigest(tag.encode(errors="surrogatepass"), 0))


def key_of_id(id: str) -> int:
    """The key under which events with an id are found."""
    return _signed(xxhash.xxh64_intdigest(id.encode(errors="surrogatepass"), 1))


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


class Store:
    """The open file. Every method may raise `sqlite3.Error`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened = ""
        self._connection: sqlite3.Connection | None = None

    def open(self) -> Head:
        """Opens the file, or makes it. The place that it stands for.

        Raises `UnusableIndexError`, `OSError`; the file is closed then.
        """
        try:
            with _no_fork:
                return self._open()
        except (sqlite3.OperationalError, OSError):
            self.close(seal=False)
            raise
        except (sqlite3.Error, TypeError, ValueError) as error:
            self.close(seal=False)
            raise UnusableIndexError(f"it is damaged: {error}") from error
        except BaseException:
            self.close(seal=False)
            raise

    def _open(self) -> Head:
        if self._path.is_symlink() or (self._path.exists() and not self._path.is_file()):
            raise UnusableIndexError("it is not a regular file")  # SQLite would follow a link, and wait for a pipe
        connection = self._connection = sqlite3.connect(
            self._path, timeout=PATIENCE, isolation_level=None, check_same_thread=False
        )
        self._opened = self._identity()
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("BEGIN IMMEDIATE")
        try:
            if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute("INSERT INTO state VALUES (?, 0, '', 0, 0, 0, 0, 0, ?)", (VERSION, self._identity()))
            place = self._check()
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return place

    def _check(self) -> Head:
        connection = self._connected()
        version, offset, line_hash, *sums, sealed, machine = connection.execute("SELECT * FROM state").fetchone()
        if version != VERSION:
            raise UnusableIndexError(f"it has version {version}, and this is version {VERSION}")
        if not sealed and machine != self._identity():
            raise UnusableIndexError("it was not closed before the machine stopped, or before it was copied")
        [problem] = connection.execute("PRAGMA quick_check(1)").fetchone()
        if problem != "ok":
            raise UnusableIndexError(f"it is damaged: {problem}")
        if list(connection.execute(f"SELECT {_SUMS} FROM pairs").fetchone()) != sums:  # noqa: S608 (a constant)
            raise UnusableIndexError("it is damaged: its pairs are not those that were written")
        return Head(offset, line_hash)

    def _identity(self) -> str:
        """The file on this machine since it was started; a copy has another one."""
        info = os.stat(self._path)
        return f"{_machine()} {info.st_dev} {info.st_ino}"

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            raise sqlite3.OperationalError("the index is closed")
        return self._connection

    def add(self, start: int, end: Head, pairs: Iterable[Pair]) -> None:
        """Adds the pairs of the lines from one offset to the place `end`, unless another process did.

        Where another process added some of them, only the rest is added. Raises `UnusableIndexError` where another
        process has begun the file anew.
        """
        with _no_fork:
            self._add(start, end, pairs)

    def _add(self, start: int, end: Head, pairs: Iterable[Pair]) -> None:
        connection = self._connected()
        if self._identity() != self._opened:
            raise UnusableIndexError("another process has made it again")
        connection.execute("BEGIN IMMEDIATE")
        try:
            offset, sealed = connection.execute("SELECT offset, sealed FROM state").fetchone()
            while sealed:
                # Durable before the file is changed. Another process may seal it at any moment.
                connection.execute("ROLLBACK")
                self._set_sealed(0)
                connection.execute("BEGIN IMMEDIATE")
                offset, sealed = connection.execute("SELECT offset, sealed FROM state").fetchone()
            if offset < start:
                raise UnusableIndexError(f"it ends at offset {offset}, and what is to be added begins at {start}")
            if offset < end.offset:
                new = sorted({pair for pair in pairs if pair[1] >= offset})
                connection.executemany("INSERT INTO pairs VALUES (?, ?)", new)
                connection.execute(
                    "UPDATE state SET offset = ?, line_hash = ?, pairs = pairs + ?, low = low + ?, high = high + ?, "
                    "offsets = offsets + ?",
                    (
                        *end,
                        len(new),
                        sum(key & 0xFFFFFFFF for key, _ in new),
                        sum(key >> 32 for key, _ in new),
                        sum(offset & 0xFFFFF for _, offset in new),
                    ),
                )
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _set_sealed(self, sealed: int) -> None:
        connection = self._connected()
        connection.execute("PRAGMA synchronous = FULL")
        try:
            connection.execute("UPDATE state SET sealed = ?, machine = ?", (sealed, self._identity()))
        finally:
            connection.execute("PRAGMA synchronous = OFF")

    def find(self, wanted: Sequence[tuple[int, int]], most: int) -> list[Found]:
        """For each key and offset, the stored offsets from that one on, at most `most` of them."""
        execute = self._connected().execute
        found = []
        for key, start in wanted:
            rows = execute(
                "SELECT offset FROM pairs WHERE key = ? AND offset >= ? ORDER BY offset LIMIT ?", (key, start, most + 1)
            ).fetchall()
            found.append(Found([offset for [offset] in rows[:most]], len(rows) <= most))
        return found

    def close(self, *, seal: bool = True) -> None:
        """Closes the file; with `seal`, so that it can be trusted after a power cut too. Idempotent."""
        connection = self._connection
        if connection is None:
            return
        try:
            if seal:
                with _no_fork:
                    self._set_sealed(1)
        finally:
            self._connection = None
            connection.close()

    def drop(self) -> None:
        """Closes and removes the file. Raises `OSError`."""
        self.close(seal=False)
        for path in (self._path, self._path.with_name(self._path.name + "-journal")):
            path.unlink(missing_ok=True)


@cache
def _machine() -> str:
    """What changes whenever the machine is started."""
    if sys.platform == "linux":
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return subprocess.run(["/usr/sbin/sysctl", "-n", "kern.boottime"], capture_output=True, text=True).stdout.strip()
