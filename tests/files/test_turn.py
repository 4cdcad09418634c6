"""The turn of shared writers, and the mark in its file."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support import FaultInjector

from eventfold import CorruptLogError, WriterFailedError
from eventfold._event import Head
from eventfold._files import mark as mark_module
from eventfold._files import turn as turn_module
from eventfold._files.mark import Mark
from eventfold._files.paths import Layout
from eventfold._files.turn import FILE_SIZE, Turn, TurnGivenUpError

ONE = Mark(Head(10, "0123456789abcdef"), Head(5, "00000000000000aa"))
TWO = Mark(Head(30, "fedcba9876543210"), Head(20, "00000000000000bb"), failed=True, sync_mode=2)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


@pytest.fixture
def new_turn(layout: Layout) -> Iterator[Callable[[], Turn]]:
    made: list[Turn] = []

    def make() -> Turn:
        made.append(Turn(layout))
        return made[-1]

    yield make
    for turn in made:
        turn.close()


class _DiedError(Exception):
    """Simulates the death of a process: it does nothing more."""


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_any_process_that_has_the_file_open_reads_the_mark_as_written(new_turn: Callable[[], Turn]) -> None:
    writer, reader = new_turn(), new_turn()
    with reader:
        assert reader.read_mark() is None
    for mark in (ONE, TWO, ONE._replace(written=Head(0, ""), durable=Head(0, ""))):
        with writer:
            writer.write_mark(mark)
        assert reader.read_mark() == mark


def test_the_mark_has_the_highest_offset_that_any_process_has_synced(new_turn: Callable[[], Turn]) -> None:
    """The order in which processes note their offsets does not matter, and nothing else in the mark changes."""
    writer, other = new_turn(), new_turn()
    with other:
        pass
    with writer:
        writer.write_mark(TWO)
    for turn, offset, durable in ((other, 25, 25), (writer, 24, 25), (writer, 29, 29), (other, 29, 29)):
        turn.record_durable(Head(offset, "00000000000000dd"))
        assert turn.synced_head.offset == offset
        assert writer.read_mark() == other.read_mark() == TWO._replace(durable=Head(durable, "00000000000000dd"))


def test_noting_a_durable_offset_does_not_wait_if_the_mark_has_it_already(new_turn: Callable[[], Turn]) -> None:
    writer, other = new_turn(), new_turn()
    with other:
        pass
    with writer:
        writer.write_mark(TWO)
        other.record_durable(TWO.durable)
        assert other.seconds_waiting() == 0


def test_noting_a_durable_offset_waits_for_the_turn(new_turn: Callable[[], Turn]) -> None:
    writer, other = new_turn(), new_turn()
    with other:
        pass
    with writer:
        writer.write_mark(ONE)
        thread = in_thread(lambda: other.record_durable(Head(8, "00000000000000dd")))
        until(lambda: other.seconds_waiting() > 0)
        writer.write_mark(ONE._replace(written=TWO.written))
        assert writer.read_mark() == ONE._replace(written=TWO.written)
    thread.join(10)
    assert writer.read_mark() == ONE._replace(written=TWO.written, durable=Head(8, "00000000000000dd"))


@pytest.mark.parametrize("harm", ["deleted", "emptied", "damaged"])
def test_a_durable_offset_cannot_be_noted_without_the_lock_file(
    new_turn: Callable[[], Turn], layout: Layout, harm: str
) -> None:
    """Then only this process knows it, and the turn is released."""
    turn = new_turn()
    with turn:
        turn.write_mark(ONE)
    other = new_turn()
    if harm == "deleted":
        layout.lock_path.unlink()
    else:
        layout.lock_path.write_bytes(b"" if harm == "emptied" else b"x" * FILE_SIZE)
    turn.record_durable(Head(9, "00000000000000dd"))
    assert turn.durable_head() == Head(9, "00000000000000dd")
    if harm == "deleted":
        assert not layout.lock_path.exists()
    else:
        with other:
            assert other.read_mark() is None


def test_the_lock_file_has_its_full_size_on_disk_once_the_turn_has_been_held(
    new_turn: Callable[[], Turn], layout: Layout
) -> None:
    with new_turn():
        assert layout.lock_path.stat().st_size == FILE_SIZE
        assert layout.lock_path.stat().st_blocks * 512 >= FILE_SIZE


@pytest.mark.parametrize("earlier", [1, 2, 3])
def test_a_death_after_any_byte_of_a_mark_leaves_the_previous_mark(
    new_turn: Callable[[], Turn], monkeypatch: pytest.MonkeyPatch, earlier: int
) -> None:
    """Tested for each of the two versions that may be replaced."""
    turn, reader = new_turn(), new_turn()
    with reader:
        pass
    with turn:
        for offset in range(earlier):
            turn.write_mark(ONE._replace(written=Head(100 + offset, "00000000000000cc")))
        before = reader.read_mark()
        assert before is not None
        size = mark_module.VERSION_SIZE
        for count in range(size):

            def die(memory: memoryview, data: bytes, position: int, count: int = count) -> None:
                memory[position : position + count] = data[:count]
                raise _DiedError

            with monkeypatch.context() as patch, pytest.raises(_DiedError):
                patch.setattr(turn_module.operations, "write_mapped", die)
                turn.write_mark(TWO)
            # All bytes except the last can equal the complete mark only if the missing byte is the same by chance.
            assert reader.read_mark() in ((before, TWO) if count == size - 1 else (before,))
        turn.write_mark(TWO)
        assert turn.read_mark() == reader.read_mark() == TWO


@pytest.mark.parametrize("position", range(mark_module.MARK_SIZE))
def test_no_changed_byte_results_in_another_valid_mark(
    new_turn: Callable[[], Turn], layout: Layout, position: int
) -> None:
    turn = new_turn()
    with turn:
        turn.write_mark(ONE)
        turn.write_mark(TWO)
    with layout.lock_path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x55]))
    assert turn.read_mark() in (ONE, TWO)


def test_only_one_process_has_the_turn(new_turn: Callable[[], Turn]) -> None:
    one, other = new_turn(), new_turn()
    order: list[str] = []

    def wait() -> None:
        with other:
            order.append("other")

    with one:
        thread = in_thread(wait)
        until(lambda: other.seconds_waiting() > 0)
        order.append("one")
    thread.join(10)
    assert order == ["one", "other"]


def test_the_kernel_releases_the_turn_of_a_process_that_dies(new_turn: Callable[[], Turn], layout: Layout) -> None:
    turn = new_turn()
    with Holder(layout) as process:
        thread = in_thread(lambda: turn.__enter__())
        until(lambda: turn.seconds_waiting() > 0)
        process.kill()
        thread.join(10)
        assert turn.held


class Holder:
    """Another process, which holds the turn."""

    def __init__(self, layout: Layout, code: str = "") -> None:
        script = (
            "import sys, time\n"
            "from eventfold._files.paths import Layout\n"
            "from eventfold._files.turn import Turn\n"
            "turn = Turn(Layout(sys.argv[1]))\n"
            "turn.__enter__()\n"
            f"{code}\n"
            "print('held', flush=True)\n"
            "time.sleep(60)\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, str(layout.dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> subprocess.Popen[str]:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        with self.process:
            pass


def test_a_turn_held_too_long_is_logged_once_with_the_id_of_its_process(
    new_turn: Callable[[], Turn],
    layout: Layout,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(turn_module, "STUCK_AFTER", 0.05)
    turn = new_turn()
    with Holder(layout) as process:
        os.kill(process.pid, signal.SIGSTOP)
        thread = in_thread(lambda: turn.__enter__())
        until(lambda: turn.seconds_waiting() > 0.05)
        turn.warn_if_stuck()
        turn.warn_if_stuck()
        assert len(caplog.messages) == 1
        assert f"process {process.pid}" in caplog.text
        os.kill(process.pid, signal.SIGCONT)
        process.kill()
        thread.join(10)
        assert turn.seconds_waiting() == 0


def test_a_turn_that_arrives_after_its_wait_was_given_up_is_released(
    new_turn: Callable[[], Turn], layout: Layout
) -> None:
    one, other, third = new_turn(), new_turn(), new_turn()
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            other.__enter__()
        except TurnGivenUpError as error:
            raised.append(error)

    with one:
        thread = in_thread(wait)
        until(lambda: other.seconds_waiting() > 0)
        assert other.give_up()
    thread.join(10)
    assert f"process {os.getpid()}" in str(raised[0])
    with third:
        pass
    with pytest.raises(TurnGivenUpError):
        other.__enter__()
    assert not one.give_up(), "nobody stood waiting there"


@pytest.mark.parametrize("replace", [False, True])
def test_a_deleted_lock_file_ends_the_writer_and_a_new_writer_creates_it_again(
    new_turn: Callable[[], Turn], layout: Layout, replace: bool
) -> None:
    turn = new_turn()
    with turn:
        turn.write_mark(ONE)
    layout.lock_path.unlink()
    newer = new_turn() if replace else None
    with pytest.raises(WriterFailedError, match="deleted or replaced"):
        turn.__enter__()
    with newer or new_turn() as newer:
        assert newer.read_mark() is None


@pytest.mark.parametrize("size", [0, 1, 100, FILE_SIZE - 1])
def test_a_truncated_lock_file_is_restored_possibly_without_its_mark(
    new_turn: Callable[[], Turn], layout: Layout, size: int
) -> None:
    """Reading a mapping beyond the file's end would kill the process with SIGBUS."""
    turn = new_turn()
    with turn:
        turn.write_mark(ONE)
    turn.synced_head = Head(7, "00000000000000dd")
    os.truncate(layout.lock_path, size)
    assert turn.read_mark() is None
    assert turn.durable_head() == Head(7, "00000000000000dd")
    with turn:
        assert turn.read_mark() in (None, ONE)
        turn.write_mark(TWO)
    assert layout.lock_path.stat().st_size == FILE_SIZE
    assert turn.read_mark() == TWO


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * FILE_SIZE, b"EVTMARK\1" * 512, bytes(10 * FILE_SIZE)])
def test_planted_bytes_are_not_a_mark(new_turn: Callable[[], Turn], layout: Layout, content: bytes) -> None:
    layout.lock_path.write_bytes(content)
    turn = new_turn()
    with turn:
        assert turn.read_mark() is None
        turn.write_mark(ONE)
        assert turn.read_mark() == ONE


def test_the_error_about_a_lock_that_is_not_a_file_names_its_path(layout: Layout) -> None:
    os.mkfifo(layout.lock_path)
    with pytest.raises(CorruptLogError, match=r"app\.jsonl\.lock.*not a regular file"):
        Turn(layout)
    layout.lock_path.unlink()
    layout.lock_path.mkdir()
    with pytest.raises(IsADirectoryError):
        Turn(layout)


def test_a_full_disk_is_an_error_and_releases_the_turn(new_turn: Callable[[], Turn], faults: FaultInjector) -> None:
    turn = new_turn()
    faults.fail("write")
    with pytest.raises(OSError, match="made to fail"):
        turn.__enter__()
    with new_turn():
        pass
    with turn:
        pass


def test_a_forked_child_does_not_keep_the_turn_of_its_parent(new_turn: Callable[[], Turn], layout: Layout) -> None:
    """The child keeps the turn neither through the file nor through the mapping, which has its own descriptor."""
    # The child lives until its standard input ends, which happens when this test closes the pipe.
    fork = (
        "from eventfold._files.mark import Mark\n"
        "turn.write_mark(Mark((0, ''), (0, '')))\n"
        "if not __import__('os').fork():\n"
        "    sys.stdin.read()\n"
        "    sys.exit()\n"
    )
    turn = new_turn()
    with Holder(layout, fork) as process:
        thread = in_thread(lambda: turn.__enter__())
        until(lambda: turn.seconds_waiting() > 0)
        process.kill()
        thread.join(5)
        assert turn.held


async def test_reading_the_durable_head_does_not_block_the_event_loop(new_turn: Callable[[], Turn]) -> None:
    """The guard of the event loop checks that."""
    turn = await asyncio.to_thread(new_turn)

    def write() -> None:
        with turn:
            turn.write_mark(ONE)

    await asyncio.to_thread(write)
    assert turn.durable_head() == ONE.durable
    await asyncio.to_thread(turn.close)
    assert turn.durable_head() is None
