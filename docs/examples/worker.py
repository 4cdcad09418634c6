"""A worker for a web backend: consumes its events, and after any stop or crash continues where it was.

    EVENTFOLD_DATA=todo-data python docs/examples/worker.py

If it is killed between the work and the commit, it does the work for that event again (at least once). The offset
identifies the repetition.
"""

import asyncio
import os
import signal

from eventfold import EventLog, Record


async def work(record: Record) -> None:
    print(f"{record.start_offset} {record.event.type} {record.event.data}", flush=True)


async def main() -> None:
    data = os.environ.get("EVENTFOLD_DATA", "todo-data")
    # Read-only: the backend is the writer.
    async with EventLog.open(data, read_only=True) as log:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, log.reader().end_waits)

        consumer = log.consumer("worker")
        async for record in consumer:
            await work(record)
            await consumer.commit(record)


if __name__ == "__main__":
    asyncio.run(main())
