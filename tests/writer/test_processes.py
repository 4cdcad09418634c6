"""Only one writer at a time can open a log, in any process."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from tests.support import event, line, numbers, write_log
from tests.writer.calls import run

from eventfold import (
    EventReader,
    EventWriter,
    LockMode,
    LogLockedError,
    WriterFailedError,
)
from eventfold._files import operations


async def test_a_second_writer_in_the_same_process_is_refused(data_dir: Path) -> None:
    """The error names the file, and the first writer continues."""
    async with EventWriter.open(data_dir) as writer:
        with pytest.raises(LogLockedError, match=r"app\.jsonl") as caught:
            await EventWriter.open(data_dir)
        await writer.append(event(1))

    assert Path(caught.value.path) == data_dir / "app.jsonl"


OPEN_AND_SAY = """
import asyncio, sys
from eventfold import EventWriter, LogLockedError

async def main():
    try:
        async with EventWriter.open(sys.argv[1]):
            print("opened")
    except LogLockedError:
        print("locked")

asyncio.run(main())
"""


async def test_a_second_writer_in_another_process_is_refused(data_dir: Path) -> None:
    """Once the first writer is closed, the second one can open the log."""
    async with EventWriter.open(data_dir):
        during = await asyncio.to_thread(run, OPEN_AND_SAY, data_dir)
    after = await asyncio.to_thread(run, OPEN_AND_SAY, data_dir)

    assert (during.stdout, after.stdout) == ("locked\n", "opened\n"), during.stderr + after.stderr


async def test_without_a_lock_a_second_writer_can_open_the_log_but_not_mix_lines(damaged_dir: Path) -> None:
    """`LockMode.NONE` locks nobody out, but the second one to write notices that the file has changed."""
    first = await EventWriter.open(damaged_dir, lock=LockMode.NONE)
    second = await EventWriter.open(damaged_dir, lock=LockMode.NONE)
    await first.append(event(1))
    with pytest.raises(WriterFailedError, match="changed by another program"):
        await second.append(event(2))
    await second.aclose()
    await first.aclose()

    assert (damaged_dir / "app.jsonl").read_bytes() == line(1)


async def test_a_file_that_was_replaced_before_it_was_locked_is_not_written(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a rotation replaces the file between opening and locking, the writer takes the new file."""
    write_log(data_dir, line(1))
    lock, replaced = operations.lock, []

    def replace_first(fd: int) -> bool:
        if not replaced:
            replaced.append(data_dir / "other")
            replaced[0].write_bytes(line(1) + line(2))
            os.replace(replaced[0], data_dir / "app.jsonl")
        return lock(fd)

    monkeypatch.setattr(operations, "lock", replace_first)
    async with EventWriter.open(data_dir) as writer:
        with pytest.raises(LogLockedError):
            await EventWriter.open(data_dir)
        await writer.append(event(3))
        found = await numbers(EventReader(data_dir))

    assert found == [1, 2, 3]


async def test_a_file_that_was_removed_before_it_was_locked_is_created_again(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that is locked must be the one that has the name."""
    lock, removed = operations.lock, []

    def remove_first(fd: int) -> bool:
        if not removed:
            removed.append(True)
            (data_dir / "app.jsonl").unlink()
        return lock(fd)

    monkeypatch.setattr(operations, "lock", remove_first)
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(1))

    assert (data_dir / "app.jsonl").read_bytes() == line(1)


FORK = """
import asyncio, os, sys
from eventfold import Event, EventfoldError, EventReader, EventWriter, LockMode

def refused(call):
    try:
        call.send(None)
    except EventfoldError as error:
        return "fork" in str(error)
    except StopIteration:
        pass
    return False

async def read():
    return [record.event.type async for record in EventReader(sys.argv[1]).read_full()]

async def main():
    writer = await EventWriter.open(sys.argv[1], lock=LockMode(sys.argv[2]))
    await writer.append(Event("parent"))
    pid = os.fork()
    if not pid:
        try:
            event = Event("child")
            calls = [writer.append(event), writer.append_many([event]), writer.append_if(event, 0, ""), writer.rotate()]
            status = 0 if all([refused(call) for call in calls]) else 1
            if asyncio.run(read()) != ["parent"]:
                status = 2
            try:
                writer.aclose().send(None)
                status = 3
            except StopIteration:
                pass
        except BaseException:
            import traceback
            traceback.print_exc()
            status = 4
        os._exit(status)
    _, status = os.waitpid(pid, 0)
    print("child", os.waitstatus_to_exitcode(status))
    try:
        await EventWriter.open(sys.argv[1])
    except EventfoldError as error:
        print(type(error).__name__)
    await writer.append(Event("parent again"))
    await writer.aclose()
    print(await read())

asyncio.run(main())
"""


@pytest.mark.parametrize("lock", [LockMode.FLOCK, LockMode.SHARED])
def test_a_writer_refuses_to_write_in_a_forked_child(data_dir: Path, lock: LockMode) -> None:
    """The child inherits the lock, and may read and close; the parent keeps the lock and continues."""
    done = run(FORK, data_dir, lock.value)

    assert done.stdout.splitlines() == ["child 0", "LogLockedError", "['parent', 'parent again']"], done.stderr
