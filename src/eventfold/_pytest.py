"""The pytest plugin: the fixture `eventfold_log`. Only pytest imports this module, through its entry point."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from . import EventLog, SyncMode, View


@pytest.fixture
def eventfold_log(tmp_path: Path) -> Callable[..., AbstractAsyncContextManager[EventLog]]:
    """Opens logs below the test's `tmp_path`: `async with eventfold_log(views=[view]) as log:`.

    It takes the options of `EventLog.open` and the `name` of the directory. The same name in the same test opens the
    same log again. `sync` is `SyncMode.OS` by default. pytest keeps the directories of the last runs, so that you can
    inspect the log of a failed test. The fixture works with every plugin for async tests.
    """

    def open_log(
        name: str = "eventfold", *, views: Iterable[View[Any]] = (), **options: Any
    ) -> AbstractAsyncContextManager[EventLog]:
        options.setdefault("sync", SyncMode.OS)
        return EventLog.open(tmp_path / name, views=views, **options)

    return open_log
