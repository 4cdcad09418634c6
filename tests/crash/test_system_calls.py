"""A real program in which every system call on the log's files fails once, is cut short, or is the last.

strace makes them fail. A run without faults shows which calls there are and on which paths. `when=N` counts them by
name and thread, so the program does its file work in one thread, where every call has its number. In the runs with many
threads, the Nth call of each of them fails. By default, a sample is run, and with `EVENTFOLD_STRACE=all` every call: N
grows until the program makes no Nth call any more.
"""

from __future__ import annotations

import asyncio
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import NamedTuple

import pytest
from tests.crash import faulty_program
from tests.crash.oracle import Opened, append, read
from tests.support import event, line

from eventfold import Event, EventLog, EventReader, LockMode
from eventfold._files import operations, rotation

pytestmark = pytest.mark.strace

ALL = os.environ.get("EVENTFOLD_STRACE") == "all"
CALLS = ("openat", "pwrite64", "write", "fdatasync", "fsync", "rename", "unlink", "ftruncate", "mkdir")
# The calls of readers, and the lock; they don't change files.
MORE_CALLS = ("pread64", "getdents64", "flock")
# Names of the same calls on other machines and in other C libraries.
VARIANTS = (
    "open",
    "creat",
    "pwritev",
    "pwritev2",
    "writev",
    "renameat",
    "renameat2",
    "unlinkat",
    "truncate",
    "mkdirat",
)
ERRORS = ("error=EIO", "error=ENOSPC")
KILL = "signal=KILL"
SHORT = "retval=5"
# The number of concurrent runs; each mostly consists of starting Python.
PROCESSES = 2
# Seconds for a run, which takes less than one on a fast machine.
LONGEST = 60
DIRECTORIES = ("new", "left", "begun")


class Fault(NamedTuple):
    """What happens to the Nth of the calls with a name, in the program with one thread or with many."""

    call: str
    what: str
    n: int
    threads: str = "one"
    lock: LockMode = LockMode.FLOCK

    def __str__(self) -> str:
        return f"{self.call} {self.n}: {self.what}, {self.threads} thread(s), {self.lock.value}"


class Run(NamedTuple):
    """A run of the program: its directory and output, whether the fault occurred, and whether it killed the program."""

    root: Path
    reported: list[list[str]]
    hit: bool
    killed: bool


class Traced(NamedTuple):
    """The calls of a run without faults: the paths, and how often the busiest thread makes each."""

    paths: list[str]
    counts: dict[str, int]


@functools.cache
def why_not() -> str:
    """Returns why system calls can't be made to fail here; empty if they can."""
    strace = shutil.which("strace")
    if strace is None:
        return "strace is not installed"
    command = [strace, "-f", "-qq", "-e", "trace=fsync", "-e", "inject=fsync:error=EIO:when=1", "true"]
    tried = subprocess.run(command, capture_output=True, text=True)
    return f"strace can't trace here: {tried.stderr.strip()}" if tried.returncode else ""


@pytest.fixture(autouse=True)
def can_trace() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two directories that the program finds, with 12 events each."""
    root = tmp_path_factory.mktemp("template")
    for name, frames in (("left", 2), ("begun", 0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rotation, "FRAME_SIZE", 150)
            with Opened(root / name) as opened:
                for n in range(6):
                    append(opened.active, line(n))
                opened.rotate()
                for n in range(6, 12):
                    append(opened.active, line(n))
                stop_rotation_after(patch, opened, frames)
        with (root / name / "app.jsonl").open("ab") as log:
            log.write(line(12)[:20])
    return root


def stop_rotation_after(patch: pytest.MonkeyPatch, opened: Opened, frames: int) -> None:
    """Begins a rotation that ends as if the process had been killed during its next frame."""
    write, left = operations.write, [frames]

    def stopping(fd: int, data: bytes, position: int) -> None:
        write(fd, data if left[0] else data[: len(data) // 2], position)
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1

    patch.setattr(operations, "write", stopping)
    patch.setattr(operations, "truncate", lambda fd, size: None)
    with pytest.raises(KeyboardInterrupt):
        opened.rotate()


def command(root: Path, threads: str, lock: LockMode) -> list[str]:
    return [sys.executable, faulty_program.__file__, threads, lock.value, *(str(root / name) for name in DIRECTORIES)]


def parsed(out: bytes) -> list[list[str]]:
    return [text.split(" ") for text in out.decode().splitlines()]


@functools.cache
def traced(template: Path, root: Path, threads: str, lock: LockMode = LockMode.FLOCK) -> Traced:
    """The calls that the program makes if none fails."""
    shutil.copytree(template, root)
    everything = ",".join("?" + call for call in (*CALLS, *VARIANTS, *MORE_CALLS))
    strace = ["strace", "-f", "-qq", "-y", "-s", "4096", "-o", f"{root}.trace", "-e", f"trace={everything}"]
    subprocess.run([*strace, *command(root, threads, lock)], check=True, capture_output=True, timeout=LONGEST)
    paths: dict[str, None] = {}
    counts: Counter[tuple[str, str]] = Counter()
    at_root = re.compile(rf'[<"]({re.escape(str(root))}(?:/[^">:]*)?)[">]')
    for call in Path(f"{root}.trace").read_text(errors="replace").splitlines():
        if (match := re.match(r"(\d+) +(\w+)\(", call)) and (found := at_root.findall(call)):
            paths.update(dict.fromkeys(path.removesuffix(" (deleted)") for path in found))
            counts[match[2], match[1]] += 1
    most: dict[str, int] = defaultdict(int)
    for (call, _), count in counts.items():
        most[call] = max(most[call], count)
    return Traced([os.path.relpath(path, root) for path in paths], dict(most))


async def run(template: Path, root: Path, fault: Fault, paths: Iterable[str]) -> Run:
    """Runs the program once with a fault."""
    await asyncio.to_thread(shutil.copytree, template, root)
    when = f":when={fault.n}" if fault.n else ""
    strace = ["strace", "-f", "-qq", "-o", f"{root}.trace", "-e", f"trace={fault.call}"]
    if fault.what != KILL:  # With the filter, strace 6.1 sends no signal.
        strace.append("--seccomp-bpf")
    strace += ["-e", f"inject={fault.call}:{fault.what}{when}"]
    for path in paths:
        strace += ["-P", str(root / path)]
    process = await asyncio.create_subprocess_exec(
        *strace, *command(root, fault.threads, fault.lock), stdout=PIPE, stderr=PIPE, start_new_session=True
    )
    try:
        out, errors = await asyncio.wait_for(process.communicate(), LONGEST)
    except TimeoutError:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("the program hangs") from None
    trace = await asyncio.to_thread(Path(f"{root}.trace").read_text, errors="replace")
    killed = "killed by SIGKILL" in trace
    reported = parsed(out)
    assert killed or (process.returncode == 0 and reported[-1] == ["end"]), errors.decode()[-1500:]
    return Run(root, reported, killed or "(INJECTED)" in trace or "(DELAYED)" in trace, killed)


class Log:
    """What the program reported about one directory."""

    def __init__(self, reported: list[list[str]], prior: range) -> None:
        self.prior = prior
        self.calls: list[tuple[int, ...]] = []
        self.fate: dict[tuple[int, ...], str] = {}
        self.ends: dict[int, int] = {}
        self.commits = [0]  # those that may be the last, in order
        for word, *rest in reported:
            if rest[:1] == ["append"]:
                numbers = tuple(map(int, rest[1].split(",")))
                self.fate[numbers] = word
                if word == "will":
                    self.calls.append(numbers)
                elif word == "did":
                    self.ends[numbers[-1]] = int(rest[2])
            elif rest[:1] == ["commit"]:
                if word == "will":
                    self.commits.append(int(rest[1]))
                elif word == "did":
                    self.commits = [int(rest[1])]

    def check(self, found: list[tuple[int, int]]) -> None:
        """Asserts that the log has these numbers, each at its end offset, as the program reported."""
        numbers = [number for number, _ in found]
        there = set(numbers)
        assert numbers == [*self.prior, *(n for call in self.calls for n in call if n in there)]
        for call in self.calls:
            count = len(there & set(call))
            assert count in {"did": [len(call)], "refused": [0]}.get(self.fate[call], [0, len(call)]), self.fate[call]
        ends = dict(found)
        assert {n: ends[n] for n in self.ends} == self.ends


def logs(reported: list[list[str]]) -> Iterator[tuple[str, Log]]:
    """Yields each directory about which the program reported something, with the reports."""
    prior = {"left": range(12), "begun": range(12), "new": range(0)}
    by_name: dict[str, list[list[str]]] = defaultdict(list)
    for words in reported:
        if words[0] == "open":
            name = Path(words[1]).name
        if words[0] != "end":
            by_name[name].append(words)
    for name in by_name:
        yield name, Log(by_name[name], prior[name])


async def check(run: Run) -> None:
    """Asserts that the log fits the reports, that views and consumers fit the log, and that the log can be used."""
    for name, log in logs(run.reported):
        directory = run.root / name
        before = [(record.event.data["n"], record.end_offset) for record in await read(directory)]
        async with EventLog.open(directory, views=faulty_program.views()) as opened:
            records = [record async for record in opened.read_full()]
            found = [(record.event.data["n"], record.end_offset) for record in records]
            log.check(found)
            assert before == found
            for view in faulty_program.views():
                wanted = [r.event for r in records if not view.event_types or r.event.type in view.event_types]
                assert opened.view(view.name) == functools.reduce(faulty_program.fold, wanted, {})
            await opened.append(event(9_000))
            async for record in opened.consumer("mailer"):
                assert record.start_offset in log.commits
                break
            await opened.rotate()
            await opened.append_many([Event("batch", {"n": n}) for n in (9_001, 9_002)])
        after = await read(directory)
        assert [record.event.data["n"] for record in after] == [*(n for n, _ in found), 9_000, 9_001, 9_002]
        assert (await EventReader(directory).head()).offset == after[-1].end_offset
        assert not list(directory.glob("app.jsonl.next.*"))


async def run_and_check(template: Path, root: Path, faults: Iterable[Fault], paths: list[str]) -> Counter[str]:
    """Runs the program with each fault; returns how many runs of each kind there were in which the fault occurred."""
    counts: Counter[str] = Counter()
    failures = []
    waiting = enumerate(faults)

    async def work() -> None:
        for number, fault in waiting:
            where = root / str(number)
            try:
                result = await run(template, where, fault, paths)
                counts[f"{fault.call} {fault.what}"] += result.hit
                await check(result)
            except Exception as error:
                failures.append(f"{fault}: {str(error) or repr(error):.2000}")
            else:
                shutil.rmtree(where)

    await asyncio.gather(*(work() for _ in range(PROCESSES)))
    print(f"{len(failures)} failures; faults that came to pass: {dict(sorted(counts.items()))}")

    assert not failures, f"{len(failures)} runs:\n" + "\n".join(failures)
    return counts


def some_of(count: int, number: int, shift: int) -> list[int]:
    """Returns a few of the numbers 1 to `count`, evenly spread; others for another shift."""
    step = max(count // number, 1)
    return [1 + (shift + i * step) % count for i in range(min(number, count))]


def faults_of(counts: dict[str, int], threads: str, lock: LockMode) -> list[Fault]:
    """Returns one fault for each call of the busiest thread and each way to fail, or a sample of these."""
    changing = sorted(set(counts) - set(MORE_CALLS))
    kinds = [(call, what) for call in changing for what in (*ERRORS, KILL)] + [("pwrite64", SHORT)]
    if ALL:
        kinds += [(call, "error=EIO") for call in MORE_CALLS if call in counts]
    chosen = []
    for shift, (call, what) in enumerate(kinds):
        count = counts[call]
        if ALL:
            numbers = range(1, count + 2)
        else:
            numbers = some_of(count, 2, shift) if threads == "one" else some_of(max(count // 3, 1), 1, shift)
        chosen += [Fault(call, what, n, threads, lock) for n in numbers]
    return chosen


@pytest.mark.parametrize(
    ("threads", "lock"), [("one", LockMode.FLOCK), ("many", LockMode.FLOCK), ("one", LockMode.SHARED)]
)
async def test_a_system_call_that_fails_loses_nothing(
    template: Path, tmp_path: Path, threads: str, lock: LockMode
) -> None:
    """Acknowledged events are there once and in order, refused ones are not, and views are a replay."""
    found = await asyncio.to_thread(traced, template, tmp_path / "traced", threads, lock)
    faults = faults_of(found.counts, threads, lock)
    if lock is LockMode.SHARED and not ALL:
        faults = faults[::8]  # Most of it is the same work.
    counts = await run_and_check(template, tmp_path, faults, found.paths)
    print(f"{threads}: {len(faults)} runs; calls {found.counts}")

    assert {"openat", "pwrite64", "fdatasync", "fsync", "ftruncate"} <= set(found.counts)
    if threads == "many":  # Which thread makes which call is a matter of chance.
        assert counts.total() >= len(faults) // 2
    elif ALL:  # Only in the last run of each kind may there be no such call any more.
        assert counts.total() >= len(faults) - len(counts)
    else:
        assert all(counts[f"{fault.call} {fault.what}"] for fault in faults)


async def test_appends_that_are_cancelled_during_a_slow_sync_are_complete_or_absent(
    template: Path, tmp_path: Path
) -> None:
    """No other event suffers from it, and events that were acknowledged meanwhile are there."""
    found = await asyncio.to_thread(traced, template, tmp_path / "traced", "many")
    faults = [
        Fault("fdatasync", f"{delay}={milliseconds * 1000}", 0, "many")
        for delay in ("delay_enter", "delay_exit")
        for milliseconds in ((1, 2, 5, 10, 20, 40) if ALL else (5, 20))
    ]
    counts = await run_and_check(template, tmp_path, faults, found.paths)

    assert counts.total() == len(faults)
