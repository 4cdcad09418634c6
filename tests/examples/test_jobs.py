"""The job queue, with real workers that are killed, suspended or stopped in the middle of a job."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic, sleep

from tests.examples.programs import WITHIN, output, process

from eventfold import Event, EventLog


@contextmanager
def workers(count: int, directory: Path, lease: float) -> Iterator[list[subprocess.Popen[str]]]:
    with ExitStack() as stack:
        command = ["work", "--lease", str(lease)]
        yield [stack.enter_context(process("jobs", *command, cwd=directory)) for _ in range(count)]


def events(directory: Path, type: str) -> list[Event]:
    """Returns the events of one type in the queue's log."""

    async def read() -> list[Event]:
        async with EventLog.open(directory / "jobs-data", read_only=True) as log:
            return [record.event async for record in log.read_full() if record.event.type == type]

    return asyncio.run(read())


def wait_for_events(directory: Path, type: str, count: int) -> list[Event]:
    """Returns all events of a type as soon as there are that many."""
    until = monotonic() + WITHIN
    while len(found := events(directory, type)) < count:
        assert monotonic() < until, f"{len(found)} of {count} {type} after {WITHIN} seconds"
        sleep(0.05)
    return found


def test_workers_share_the_jobs_and_each_is_done_once(tmp_path: Path) -> None:
    """The workers compete for the same jobs. An idle worker ends on a supervisor's signal."""
    output("jobs", "add", *(f"job {n}" for n in range(40)), "--seconds", "0.01", cwd=tmp_path)
    with workers(2, tmp_path, 60) as both:
        wait_for_events(tmp_path, "job_done", 40)
        for worker in both:
            worker.terminate()
            assert worker.communicate(timeout=WITHIN)[1] == ""
            assert worker.returncode == 130
    for type in ("job_taken", "job_done"):
        once = Counter(event.data["job"] for event in events(tmp_path, type))
        assert len(once) == 40
        assert set(once.values()) == {1}
    assert output("jobs", "list", cwd=tmp_path).count("done: JOB ") == 40


def test_the_job_of_a_killed_worker_is_done_by_another(tmp_path: Path) -> None:
    """Another worker takes the job when the dead worker's time is up; there is one result."""
    output("jobs", "add", "precious", "--seconds", "1", cwd=tmp_path)
    with workers(1, tmp_path, 0.9) as [killed]:
        assert killed.stdout.readline().endswith(" begins precious\n")
        killed.kill()
        killed.wait()
    with workers(1, tmp_path, 0.9):
        [done] = wait_for_events(tmp_path, "job_done", 1)
    taken = [event.data["worker"] for event in events(tmp_path, "job_taken")]

    assert taken[0].startswith(f"{killed.pid}-")
    assert done.data["worker"] != taken[0]
    assert done.data["result"] == "PRECIOUS"


def test_a_worker_that_resumes_too_late_does_not_report_a_result(tmp_path: Path) -> None:
    """The worker was suspended while another one did its job: there is one result, and no error."""
    output("jobs", "add", "precious", "--seconds", "1", cwd=tmp_path)
    with workers(1, tmp_path, 0.9) as [late]:
        assert late.stdout.readline().endswith(" begins precious\n")
        late.send_signal(signal.SIGSTOP)
        with workers(1, tmp_path, 0.9) as [punctual]:
            [done] = wait_for_events(tmp_path, "job_done", 1)
        late.send_signal(signal.SIGCONT)
        assert "was too late with precious" in late.stdout.readline()

    assert done.data["worker"].startswith(f"{punctual.pid}-")
    assert len(events(tmp_path, "job_done")) == 1


def test_ctrl_c_gives_the_job_back_at_once(tmp_path: Path) -> None:
    """Nobody has to wait until the worker's time is up."""
    output("jobs", "add", "long", "--seconds", "60", cwd=tmp_path)
    with workers(1, tmp_path, 60) as [leaving]:
        assert leaving.stdout.readline().endswith(" begins long\n")
        leaving.send_signal(signal.SIGINT)
        _, complaints = leaving.communicate(timeout=WITHIN)

    assert (leaving.returncode, complaints) == (130, "")
    assert output("jobs", "list", cwd=tmp_path).split() == ["long", "waiting"]
