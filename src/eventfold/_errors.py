"""Every exception that eventfold defines, with its fields.

Promise: a problem with a log raises an `EventfoldError`, or an `OSError` from the operating system. A wrong argument
raises a `ValueError`, or a `TypeError` if it has the wrong type. Messages say what is wrong, where, and what to do.
"""

from __future__ import annotations

import copy
import os
from typing import TypeVar

import msgspec


class EventfoldError(Exception):
    """The base class of all errors that eventfold defines."""


class AppendConflict(msgspec.Struct, frozen=True):
    """Why a conditional append was refused.

    Attributes:
        expected_offset: The offset of the expected head, in bytes of the whole log. For a condition with a query: the
            offset from which no event was allowed to match.
        actual_offset: The offset of the actual head.
        expected_hash: The line hash of the expected head; "" for a condition with a query.
        actual_hash: The line hash of the actual head; None if the offsets differ, or for a condition with a query.
        offset: The offset of the first event that matches the query; None for a condition without a query.
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
            return f"the event at offset {c.offset} matches, but no event at or after {c.expected_offset} may match"
        if c.actual_hash is None:
            return f"expected the head at offset {c.expected_offset}, but it is at {c.actual_offset}"
        return f"expected line hash {c.expected_hash!r} before offset {c.expected_offset}, but it is {c.actual_hash!r}"


class LogLockedError(EventfoldError):
    """Another writer has the log open.

    Attributes:
        path: The locked file.
        pid: The id of a process that holds the lock; None if the system does not report it.
        reason: What to do, if this differs from the usual advice; otherwise "".
    """

    def __init__(self, path: str | os.PathLike[str], pid: int | None = None, reason: str = "") -> None:
        super().__init__(path, pid, reason)
        self.path = path
        self.pid = pid
        self.reason = reason

    def __str__(self) -> str:
        process = f"this process ({self.pid})" if self.pid == os.getpid() else f"process {self.pid}"
        where = "" if self.pid is None else f" in {process}"
        reason = self.reason or (
            "only one writer may have the log open, unless all open it with LockMode.SHARED; close the other writer, "
            "or open the log with read_only=True to read it"
        )
        return f"{os.fspath(self.path)} is locked by another writer{where}: {reason}"


class LogClosedError(EventfoldError):
    """The log is closed, is being closed, or was closed while the call waited."""


class InvalidEventError(EventfoldError, ValueError):
    """The event can't be written as JSON that reads back as the same event. Nothing was written."""


class WriterFailedError(EventfoldError):
    """A sync failed, or another program changed the file: what is on disk is unknown, and the log must be reopened.

    An append that was waiting may or may not be in the log.
    """


class UnknownOutcomeError(EventfoldError):
    """The connection was lost during a commit: the append may or may not be in the log. The writer continues."""


class CorruptLogError(EventfoldError):
    """The log is damaged: a file, or a document in a database, contains something that does not belong there.

    Attributes:
        path: The damaged file, or the location of the document.
        offset: Where the damage begins, in bytes of the whole log.
        reason: What is wrong there.
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

    Attributes:
        offset: The start of the event's line, in bytes of the whole log.
        type: The event's type.
        field: The part of the data that does not fit, such as `lines[0].amount`; "" for all of the data.
        reason: What is wrong there.
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
    """The reducer of a view raised an exception, which is the `__cause__`.

    Attributes:
        view: The view's name.
        offset: The start of the line of the event that the reducer was called with, in bytes of the whole log.
    """

    def __init__(self, view: str, offset: int) -> None:
        super().__init__(view, offset)
        self.view = view
        self.offset = offset

    def __str__(self) -> str:
        return f"the reducer of view {self.view!r} failed on the event at offset {self.offset}: {self.__cause__!r}"


class UnknownViewError(EventfoldError, KeyError):
    """No view of that name is registered.

    Attributes:
        name: The requested name.
        registered: The names of all registered views.
    """

    def __init__(self, name: str, registered: tuple[str, ...] = ()) -> None:
        super().__init__(name, registered)
        self.name = name
        self.registered = registered

    def __str__(self) -> str:
        if self.name in self.registered:
            return f"this View object is not registered, but a different one with the name {self.name!r} is"
        names = ", ".join(map(repr, self.registered)) or "none"
        return f"no view named {self.name!r} is registered; registered are: {names}"


_E = TypeVar("_E", bound=BaseException)


def copy_error(error: _E) -> _E:
    """A copy of an error: the same object, raised in several tasks, would collect the tracebacks of all of them."""
    copied = copy.copy(error)
    copied.__cause__ = error
    return copied
