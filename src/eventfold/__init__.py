"""Your application state is a fold over an event log: append-only, in a directory of plain files, with derived views.

    async with EventLog.open("data", views=[View("todos", reduce_todos, Todos)]) as log:
        await log.append(Event("todo_added", {"text": "write it down"}))
        await log.refresh_all()
        print(log.view("todos"))

What `append` returned for is on disk. No database, no infrastructure.
"""

from . import snapshot
from ._consumer import Consumer
from ._engine import LockMode, SyncMode
from ._errors import (
    AppendConflict,
    ConditionalAppendError,
    CorruptLogError,
    EventfoldError,
    InvalidEventError,
    LogClosedError,
    LogLockedError,
    ReducerError,
    UnknownOutcomeError,
    UnknownViewError,
    WriterFailedError,
)
from ._event import AppendResult, Event, Head, Record, line_hash
from ._log import EventLog, EventLogBuilder
from ._reader import EventReader, WaitResult
from ._view import ReduceFn, View
from ._writer import EventWriter, ViewOps
from .snapshot import Snapshot

__all__ = [
    "AppendConflict",
    "AppendResult",
    "ConditionalAppendError",
    "Consumer",
    "CorruptLogError",
    "Event",
    "EventLog",
    "EventLogBuilder",
    "EventReader",
    "EventWriter",
    "EventfoldError",
    "Head",
    "InvalidEventError",
    "LockMode",
    "LogClosedError",
    "LogLockedError",
    "Record",
    "ReduceFn",
    "ReducerError",
    "Snapshot",
    "SyncMode",
    "UnknownOutcomeError",
    "UnknownViewError",
    "View",
    "ViewOps",
    "WaitResult",
    "WriterFailedError",
    "line_hash",
    "snapshot",
]
