"""Your application state is a fold over an event log: append-only, in a directory of plain files, with derived views.

    async with EventLog.open("data", views=[View("todos", reduce_todos, Todos)]) as log:
        await log.append(Event("todo_added", {"text": "write it down"}))
        await log.refresh_all()
        print(log.view("todos"))

Once `append` returns, the event is on disk. No database, no infrastructure.
"""

from importlib.metadata import PackageNotFoundError as _NotInstalled
from importlib.metadata import version as _version

from . import snapshot
from ._aio import AsyncOpener
from ._codec.decode import Slice
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
from ._log import EventLog, EventLogBuilder, Views
from ._query import Query
from ._reader import EventReader, WaitResult
from ._view import ReduceFn, View
from ._writer import EventWriter, ViewOps
from .snapshot import Snapshot

__all__ = [
    "AppendConflict",
    "AppendResult",
    "AsyncOpener",
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
    "Query",
    "Record",
    "ReduceFn",
    "ReducerError",
    "Slice",
    "Snapshot",
    "SyncMode",
    "UnknownOutcomeError",
    "UnknownViewError",
    "View",
    "ViewOps",
    "Views",
    "WaitResult",
    "WriterFailedError",
    "line_hash",
    "snapshot",
]

try:
    __version__ = _version("eventfold")
except _NotInstalled:  # run from a checkout
    __version__ = "0"

# People meet these names in messages and in tracebacks: they print as what can be imported.
for _name in __all__:
    if getattr(globals()[_name], "__module__", "").startswith("eventfold._"):
        globals()[_name].__module__ = "eventfold"
Snapshot.__module__ = "eventfold"
