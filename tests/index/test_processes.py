"""The index after a kill, in forked children, and shared by several processes."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.index.events import WRITE_BATCH_SIZE, fill, numbers, tag, tagged

from eventfold import (
    ConditionalAppendError,
    EventLog,
    Head,
    LockMode,
)
from eventfold._index import store


async def test_the_index_of_a_killed_process_is_brought_up_to_date(data_dir: Path) -> None:
    script = """
import asyncio, sys
from eventfold import Event, EventLog
async def main():
    async with EventLog.open(sys.argv[1], index=True) as log:
        n = 0
        while True:
            await log.append_many([Event("counted", {"n": i}, ts=1, tags=(f"own:{i}",)) for i in range(n, n + 500)])
            n += 500
            print(n, flush=True)
asyncio.run(main())
"""
    for _ in range(3):
        shutil.rmtree(data_dir, ignore_errors=True)
        process = subprocess.Popen([sys.executable, "-c", script, data_dir], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        written = 0
        for line in process.stdout:
            written = int(line)
            if written >= 12_000:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        process.wait()
        async with EventLog.open(data_dir, index=True) as log:
            for n in (0, 5000, written - 1):
                assert await numbers(log, tag(f"own:{n}")) == [n]


def test_a_forked_child_can_open_the_index_while_its_parent_uses_it(data_dir: Path) -> None:
    """The parent may even fork during a look-up, although the child has none of its threads."""

    async def child() -> None:
        async with EventLog.open(data_dir, lock=LockMode.SHARED, index=True) as log:
            assert await numbers(log, tag("own:1")) == [1]
            await log.append_unless([tagged(0, f"child:{os.getpid()}")], tag(f"child:{os.getpid()}"))

    async def parent() -> None:
        async with EventLog.open(data_dir, lock=LockMode.SHARED, index=True) as log:
            await fill(log, 100)
            children = []
            reading = asyncio.create_task(look_up(log))
            for _ in range(3):
                await asyncio.sleep(0.01)
                if not (pid := os.fork()):
                    status = 1
                    try:
                        asyncio.events._set_running_loop(None)
                        asyncio.run(asyncio.wait_for(child(), 20))
                        status = 0
                    finally:
                        os._exit(status)
                children.append(pid)
            for pid in children:
                assert (await asyncio.to_thread(os.waitpid, pid, 0))[1] == 0
                assert len(await numbers(log, tag(f"child:{pid}"))) == 1
            reading.cancel()
            assert await numbers(log, tag("own:99")) == [99]

    async def look_up(log: EventLog) -> None:
        while True:
            assert await numbers(log, tag("own:7")) == [7]

    asyncio.run(parent())


async def test_several_processes_share_one_index(data_dir: Path) -> None:
    """Two logs of one directory in the same process stand for them, since each has its own connection."""
    async with (
        EventLog.open(data_dir, lock=LockMode.SHARED, index=True) as one,
        EventLog.open(data_dir, lock=LockMode.SHARED, index=True) as two,
    ):
        for start in range(0, 2 * WRITE_BATCH_SIZE, 1000):
            await fill(one if start % 2000 else two, 1000, start)
        for n in (0, 4321, 2 * WRITE_BATCH_SIZE - 1):
            assert await numbers(one, tag(f"own:{n}")) == [n]
            assert await numbers(two, tag(f"own:{n}")) == [n]

        async def attempt(log: EventLog, n: int) -> bool:
            try:
                await log.append_unless([tagged(n, f"once:{n}")], tag(f"once:{n}"))
            except ConditionalAppendError:
                return False
            return True

        won = await asyncio.gather(*(attempt(log, n) for n in range(100) for log in (one, two)))
        assert sum(won) == 100
    async with EventLog.open(data_dir, index=True) as log:
        assert await numbers(log, tag("own:4321")) == [4321]


def test_a_fork_waits_for_the_end_of_a_transaction(tmp_path: Path) -> None:
    """Otherwise the child would roll the transaction back when it ends."""
    reached, go_on, forked = threading.Event(), threading.Event(), threading.Event()

    class Pairs(dict[int, int | list[int]]):
        def __iter__(self) -> Iterator[int]:
            reached.set()
            assert go_on.wait(10)
            return super().__iter__()

    def fork() -> None:
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        forked.set()

    index = store.Store(tmp_path / "index.sqlite")
    index.open()
    adding = threading.Thread(target=index.add, args=(0, Head(10, "x"), Pairs({1: 0, 2: [0, 5]})))
    adding.start()
    assert reached.wait(10)
    forking = threading.Thread(target=fork)
    forking.start()
    assert not forked.wait(0.1)
    go_on.set()
    assert forked.wait(10)
    adding.join()
    forking.join()
    assert index.find([(1, 0), (2, 1), (3, 0)], 10) == {
        (1, 0): store.StoredOffsets([0], True),
        (2, 1): store.StoredOffsets([5], True),
    }
    index.close()
