"""What is fuzzed: a directory with given bytes is read and compared with the slow reference or the archived lines."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tests.fuzz import reference
from tests.fuzz.damage import ZSTD_MAGIC, Archived

from eventfold import CorruptLogError, EventReader, Record


class Outcome(NamedTuple):
    """The result of reading: the records, and then the error, if one was raised."""

    records: list[Record]
    error: CorruptLogError | None


async def read(reader: EventReader, offset: int = 0) -> Outcome:
    """Reads to the end, or to the damage."""
    records: list[Record] = []
    try:
        async for record in reader.read_from(offset):
            records.append(record)
    except CorruptLogError as error:
        return Outcome(records, error)
    return Outcome(records, None)


async def check_lines(directory: Path, data: bytes) -> bool:
    """Asserts that an active log with these bytes is read as the reference reads it; returns False if undecided."""
    path = directory / "app.jsonl"
    path.write_bytes(data)
    reader = EventReader(directory)
    try:
        wanted = reference.read(data)
        starts = [line.start for line in wanted.lines[1:4]]
        later = [reference.read(data, start) for start in starts]
    except reference.UnsureError:
        await read(reader)  # It must end, and raise no other error.
        return False
    assert (await reader.head()).offset == wanted.head
    for start, each in zip([0, *starts], [wanted, *later], strict=True):
        found = await read(reader, start)
        assert [(r.start_offset, r.end_offset, r.event) for r in found.records] == [line[:3] for line in each.lines]
        if each.fault is None:
            assert found.error is None
        else:
            assert found.error is not None
            assert (found.error.path, found.error.offset) == (path, each.fault)
    await check_selection(reader, wanted)
    return True


async def check_selection(reader: EventReader, wanted: reference.Reading) -> None:
    """Asserts that reading only some types returns their events, at least up to the damage."""
    types = {line.event.type for line in wanted.lines[::2]}
    given: list[tuple[int, int, object]] = []
    error = None
    try:
        async for piece in reader.read_slices(types=types):
            given += [(r.start_offset, r.end_offset, r.event) for r in piece.records()]
    except CorruptLogError as raised:
        error = raised
    selected = [line[:3] for line in wanted.lines if line.event.type in types]
    assert given[: len(selected)] == selected
    if wanted.fault is None:
        assert error is None
        assert given == selected


async def check_archive(archive: Archived, data: bytes) -> str:
    """Asserts that an archive with these bytes gives a prefix of its lines, followed by an error or by nothing.

    Frames after the last complete record are read as they are, since no record describes them. Returns "exact",
    "reported", "unrecorded" or, if a log was read completely but is shorter, "shorter".
    """
    directory, lines = archive.dir, archive.lines
    (directory / "archive.jsonl.zst").write_bytes(data)
    found = await read(EventReader(directory))
    texts = [record._line for record in found.records]
    same = next((i for i, pair in enumerate(zip(texts, lines, strict=False)) if pair[0] != pair[1]), len(texts))
    last_record = max(0, *(data.rfind(record) for record in archive.parts()[1::2]))
    unrecorded = ZSTD_MAGIC in data[last_record:]
    assert same == len(texts) or unrecorded
    assert [r.start_offset for r in found.records] == [sum(map(len, texts[:i])) for i in range(len(texts))]
    if found.error is not None:
        assert Path(found.error.path).parent == directory
        assert found.error.offset <= sum(map(len, lines)) or unrecorded
        return "reported"
    if same < len(texts):
        return "unrecorded"
    return "exact" if len(texts) == len(lines) else "shorter"
