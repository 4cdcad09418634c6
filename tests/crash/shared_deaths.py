"""A fault injector: a writer dies, or fails, at each of its file operations in turn, alone or beside another writer.

Run it as `python -m tests.crash.shared_deaths SCENARIO HOW PEER DIRECTORY`, with PEER as "beside" or "alone". It has no
threads and no event loop, so that it can fork: the child runs the scenario and reports what was acknowledged, until it
ends before or in the middle of its nth operation ("die", "half"), or gets an `OSError` from it ("fail"). Then the
parent continues, and checks the result. It exits with status 0, and prints how many operations there were.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.crash.oracle import check_archive, read_now
from tests.crash.peers import Peer
from tests.support import line

from eventfold import EventfoldError, WriterFailedError
from eventfold._files import operations, shared_rotation
from eventfold._files.paths import Layout
from eventfold._files.turn import Turn

OPERATIONS = (
    "open_file",
    "write",
    "write_mapped",
    "sync",
    "sync_dir",
    "truncate",
    "rename",
    "unlink",
    "lock",
    "lock_shared",
    "unlock",
)
DIED = 9


Report = Callable[[int, bytes], None]


def append(peer: Peer, report: Report, data: bytes) -> None:
    report(peer.append(data), data)


def commits(peer: Peer, report: Report) -> None:
    append(peer, report, line(100))
    append(peer, report, line(101, batch="1,2") + line(102, batch="2,2"))
    append(peer, report, line(103))


def rotates(peer: Peer, report: Report) -> None:
    append(peer, report, line(100))
    peer.rotate(lambda: append(peer, report, line(101)))
    append(peer, report, line(102))


def nothing_left(peer: Peer) -> None:
    """The previous rotation is finished."""


def begun(peer: Peer) -> None:
    """A process died when a rotation had only begun: it must be undone."""
    shared_rotation.begin(peer.layout, peer.log, peer.log.head.offset).close()


def archived(peer: Peer) -> None:
    """A process died when everything was in the archive: the rotation must be completed."""
    left = shared_rotation.begin(peer.layout, peer.log, peer.log.head.offset)
    left.archive(peer.log)
    left.close()


SCENARIOS: dict[str, tuple[Callable[[Peer], None], Callable[[Peer, Report], None]]] = {
    "commits": (nothing_left, commits),
    "rotates": (nothing_left, rotates),
    "undoes": (begun, rotates),
    "finishes": (archived, rotates),
}


class Ender:
    """Makes one of the operations the last one, or makes it fail."""

    def __init__(self, number: int, how: str) -> None:
        self._left = number
        self._how = how
        for name in OPERATIONS:
            setattr(operations, name, self._wrapped(name, getattr(operations, name)))

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            self._left -= 1
            if self._left == -1:
                self._end(name, original, args)
            return original(*args)

        return wrapped

    def _end(self, name: str, original: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if self._how == "fail":
            if name in ("write_mapped", "unlock"):  # These can't fail.
                return
            raise OSError(errno.EIO, f"{name} was made to fail")
        if self._how == "half":
            if name in ("write", "write_mapped"):
                target, data, position = args
                original(target, data[: len(data) // 2], position)
            else:
                original(*args)
        os._exit(DIED)

    @property
    def used(self) -> bool:
        return self._left < 0


def child(directory: Path, scenario: str, number: int, how: str, pipe: int) -> int:
    """Runs the scenario; returns 0 if the number was beyond its last operation."""

    def report(offset: int, data: bytes) -> None:
        os.write(pipe, b"%d %s" % (offset, data.replace(b"\n", b"\t") + b"\n"))

    ender = Ender(number, how)
    try:
        peer = Peer(directory)
        try:
            SCENARIOS[scenario][1](peer, report)
        finally:
            peer.close()
    except WriterFailedError:
        return 2
    except (OSError, EventfoldError):
        return 1
    return 1 if ender.used else 0


def run_child(directory: Path, scenario: str, number: int, how: str) -> tuple[int, list[tuple[int, bytes]]]:
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        status = 70
        try:
            os.close(ours)
            status = child(directory, scenario, number, how, theirs)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(theirs)
    with os.fdopen(ours, "rb") as file:
        acknowledged = [one.split(b" ", 1) for one in file.read().splitlines()]
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 1, 2, DIED), status
    return status, [(int(offset), data.replace(b"\t", b"\n")) for offset, data in acknowledged]


def check(directory: Path, acknowledged: list[tuple[int, bytes]]) -> bytes:
    """Asserts that everything acknowledged is at its offset, and that nothing is there twice."""
    head, data = read_now(directory)
    assert head.offset == len(data)
    for offset, lines in acknowledged:
        assert data[offset : offset + len(lines)] == lines, (offset, lines, data)
    found = data.splitlines()
    assert len(set(found)) == len(found), data
    for one_line in found:
        json.loads(one_line)
    return data


def one(directory: Path, scenario: str, number: int, how: str, beside: bool) -> bool:
    """Tests one death; returns False if there is no operation with this number."""
    shutil.rmtree(directory, ignore_errors=True)
    acknowledged: list[tuple[int, bytes]] = []

    def report(offset: int, data: bytes) -> None:
        acknowledged.append((offset, data))

    peer = Peer(directory)
    for n in range(3):
        append(peer, report, line(n))
    peer.rotate()
    append(peer, report, line(3))
    SCENARIOS[scenario][0](peer)
    if not beside:
        peer.close()
    status, more = run_child(directory, scenario, number, how)
    acknowledged += more
    check(directory, acknowledged)
    started = time.monotonic()
    if not beside:
        peer = Peer(directory)
    try:
        append(peer, report, line(200))
    except WriterFailedError:
        assert how == "fail"
        peer.close()
        peer = Peer(directory)
        append(peer, report, line(201))
    else:
        assert not says_failed(directory)
    assert time.monotonic() - started < 5
    data = check(directory, acknowledged)
    peer.rotate()
    assert check(directory, acknowledged) == data
    check_archive(directory, data)
    append(peer, report, line(202))
    peer.close()
    peer = Peer(directory)
    check(directory, acknowledged)
    assert peer.log.head.offset == len(read_now(directory)[1])
    peer.close()
    return status != 0


def says_failed(directory: Path) -> bool:
    """Whether the mark says that a sync has failed."""
    turn = Turn(Layout(directory))
    with turn:
        mark = turn.read_mark()
    turn.close()
    return mark is not None and mark.failed


def main() -> None:
    scenario, how, beside, where = sys.argv[1:]
    directory = Path(where)
    number = 0
    while one(directory, scenario, number, how, beside == "beside"):
        number += 1
    print(number)


if __name__ == "__main__":
    main()
