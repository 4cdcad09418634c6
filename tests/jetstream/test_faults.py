"""Three servers of which one, two or all are killed or stopped while two processes append, conditionally too.

Whatever was acknowledged is there once, nothing is there twice, the order of each task is kept, and a tail that was
running all the time has seen exactly what is in the log. `EVENTFOLD_NATS_ROUNDS` makes more rounds.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.jetstream.servers import Servers

from eventfold import EventLog, Record
from eventfold.jetstream import JetStream

ROUNDS = int(os.environ.get("EVENTFOLD_NATS_ROUNDS", "4"))
TASKS = 50
PROGRAM = Path(__file__).with_name("appending_worker.py")
FAULTS = ("kill one", "stop one", "kill two", "stop two", "kill all")


async def _harm(servers: Servers, fault: str, choice: random.Random) -> None:
    action, count = fault.split()
    victims = choice.sample(servers.all, {"one": 1, "two": 2, "all": 3}[count])
    for server in victims:
        if action == "kill":
            await asyncio.to_thread(server.kill)
        else:
            server.signal(signal.SIGSTOP)
    await asyncio.sleep(choice.uniform(0.5, 3))
    for server in victims:
        if action == "kill":
            server.start()
        else:
            server.signal(signal.SIGCONT)
    for server in servers.all:
        await asyncio.to_thread(server.wait_until_ready)
    await asyncio.sleep(choice.uniform(0.2, 1))


async def test_servers_that_are_killed_or_stopped_lose_and_double_nothing(
    own_servers: Callable[[int], Servers], capsys: pytest.CaptureFixture[str]
) -> None:
    servers = await asyncio.to_thread(own_servers, 3)
    engine = JetStream(servers.addresses, "faults", replicas=3, timeout=30, attempt_timeout=1)
    choice = random.Random(os.environ.get("EVENTFOLD_NATS_SEED", "1"))
    outcomes: dict[str, Counter[tuple[str, int, int]]] = {}
    seen: list[Record] = []

    async def follow(log: EventLog) -> None:
        async for record in log.tail(0):
            seen.append(record)

    async with EventLog.open(engine) as log:
        following = asyncio.create_task(follow(log))
        workers = {
            name: await asyncio.create_subprocess_exec(
                sys.executable, PROGRAM, ",".join(servers.addresses), name, str(TASKS), stdin=-1, stdout=-1
            )
            for name in ("one", "other")
        }

        async def listen(name: str) -> None:
            output = workers[name].stdout
            assert output is not None
            async for line in output:
                outcome, task, number = line.decode().split()
                outcomes.setdefault(outcome, Counter())[name, int(task), int(number)] += 1

        listening = [asyncio.create_task(listen(name)) for name in workers]
        await asyncio.sleep(1)
        for fault in itertools.islice(itertools.cycle(FAULTS), ROUNDS):
            await _harm(servers, fault, choice)
        for worker in workers.values():
            assert worker.stdin is not None
            worker.stdin.close()
        await asyncio.wait_for(asyncio.gather(*listening, *(worker.wait() for worker in workers.values())), 120)
        assert [worker.returncode for worker in workers.values()] == [0, 0]

        found = [record async for record in log.read_full()]
        async with asyncio.timeout(30):
            while len(seen) < len(found):
                await asyncio.sleep(0.05)
        following.cancel()

    there = Counter((data["worker"], data["task"], data["number"]) for data in (record.event.data for record in found))
    with capsys.disabled():
        counts = {name: len(numbers) for name, numbers in outcomes.items()}
        print(f"\n{ROUNDS} rounds: {counts}, {len(found)} events in the log")

    assert seen == found
    assert max(there.values()) == 1
    assert not outcomes["acknowledged"].keys() - there.keys()
    assert not outcomes.get("refused", Counter()).keys() & there.keys()
    order: dict[tuple[str, int], int] = {}
    for worker, task, number in there:
        assert order.get((worker, task), -1) < number
        order[worker, task] = number
