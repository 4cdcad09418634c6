"""Three servers, some of which are killed or suspended while two processes append, some of it conditionally.

The leader, a follower, two servers or all of them are harmed. Every acknowledged event is in the log once, where it was
acknowledged, no event is there twice, the order of each task is kept, and a tail that ran all the time has seen exactly
the log. `EVENTFOLD_NATS_ROUNDS` sets the number of rounds.
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

ROUNDS = int(os.environ.get("EVENTFOLD_NATS_ROUNDS", "2"))
TASKS = 50
PROGRAM = Path(__file__).with_name("appending_worker.py")
FAULTS = (
    "kill leader",
    "stop follower",
    "kill all",
    "stop leader",
    "kill follower",
    "stop two",
    "kill two",
    "stop all",
)
OUTAGES = (0.5, 2, 7)  # seconds; there is a new leader after about five


async def _harm(servers: Servers, fault: str, outage: float, choice: random.Random) -> None:
    action, which = fault.split()
    leader = await asyncio.to_thread(servers.leader_of, "faults")
    followers = [server for server in servers.all if server is not leader]
    victims = {
        "leader": [leader],
        "follower": [choice.choice(followers)],
        "two": [leader, choice.choice(followers)],
        "all": servers.all,
    }[which]
    for server in victims:
        if action == "kill":
            await asyncio.to_thread(server.kill)
        else:
            server.signal(signal.SIGSTOP)
    await asyncio.sleep(outage)
    for server in victims:
        if action == "kill":
            server.start()
        else:
            server.signal(signal.SIGCONT)
    for server in servers.all:
        await asyncio.to_thread(server.wait_until_ready)


async def test_servers_that_are_killed_or_suspended_lose_and_duplicate_nothing(
    own_servers: Callable[[int], Servers], capsys: pytest.CaptureFixture[str]
) -> None:
    servers = await asyncio.to_thread(own_servers, 3)
    engine = JetStream(servers.addresses, "faults", replicas=3, timeout=30, attempt_timeout=1)
    choice = random.Random(os.environ.get("EVENTFOLD_NATS_SEED", "1"))
    outcomes: dict[str, Counter[tuple[str, int, int]]] = {}
    offsets: dict[tuple[str, int, int], int] = {}
    written: Counter[str] = Counter()
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
                outcome, task, number, offset = line.decode().split()
                outcomes.setdefault(outcome, Counter())[name, int(task), int(number)] += 1
                if outcome == "acknowledged":
                    offsets[name, int(task), int(number)] = int(offset)
                    written[name] += 1

        listening = [asyncio.create_task(listen(name)) for name in workers]

        async def go_on() -> None:
            """Waits until each process has got so many more events acknowledged."""
            async with asyncio.timeout(60):
                for name in workers:
                    before = written[name]
                    while written[name] < before + 50:
                        await asyncio.sleep(0.02)

        await go_on()
        for fault, outage in itertools.islice(zip(itertools.cycle(FAULTS), itertools.cycle(OUTAGES)), ROUNDS):
            await _harm(servers, fault, outage, choice)
            await go_on()
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

    there: Counter[tuple[str, int, int]] = Counter()
    for record in found:
        event = record.event.data["worker"], record.event.data["task"], record.event.data["number"]
        there[event] += 1
        assert offsets.get(event, record.start_offset) == record.start_offset
    assert seen == found
    assert max(there.values()) == 1
    assert not outcomes["acknowledged"].keys() - there.keys()
    assert not outcomes.get("refused", Counter()).keys() & there.keys()
    order: dict[tuple[str, int], int] = {}
    for worker, task, number in there:
        assert order.get((worker, task), -1) < number
        order[worker, task] = number
    with capsys.disabled():
        counts = {name: numbers.total() for name, numbers in outcomes.items() if name != "ready"}
        print(f"\n{ROUNDS} rounds: {counts}, {len(found)} events in the log")
