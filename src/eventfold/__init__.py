"""Your application state is a fold over an event log: append-only, in a directory of plain files, with derived views.

    async with EventLog.open("data", views=[View("todos", reduce_todos, Todos)]) as log:
        await log.append(Event("todo_added", {"text": "write it down"}))
        await log.refresh_all()
        print(log.view("todos"))

Once `append` returns, the event is on disk. No database, no infrastructure.
"""

from typing import get_type_hints as _get_type_hints

from . import snapshot
from ._aio import AsyncOpener
from ._build_index import build_index, drop_index
from ._catalog import Catalog
from ._codec.decode import Slice
from ._consumer import Consumer
from ._copy import copy_log
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
    SchemaError,
    UnknownOutcomeError,
    UnknownViewError,
    WriterFailedError,
)
from ._event import AppendResult, Event, Head, Record, line_hash
from ._export import ExportFormat, export_log
from ._info import FilesInfo, LogInfo, PlaceInfo
from ._log import EventLog, EventLogBuilder, Views
from ._query import Query
from ._reader import EventReader, WaitResult
from ._repair import CutEnd, DropSnapshot, Repair, RepairPlan, ResetConsumer, plan_repairs, repair
from ._restore import restore
from ._rotator import ViewOps
from ._signals import end_streams_on_stop
from ._stats import LogStats, ViewStats
from ._verify import Problem, VerifyReport, verify
from ._view import ReduceFn, View
from ._writer import EventWriter
from .snapshot import Snapshot

__all__ = [
    "AppendConflict",
    "AppendResult",
    "AsyncOpener",
    "Catalog",
    "ConditionalAppendError",
    "Consumer",
    "CorruptLogError",
    "CutEnd",
    "DropSnapshot",
    "Event",
    "EventLog",
    "EventLogBuilder",
    "EventReader",
    "EventWriter",
    "EventfoldError",
    "ExportFormat",
    "FilesInfo",
    "Head",
    "InvalidEventError",
    "LockMode",
    "LogClosedError",
    "LogInfo",
    "LogLockedError",
    "LogStats",
    "PlaceInfo",
    "Problem",
    "Query",
    "Record",
    "ReduceFn",
    "ReducerError",
    "Repair",
    "RepairPlan",
    "ResetConsumer",
    "SchemaError",
    "Slice",
    "Snapshot",
    "SyncMode",
    "UnknownOutcomeError",
    "UnknownViewError",
    "VerifyReport",
    "View",
    "ViewOps",
    "ViewStats",
    "Views",
    "WaitResult",
    "WriterFailedError",
    "build_index",
    "copy_log",
    "drop_index",
    "end_streams_on_stop",
    "export_log",
    "line_hash",
    "plan_repairs",
    "repair",
    "restore",
    "snapshot",
    "verify",
]

# The build takes the version from here. Reading it from the installed metadata would take a fifth of the import time.
__version__ = "0.2.0"

# Messages and tracebacks show these names with the module from which they are imported. The annotations of a class are
# strings, which are resolved in the module of the class, so they are resolved before that is changed.
for _name in __all__:
    _public = globals()[_name]
    if getattr(_public, "__module__", "").startswith("eventfold."):
        if isinstance(_public, type) and "__annotations__" in vars(_public):
            _hints = _get_type_hints(_public)
            _public.__annotations__ = {name: _hints[name] for name in _public.__annotations__}
        _public.__module__ = "eventfold"
