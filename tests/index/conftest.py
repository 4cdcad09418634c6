"""Fixtures of the tests of the index."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.index.events import WRITE_BATCH_SIZE

from eventfold._index import file_index


@pytest.fixture(autouse=True)
def _small_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a log of some thousand events need several transactions to be written to the file."""
    monkeypatch.setattr(file_index, "WRITE_BATCH_SIZE", WRITE_BATCH_SIZE)


@pytest.fixture
def index_path(data_dir: Path) -> Path:
    return data_dir / "index.sqlite"
