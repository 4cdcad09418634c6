"""The protocols that an engine implements. An engine stores logs.

An engine provides a `Source` to read a log, a `Committer` to append to it, and `Documents`, which are stored beside the
log by name, and replaced as a whole. Lines are passed on in blocks, never as single events.

For the modules above, an offset is opaque: an integer that only grows, 0 before the first event. The end of one event
is the start of the next. A `Lines` knows the offset of each of its positions.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import msgspec

from ._codec.lines import Lines
from ._documents import Documents
from ._errors import EventfoldError
from ._event import Head
from ._judge import Append
from ._waiters import Waiters


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
    """About how many bytes of lines to put into one commit. A single append may be larger, if the engine accepts it."""

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
        """Announces that the log is about to be closed: operations that wait for something else must fail soon."""


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
