"""A job queue without a server: the workers of one machine share jobs, and redo the job of a killed worker.

    python docs/examples/jobs.py add "resize cat.png" "resize dog.png" --seconds 3
    python docs/examples/jobs.py work        # in as many terminals as you like
    python docs/examples/jobs.py list

A worker takes a job for a few seconds, and extends this time while it works. Kill a worker (`kill -9`) in the middle of
a job: when its time is up, another worker takes the job. Ctrl-C gives the job back at once.
"""

import argparse
import asyncio
import contextlib
import os
import secrets
import signal
import sys
import time

import msgspec

from eventfold import Catalog, ConditionalAppendError, Event, EventfoldError, EventLog, LockMode, Query, View

catalog = Catalog()


def job_tag(event) -> list[str]:
    return [f"job:{event.job}"]


@catalog.event("job_added", tags=job_tag)
class JobAdded(msgspec.Struct, frozen=True):
    job: str
    task: str
    seconds: float


@catalog.event("job_taken", tags=job_tag)
class JobTaken(msgspec.Struct, frozen=True):
    job: str
    worker: str
    until: float  # seconds since the epoch; stored in the event because a reducer must not use the clock


@catalog.event("job_released", tags=job_tag)
class JobReleased(msgspec.Struct, frozen=True):
    job: str


@catalog.event("job_done", tags=job_tag)
class JobDone(msgspec.Struct, frozen=True):
    job: str
    worker: str
    result: str


class Job(msgspec.Struct):
    task: str
    seconds: float
    worker: str = ""
    until: float = 0.0
    result: str | None = None


Jobs = dict[str, Job]


class LostError(Exception):
    """The worker took too long, and another one has taken its job."""


def reduce_jobs(jobs: Jobs, event: Event) -> Jobs:
    match event.data:
        case JobAdded(job, task, seconds):
            jobs[job] = Job(task, seconds)
        case JobTaken(job, worker, until):
            jobs[job].worker, jobs[job].until = worker, until
        case JobReleased(job):
            jobs[job].worker, jobs[job].until = "", 0.0
        case JobDone(job, _, result):
            jobs[job].result = result
    return jobs


class Worker:
    def __init__(self, log: EventLog, jobs: View[Jobs], lease: float) -> None:
        self.log, self.jobs, self.lease = log, jobs, lease
        # A process id may be reused after a reboot or in another container; the random part never is.
        self.name = f"{os.getpid()}-{secrets.token_hex(4)}"

    async def take(self) -> str | None:
        """Takes the first free job; returns None if there is none."""
        while True:
            jobs, offset = await self.log.wait_until(self.jobs), self.jobs.offset
            now = time.time()
            free = (name for name, job in jobs.items() if job.result is None and job.until < now)
            if (name := next(free, None)) is None:
                return None
            taken = JobTaken(name, self.name, now + self.lease)
            try:
                # If several workers try at the same time, one succeeds, and its event makes the others fail.
                await self.log.append_unless([taken], Query(tags=[f"job:{name}"]), after=offset)
                return name
            except ConditionalAppendError:
                continue  # look for another job

    async def tell(self, name: str, event: object) -> None:
        """Appends an event about a job if the job still belongs to this worker."""

        def decide(jobs: Jobs) -> object:
            if jobs[name].worker != self.name or jobs[name].result is not None:
                raise LostError(f"{self.name} was too late with {jobs[name].task}: another worker has it")
            return event

        await self.log.decide(self.jobs, decide, query=Query(tags=[f"job:{name}"]))

    async def keep(self, name: str) -> None:
        while True:
            await asyncio.sleep(self.lease / 3)
            await self.tell(name, JobTaken(name, self.name, time.time() + self.lease))

    async def do(self, name: str) -> None:
        """Does a job that was taken, and extends its time until the job is done."""
        job = self.jobs.state[name]
        print(f"{self.name} begins {job.task}", flush=True)
        try:
            async with asyncio.TaskGroup() as group:
                keeping = group.create_task(self.keep(name))
                result = await perform(job)
                keeping.cancel()
            await self.tell(name, JobDone(name, self.name, result))
            print(f"{self.name} has done {job.task}", flush=True)
        except* LostError as lost:
            print(*lost.exceptions, flush=True)

    async def work(self) -> None:
        """Does jobs until cancelled."""
        while True:
            if (name := await self.take()) is None:
                # Wait for a new job; the timeout covers a killed worker's job becoming free, which is not an event.
                await self.log.wait_for_events(self.jobs.offset, timeout=self.lease / 3)
                continue
            try:
                await self.do(name)
            except asyncio.CancelledError:
                with contextlib.suppress(LostError):  # the job may have just been done
                    await self.tell(name, JobReleased(name))
                raise


async def perform(job: Job) -> str:
    """Stands in for the real work. It may be done twice if a worker dies before it has recorded the result."""
    await asyncio.sleep(job.seconds)
    return job.task.upper()


def describe(job: Job) -> str:
    if job.result is not None:
        return f"done: {job.result}"
    return f"taken by {job.worker}" if job.until > time.time() else "waiting"


async def run(args: argparse.Namespace) -> None:
    jobs: View[Jobs] = View("jobs", reduce_jobs, dict, state_type=Jobs)
    async with EventLog.open(args.dir, catalog=catalog, views=[jobs], lock=LockMode.SHARED) as log:
        match args.command:
            case "add":
                await log.append_many(JobAdded(secrets.token_hex(4), task, args.seconds) for task in args.task)
            case "work":
                # Ctrl-C cancels this task; SIGTERM from a supervisor or a container should do the same.
                asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
                await Worker(log, jobs, args.lease).work()
            case "list":
                for job in jobs.state.values():
                    print(f"{job.task:<30} {describe(job)}")


def seconds(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise ValueError
    return value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A job queue without a server.")
    parser.add_argument("--dir", default="jobs-data", help="where the queue is (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="add jobs")
    adding.add_argument("task", nargs="+")
    adding.add_argument("--seconds", type=seconds, default=1.0, help="how long each takes (default: %(default)s)")
    working = commands.add_parser("work", help="do jobs until Ctrl-C")
    working.add_argument("--lease", type=seconds, default=10.0, help="seconds for which a job is taken at a time")
    commands.add_parser("list", help="show the jobs")
    try:
        asyncio.run(run(parser.parse_args()))
    except (EventfoldError, OSError) as error:
        sys.exit(f"jobs: {error}")
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)
