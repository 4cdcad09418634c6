"""Where an offset is stored: the archive and the active log as they fit together at one moment, without locks."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import support
from tests.crash.oracle import Opened, append
from tests.support import line

from eventfold import CorruptLogError, EventReader, EventWriter, Head, line_hash
from eventfold._files import frames, line_scan, segments
from eventfold._files import rotation as rotations
from eventfold._files.line_scan import complete_size, line_before
from eventfold._files.paths import Layout
from eventfold._files.segments import LogSegments


def lines(start: int, end: int) -> bytes:
    """Returns the lines of these events."""
    return b"".join(map(line, range(start, end)))


@pytest.fixture(autouse=True)
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes frames, blocks and steps backwards so small that a few lines need several."""
    support.small_frames(monkeypatch, 200)
    monkeypatch.setattr(segments, "BLOCK_SIZE", 120)
    monkeypatch.setattr(line_scan, "_STEP_BACK", 16)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """A log opened for writing, without an event loop."""
    with Opened(tmp_path / "data") as log:
        yield log


def test_a_missing_directory_is_an_empty_log(tmp_path: Path) -> None:
    """There is nothing to read, and no file is created."""
    with LogSegments(Layout(tmp_path / "data")) as parts:
        head, base, found = parts.head(), parts.base, list(parts.lines(0, 0))

    assert (head, base, found) == (Head(0, ""), 0, [])
    assert not (tmp_path / "data").exists()


def test_every_range_of_lines_is_found_wherever_it_is(opened: Opened) -> None:
    """The spans go from each line to each later one: in the archive, in the active log, or across both."""
    append(opened.active, lines(0, 7))
    opened.rotate()
    append(opened.active, lines(7, 12))
    whole = lines(0, 12)
    ends = [0, *itertools.accumulate(len(line(n)) for n in range(12))]
    with LogSegments(opened.layout) as parts:
        for start, end in itertools.combinations(ends, 2):
            found = list(parts.lines(start, end))

            assert b"".join(piece.data for piece in found) == whole[start:end]
            assert [piece.start_offset for piece in found] == [
                start + sum(len(piece.data) for piece in found[:i]) for i in range(len(found))
            ]


def test_the_line_before_any_offset_is_found_wherever_it_is(opened: Opened) -> None:
    """The line may be in the archive, at the border, or in the active log; an offset inside a line has none."""
    append(opened.active, lines(0, 7))
    opened.rotate()
    append(opened.active, lines(7, 12))
    whole = lines(0, 12)
    with LogSegments(opened.layout) as parts:
        for offset in range(1, len(whole) + 1):
            if whole[offset - 1 : offset] == b"\n":
                assert parts.line_before(offset) == whole[:offset].splitlines()[-1]
            else:
                with pytest.raises(ValueError, match="not where a line begins"):
                    parts.line_before(offset)


def test_the_head_of_a_log_that_was_just_rotated_is_the_archives_end(opened: Opened) -> None:
    """The head's hash is that of the last archived line."""
    append(opened.active, lines(0, 7))
    opened.rotate()
    with LogSegments(opened.layout) as parts:
        head = parts.head()

    assert head == Head(len(lines(0, 7)), line_hash(line(6)))


def test_opened_files_stay_valid_while_the_log_is_rotated(opened: Opened) -> None:
    """A read that began before a rotation continues in the old files, and nothing is missing or comes twice."""
    append(opened.active, lines(0, 9))
    with LogSegments(opened.layout) as parts:
        head = parts.head()
        reading = parts.lines(0, head.offset)
        first = next(reading)
        for n in range(9, 12):
            append(opened.active, line(n))
            opened.rotate()
        rest = [piece.data for piece in reading]

    assert first.data + b"".join(rest) == lines(0, 9)


LOOKS = 5  # the looks at the active log, the archive, its size, the rotation under way, and the name of the active log
STEPS = 6


class Rotating:
    """A log that is rotated step by step."""

    def __init__(self, opened: Opened, rotated_before: bool) -> None:
        self.opened = opened
        self.whole = b""
        self._n = 0
        self.add(3)
        if rotated_before:
            opened.rotate()
            self.add(6)
        self._steps = self._rotate()
        self._done = 0
        self._going_on = False

    def add(self, count: int) -> None:
        """Adds `count` lines."""
        new = lines(self._n, self._n + count)
        append(self.opened.active, new)
        self.whole += new
        self._n += count

    def go_on(self, done: int) -> None:
        """Continues until that many steps are done."""
        if not self._going_on:
            self._going_on = True
            while self._done < done and self._done < STEPS:
                next(self._steps, None)
                self._done += 1
            self._going_on = False

    def _rotate(self) -> Iterator[None]:
        layout, active = self.opened.layout, self.opened.active
        rotation = rotations.begin(layout, active)
        yield
        self.add(1)
        if layout.archive_path.exists():
            # what `Rotation.archive` does, with a pause after each frame
            fd = os.open(layout.archive_path, os.O_RDWR)
            position, offset = os.fstat(fd).st_size, active.base
            for chunk in rotation._chunks(active.fd, 0):
                position, offset = frames.write_frames(fd, position, offset, [chunk]), offset + len(chunk)
                yield
            os.close(fd)
        else:
            rotation.archive(active)
            yield
        self.opened._old.append(rotation.switch(active))
        yield
        self.add(2)
        yield


@pytest.mark.parametrize("rotated_before", [False, True])
def test_a_rotation_at_any_moment_does_not_mislead_a_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rotated_before: bool
) -> None:
    """The steps of a rotation happen at every point between a reader's looks at the files, in every combination."""
    fstat, stat, open_, next_file = os.fstat, os.stat, segments._open_if_there, Layout.next_file
    heads = set()
    for number, before in enumerate(itertools.combinations_with_replacement(range(STEPS + 1), LOOKS)):
        with Opened(tmp_path / str(number)) as opened:
            log, look = Rotating(opened, rotated_before), iter(before)
            acknowledged = opened.active.head.offset

            def looking(original: Any, log: Rotating = log, look: Any = look) -> Any:
                def call(*args: Any, **kwargs: Any) -> Any:
                    if not log._going_on:
                        log.go_on(next(look, 0))
                    return original(*args, **kwargs)

                return call

            look_for_rotation = looking(next_file)
            with monkeypatch.context() as patch:
                patch.setattr(segments, "_open_if_there", looking(open_))
                patch.setattr(os, "fstat", looking(fstat))
                patch.setattr(Layout, "next_file", lambda self, look=look_for_rotation: look(self))
                patch.setattr(os, "stat", looking(stat))
                parts = LogSegments(opened.layout)
            log.go_on(STEPS)
            with parts:
                head = parts.head()
                found = b"".join(piece.data for piece in parts.lines(0, head.offset))
        heads.add(head)

        assert found == log.whole[: head.offset]
        assert head.offset >= acknowledged
    assert number == 461
    assert len(heads) == 2


@pytest.mark.parametrize(
    ("data", "end"),
    [
        (b"", 0),
        (line(0), len(line(0))),
        (line(0) + b"{", len(line(0))),
        (b"{", 0),
        (line(0) + bytes(50), len(line(0))),
        (line(0) + line(1, batch="1,2"), len(line(0))),
        (line(0) + line(1, batch="1,2") + line(2, batch="2,2"), None),
        (line(1, batch="1,3") + line(2, batch="2,3"), 0),
        (line(0) + line(2, batch="2,2"), None),
    ],
)
def test_a_log_ends_with_its_last_complete_line_or_batch(tmp_path: Path, data: bytes, end: int | None) -> None:
    """What follows (half a line, NUL bytes or an open batch) is not part of it."""
    path = tmp_path / "app.jsonl"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        found = complete_size(fd, len(data))
    finally:
        os.close(fd)

    assert found == (len(data) if end is None else end)


@pytest.mark.parametrize("size", [1, 14, 15, 16, 17, 63, 64, 65, 1000])
def test_a_line_is_found_backwards_whatever_its_length(tmp_path: Path, size: int) -> None:
    """The lines end at, before or after the steps that are taken backwards."""
    path = tmp_path / "app.jsonl"
    path.write_bytes(b"a" * 3 + b"\n" + b"b" * size + b"\n")
    fd = os.open(path, os.O_RDONLY)
    try:
        second = line_before(fd, 5 + size)
        first = line_before(fd, 4)
    finally:
        os.close(fd)

    assert second == (4, b"b" * size)
    assert first == (0, b"aaa")


async def test_a_last_line_with_an_impossible_place_in_a_batch_is_reported(damaged_dir: Path) -> None:
    """Such a line is damage rather than an incomplete batch, so nothing is cut off."""
    data = line(0) + line(1, batch="1,2") + line(2, batch="0,2")
    damaged_dir.mkdir()
    (damaged_dir / "app.jsonl").write_bytes(data)
    async with EventWriter.open(damaged_dir):
        pass
    with pytest.raises(CorruptLogError):
        async for _ in EventReader(damaged_dir).read_full():
            pass

    assert (damaged_dir / "app.jsonl").read_bytes() == data


@pytest.mark.parametrize("harm", ["cut", "deleted"])
def test_events_missing_in_the_archive_during_a_rotation_are_reported(damaged_dir: Path, harm: str) -> None:
    """The rotation's file says where the active log begins, so missing events before that are noticed."""
    with Opened(damaged_dir) as opened:
        append(opened.active, lines(0, 12))
        opened.rotate()
        append(opened.active, lines(12, 15))
        rotations.begin(opened.layout, opened.active).close()
    archive = opened.layout.archive_path
    if harm == "cut":
        os.truncate(archive, archive.stat().st_size // 2)
    else:
        archive.unlink()
    found = b""
    with LogSegments(opened.layout) as parts, pytest.raises(CorruptLogError, match="archive"):
        for block in parts.lines(0, len(lines(0, 15))):
            found += block.data

    assert lines(0, 11).startswith(found)
