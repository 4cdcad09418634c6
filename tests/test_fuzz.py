"""Random damage: damaged lines and archives are either read as the slow reference implementation does, or refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.damage import KINDS, LINES, PIECES, Archived, Edit, archived, edited
from tests.fuzz.targets import check_archive, check_lines
from tests.generated import examples

Run = Callable[[Coroutine[Any, Any, Any]], Any]

edits = st.lists(
    st.builds(
        Edit,
        st.sampled_from(KINDS),
        st.integers(0, 2**16),
        st.one_of(st.integers(1, 4), st.integers(1, 200)),
        st.sampled_from(PIECES),
    ),
    max_size=4,
)


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs a coroutine in an event loop that all examples share."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lines")


@pytest.fixture(scope="module")
def archive(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Archived:
    return run(archived(tmp_path_factory.mktemp("archive") / "data"))


@examples(600)
@given(st.lists(st.sampled_from(LINES), min_size=1, max_size=7), edits)
def test_damaged_lines_are_read_as_the_reference_reads_them(
    run: Run, place: Path, lines: list[bytes], changes: list[Edit]
) -> None:
    """Reader and reference return the same events, the same head, and the same position of the first damage."""
    run(check_lines(place, edited(b"".join(lines), changes)))


@examples(300)
@given(st.binary(max_size=60) | st.text('{}[]":,\\ \n09.-etruflsnda', max_size=60).map(str.encode))
def test_any_bytes_are_read_as_a_log_or_refused(run: Run, place: Path, data: bytes) -> None:
    """Tested also with bytes that don't resemble lines at all."""
    run(check_lines(place, data + b"\n"))


@examples(400)
@given(edits, st.lists(st.integers(0, 3), max_size=6) | st.none())
def test_a_damaged_archive_gives_its_events_or_is_refused(
    run: Run, archive: Archived, changes: list[Edit], order: list[int] | None
) -> None:
    """Frames are cut, doubled, left out or swapped, or bytes in them change: no other event ever appears."""
    data = archive.data if order is None else archive.spliced(order)

    run(check_archive(archive, edited(data, changes)))
