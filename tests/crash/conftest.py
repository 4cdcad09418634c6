"""Fixtures of the crash tests that work on computed states."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.crash.recorder import scratch_directory
from tests.crash.scenarios import small_frames


@pytest.fixture
def fast_disk(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Frames so small that a few events fill several, and syncs that take no time."""
    small_frames(monkeypatch, caplog)


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A directory for many small files, in memory if possible."""
    with scratch_directory(tmp_path) as path:
        yield path
