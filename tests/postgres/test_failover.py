"""A primary whose commits wait for a standby: the standby is read, and promoted under load when the primary dies."""

from __future__ import annotations

import asyncio
import os

import pytest
from tests.postgres.programs import writing
from tests.postgres.servers import Server, in_thread, primary_and_standby

from eventfold import Event, EventfoldError, EventLog, EventReader
from eventfold.postgres import Postgres

# How often the primary is killed and the standby promoted; never in the suite, since two servers take long to start.
ROUNDS = int(os.environ.get("EVENTFOLD_POSTGRES_FAILOVERS", "0"))
TASKS = 100


@pytest.mark.skipif(not ROUNDS, reason="takes long: set EVENTFOLD_POSTGRES_FAILOVERS to the number of failovers")
@pytest.mark.timeout(240 + 120 * ROUNDS)
async def test_acknowledged_events_are_there_once_after_a_promotion_of_the_standby_under_load() -> None:
    """Two programs have both servers in their address; until the promotion, the standby can be read and tailed."""
    with primary_and_standby() as (primary, standby):
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in (primary, standby))
        address = f"postgresql://admin@{hosts}/postgres?log=orders&target_session_attrs=read-write"
        async with EventLog.open(address) as log:
            result = await log.append(Event("counted", {"program": -1, "n": -1}))
        await check_standby(standby, result.end_offset)

        async with writing([address] * 2, TASKS // 2) as programs:
            await programs.go_on()
            for _ in range(ROUNDS):
                await in_thread(primary.kill)
                await standby.execute("SELECT pg_promote()")
                # Until it has a standby of its own, it acknowledges nothing.
                await in_thread(lambda old=primary, new=standby: old.create_standby_of(new))
                await in_thread(primary.restart_after_kill)
                primary, standby = standby, primary
                await programs.go_on()
            await programs.end()
        await programs.check(address, f"{ROUNDS} failovers")


async def check_standby(standby: Server, offset: int) -> None:
    """Asserts that appending is refused there, and that reads, tails and waits go on."""
    with pytest.raises(EventfoldError, match="it is a standby"):
        await EventLog.open(Postgres(standby.address(), "orders"))
    reader = EventReader(Postgres(standby.address(), "orders"))
    async with asyncio.timeout(10):
        assert await reader.wait_for_events(0)
        async for record in reader.tail(0):
            assert record.end_offset == offset
            break
    await reader.aclose()
