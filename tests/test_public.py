"""The public surface: every name with its parameters and defaults, and what newcomers rely on."""

from __future__ import annotations

import importlib.metadata
import inspect
import pickle
import subprocess
import sys
from typing import Any, get_type_hints

import pytest

import eventfold
from eventfold import (
    AppendConflict,
    AppendResult,
    ConditionalAppendError,
    CorruptLogError,
    Event,
    EventfoldError,
    EventLog,
    EventLogBuilder,
    EventReader,
    EventWriter,
    Head,
    InvalidEventError,
    LockMode,
    LogClosedError,
    LogLockedError,
    Record,
    ReducerError,
    Snapshot,
    SyncMode,
    UnknownViewError,
    View,
    WaitResult,
    WriterFailedError,
)

NAMES = [
    "AppendConflict",
    "AppendResult",
    "AsyncOpener",
    "Catalog",
    "ConditionalAppendError",
    "CorruptLogError",
    "Event",
    "EventLog",
    "EventLogBuilder",
    "EventReader",
    "EventWriter",
    "EventfoldError",
    "FilesInfo",
    "Head",
    "InvalidEventError",
    "LockMode",
    "LogClosedError",
    "LogInfo",
    "LogLockedError",
    "PlaceInfo",
    "Problem",
    "Record",
    "ReduceFn",
    "ReducerError",
    "Slice",
    "Snapshot",
    "SyncMode",
    "UnknownViewError",
    "VerifyReport",
    "View",
    "ViewOps",
    "Views",
    "WaitResult",
    "WriterFailedError",
    "end_streams_on_stop",
    "line_hash",
    "snapshot",
    "verify",
]

SIGNATURES: dict[Any, str] = {
    EventWriter.open: "(dir, *, lock=FLOCK, sync=ALWAYS, max_log_size=0, max_event_size=16777216)",
    EventWriter.append: "(self, event)",
    EventWriter.append_many: "(self, events)",
    EventWriter.append_if: "(self, event, expected_offset, expected_hash)",
    EventWriter.rotate: "(self, views=())",
    EventWriter.aclose: "(self)",
    EventWriter.reader: "(self)",
    EventReader.__init__: "(self, dir)",
    EventReader.read_from: "(self, offset=0, *, query=None, until=None)",
    EventReader.read_full: "(self)",
    EventReader.tail: "(self, offset=None, *, query=None)",
    EventReader.wait_for_events: "(self, offset, timeout=None)",
    EventReader.has_new_events: "(self, offset)",
    EventReader.head: "(self)",
    EventReader.active_log_size: "(self)",
    EventReader.read_line_hash_before: "(self, offset)",
    View.__init__: (
        "(self, name, reducer, initial, *, state_type=None, version=0, event_types=None, "
        "query=None, shares_events=False)"
    ),
    View.refresh: "(self, reader)",
    View.rebuild: "(self, reader)",
    EventLog.builder: "(dir)",
    EventLog.append: "(self, event, *, ts=None, id=None, actor=None, meta=None, tags=())",
    EventLog.append_many: "(self, events)",
    EventLog.append_if: "(self, event, expected_offset, expected_hash)",
    EventLog.view: "(self, name)",
    EventLog.refresh_all: "(self)",
    EventLog.rebuild: "(self, name)",
    EventLog.watch: "(self, name)",
    EventLog.read_from: "(self, offset=0, *, query=None, until=None)",
    EventLog.tail: "(self, offset=None, *, query=None)",
    EventLog.wait_for_events: "(self, offset, timeout=None)",
    EventLogBuilder.view: (
        "(self, name, reducer, initial, *, state_type=None, version=0, event_types=None, "
        "query=None, shares_events=False)"
    ),
    EventLogBuilder.max_log_size: "(self, size)",
    EventLogBuilder.lock_mode: "(self, mode)",
    EventLogBuilder.sync_mode: "(self, mode)",
    EventLogBuilder.open: "(self)",
    eventfold.line_hash: "(line)",
    eventfold.snapshot.save: "(path, snapshot)",
    eventfold.snapshot.delete: "(path)",
}


def written(function: Any) -> str:
    """Returns a signature without annotations, with enum members by name."""
    parameters = []
    keyword_only = False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            parameters.append("*")
        default = parameter.default
        value = default.name if isinstance(default, LockMode | SyncMode) else repr(default)
        parameters.append(parameter.name if default is parameter.empty else f"{parameter.name}={value}")
    return f"({', '.join(parameters)})"


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_can_be_imported(name: str) -> None:
    """`__all__` contains it too, for `from eventfold import *` and the documentation."""
    assert hasattr(eventfold, name)
    assert name in eventfold.__all__


def test_all_is_sorted_and_complete() -> None:
    """Each public name is listed once and exists."""
    assert len(eventfold.__all__) == len(set(eventfold.__all__))
    assert all(hasattr(eventfold, name) and not name.startswith("_") for name in eventfold.__all__)


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_the_signatures_are_those_of_the_design(function: Any) -> None:
    """The names, order, kinds and defaults of the parameters are compared."""
    assert written(function) == SIGNATURES[function]


def test_the_log_takes_the_options_of_the_writer_and_its_views() -> None:
    """All options are keyword-only."""
    parameters = inspect.signature(EventLog.open).parameters

    assert next(iter(parameters)) == "dir"
    assert {"views", "max_log_size", "lock", "sync"} <= set(parameters)
    assert all(p.kind is p.KEYWORD_ONLY for name, p in parameters.items() if name != "dir")


@pytest.mark.parametrize("name", [n for n in dir(EventWriter) if not n.startswith("_") and n not in ("attach", "open")])
def test_the_log_has_all_methods_of_the_writer(name: str) -> None:
    """A method with the same name does the same thing."""
    assert hasattr(EventLog, name)


@pytest.mark.parametrize("name", [n for n in dir(EventReader) if not n.startswith("_")])
def test_the_log_has_all_methods_of_the_reader(name: str) -> None:
    """The public methods of the design are there; those that only other modules use are not."""
    of_the_design = {
        *("read_from", "read_full", "tail", "wait_for_events", "has_new_events", "head", "active_log_size"),
        *("read_line_hash_before", "dir", "log_path", "archive_path", "views_dir"),
    }

    assert hasattr(EventLog, name) or name not in of_the_design


@pytest.mark.parametrize(
    "error",
    [
        ConditionalAppendError,
        CorruptLogError,
        InvalidEventError,
        LogClosedError,
        LogLockedError,
        ReducerError,
        UnknownViewError,
        WriterFailedError,
    ],
)
def test_every_error_is_an_eventfold_error(error: type[Exception]) -> None:
    assert issubclass(error, EventfoldError)


def test_two_errors_are_also_builtin_errors() -> None:
    """Code that doesn't know eventfold's errors can catch them as these."""
    assert issubclass(InvalidEventError, ValueError)
    assert issubclass(UnknownViewError, KeyError)


ERRORS = [
    ConditionalAppendError(AppendConflict(1, 2, "a", None)),
    CorruptLogError("/data/app.jsonl", 12, "no event"),
    InvalidEventError("data.x: nan"),
    LogClosedError("closed"),
    LogLockedError("/data/app.jsonl"),
    ReducerError("todos", 12),
    UnknownViewError("todos"),
    WriterFailedError("a sync failed"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_can_be_pickled(error: EventfoldError) -> None:
    """Their fields and messages survive pickling."""
    again = pickle.loads(pickle.dumps(error))

    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_the_errors_have_the_fields_of_the_design() -> None:
    """The fields are those that the design names."""
    conflict, corrupt, _, _, _, reducer, unknown, _ = ERRORS

    assert conflict.conflict.expected_offset == 1  # type: ignore[attr-defined]
    assert (corrupt.offset, corrupt.reason) == (12, "no event")  # type: ignore[attr-defined]
    assert (reducer.view, reducer.offset) == ("todos", 12)  # type: ignore[attr-defined]
    assert "12" in str(reducer)
    assert "'todos'" in str(unknown)


def test_the_values_have_the_fields_of_the_design() -> None:
    """The fields can be given by position and by name."""
    assert AppendResult(1, 2, "h") == AppendResult(start_offset=1, end_offset=2, line_hash="h")
    assert Head(1, "h") == (1, "h")
    assert Head(1, "h")._fields == ("offset", "line_hash")
    assert WaitResult(True, 5) == WaitResult(new_data=True, size=5)
    assert AppendConflict(1, 2, "a", None) == AppendConflict(
        expected_offset=1, actual_offset=2, expected_hash="a", actual_hash=None
    )
    assert Snapshot([1], 2, "h") == Snapshot(state=[1], offset=2, hash="h")
    assert {"event", "start_offset", "end_offset"} <= set(get_type_hints(Record))
    assert isinstance(Record.line_hash, property)


@pytest.mark.parametrize(
    "value",
    [Event("a", ts=1), AppendResult(1, 2, "h"), Head(1, "h"), WaitResult(True, 1), AppendConflict(1, 2, "a", None)],
    ids=lambda value: type(value).__name__,
)
def test_the_values_cannot_be_changed(value: Any) -> None:
    """Events and results describe the past, so they are immutable."""
    for name in getattr(value, "_fields", None) or value.__struct_fields__:
        with pytest.raises(AttributeError):
            setattr(value, name, 0)


def test_the_modes_have_the_names_of_the_design() -> None:
    """The strict modes are the defaults."""
    assert [mode.name for mode in LockMode] == ["FLOCK", "SHARED", "NONE"]
    assert [mode.name for mode in SyncMode] == ["ALWAYS", "EVERY_SECOND", "OS"]


@pytest.mark.parametrize(
    "thing",
    [getattr(eventfold, name) for name in NAMES if name != "ReduceFn"],
    ids=[name for name in NAMES if name != "ReduceFn"],
)
def test_every_public_name_says_what_it_is(thing: Any) -> None:
    """Each one has its own docstring, and so has every public method."""
    methods = [
        member
        for name, member in vars(thing).items()
        if inspect.isclass(thing) and not name.startswith("_") and inspect.isfunction(member)
    ]
    if thing is eventfold.ViewOps:
        methods = []

    assert thing.__doc__
    assert [method.__qualname__ for method in methods if not method.__doc__] == []


def test_importing_eventfold_imports_no_optional_package() -> None:
    """Programs that don't use pydantic or attrs should not load them."""
    optional = ("asyncpg", "nats", "pydantic", "attr", "attrs", "pytest", "cryptography", "pyarrow", "opentelemetry")
    script = f"import eventfold, sys; print([m for m in {optional} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("ReduceFn", "snapshot")])
def test_the_public_names_print_as_they_are_imported(name: str) -> None:
    """Messages and tracebacks say `eventfold.X`, whatever module defines X."""
    assert getattr(eventfold, name).__module__ == "eventfold"


def test_the_snapshot_module_exports_its_own_names_only() -> None:
    """The names that it imports, or that only other modules use, are private."""
    assert sorted(eventfold.snapshot.__all__) == ["Snapshot", "delete", "load", "save"]


def test_the_version_is_that_of_the_installed_package() -> None:
    """The package's metadata takes the version from the module."""
    try:
        installed = importlib.metadata.version("eventfold")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("eventfold is not installed, so nothing says which version it is")

    assert eventfold.__version__ == installed


def test_the_import_loads_no_module_that_is_rarely_needed() -> None:
    """`importlib.metadata` alone would take a fifth of the import time."""
    late = ["importlib.metadata", "aiofiles", "watchfiles", "eventfold._files.shared_committer"]
    script = f"import eventfold, sys; print([m for m in {late} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_a_wait_result_is_true_if_there_are_new_events() -> None:
    """Programs can write `if await log.wait_for_events(offset, timeout):`."""
    assert WaitResult(True, 5)
    assert not WaitResult(False, 5)
