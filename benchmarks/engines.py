"""The same work on each engine, compared with asyncpg (a row and a transaction per event) and nats-py (a message per
event).

It starts a PostgreSQL server and four nats-servers, one alone and three in a cluster, all of which sync what they
acknowledge, and needs the binaries of the servers that the chosen contenders use. `R3` has a replica on each server of
the cluster. With `postgres`, the index is measured too. Clients and servers share the machine's processors, so only the
ratios matter. The ready-made commits of nats-py are messages of a thousand encoded events, like those of eventfold: no
program can append faster through these servers. The exit status is 1 if eventfold does not reach a minimum.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import resource
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from time import monotonic_ns, perf_counter, process_time
from typing import Any

import msgspec
from tests.jetstream.servers import Servers
from tests.postgres.servers import running_server

from . import _engine_index
from ._engine_contenders import CONTENDERS, PLAIN, Contender, PlainNats, contender_of
from ._harness import Case, Figures, Goal, Table, measure

TASKS = (1, 100, 1000)
# How many times as fast as plain asyncpg the engine must be.
APPEND_FLOOR, REPLAY_FLOOR = 15.0, 5.0
_TAILED = 100  # events to a tail, and seconds between them
_TAIL_INTERVAL = 0.01
_IN_FLIGHT = (1, 2, 4)  # ready-made commits at once


async def appends(append: Callable[[int], Awaitable[Any]], tasks: int, seconds: float) -> Figures:
    """The rate at which calls return if each of the tasks makes one after the other, and the processor time of one."""
    done, start, cpu = 0, perf_counter(), process_time()

    async def run(task: int) -> None:
        nonlocal done
        while perf_counter() < start + seconds:
            await append(task)
            done += 1

    await asyncio.gather(*map(run, range(tasks)))
    return {"rate": done / (perf_counter() - start), "cpu": (process_time() - cpu) / done * 1e6}


async def ready_commits(contender: PlainNats, in_flight: int, seconds: float) -> Figures:
    """The rate of events if `in_flight` messages of a thousand events are always under way."""
    done, start, cpu = 0, perf_counter(), process_time()

    async def run() -> None:
        nonlocal done
        while perf_counter() < start + seconds:
            done += await contender.append_commit()

    await asyncio.gather(*(run() for _ in range(in_flight)))
    return {"rate": done / (perf_counter() - start), "cpu": (process_time() - cpu) / done * 1e6}


async def replay(contender: Contender, filled: Mapping[str, int], places: Mapping[str, str]) -> Figures:
    """Reads in a separate process, to measure its processor time and memory."""
    found = await in_other_process("--replay", contender.name, places)
    figures = msgspec.json.decode(found[-1], type=dict[str, float])
    if (count := figures.pop("events")) != filled[contender.name]:
        raise AssertionError(f"{contender.name} has {count} events, and not {filled[contender.name]}")
    return figures


async def replay_as_other_process(name: str, places: str) -> None:
    contender = contender_of(name, msgspec.json.decode(places))
    await contender.open(read_only=True)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = perf_counter(), process_time()
    count = await contender.replay()
    seconds, cpu = perf_counter() - start, process_time() - cpu
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    await contender.aclose()
    figures = {"events": count, "rate": count / seconds, "cpu": cpu / count * 1e6, "memory": memory / 1024}
    print(msgspec.json.encode(figures).decode())


async def tailed(contender: Contender, begun: Callable[[], object]) -> list[float]:
    """The milliseconds from the call of append to the tail, for each event."""
    delays: list[float] = []
    async with aclosing(contender.tail(begun)) as times:  # type: ignore[type-var]
        async for called in times:
            delays.append((monotonic_ns() - called) / 1e6)
            if len(delays) == _TAILED:
                break
    return delays


async def append_slowly(contender: Contender) -> None:
    for _ in range(_TAILED):
        await contender.append_now()
        await asyncio.sleep(_TAIL_INTERVAL)


async def to_own_tail(contender: Contender) -> Figures:
    begun = asyncio.Event()
    tailing = asyncio.create_task(tailed(contender, begun.set))
    await begun.wait()
    await append_slowly(contender)
    return percentiles(await tailing)


async def to_other_process(contender: Contender, places: Mapping[str, str]) -> Figures:
    found = await in_other_process("--tail", contender.name, places, lambda: append_slowly(contender))
    return percentiles(msgspec.json.decode(found[-1], type=list[float]))


async def in_other_process(
    option: str, name: str, places: Mapping[str, str], meanwhile: Callable[[], Awaitable[None]] | None = None
) -> list[bytes]:
    """The lines that this program prints with an option; `meanwhile` is called after the first line."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.engines", option, name, msgspec.json.encode(places).decode()),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    first = await process.stdout.readline()
    if meanwhile is not None:
        await meanwhile()
    lines = [first, *(await process.stdout.read()).splitlines()]
    await process.wait()
    return lines


async def tail_as_other_process(name: str, places: str) -> None:
    contender = contender_of(name, msgspec.json.decode(places))
    await contender.open(read_only=True)
    delays = await tailed(contender, lambda: print("begun", flush=True))
    await contender.aclose()
    print(msgspec.json.encode(delays).decode())


def percentiles(delays: list[float]) -> Figures:
    return {"p50": statistics.median(delays), "p99": statistics.quantiles(delays, n=100)[98]}


def tables(runner: asyncio.Runner, places: Mapping[str, str], options: argparse.Namespace) -> Iterator[Table]:
    """The tables, with all contenders open in one event loop."""
    contenders = [contender_of(name, places) for name in options.only or CONTENDERS]
    for contender in contenders:
        runner.run(contender.open())

    def cases(work: str, call: Callable[[Any], Coroutine[Any, Any, Figures]], floor: float | None = None) -> list[Case]:
        return [
            Case(
                work,
                contender.name,
                lambda contender=contender: runner.run(call(contender)),  # type: ignore[misc]
                (Goal(floor, to=f"{work}, {PLAIN[contender.name]}"),)
                if floor is not None and contender.name in PLAIN
                else (),
                f"{work}, {PLAIN.get(contender.name, contenders[0].name)}",
            )
            for contender in contenders
        ]

    found = []
    for tasks in TASKS:
        work = f"{tasks:,} task{'s' * (tasks > 1)}"
        floor = APPEND_FLOOR if tasks == TASKS[-1] else None
        found += cases(work, lambda c, tasks=tasks: appends(c.append, tasks, options.seconds), floor)
    for contender in contenders:
        if isinstance(contender, PlainNats):
            for count in _IN_FLIGHT:
                found.append(
                    Case(
                        f"{count} ready-made commit{'s' * (count > 1)} of {TASKS[-1]:,}",
                        contender.name,
                        lambda c=contender, n=count: runner.run(ready_commits(c, n, options.seconds)),  # type: ignore[misc]
                        reference=f"{TASKS[-1]:,} tasks, {contender.name}",
                    )
                )
    found += cases("append_if, 1 task", lambda c: appends(c.append_if, 1, options.seconds))
    columns = {"rate": "events/s", "cpu": "µs an event"}
    notes = ["The processor time is the client's, without the servers'."]
    yield Table("append", "appends", columns, found, more_is_better=True, notes=notes)

    columns = {"p50": "ms", "p99": "ms"}
    found = cases("same process", to_own_tail)
    found += cases("another process", lambda c: to_other_process(c, places))
    yield Table("tail", "from the call of append to a tail", columns, found, warm_up=False)

    filled = {contender.name: runner.run(contender.fill(options.events)) for contender in contenders}
    found = cases(f"{options.events:,} events", lambda c: replay(c, filled, places), REPLAY_FLOOR)
    columns = {"rate": "events/s", "cpu": "µs an event", "memory": "MiB"}
    notes = ["Each in a separate process: its processor time, and the growth of its peak memory."]
    yield Table("replay", "reading and decoding all events", columns, found, more_is_better=True, notes=notes)
    for contender in contenders:
        runner.run(contender.aclose())
    if "postgres" in (options.only or CONTENDERS):
        yield from _engine_index.tables(runner, places, options, appends)


def started(names: Sequence[str], stack: contextlib.ExitStack) -> dict[str, str]:
    """The directory and the addresses of the servers that these contenders need, until the stack is closed."""
    directory = stack.enter_context(tempfile.TemporaryDirectory())
    places = {"files": directory, "postgres": "", "server": "", "cluster": ""}
    if {"asyncpg", "postgres"} & set(names):
        places["postgres"] = stack.enter_context(running_server()).address()
    for place, count, users in (
        ("server", 1, {"nats-py", "jetstream"}),
        ("cluster", 3, {"nats-py R3", "jetstream R3"}),
    ):
        if users & set(names):
            servers = Servers(Path(directory, place), count)
            stack.callback(servers.kill)
            servers.start()
            places[place] = "nats://" + ",".join(address.removeprefix("nats://") for address in servers.addresses)
    return places


def main() -> int:
    """Measures and prints tables; returns 1 if a minimum was not reached."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="duration of each case in each round (default: %(default)s)"
    )
    parser.add_argument(
        "--events",
        type=int,
        default=1_000_000,
        help="number of events to replay, a multiple of 1,000 (default: %(default)s)",
    )
    parser.add_argument(
        "--tagged",
        type=int,
        default=100_000,
        help="number of events in the log whose tags are looked up (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of interleaved rounds (default: %(default)s)")
    parser.add_argument(
        "--only", action="append", choices=CONTENDERS, help="measure only this contender; may be repeated"
    )
    parser.add_argument("--tail", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--replay", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tail:
        asyncio.run(tail_as_other_process(*options.tail))
        return 0
    if options.replay:
        asyncio.run(replay_as_other_process(*options.replay))
        return 0
    reached = True
    with contextlib.ExitStack() as stack:
        places = started(options.only or CONTENDERS, stack)
        runner = stack.enter_context(asyncio.Runner())
        for table in tables(runner, places, options):
            result = measure(table, options.rounds)
            result = replace(result, ours="postgres")
            print(result, end="\n\n", flush=True)
            reached = reached and all(verdict.reached for verdict in result.verdicts())
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
