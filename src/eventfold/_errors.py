"""Every exception that eventfold defines, with its fields.

Promise: anything that goes wrong with a log raises an `EventfoldError` or the operating system's own `OSError`; a wrong
argument raises a `ValueError`, or a `TypeError` if it is the wrong kind of object. Messages say what was wrong, where,
and what to do.
"""

from __future__ import annotations

import copy
import os
from typing import TypeVar

import msgspec


class EventfoldError(Exception):
    """The base class of all errors that eventfold defines."""


class AppendConflict(msgspec.Struct, frozen=True):
    """Why a conditional append was refused: what the caller expected, and what the log's head was.

    Offsets are bytes in the whole log. `actual_hash` is None if the offset already differed. For a condition on a
    query, `offset` is that of the first conflicting event, and `expected_offset` the one from which no event was
    allowed to match.
    """

    expected_offset: int
    actual_offset: int
    expected_hash: str
    actual_hash: str | None
    offset: int | None = None


class ConditionalAppendError(EventfoldError):
    """The condition of an append did not hold. Nothing was written; `conflict` says why."""

    def __init__(self, conflict: AppendConflict) -> None:
        super().__init__(conflict)
        self.conflict = conflict

    def __str__(self) -> str:
        c = self.conflict
        if c.offset is not None:
            return f"the event at offset {c.offset} matches, but no event at or after {c.expected_offset} may"
        if c.actual_hash is None:
            return f"expected the head at offset {c.expected_offset}, but it is at {c.actual_offset}"
        return f"expected line hash {c.expected_hash!r} before offset {c.expected_offset}, but it is {c.actual_hash!r}"


class LogLockedError(EventfoldError):
    """Another writer holds the directory.

    `path` is the locked file; `pid` a process that holds the lock, None if the system does not report it; `reason` may
    say more.
    """

    def __init__(self, path: str | os.PathLike[str], pid: int | None = None, reason: str = "") -> None:
        super().__init__(path, pid, reason)
        self.path = path
        self.pid = pid
        self.reason = reason

    def __str__(self) -> str:
        where = "" if self.pid is None else f" in process {self.pid}"
        reason = self.reason or (
            "only one may have the log open for writing, unless all open it with LockMode.SHARED; close the other one, "
            "or open this one with read_only=True to read beside it"
        )
        return f"{os.fspath(self.path)} is locked by another writer{where}: {reason}"


class LogClosedError(EventfoldError):
    """The log was closed or being closed when the call was made."""


class InvalidEventError(EventfoldError, ValueError):
    """The event can't be written as a line that reads back the same. Nothing was written."""


class WriterFailedError(EventfoldError):
    """A sync failed, or the file changed under the writer: what is on disk is unknown, and the log must be reopened.

    An append that was waiting may or may not be in the log.
    """


class UnknownOutcomeError(EventfoldError):
    """The connection was lost during a commit: the append may or may not be in the log. The writer continues."""


class CorruptLogError(EventfoldError):
    """A file of the log contains something that does not belong there.

    `path` is the file, `offset` where the damage begins, in bytes of the whole log, and `reason` what is wrong there.
    """

    def __init__(self, path: str | os.PathLike[str], offset: int, reason: str) -> None:
        super().__init__(path, offset, reason)
        self.path = path
        self.offset = offset
        self.reason = reason

    @property
    def file(self) -> str:
        """The damaged file's path as a string."""
        return os.fspath(self.path)

    def __str__(self) -> str:
        return f"{self.file}, offset {self.offset}: {self.reason}"


class SchemaError(EventfoldError):
    """The data of an event in the log does not fit the class that the catalog has for its type.

    `offset` is the start of the event's line in the whole log, in bytes; `type` the event's type; `field` the part of
    the data that does not fit, such as `lines[0].amount`, "" for the whole of it; `reason` what is wrong there.
    """

    def __init__(self, offset: int, type: str, field: str, reason: str) -> None:
        super().__init__(offset, type, field, reason)
        self.offset = offset
        self.type = type
        self.field = field
        self.reason = reason

    def __str__(self) -> str:
        where = f", field {self.field!r}" if self.field else ""
        return (
            f"the event of type {self.type!r} at offset {self.offset} does not fit its class in the catalog{where}: "
            f"{self.reason}; declare an upcaster for it, or open the log with on_mismatch='skip'"
        )


class ReducerError(EventfoldError):
    """A view's reducer raised; its exception is the `__cause__`.

    `view` is the view's name, `offset` the start of the event's line in the whole log, in bytes.
    """

    def __init__(self, view: str, offset: int) -> None:
        super().__init__(view, offset)
        self.view = view
        self.offset = offset

    def __str__(self) -> str:
        return f"the reducer of view {self.view!r} failed on the event at offset {self.offset}: {self.__cause__!r}"


class UnknownViewError(EventfoldError, KeyError):
    """No view of that name is registered; `name` was asked for, `registered` are the existing names."""

    def __init__(self, name: str, registered: tuple[str, ...] = ()) -> None:
        super().__init__(name, registered)
        self.name = name
        self.registered = registered

    def __str__(self) -> str:
        if self.name in self.registered:
            return f"this View object named {self.name!r} is not registered, but a different one of that name is"
        names = ", ".join(map(repr, self.registered)) or "none"
        return f"no view named {self.name!r} is registered; registered are: {names}"


_E = TypeVar("_E", bound=BaseException)


def copy_error(error: _E) -> _E:
    """A copy of an error, since one that is raised in several tasks would collect all their tracebacks."""
    again = copy.copy(error)
    again.__cause__ = error
    return again
