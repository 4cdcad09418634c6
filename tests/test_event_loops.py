"""One program in several kinds of event loop: eager tasks, uvloop, few descriptors, no threads, and loops that end."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.support import FaultInjector, event, no_thread, numbers, settle

from eventfold import Event, EventfoldError, EventLog, EventReader, EventWriter, View

PROGRAM = """
import asyncio, sys
from eventfold import Event, EventLog, View

async def main(directory):
    async with EventLog.open(directory, views=[View("count", lambda n, event: n + 1, 0)], max_log_size=2000) as log:
        for round in range(5):
            await asyncio.gather(*(log.append(Event("a", {"n": n})) for n in range(20)))
            await log.append_many([Event("b"), Event("c")])
        await log.append_if(Event("d"), *log.head)
        await log.refresh_all()
        await log.rotate()
        print(log.view("count"))
"""
RUNS = {
    "plain": "asyncio.run(main(sys.argv[1]))",
    "eager": "async def eager(d):\n"
    "    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)\n"
    "    await main(d)\n"
    "asyncio.run(eager(sys.argv[1]))",
    "uvloop": "import uvloop\nuvloop.run(main(sys.argv[1]))",
    "anyio": "import anyio\nanyio.run(main, sys.argv[1])",
}


def run(script: str, directory: Path, *flags: str, shell: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "-c", script, str(directory)]
    if shell:
        command = ["sh", "-c", f'{shell}; exec "$@"', "sh", *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("kind", RUNS)
def test_the_same_program_runs_in_every_kind_of_loop(tmp_path: Path, kind: str) -> None:
    """Development mode shows no warning."""
    if kind == "eager" and sys.version_info < (3, 12):
        pytest.skip("eager tasks came with Python 3.12")
    if kind == "uvloop":
        pytest.importorskip("uvloop")
    flags = ("-X", "dev", "-W", "error") if kind in ("plain", "eager") else ()
    done = run(PROGRAM + RUNS[kind], tmp_path / "data", *flags)
    # On a busy machine, development mode reports slow steps.
    said = [line for line in done.stderr.splitlines() if not line.startswith("Executing <")]

    assert (done.stdout, said) == ("111\n", [])


def test_a_few_descriptors_are_enough(tmp_path: Path) -> None:
    """Small logs that rotate again and again keep a few old files open, not all of the last minute."""
    script = PROGRAM.replace("range(5)", "range(100)").replace("2000", "1") + RUNS["plain"]
    done = run(script, tmp_path / "data", shell="ulimit -n 64")

    assert (done.stdout, done.stderr) == ("2201\n", "")


def can_unshare() -> bool:
    """Whether a process can get a pid namespace of its own here."""
    tried = [] if shutil.which("unshare") is None else ["unshare", "--pid", "--fork", "true"]
    return bool(tried) and subprocess.run(tried, capture_output=True).returncode == 0


@pytest.fixture
def pid_namespaces() -> None:
    if not can_unshare():
        pytest.skip("needs unshare, and the right to make pid namespaces")


def test_the_same_program_runs_as_the_first_process(tmp_path: Path, pid_namespaces: None) -> None:
    """In a container, the program may be the only process."""
    script = PROGRAM + "import os\nassert os.getpid() == 1\n" + RUNS["plain"]
    done = run(script, tmp_path / "data", shell='set -- unshare --pid --fork "$@"')

    assert (done.stdout, done.stderr) == ("111\n", "")


async def test_a_process_in_another_pid_namespace_can_read_but_not_write(data_dir: Path, pid_namespaces: None) -> None:
    """Both processes may have the same id, but the lock depends only on files."""
    async with EventLog.open(data_dir) as log:
        await log.append(event(0))
        shell = 'set -- unshare --pid --fork "$@"'
        locked = await asyncio.to_thread(run, PROGRAM + RUNS["plain"], data_dir, shell=shell)
        read = "import asyncio, sys\nfrom eventfold import EventReader\n"
        read += "print(asyncio.run(EventReader(sys.argv[1]).head()).offset)"
        beside = await asyncio.to_thread(run, read, data_dir, shell=shell)
        assert int(beside.stdout) == log.head.offset
    afterwards = await asyncio.to_thread(run, PROGRAM + RUNS["plain"], data_dir, shell=shell)

    assert "LogLockedError" in locked.stderr
    assert (afterwards.stdout, afterwards.stderr) == ("112\n", "")


# Ends of loops


def test_an_append_in_the_clean_up_of_a_cancelled_task_succeeds(tmp_path: Path) -> None:
    """When `asyncio.run` cancels all remaining tasks, the writer's task continues for those that still append."""
    appended: list[int] = []

    async def worker(log: EventLog) -> None:
        try:
            while True:
                await log.append(event(0))
        finally:
            await log.append(event(1))
            await log.append_many([event(2), event(3)])
            appended.append(log.head.offset)
            await log.aclose()

    async def main() -> None:
        log = await EventLog.open(tmp_path)
        tasks.append(asyncio.create_task(worker(log)))
        await asyncio.sleep(0.02)

    tasks: list[Any] = []
    asyncio.run(main())
    found = asyncio.run(numbers(EventReader(tmp_path)))

    assert appended
    assert found[-3:] == [1, 2, 3]


def test_a_rotation_is_finished_if_its_loop_ends(tmp_path: Path, faults: FaultInjector) -> None:
    """The switch goes on in the thread while all tasks are cancelled, and no file is closed that it still uses."""

    async def main() -> None:
        log = await EventLog.open(tmp_path)
        await log.append(event(0))
        gate = faults.freeze("rename")
        rotation = asyncio.create_task(log.rotate())
        await gate.reached()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await settle()
        assert rotation.done()
        gate.open()
        await log.append(event(1))
        await log.aclose()

    asyncio.run(main())

    assert asyncio.run(numbers(EventReader(tmp_path))) == [0, 1]
    assert not list(tmp_path.glob("app.jsonl.next.*"))


# Other loops


async def test_an_append_from_another_loop_is_refused_before_anything_is_queued(data_dir: Path) -> None:
    """The error says what to do, and no event reaches the log."""
    async with EventWriter.open(data_dir) as writer:

        def elsewhere() -> list[BaseException]:
            async def calls() -> list[Any]:
                made = [writer.append(event(1)), writer.append_many([event(2)]), writer.append_if(event(3), 0, "")]
                return await asyncio.gather(*made, writer.rotate(), writer.aclose(), return_exceptions=True)

            return asyncio.run(calls())

        errors = await asyncio.to_thread(elsewhere)
        await writer.append(event(4))
        found = await numbers(writer.reader())

    assert [type(error) for error in errors] == [EventfoldError] * 5
    assert "run_coroutine_threadsafe" in str(errors[0])
    assert found == [4]


def test_a_writer_whose_loop_has_ended_can_be_closed_in_another(tmp_path: Path) -> None:
    """Closing releases the lock."""
    writers: list[EventWriter] = []

    async def main() -> None:
        writers.append(await EventWriter.open(tmp_path))
        await writers[0].append(event(1))

    async def close_and_reopen() -> list[int]:
        await writers[0].aclose()
        async with EventWriter.open(tmp_path) as writer:
            await writer.append(event(2))
            return await numbers(writer.reader())

    asyncio.run(main())

    assert asyncio.run(close_and_reopen()) == [1, 2]


# No threads


async def test_an_opening_without_a_thread_opens_nothing(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening raises `OSError`; once threads can be started again, it succeeds."""
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(OSError, match="no thread can be started"):
            await EventWriter.open(data_dir)
    async with EventWriter.open(data_dir) as writer:
        await writer.append(event(1))


async def test_a_close_without_a_thread_releases_the_lock(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer has its own thread; work that needs another one fails, and `aclose` raises that error afterwards."""

    class Unsaved:
        name, offset = "unsaved", 0

        async def save(self, reader: EventReader) -> None:
            raise OSError("no thread can be started")

    writer = await EventWriter.open(data_dir)
    await writer.append(event(1))
    writer._attach([Unsaved()])  # type: ignore[list-item]
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(OSError, match="no thread"):
            await writer.aclose()
    async with EventWriter.open(data_dir) as again:
        await again.append(event(2))


def test_the_views_of_a_log_in_two_loops_one_after_the_other(tmp_path: Path) -> None:
    """Each `asyncio.run` opens the log again."""

    def count(state: int, event: Event) -> int:
        return state + 1

    async def main() -> int:
        async with EventLog.open(tmp_path, views=[View("count", count, 0)]) as log:
            await log.append(event(1))
            await log.refresh_all()
            return int(log.view("count"))

    assert [asyncio.run(main()) for _ in range(3)] == [1, 2, 3]


def test_a_program_without_anyio_need_not_wait_for_its_import(tmp_path: Path) -> None:
    """anyio loads its backend with the first scope, which takes 20 ms during which nothing else runs."""
    program = """
import asyncio, sys
from eventfold import Event, EventLog

async def main():
    async with EventLog.open(sys.argv[1]) as log:
        appending = asyncio.create_task(log.append(Event("added", {})))
        await asyncio.sleep(0)
        appending.cancel()

asyncio.run(main())
print(sorted(name for name in sys.modules if name.startswith("anyio._backends.")))
"""
    ran = run(program, tmp_path)

    assert (ran.stdout, ran.stderr) == ("[]\n", "")
