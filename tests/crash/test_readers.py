"""A reader in another process reads from 0 repeatedly while the log is rotated hundreds of times."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import xxhash
from tests.crash.oracle import read

from eventfold import Event, EventLog

ROTATIONS = int(os.environ.get("EVENTFOLD_READER_ROTATIONS", "500"))
SCRIPT = """
import asyncio, sys
import xxhash
from eventfold import EventReader

async def main():
    reader, last = EventReader(sys.argv[1]), None
    while last != "stop":
        digest, count, end = xxhash.xxh64(), 0, 0
        async for record in reader.read_full():
            text = f"{record.start_offset} {record.end_offset} {record.line_hash} {record.event.data}\\n"
            digest.update(text.encode())
            count, end, last = count + 1, record.end_offset, record.event.type
        print(count, end, digest.hexdigest(), flush=True)

asyncio.run(main())
"""


async def test_a_reader_in_another_process_always_sees_a_prefix(tmp_path: Path) -> None:
    """Each of its reads is a prefix of the final log, and none is shorter than the one before."""
    directory = tmp_path / "data"
    async with EventLog.open(directory) as log:
        command = [sys.executable, "-c", SCRIPT, str(directory)]
        process = await asyncio.to_thread(subprocess.Popen, command, stdout=subprocess.PIPE)
        output = asyncio.create_task(asyncio.to_thread(process.communicate))
        for n in range(ROTATIONS):
            await log.append(Event("single", {"n": n}))
            await log.append_many(Event("batched", {"n": n, "i": i, "text": "x" * (n % 50)}) for i in range(3))
            rotation = asyncio.create_task(log.rotate())
            await log.append(Event("meanwhile", {"n": n}))
            await rotation
        await log.append(Event("stop"))
        lines = (await output)[0].decode().splitlines()
    digest = xxhash.xxh64()
    prefixes = {0: (0, digest.hexdigest())}
    for count, record in enumerate(await read(directory), 1):
        text = f"{record.start_offset} {record.end_offset} {record.line_hash} {record.event.data}\n"
        digest.update(text.encode())
        if record.event.data.get("i", 2) == 2:
            prefixes[count] = record.end_offset, digest.hexdigest()
    reads = [(int(count), (int(end), found)) for count, end, found in map(str.split, lines)]
    print(f"{len(reads)} reads during {ROTATIONS} rotations, {len(set(reads))} different")

    assert process.returncode == 0
    assert [found for count, found in reads] == [prefixes.get(count) for count, _ in reads]
    assert reads == sorted(reads)
    assert len(set(reads)) >= 10
