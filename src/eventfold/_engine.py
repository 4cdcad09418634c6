"""The protocols that an engine implements. An engine stores logs.

An engine provides a `Source` to read a log, a `Committer` to append to it, and `Documents`, which are stored beside the
log by name, and replaced as a whole. Lines are passed on in blocks, never as single events.

For the modules above, an offset is opaque: an integer that only grows, 0 before the first event. The end of one event
is the start of the next. A `Lines` knows the offset of each of its positions.
"""

from __future__ import annotations

import asyncio
import enum
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable
from urllib.parse import SplitResult, urlsplit

import msgspec

from ._aio import uninterrupted
from ._codec.lines import Lines
from ._errors import EventfoldError
from ._event import Head
from ._judge import Append
from ._threads import ThreadCall
from ._waiters import Waiters

DocumentKind: TypeAlias = Literal["view", "consumer"]
L = TypeVar("L", bound="DocumentLock")


class LockMode(enum.Enum):
    """How the writer of a log in files keeps out other writers.

    `FLOCK`: by an exclusive flock on `app.jsonl`, so that there is one writer. `SHARED`: any number of processes on one
    machine may write at the same time, if all of them use `SHARED` and the same `SyncMode`. `NONE`: not at all.
    """

    FLOCK = "flock"
    SHARED = "shared"
    NONE = "none"


class SyncMode(enum.Enum):
    """When an append to a log in files is on disk.

    `ALWAYS`: before it returns. `EVERY_SECOND`: about a second later. `OS`: when the operating system writes it. With
    the last two, a power cut loses events that are not on disk yet, but a killed process loses nothing.
    """

    ALWAYS = "always"
    EVERY_SECOND = "every_second"
    OS = "os"


# The hosts of an address and their ports.
_HOSTS = re.compile(r"((\[[^\]]*\]|[^:,\[\]]*)(:\d*)?(,|$))*")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


def is_name(name: object) -> bool:
    """Whether a view or a consumer may have this name, which becomes part of a file name."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def check_name(kind: str, name: str) -> str:
    """Returns a name that a view or a consumer may have; raises `ValueError` for any other."""
    if not is_name(name):
        raise ValueError(
            f"{kind} name {name!r}: it must be 1 to 128 characters of A-Z a-z 0-9 . _ -, not starting with a dot"
        )
    return name


class Documents(Protocol):
    """The documents beside a log: the snapshots of views, and the committed offsets of consumers."""

    def location(self, kind: DocumentKind, name: str) -> str | Path:
        """The location of a document, for messages."""

    async def load(self, kind: DocumentKind, name: str) -> bytes | None:
        """The content of a document; None if the document does not exist."""

    async def store(self, kind: DocumentKind, name: str, data: bytes) -> None:
        """Replaces a document atomically; its content is durable when this returns."""

    async def delete(self, kind: DocumentKind, name: str) -> None:
        """Removes a document; does nothing if it does not exist."""

    async def names(self, kind: DocumentKind) -> list[str]:
        """The names of all documents of a kind, sorted."""


class DocumentLock(Protocol):
    """A lock that this process holds. It is also released when the process ends."""

    async def was_lost(self) -> bool:
        """Whether another process may hold the lock now, because the connection to the server was lost."""

    def release(self) -> None:
        """Releases the lock. Idempotent and never blocks; any thread may call it."""


class NoLock:
    """A placeholder where nothing can be locked."""

    async def was_lost(self) -> bool:
        return False

    def release(self) -> None:
        """Does nothing."""


async def acquired(acquiring: asyncio.Future[L | None] | ThreadCall[L | None]) -> L | None:
    """Waits for a lock that is being acquired; None if another process holds it.

    If cancelled, it still waits for the lock, and releases it.
    """
    try:
        return await (uninterrupted(acquiring) if isinstance(acquiring, asyncio.Future) else acquiring)
    except asyncio.CancelledError:
        with suppress(Exception):  # the cancellation is raised, whether or not the lock could be acquired
            if (lock := acquiring.result()) is not None:
                lock.release()
        raise
    finally:
        del acquiring  # as in `uninterrupted`


@runtime_checkable
class LockingDocuments(Protocol):
    """Documents that can be locked. The locks apply to all processes that use the log."""

    async def lock(self, kind: DocumentKind, name: str) -> DocumentLock | None:
        """Locks a document, which need not exist; None if another process holds the lock. Raises `OSError`."""


class Source(Protocol):
    """One log, for reading."""

    @property
    def location(self) -> str | Path:
        """The location of the log, for messages: a path, or an address without its password."""

    @property
    def documents(self) -> Documents:
        """The documents beside the log."""

    async def identity(self) -> str:
        """A string that two sources in this process have in common if and only if they read the same log."""

    async def waiters(self) -> Waiters:
        """The waiters for new events of this log in this process: one object for all sources of the log."""

    async def head(self) -> Head:
        """The head of the log. In the process of a writer, the durable head."""

    async def base(self) -> int:
        """The offset up to which the log is archived; 0 if the engine has no archive."""

    def blocks(self, start: Head, end: int) -> AsyncGenerator[Lines, None]:
        """Blocks of whole lines from one offset to another.

        Raises `ValueError` if no line begins at the start, and `CorruptLogError` if the line before the start does not
        have the hash that `start` has (which may be unknown, ""), or at damage, after it has yielded all blocks before
        the damage.
        """

    async def block_before(self, offset: int) -> Lines:
        """A small block of at least one line that ends at an offset, which is above 0 and at most the head.

        Raises `ValueError` if no line ends there, and `CorruptLogError` at damage.
        """

    async def line_hash_before(self, offset: int) -> str:
        """The hash of the line that ends at an offset above 0. Raises `ValueError` if none ends there."""

    async def aclose(self) -> None:
        """Closes connections; idempotent."""


@runtime_checkable
class SourceOfLines(Protocol):
    """A source that can read single lines faster than `blocks` can."""

    async def lines_at(self, offsets: Sequence[int]) -> list[Lines]:
        """For each offset, in any order, the line that begins there, without any other line.

        Raises `ValueError` if no line begins there, and `CorruptLogError` at damage.
        """


class EngineKeys(Protocol):
    """An index that the engine stores: the offsets of the events with each key, the number for a tag or an id."""

    async def extend(self, end: int, progress: Callable[[int], object] | None = None) -> None:
        """Adds the missing keys of events up to an offset. The log may be written at the same time.

        Repeatedly calls `progress` with the offset up to which the index is complete. Raises what reading raises.
        """

    async def find(self, wanted: Sequence[tuple[int, int]], limit: int) -> tuple[int, int, list[list[int]]]:
        """Looks up pairs of a key and a start offset.

        Returns the offset up to which the index is complete, the offset of the head, and for each pair at most `limit`
        offsets from the start on, in order. Raises `OSError`.
        """

    async def drop(self) -> bool:
        """Removes all keys; returns whether there were any. Raises `OSError`."""


@runtime_checkable
class IndexedSource(Protocol):
    """A source whose engine can store the index."""

    @property
    def keys(self) -> EngineKeys:
        """The index."""


class Commit(msgspec.Struct):
    """The result of committing a group of appends.

    `outcomes` has, for each append, the position in `lines.data` at which its lines begin, or the error for which they
    were not written. `lines` are the lines that were written, with their offsets; `head` is the head after them.
    """

    outcomes: list[int | Exception]
    lines: Lines
    head: Head


class Committer(Protocol):
    """One log, open for appending. Only one commit is made at a time."""

    max_commit_size: int
    """The maximum size of the lines of a commit, in bytes. The engine refuses a larger append."""

    @property
    def source(self) -> Source:
        """The same log, for reading."""

    @property
    def head(self) -> Head:
        """The newest durable head that this committer has seen. No I/O."""

    async def commit(self, appends: Sequence[Append]) -> Commit:
        """Judges the appends in order, by the log as it is at this moment, and durably writes those that are accepted.

        Raises `OSError` if nothing was written, `UnknownOutcomeError` if the lines may or may not be in the log, and
        `WriterFailedError` if that is unknown and the committer can't continue. A cancellation is raised only after
        the commit has ended.
        """

    async def aclose(self) -> None:
        """Finishes the current operations and closes the log; idempotent.

        Raises `WriterFailedError` if acknowledged events could not be made durable; the log is closed all the same.
        """

    def abandon(self) -> None:
        """Closes what this process has open, immediately and without an event loop; idempotent.

        It is called in a forked child, where it must not affect the lock and the connections of the parent, and if the
        event loop of the committer has ended.
        """


@runtime_checkable
class IndexingCommitter(Protocol):
    """A committer that can write the keys of events together with the events."""

    def begin_indexing(self) -> None:
        """Makes each later commit write the keys of its events too. The source must be an `IndexedSource`."""


@runtime_checkable
class RemoteCommitter(Protocol):
    """A committer that sends its commits to a server. This process has little to do and can work during a commit."""

    @property
    def is_remote(self) -> Literal[True]:
        """Always true."""


@runtime_checkable
class RotatingCommitter(Protocol):
    """A committer that can move its log into an archive."""

    @property
    def rotation_is_due(self) -> bool:
        """Whether the log has grown beyond the size at which it is rotated automatically. No I/O."""

    async def rotate(self, *, if_due: bool = False) -> None:
        """Moves the whole active log into the archive, while commits continue.

        With `if_due`, does nothing if the rotation is no longer due, or if another process is rotating the log.

        Raises `OSError` (nothing is lost, and the next rotation continues where this one stopped), `CorruptLogError`,
        or `WriterFailedError` if the committer can't continue.
        """


@runtime_checkable
class ClosingCommitter(Protocol):
    """A committer that may wait for a long time: for a stopped process, or for a server that does not answer."""

    def begin_closing(self) -> None:
        """Announces that the log is about to be closed, so that operations no longer wait in vain, but fail soon."""


@runtime_checkable
class Paths(Protocol):
    """The paths of a log in files."""

    dir: Path
    log_path: Path
    archive_path: Path
    views_dir: Path


def paths_of(source: Source) -> Paths:
    """The paths of a log in files. Raises `EventfoldError` for a log that another engine keeps."""
    layout = getattr(source, "layout", None)
    if not isinstance(layout, Paths):
        raise EventfoldError(f"{source.location} is not a directory of files: it has no paths")
    return layout


class HasPaths:
    """The paths of a log, each of which raises `EventfoldError` for a log that is not in files."""

    @property
    def _paths(self) -> Paths:
        raise NotImplementedError

    @property
    def dir(self) -> Path:
        """The data directory. Like all paths, it raises `EventfoldError` for a log that is not in files."""
        return self._paths.dir

    @property
    def log_path(self) -> Path:
        """The active log, `app.jsonl`; it may not exist yet."""
        return self._paths.log_path

    @property
    def archive_path(self) -> Path:
        """The archive, `archive.jsonl.zst`; it may not exist yet."""
        return self._paths.archive_path

    @property
    def views_dir(self) -> Path:
        """The directory of the snapshots; it may not exist yet."""
        return self._paths.views_dir


def refuse_options(options: Mapping[str, Any], engine: str) -> None:
    """For an engine without options for `open_committer`: raises `ValueError` if any are given."""
    if options:
        raise ValueError(f"{', '.join(sorted(options))}: only a log in files has this option, not a log in {engine}")


def check_seconds(name: str, value: object, *, check_range: bool = True) -> None:
    """Raises `ValueError` unless the value of an option is a number of seconds, and with `check_range` more than 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or (check_range and not value > 0):
        raise ValueError(f"{name} must be a number of seconds, more than 0, not {value!r}")


def address_parts(address: str) -> SplitResult:
    """The parts of an address.

    Raises a `ValueError` without any part of the address if a password in it is not percent-encoded. A part of such a
    password would be taken for a port or a name, and messages would show it.
    """
    try:
        parts = urlsplit(address)
        clear = "@" not in parts.path + parts.fragment
    except ValueError:
        clear = False
    if not clear or ("@" not in parts.netloc and not _HOSTS.fullmatch(parts.netloc)):
        raise ValueError(
            "the address can't be read: in a user or a password, the characters / ? # [ ] @ : % must be written as "
            "%2F %3F %23 %5B %5D %40 %3A %25; a port must be a number"
        )
    return parts


def check_flag(name: str, value: object) -> None:
    """Raises `ValueError` unless the value of an option is a boolean."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {value!r}")


@runtime_checkable
class MigratingEngine(Protocol):
    """An engine that stores logs in a schema, which new versions may change and which not every role may change."""

    async def migrate(self, *, role: str | None = None) -> str:
        """Creates or updates the schema, and grants a role the necessary rights; returns the executed statements."""

    async def migration_sql(self, *, role: str | None = None) -> str:
        """The statements that `migrate` would execute."""


@runtime_checkable
class Engine(Protocol):
    """What stores a log. `EventLog.open` and `EventReader` take an engine, or an address from which they create one."""

    def source(self) -> Source:
        """The log, for reading. No I/O."""

    def open_committer(self, *args: Any, **options: Any) -> Awaitable[Committer]:
        """Opens the log for appending. Raises `ValueError` for an option that this engine does not have."""


@runtime_checkable
class CreatingEngine(Protocol):
    """An engine that creates a missing log, even for readers."""

    def existing(self) -> Engine:
        """The same engine, but it raises `EventfoldError` for a log that does not exist."""
