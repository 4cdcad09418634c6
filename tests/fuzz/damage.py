"""What is damaged, and in which ways."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from tests.support import event, line, small_frames

from eventfold import EventReader, EventWriter

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
RECORD_SIZE = 80
RECORD_MAGIC = b"\x5b\x2a\x4d\x18\x48\x00\x00\x00EVTFOLD\x00"


def _batch(n: int, count: int) -> bytes:
    return b"".join(line(n, batch=f"{i},{count}") for i in range(1, count + 1))


# Lines and batches, some of them written in an unusual way, and some lines that are not events.
LINES = [
    *(line(n) for n in range(4)),
    _batch(5, 2),
    _batch(6, 3),
    line(7, batch="1,1"),
    line(8, batch="2,2"),
    line(9, type="ändern ☃"),
    b'{"type":"a","data":{"b":[1,-2.5e3,null,true,"\\u00e9\\n"]},"ts":0,"id":"i","actor":"x","meta":{"k":"v"}}\n',
    b' { "ts" : 1 , "data" : null , "type" : "spaces" , "batch" : null }\r\n',
    b'{"type":"a","data":1,"ts":1,"more":{"type":"b","batch":[1,2]}}\n',
    b'{"type":"a","data":1,"data":2,"ts":1,"type":"b"}\n',
    b'{"type":"a","data":"}\\n{","ts":1}\n',
    b"\n",
    b'{"type":"","data":1,"ts":1}\n',
    b'{"type":"a","data":1,"ts":-1}\n',
    b'{"type":"a","ts":1}\n',
]


class Edit(NamedTuple):
    """One change: at `at` (modulo the length), to `size` bytes; `piece` is what an insertion inserts."""

    kind: str
    at: int
    size: int
    piece: bytes


KINDS = ["flip", "replace", "delete", "double", "insert", "move", "cut"]
PIECES = [
    *(bytes([byte]) for byte in b'\n"\\{}[]:,0-e \x00\xff'),
    b"}\n{",
    b"\n\n",
    b',"batch":[1,2]',
    b',"b\\u0061tch":[1,2]',
    b'"batch":[2,2]',
    b"\\ud800",
    b"1e999",
    RECORD_MAGIC,
    ZSTD_MAGIC,
    b"\x00" * 80,
]


def edited(data: bytes, edits: list[Edit]) -> bytes:
    """Returns the data after the changes, which are made one after another."""
    for kind, at, size, piece in edits:
        at %= len(data) + 1
        before, these, after = data[:at], data[at : at + size], data[at + size :]
        if kind == "flip":
            data = before + bytes(byte ^ 1 << size % 8 for byte in these[:1]) + these[1:] + after
        elif kind == "replace":
            data = before + piece + data[at + len(piece) :]
        elif kind == "delete":
            data = before + after
        elif kind == "double":
            data = before + these + these + after
        elif kind == "insert":
            data = before + piece + these + after
        elif kind == "move":
            data = before + after + these
        else:
            data = before
    return data


class Archived(NamedTuple):
    """A directory with an archive of several frames and an empty active log, and the lines in it."""

    dir: Path
    data: bytes
    lines: list[bytes]

    def parts(self) -> list[bytes]:
        """Returns its frames and records in order."""
        parts, start = [], 0
        while start < len(self.data):
            at = self.data.index(RECORD_MAGIC, start)
            parts += [self.data[start:at], self.data[at : at + RECORD_SIZE]]
            start = at + RECORD_SIZE
        return parts

    def spliced(self, order: list[int]) -> bytes:
        """Returns its frames, each with its record, repeated and ordered as asked."""
        parts = self.parts()
        pairs = [frame + record for frame, record in zip(parts[::2], parts[1::2], strict=True)]
        return b"".join(pairs[number % len(pairs)] for number in order)


async def archived(directory: Path) -> Archived:
    """Creates it, with a few lines in each frame."""
    with pytest.MonkeyPatch.context() as patch:
        small_frames(patch, 150)
        async with EventWriter.open(directory) as writer:
            for start in (0, 5):
                for n in range(start, start + 4):
                    await writer.append(event(n))
                await writer.rotate()
    lines = [record._line async for record in EventReader(directory).read_full()]
    return Archived(directory, (directory / "archive.jsonl.zst").read_bytes(), lines)
