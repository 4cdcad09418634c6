"""A directory as a source: which files are opened again, and what may be in the place of a document."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tests.support import line, write_log

from eventfold import EventfoldError, EventReader
from eventfold._files import head_cache
from eventfold._files.paths import Layout
from eventfold._files.segments import LogSegments
from eventfold._files.source import FileDocuments
from eventfold._waiters import Scope


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Layout]:
    """A list that gets the layout each time files are opened to find the head."""
    opened: list[Layout] = []

    class Counted(LogSegments):
        def __init__(self, layout: Layout) -> None:
            opened.append(layout)
            super().__init__(layout)

    monkeypatch.setattr(head_cache, "LogSegments", Counted)
    return opened


async def test_files_that_have_not_changed_are_not_opened_for_the_head(
    data_dir: Path, looks: list[Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeated questions about the head cost a look at the files' sizes and times."""
    monkeypatch.setattr(head_cache, "_CLOCK_RESOLUTION", -(10**9))
    write_log(data_dir, line(0))
    readers = EventReader(data_dir), EventReader(data_dir)
    found = [(await readers[n % 2].head()).offset for n in range(10)]
    write_log(data_dir, line(0), line(1))
    then = (await readers[0].head()).offset

    assert found == [len(line(0))] * 10
    assert then == len(line(0) + line(1))
    assert len(looks) == 2


async def test_recently_changed_files_are_opened_again(data_dir: Path, looks: list[Layout]) -> None:
    """A change of the same size within one tick of the clock would leave no trace in them."""
    first = write_log(data_dir, line(0))
    reader = EventReader(data_dir)
    before = await reader.head()
    stat = os.stat(reader.log_path)
    with reader.log_path.open("r+b") as file:
        file.write(line(1))
    os.utime(reader.log_path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = await reader.head()

    assert len(line(1)) == len(first)
    assert after.offset == before.offset
    assert after.line_hash != before.line_hash
    assert len(looks) == 2


LONG = line(7).replace(b'"counted"', b'"' + b"x" * 3000 + b'"')


@pytest.mark.parametrize("known", [b"", line(0), LONG, LONG + line(0), line(0) * 100])
@pytest.mark.parametrize(
    ("added", "complete"),
    [
        (line(1), line(1)),
        (line(1) + LONG, line(1) + LONG),
        (line(1) + line(2)[:10], line(1)),
        (line(1) + line(2, batch="1,2"), line(1)),
        (line(1, batch="1,2") + line(2, batch="2,2"), line(1, batch="1,2") + line(2, batch="2,2")),
        (line(1)[:10], b""),
    ],
)
def test_new_lines_are_found_without_opening_the_files_again(
    data_dir: Path, looks: list[Layout], known: bytes, added: bytes, complete: bytes
) -> None:
    """One read finds the new lines, whatever the lines before them are like; incomplete ones are left out."""
    write_log(data_dir, known)
    cache = head_cache.HeadCache(Layout(data_dir))
    cache.poll()
    before = len(looks)
    write_log(data_dir, known, added)
    change = cache.poll()

    assert change is not None
    assert change.head == head_cache.HeadCache(Layout(data_dir)).head()
    if complete:
        assert change.lines is not None
        assert (change.lines.start_offset, change.lines.data) == (len(known), complete)
        assert len(looks) == before + 1  # the read for the comparison above
    else:
        assert change.head.offset == len(known)


@pytest.mark.parametrize("known", [line(0), LONG])
def test_lines_of_a_log_that_replaced_another_are_not_mistaken_for_new_lines(data_dir: Path, known: bytes) -> None:
    """Somebody has replaced the lines in the same file."""
    write_log(data_dir, known)
    cache = head_cache.HeadCache(Layout(data_dir))
    cache.poll()
    write_log(data_dir, known.replace(b'"n":', b'"m":'), line(1))
    change = cache.poll()

    assert change is not None
    assert change.lines is None


async def test_a_pipe_where_a_document_should_be_is_an_error(data_dir: Path) -> None:
    """Opening it does not wait until somebody writes to it."""
    layout = Layout(data_dir)
    layout.views_dir.mkdir(parents=True)
    os.mkfifo(layout.snapshot_path("planted"))

    with pytest.raises(OSError, match="not a regular file"):
        await FileDocuments(layout).load("view", "planted")


class Elsewhere:
    """A source that has no files."""

    location = "elsewhere://log"


@pytest.mark.parametrize("name", ["dir", "log_path", "archive_path", "views_dir"])
def test_a_log_that_is_not_in_files_has_no_paths(name: str) -> None:
    """The error names the log."""
    source: Any = Elsewhere()
    reader = EventReader._of_source(source, Scope())

    with pytest.raises(EventfoldError, match="elsewhere://log"):
        getattr(reader, name)
