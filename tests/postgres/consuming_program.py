"""One of several programs that read under the same consumer's name.

Arguments: the address, and the seconds that a record takes. For each record, it prints `begin N`, and then `end N` once
that is committed, or `refused N` if another program has taken the name over.
"""

from __future__ import annotations

import asyncio
import sys

from eventfold import EventfoldError, EventLog
from eventfold.postgres import Postgres


async def main() -> None:
    async with EventLog.open(Postgres.from_address(sys.argv[1]), read_only=True) as log:
        print("opened", flush=True)
        consumer = log.consumer("worker")
        async for record in consumer:
            n = record.event.data["n"]
            print("begin", n, flush=True)
            await asyncio.sleep(float(sys.argv[2]))
            try:
                await consumer.commit(record)
            except EventfoldError:
                print("refused", n, flush=True)
            else:
                print("end", n, flush=True)


asyncio.run(main())
