"""A process that reads under the name `mailer`, commits each record and prints its number, until its input ends.

Arguments: a server's address, and the log. If it can't continue, it prints why.
"""

from __future__ import annotations

import asyncio
import sys

from eventfold import EventfoldError, EventLog
from eventfold.jetstream import JetStream


async def main(address: str, name: str) -> None:
    async with EventLog.open(JetStream([address], name), read_only=True) as log:

        async def consume() -> None:
            consumer = log.consumer("mailer")
            try:
                async for record in consumer:
                    await consumer.commit(record)
                    print(record.event.data["n"], flush=True)
            except EventfoldError as error:
                print(error, flush=True)

        consuming = asyncio.create_task(consume())
        await asyncio.to_thread(sys.stdin.read)
        consuming.cancel()


asyncio.run(main(*sys.argv[1:]))
