"""The newest lines in memory: they give the same records as the disk, and each reader gets its own."""

from __future__ import annotations

import pytest
from tests.support import line

from eventfold import CorruptLogError, Head, Record, line_hash
from eventfold._codec.decode import Decoder
from eventfold._codec.lines import SLICE_SIZE, Lines
from eventfold._recent_lines import RecentLines


class Log:
    """A sequence of commits."""

    def __init__(self, recent_lines: RecentLines) -> None:
        self.recent_lines = recent_lines
        self.heads = [Head(0, "")]
        self.data = b""

    def commit(self, data: bytes) -> Head:
        known = self.heads[-1]
        head = Head(known.offset + len(data), line_hash(data[data.rfind(b"\n", 0, -1) + 1 :]))
        self.recent_lines.add(known, head, Lines("app.jsonl", known.offset, data))
        self.heads.append(head)
        self.data += data
        return head


@pytest.fixture
def log() -> Log:
    return Log(RecentLines())


def as_from_disk(lines: Lines) -> list[Record]:
    return [record for piece in Decoder().feed(lines) for record in piece.records()]


@pytest.mark.parametrize(
    "data",
    [
        line(1),
        line(1) + line(2),
        line(1, batch="1,2") + line(2, batch="2,2"),
        line(0) + line(1, batch="1,2") + line(2, batch="2,2") + line(3),
        line(1) + b"\n" + line(2),
        line(1).replace(b"}\n", b',"batch":"of another kind"}\n') + line(2),
    ],
)
def test_each_who_asks_gets_the_records_that_the_disk_gives(log: Log, data: bytes) -> None:
    """This holds for the first reader and for all others."""
    log.commit(line(0))
    log.commit(data)
    found = log.recent_lines.since(log.heads[1])
    assert found is not None
    head, lines = found
    everybodys = [list(log.recent_lines.records(lines)) for _ in range(4)]

    assert head == log.heads[2]
    assert everybodys == [as_from_disk(lines)] * 4
    assert [record.line_hash for record in everybodys[3]] == [record.line_hash for record in as_from_disk(lines)]


def test_each_has_events_of_its_own(log: Log) -> None:
    """If a reader changes an event's data, no other reader sees that."""
    log.commit(line(1))
    found = log.recent_lines.since(log.heads[0])
    assert found is not None
    everybodys = [list(log.recent_lines.records(found[1])) for _ in range(4)]
    for records in everybodys[:-1]:
        records[0].event.data["n"] = "changed"

    assert everybodys[-1][0].event.data == {"n": 1}


def test_each_is_told_of_damage_after_what_comes_before_it(log: Log) -> None:
    """Somebody else may have written the lines."""
    log.commit(line(1) + b"damage\n" + line(2))
    found = log.recent_lines.since(log.heads[0])
    assert found is not None
    for _ in range(3):
        records = iter(log.recent_lines.records(found[1]))
        before = next(records)
        with pytest.raises(CorruptLogError, match="not an event"):
            next(records)

        assert before.event.data == {"n": 1}


def test_who_is_some_commits_late_gets_them_joined(log: Log) -> None:
    """It may continue from the end of any kept commit to the end of any later one."""
    for n in range(10):
        log.commit(line(n) * (n + 1))
    for first in range(10):
        for last in range(first + 1, 11):
            start, end = log.heads[first], log.heads[last]
            found = log.recent_lines.since(start, end)

            assert found is not None
            assert found[0] == end
            assert (found[1].start_offset, found[1].data) == (start.offset, log.data[start.offset : end.offset])
        newest = log.recent_lines.since(Head(log.heads[first].offset, ""))
        assert newest is not None
        assert newest[0] == log.heads[-1]


def test_there_are_no_news_for_who_is_elsewhere(log: Log) -> None:
    """Its offset may be inside a commit, after a different line, or where no line ends."""
    for n in range(3):
        log.commit(line(n) + line(n))
    inside = Head(log.heads[1].offset + len(line(1)), "")

    assert log.recent_lines.since(inside) is None
    assert log.recent_lines.since(Head(log.heads[1].offset, "another line")) is None
    assert log.recent_lines.since(log.heads[1], inside) is None
    assert log.recent_lines.since(log.heads[3]) is None


def test_only_a_little_is_kept(log: Log) -> None:
    """Some commits are kept, up to one slice of them; of a larger commit, nothing is kept."""
    for n in range(40):
        log.commit(line(n))
    of_small = [log.recent_lines.since(head) is not None for head in log.heads]
    for n in range(10):
        log.commit(line(n) * (SLICE_SIZE // 4 // len(line(n))))
    of_larger = [log.recent_lines.since(head) is not None for head in log.heads]
    log.commit(line(0) * SLICE_SIZE)

    assert of_small == [False] * 24 + [True] * 16 + [False]
    assert of_larger == [False] * 46 + [True] * 4 + [False]
    assert not any(log.recent_lines.since(head) for head in log.heads)


def test_what_does_not_follow_replaces_what_is_there(log: Log) -> None:
    """Other writers have appended in between, or the lines are unknown."""
    log.commit(line(0))
    log.heads.append(Head(log.heads[-1].offset + 100, "of somebody else"))
    log.commit(line(1))
    gap = [log.recent_lines.since(head) is not None for head in log.heads]
    log.recent_lines.add(log.heads[-1], Head(10_000, "unknown"), None)

    assert gap == [False, False, True, False]
    assert not any(log.recent_lines.since(head) for head in log.heads)
