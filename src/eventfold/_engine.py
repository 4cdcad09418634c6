"""The interface between a log and what stores it: the protocols that an engine implements.

An engine provides a `Source` (a log to read), a `Committer` (the same log to append to) and `Documents` (small named
files beside it, each replaced as a whole). They exchange blocks of whole lines, never single events.

To everything above, an offset is opaque: a whole number that only grows, 0 before the first event; the end of one event
is the start of the next. A `Lines` knows which offset belongs to each of its positions.
"""

from __future__ import annotations

import enum
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable
from urllib.parse import SplitResult, urlsplit

import msgspec

from ._codec.lines import Lines
from ._errors import EventfoldError
from ._event import Head
from ._judge import Append
from ._waiters import Waiters

DocumentKind: TypeAlias = Literal["view", "consumer"]


class LockMode(enum.Enum):
    """How the writer of a log in files keeps others out.

    `FLOCK`: by an exclusive flock on `app.jsonl`. `SHARED`: only exclusive writers are kept out, and any number of
    processes on one machine write together, all with the same `SyncMode`. `NONE`: not at all.
    """

    FLOCK = "flock"
    SHARED = "shared"
    NONE = "none"


class SyncMode(enum.Enum):
    """When an append to a log in files is on disk.

    `ALWAYS`: before it returns; `EVERY_SECOND`: a second later; `OS`: when the system writes it. With the last two, a
    power cut loses what was not synced yet; a killed process loses nothing.
    """

    ALWAYS = "always"
    EVERY_SECOND = "every_second"
    OS = "os"


# The hosts of an address, with their ports.
_HOSTS = re.compile(r"((\[[^\]]*\]|[^:,\[\]]*)(:\d*)?(,|$))*")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


def is_name(name: object) -> bool:
    """Whether a view or a consumer may have this name. In files, it is part of a file name."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def check_name(kind: str, name: str) -> str:
    """Returns the name if a view or a consumer may have it; otherwise raises `ValueError`."""
    if not is_name(name):
        raise ValueError(
            f"{kind} name {name!r}: it must be 1 to 128 characters of A-Z a-z 0-9 . _ -, not starting with a dot"
        )
    return name


class Documents(Protocol):
    """The documents beside a log: the views' snapshots, and the consumers' committed offsets."""

    def location(self, kind: DocumentKind, name: str) -> str | Path:
        """Where a document is, for messages."""

    async def load(self, kind: DocumentKind, name: str) -> bytes | None:
        """The document's content; None if there is none."""

    async def store(self, kind: DocumentKind, name: str, data: bytes) -> None:
        """Replaces the document atomically; it is durable when this returns."""

    async def delete(self, kind: DocumentKind, name: str) -> None:
        """Removes the document; does nothing if there is none."""

    async def names(self, kind: DocumentKind) -> list[str]:
        """The names of all documents of a kind, sorted."""


class DocumentLock(Protocol):
    """A held lock. It also ends with the process."""

    async def was_lost(self) -> bool:
        """Whether somebody else may have it now: this process could not be reached, or its connection was cut."""

    def release(self) -> None:
        """Releases the lock; idempotent, and never blocks. Any thread may call it."""


class NoLock:
    """What stands for a lock where there is none."""

    async def was_lost(self) -> bool:
        return False

    def release(self) -> None:
        """Nothing is held."""


@runtime_checkable
class LockingDocuments(Protocol):
    """Documents that can be locked, against all processes that use the log."""

    async def lock(self, kind: DocumentKind, name: str) -> DocumentLock | None:
        """Locks a document, whether or not it exists; None if somebody else has the lock. Raises `OSError`."""


class Source(Protocol):
    """One log, for reading."""

    @property
    def location(self) -> str | Path:
        """Where the log is, for messages: a path, or an address without its password."""

    @property
    def documents(self) -> Documents:
        """The documents beside the log."""

    async def identity(self) -> str:
        """A string that is equal for two sources if and only if they are of the same log in this process."""

    async def waiters(self) -> Waiters:
        """The waiters for news of this log in this process: one object for all sources of the log."""

    async def head(self) -> Head:
        """The offset after the last event, and the hash of its line. In a writer's process, the durable head."""

    async def base(self) -> int:
        """The offset up to which the log is archived; 0 if the engine has no archive."""

    def blocks(self, start: Head, end: int) -> AsyncGenerator[Lines, None]:
        """Blocks of whole lines from one offset to another.

        Raises `ValueError` if no line begins at the start, and `CorruptLogError` at damage, after all blocks before it,
        or if the line before the start does not have the start's hash, unless that is "" (unknown).
        """

    async def block_before(self, offset: int) -> Lines:
        """A block of at least one whole line, not a large one, that ends at an offset (above 0, at most the head).

        Raises `ValueError` if no line ends there, and `CorruptLogError` at damage.
        """

    async def line_hash_before(self, offset: int) -> str:
        """The hash of the line that ends at an offset above 0. Raises `ValueError` if none ends there."""

    async def aclose(self) -> None:
        """Closes connections; idempotent."""


@runtime_checkable
class SourceOfLines(Protocol):
    """A source that can read single lines anywhere faster than by reading blocks that begin with them."""

    async def lines_at(self, offsets: Sequence[int]) -> list[Lines]:
        """For each offset, in any order, just the line that begins there.

        Raises `ValueError` if no line begins there, and `CorruptLogError` at damage.
        """


class EngineKeys(Protocol):
    """The offsets of the events with each key (a number for a tag or an id), as the log's engine keeps them itself."""

    async def extend(self, end: int, progress: Callable[[int], object] | None = None) -> None:
        """Adds what is missing up to an offset, beside whoever writes. Raises what reading raises.

        Calls `progress` with the offset up to which nothing is missing, again and again.
        """

    async def find(self, wanted: Sequence[tuple[int, int]], limit: int) -> tuple[int, int, list[list[int]]]:
        """For each key and offset, the offsets from that one on, in order, at most `limit` of them.

        They are complete up to the offset that is returned first; the second one is that of the head. Raises `OSError`.
        """

    async def drop(self) -> bool:
        """Forgets all keys; whether there were any. Raises `OSError`."""


@runtime_checkable
class IndexedSource(Protocol):
    """A source whose engine can keep the index itself."""

    @property
    def keys(self) -> EngineKeys:
        """The index."""


class Commit(msgspec.Struct):
    """The outcomes of appends that were committed together.

    `outcomes` has, for each append, the position in `lines.data` at which its lines begin, or why they were not
    written. `lines` are the lines that were written, with their offsets; `head` is the head after them.
    """

    outcomes: Sequence[int | Exception]
    lines: Lines
    head: Head


class Committer(Protocol):
    """One log, open for appending. There is only one commit at a time."""

    batch_size: int
    """The maximum size of a commit's lines in bytes; the engine refuses a larger append."""

    @property
    def source(self) -> Source:
        """The same log, for reading."""

    @property
    def head(self) -> Head:
        """The last durable head that this committer has seen. No I/O."""

    async def commit(self, appends: Sequence[Append]) -> Commit:
        """Checks the appends' conditions in order against the true head, and writes those that hold, durably.

        Raises `OSError` if nothing was written and the committer can continue, `UnknownOutcomeError` if the lines may
        or may not be in the log and the committer can continue, `WriterFailedError` if it can't. A cancellation is
        raised only once the commit has ended.
        """

    async def aclose(self) -> None:
        """Finishes what is under way and closes the log; idempotent.

        Raises `WriterFailedError` if what was acknowledged could not be made durable; the log is closed anyway.
        """

    def abandon(self) -> None:
        """Closes everything that this process has open at once, without an event loop and without waiting; idempotent.

        For a forked child, which must leave the parent's lock and connections as they are, and for a committer whose
        event loop has ended.
        """


@runtime_checkable
class IndexingCommitter(Protocol):
    """A committer that can write the keys of events together with them."""

    def begin_indexing(self) -> None:
        """From now on, each commit has the keys of its events too. The source is an `IndexedSource`."""


@runtime_checkable
class RemoteCommitter(Protocol):
    """A committer whose commits another process makes, with little to do here: they overlap with other work."""

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
        """Moves the whole log into the archive, while commits continue.

        With `if_due`, does nothing if that is no longer due, or if another process is doing it.

        Raises `OSError`, with nothing lost: the next rotation continues where this one stopped; `CorruptLogError`;
        `WriterFailedError` if the committer can't continue.
        """


@runtime_checkable
class ClosingCommitter(Protocol):
    """A committer that may have to wait long: for another process that is stopped, or for a server that is away."""

    def begin_closing(self) -> None:
        """The log is about to be closed. What waits for others is to fail soon, but for appends that would not."""


@runtime_checkable
class Paths(Protocol):
    """Where a log in files is."""

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
        """The data directory. Raises `EventfoldError` for a log that is not in files, as all paths do."""
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
        """Where the snapshots are; it may not exist yet."""
        return self._paths.views_dir


def refuse_options(options: Mapping[str, Any], engine: str) -> None:
    """Raises `ValueError` if there are any options, for an engine that has none for `open_committer`."""
    if options:
        raise ValueError(f"{', '.join(sorted(options))}: only a log in files has this option, not one in {engine}")


def check_seconds(name: str, value: object) -> None:
    """Raises `ValueError` unless the value of an option is a number of seconds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{name} must be a number of seconds, more than 0, not {value!r}")


def address_parts(address: str) -> SplitResult:
    """The parts of an address.

    Raises `ValueError`, which shows nothing of the address, if it has a password that is not percent-encoded: parts of
    that would be taken for a port or a name, and shown in messages.
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
    """An engine that keeps logs in a form which a new version may change, and which not every role may change."""

    async def migrate(self, *, role: str | None = None) -> str:
        """Makes or changes it, and grants a role what it needs; the statements that were run."""

    async def migration_sql(self, *, role: str | None = None) -> str:
        """The statements that `migrate` would run."""


@runtime_checkable
class Engine(Protocol):
    """What stores a log. `EventLog.open` and `EventReader` take one, or an address that names one."""

    def source(self) -> Source:
        """The log, for reading. No I/O."""

    def open_committer(self, *args: Any, **options: Any) -> Awaitable[Committer]:
        """Opens the log for appending. Raises `ValueError` for an option that this engine does not have."""


@runtime_checkable
class MakesLogs(Protocol):
    """An engine that creates a missing log, even for readers."""

    def existing(self) -> Engine:
        """The same without that: to it, a log that is not there is an `EventfoldError`."""
