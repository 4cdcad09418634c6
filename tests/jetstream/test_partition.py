"""A server that is cut off from the others, but not from the programs that use it; and no majority at all.

The servers need some seconds to notice, so these tests run only with `EVENTFOLD_NATS=all`.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

import pytest
from tests.jetstream.network import Network
from tests.jetstream.servers import Servers

from eventfold import Event, EventLog, Record, UnknownOutcomeError
from eventfold.jetstream import JetStream

pytestmark = pytest.mark.skipif(
    os.environ.get("EVENTFOLD_NATS") != "all", reason="takes half a minute: EVENTFOLD_NATS=all"
)


async def test_appends_and_tails_move_away_from_a_leader_that_is_cut_off(network: tuple[Servers, Network]) -> None:
    """The leader still answers pings, so that only the missing acknowledgements show that it is cut off."""
    servers, ways = network
    async with EventLog.open(JetStream(servers.addresses, "cut", replicas=3)) as log:
        await log.append(Event("counted", {"n": 0}))
    leader = await asyncio.to_thread(servers.leader_of, "cut")
    addresses = [leader.address, *(server.address for server in servers.all if server is not leader)]
    engine = JetStream(addresses, "cut", attempt_timeout=0.5, dont_randomize=True)
    seen: list[Record] = []

    async def follow(log: EventLog) -> None:
        async for record in log.tail(0):
            seen.append(record)

    async with EventLog.open(engine) as log:
        following = asyncio.create_task(follow(log))
        await log.append(Event("counted", {"n": 1}))
        ways.cut_off(servers.all.index(leader))

        for n in range(2, 20):
            if n % 2:
                await log.append(Event("counted", {"n": n}))
            else:
                await log.append_if(Event("counted", {"n": n}), *log.head)
        elected = await asyncio.to_thread(servers.leader_of, "cut", apart_from=leader)
        ways.mend()
        await log.append(Event("counted", {"n": 20}))

        found = [record async for record in log.read_full()]
        async with asyncio.timeout(10):
            while len(seen) < len(found):
                await asyncio.sleep(0.01)
        following.cancel()

    assert elected is not leader
    assert [record.event.data["n"] for record in found] == list(range(21))
    assert seen == found


async def test_without_a_majority_appends_wait_and_their_outcome_is_unknown(
    own_servers: Callable[[int], Servers],
) -> None:
    """A tail that waits meanwhile continues on its own when the majority is back."""
    servers = own_servers(3)
    async with EventLog.open(JetStream(servers.addresses, "log", replicas=3, timeout=6, attempt_timeout=1)) as log:
        await log.append(Event("counted", {"n": 0}))
        waiting = asyncio.ensure_future(anext(log.tail()))
        leader = await asyncio.to_thread(servers.leader_of, "log")
        followers = [server for server in servers.all if server is not leader]
        for server in followers:
            server.signal(signal.SIGSTOP)

        with pytest.raises(UnknownOutcomeError, match="may or may not be in the log"):
            await log.append(Event("counted", {"n": 1}))
        assert not waiting.done()

        for server in followers:
            server.signal(signal.SIGCONT)
        for server in followers:
            await asyncio.to_thread(server.wait_until_ready)
        last = await log.append(Event("counted", {"n": 2}))
        await asyncio.wait_for(waiting, 30)

        found = [record.event.data["n"] async for record in log.read_full()]
        assert found in ([0, 2], [0, 1, 2])
        assert log.head.offset == last.end_offset
