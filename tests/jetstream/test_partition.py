"""A server that is cut off from the others, but not from the programs that use it."""

from __future__ import annotations

import asyncio

from tests.jetstream.network import Network
from tests.jetstream.servers import Servers

from eventfold import Event, EventLog, Record
from eventfold.jetstream import JetStream


async def test_appends_and_tails_leave_a_leader_that_is_cut_off(network: tuple[Servers, Network]) -> None:
    """It answers pings as before, so that nothing but the missing answers tells that it is cut off."""
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
