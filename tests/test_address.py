"""How the name of a log selects the engine that stores it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support import event

from eventfold import EventfoldError, EventLog, EventReader, EventWriter, SyncMode
from eventfold._address import engine_of
from eventfold._files.engine import Files


@pytest.mark.parametrize("name", ["{dir}", "file://{dir}", "file://localhost{dir}", "FILE://{dir}"])
async def test_a_path_and_a_file_address_name_a_directory(data_dir: Path, name: str) -> None:
    """A string without a scheme is a path, even if it has colons or slashes in it."""
    async with EventLog.open(name.format(dir=data_dir)) as log:
        await log.append(event(1))

    assert (data_dir / "app.jsonl").exists()
    assert (await EventReader(data_dir).head()).offset > 0


@pytest.mark.parametrize("address", ["redis://host/0", "http://host", "file://host/data", "file://"])
def test_an_address_without_an_engine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """An unknown address never becomes a directory with that name."""
    monkeypatch.chdir(tmp_path)
    for open_ in (EventReader, EventWriter.open, EventLog.open):
        with pytest.raises(ValueError, match="://"):
            open_(address)

    assert not list(tmp_path.iterdir())


def test_an_empty_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It never becomes the current directory: it is usually a variable that is not set."""
    monkeypatch.chdir(tmp_path)
    for open_ in (EventReader, EventWriter.open, EventLog.open):
        with pytest.raises(ValueError, match="empty"):
            open_("")


@pytest.mark.parametrize(
    ("address", "extra"),
    [("postgresql://me:secret@host/db", "postgres"), ("postgres://host/db", "postgres"), ("nats://host/log", "nats")],
)
def test_an_engine_that_is_not_installed_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, address: str, extra: str
) -> None:
    """The message shows the install command, and never the address's password."""
    for module in ("eventfold.postgres", "eventfold.jetstream"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EventfoldError, match=rf"pip install 'eventfold\[{extra}\]'") as caught:
        engine_of(address)

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("where", [None, 7, b"data", object()])
def test_a_value_that_names_no_log_is_refused(where: Any) -> None:
    """Whatever is neither a path, an address nor an engine raises an error."""
    with pytest.raises(ValueError, match="a directory, an address or an engine"):
        engine_of(where)


async def test_an_engine_keeps_the_options_of_its_constructor(data_dir: Path) -> None:
    """The defaults of `open` don't override the engine's own options, but options that are passed to `open` do."""
    engine = Files(data_dir, sync=SyncMode.OS, max_log_size=10**6)
    async with EventWriter.open(engine) as kept:
        of_the_engine = kept._committer._sync_mode, kept._committer._max_log_size  # type: ignore[attr-defined]
    async with EventWriter.open(engine, sync=SyncMode.EVERY_SECOND) as given:
        overruled = given._committer._sync_mode  # type: ignore[attr-defined]

    assert of_the_engine == (SyncMode.OS, 10**6)
    assert overruled is SyncMode.EVERY_SECOND
