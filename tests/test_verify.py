"""`verify`, `EventLog.info` and `EventLog.state_at`: what operators ask about a log."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from tests.support import line, write_log

from eventfold import CorruptLogError, Event, EventLog, EventReader, LogInfo, View, verify


def count(state: int, event: Event) -> int:
    return state + 1


def counting() -> View[int]:
    """A view that counts the events."""
    return View("count", count, 0)


async def write(dir: Path, events: int = 10, *, rotate: bool = True) -> list[int]:
    """Creates a log with events before and after a rotation, a snapshot and a consumer; returns the events' offsets."""
    async with EventLog.open(dir, views=[counting()]) as log:
        results = [await log.append(Event("added", {"n": n}, ts=n)) for n in range(events)]
        if rotate:
            await log.rotate()
        results += [await log.append(Event("added", {"n": n}, ts=n)) for n in range(events)]
        await log.refresh_all()
        async for record in (consumer := log.consumer("mailer")):
            await consumer.commit(record)
            break
    return [result.start_offset for result in results]


def damage(path: Path, old: bytes, new: bytes) -> None:
    """Changes a file as a bad disk would."""
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


async def test_a_sound_log_is_counted_and_has_no_problems(tmp_path: Path) -> None:
    """The report counts the events before and after a rotation, the frames, the snapshot and the consumer."""
    await write(tmp_path)

    report = await verify(tmp_path, views=[counting()])

    assert report.ok
    assert (report.events, report.frames, report.snapshots, report.consumers) == (20, 1, 1, 1)
    assert report.size == (await EventReader(tmp_path).head()).offset


async def test_an_empty_log_has_no_problems(tmp_path: Path) -> None:
    """A missing directory has none either."""
    assert (await verify(tmp_path / "none")).ok


async def test_a_log_that_is_open_for_writing_can_be_verified(tmp_path: Path) -> None:
    """Verification takes no lock."""
    async with EventLog.open(tmp_path) as log:
        await log.append(Event("added"))

        assert (await verify(tmp_path)).events == 1


async def test_a_bad_line_is_reported_with_its_file_and_offset(tmp_path: Path) -> None:
    """The events before it are counted."""
    offsets = await write(tmp_path)
    damage(tmp_path / "app.jsonl", b'"n":4', b'"n":\0')

    report = await verify(tmp_path)

    assert [(p.path, p.offset) for p in report.problems] == [(str(tmp_path / "app.jsonl"), offsets[14])]
    assert report.events == 14


async def test_a_damaged_frame_is_reported(tmp_path: Path) -> None:
    """The record of the frame is intact."""
    await write(tmp_path)
    path = tmp_path / "archive.jsonl.zst"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)

    report = await verify(tmp_path)

    assert str(path) in [p.path for p in report.problems]
    assert not report.ok


@pytest.mark.parametrize("lost", [1, 2])
@pytest.mark.parametrize("blank", [b"", b"\n"])
async def test_a_log_that_begins_inside_a_batch_is_reported(tmp_path: Path, lost: int, blank: bytes) -> None:
    """Its first lines are lost, and without a base file nothing else says so; reading never gives part of a batch."""
    lines = [line(n, batch=f"{n},3") for n in range(1, 4)]
    write_log(tmp_path, blank, *lines[lost:], line(4))
    [problem] = (await verify(tmp_path)).problems

    assert (problem.path, problem.offset) == (str(tmp_path / "app.jsonl"), len(blank))
    assert "this batch is incomplete" in problem.reason
    reader = EventReader(tmp_path)
    with pytest.raises(CorruptLogError):
        await anext(reader.read_full())
    assert [r.event.data["n"] async for r in reader.read_from(len(blank + lines[lost]))] == [*range(lost + 2, 5)]


@pytest.mark.parametrize("kind", ["views/count.snapshot.json", "consumers/mailer.json"])
async def test_a_document_that_can_t_be_read_is_reported_and_hides_nothing_else(tmp_path: Path, kind: str) -> None:
    """A bad block in a snapshot must not keep anybody from what is wrong with the log."""
    await write(tmp_path)
    damage(tmp_path / "app.jsonl", b'"n":5', b'"n":x')
    document = tmp_path / kind
    document.unlink()
    document.mkdir()
    report = await verify(tmp_path)

    assert [problem.path for problem in report.problems] == [str(tmp_path / "app.jsonl"), str(document)]
    assert "can't be read: not a regular file" in report.problems[1].reason
    async with EventLog.open(tmp_path, read_only=True) as log:
        places = [*(found := await log.info()).views, *found.consumers]
    [problem] = [place.problem for place in places if place.problem]
    assert problem == "it can't be read: not a regular file; move it away"


async def test_a_damaged_base_file_is_reported(tmp_path: Path) -> None:
    """Without it, nobody can tell where app.jsonl begins."""
    await write(tmp_path)
    (tmp_path / "app.jsonl.base").write_bytes(b"{}")

    report = await verify(tmp_path)

    assert str(tmp_path / "app.jsonl.base") in [p.path for p in report.problems]


async def test_a_snapshot_that_is_damaged_is_reported(tmp_path: Path) -> None:
    """The snapshot's checksum is wrong."""
    await write(tmp_path)
    path = tmp_path / "views" / "count.snapshot.json"
    damage(path, b'"state":20', b'"state":21')

    report = await verify(tmp_path)

    assert [p.path for p in report.problems] == [str(path)]
    assert "checksum" in report.problems[0].reason


async def test_a_snapshot_beyond_the_log_is_reported(tmp_path: Path) -> None:
    """Such a snapshot is left after a log was replaced by an older copy."""
    await write(tmp_path / "one", 20)
    await write(tmp_path / "other", 5)
    snapshot = "views/count.snapshot.json"
    (tmp_path / "other" / snapshot).write_bytes((tmp_path / "one" / snapshot).read_bytes())

    report = await verify(tmp_path / "other")

    assert [p.path for p in report.problems] == [str(tmp_path / "other" / snapshot)]


async def test_a_snapshot_that_differs_from_a_replay_is_reported(tmp_path: Path) -> None:
    """For that, `verify` needs the view."""
    await write(tmp_path)

    def count_double(state: int, event: Event) -> int:
        return state + 2

    assert (await verify(tmp_path)).ok
    report = await verify(tmp_path, views=[View("count", count_double, 0)])

    assert "40 became 20" in report.problems[0].reason


@pytest.mark.parametrize("content", [b"nonsense", b'{"offset":3,"hash":"x"}', b'{"offset":9999999,"hash":"x"}'])
async def test_a_consumer_whose_offset_is_not_in_the_log_is_reported(tmp_path: Path, content: bytes) -> None:
    """The offset may be damaged, inside a line, or beyond the head."""
    await write(tmp_path)
    path = tmp_path / "consumers" / "mailer.json"
    path.write_bytes(content)

    report = await verify(tmp_path)

    assert [p.path for p in report.problems] == [str(path)]


async def test_files_with_names_that_views_and_consumers_cannot_have_are_ignored(tmp_path: Path) -> None:
    await write(tmp_path)
    for name in ("foo bar", "count (copy)", "x" * 129, "é"):
        (tmp_path / "views" / f"{name}.snapshot.json").write_bytes(b"{}")
        (tmp_path / "consumers" / f"{name}.json").write_bytes(b"{}")
    report = await verify(tmp_path)
    assert (report.problems, report.snapshots, report.consumers) == ((), 1, 1)
    async with EventLog.open(tmp_path, views=[counting()]) as log:
        info = await log.info()
        assert [place.name for place in [*info.views, *info.consumers]] == ["count", "mailer"]
        await log.rotate()
        await log.backup(tmp_path.parent / "backup")


async def test_progress_ends_at_the_size_of_the_log(tmp_path: Path) -> None:
    """The progress never goes back."""
    await write(tmp_path)
    reported: list[tuple[int, int]] = []

    report = await verify(tmp_path, progress=lambda done, total: reported.append((done, total)))

    assert reported == sorted(reported)
    assert reported[-1] == (report.size, report.size)


async def test_info_has_sizes_events_and_lags(tmp_path: Path) -> None:
    offsets = await write(tmp_path)
    async with EventLog.open(tmp_path, read_only=True) as log:
        info = await log.info()

    head = (await EventReader(tmp_path).head()).offset
    assert info.head.offset == head
    assert [(v.name, v.offset, v.lag) for v in info.views] == [("count", head, 0)]
    assert [(c.name, c.offset, c.lag) for c in info.consumers] == [("mailer", offsets[1], head - offsets[1])]
    assert info.files is not None
    assert (info.files.events, info.files.base) == (20, offsets[10])
    assert info.files.active_size == (tmp_path / "app.jsonl").stat().st_size
    assert info.files.archive_size == (tmp_path / "archive.jsonl.zst").stat().st_size
    assert not info.files.rotating


async def test_info_has_the_average_events_and_bytes_per_day(tmp_path: Path) -> None:
    async with EventLog.open(tmp_path) as log:
        assert (await log.info()).bytes_a_day is None
        for day in range(3):
            await log.append(Event("added", ts=day * 86400))
        await log.rotate()
        info = await log.info()
    assert (info.events_a_day, info.bytes_a_day) == (3 / 2, info.head.offset / 2)
    assert info.files is not None
    assert info.files.frames == 1


async def test_info_describes_the_problem_with_an_offset(tmp_path: Path) -> None:
    """All other fields have their usual values."""
    await write(tmp_path)
    (tmp_path / "consumers" / "mailer.json").write_bytes(b"nonsense")
    (tmp_path / "views" / "count.snapshot.json").write_bytes(b"nonsense")
    async with EventLog.open(tmp_path, read_only=True) as log:
        info = await log.info()

    assert info.views[0].problem is not None
    assert info.consumers[0].problem is not None
    assert info.consumers[0].lag is None


async def test_info_can_be_encoded_as_json(tmp_path: Path) -> None:
    """A monitor may want JSON."""
    await write(tmp_path)
    async with EventLog.open(tmp_path) as log:
        info = await log.info()

    assert msgspec.json.decode(msgspec.json.encode(info), type=LogInfo) == info


async def test_state_at_returns_the_state_at_every_offset(tmp_path: Path) -> None:
    """The offsets are before and after a rotation; the view itself does not change."""
    offsets = await write(tmp_path)
    view = counting()
    async with EventLog.open(tmp_path, views=[view]) as log:
        states = [await log.state_at(view, offset) for offset in [*offsets, log.head.offset]]

        assert states == list(range(21))
        assert log.view(view) == 20


async def test_state_at_a_time_includes_the_events_before_it(tmp_path: Path) -> None:
    async with EventLog.open(tmp_path, views=[counting()]) as log:
        for seconds in (100, 200, 200, 300):
            await log.append(Event("counted", ts=seconds))
        states = [
            await log.state_at("count", datetime.fromtimestamp(seconds, UTC))
            for seconds in (0, 100, 100.5, 101, 200, 300, 301)
        ]

        assert states == [0, 0, 1, 1, 1, 3, 4]


async def test_state_at_refuses_an_offset_where_no_line_begins(tmp_path: Path) -> None:
    """The offset may be inside a line or beyond the head."""
    await write(tmp_path)
    async with EventLog.open(tmp_path, views=[counting()]) as log:
        for offset in (-1, 3, log.head.offset + 1):
            with pytest.raises(ValueError, match="offset"):
                await log.state_at("count", offset)
