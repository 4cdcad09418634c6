"""Planted files that are small on disk, but expensive to read."""

from __future__ import annotations

import resource
import struct
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from tests.support import numbers, write_log

from eventfold import CorruptLogError, EventReader
from eventfold._files import frames
from eventfold._files.frames import Span, pack_record


def _bomb(size: int) -> bytes:
    """A frame that expands to a gigabyte of zeros, with a valid record that claims a few bytes."""
    compressor = frames.zstd.ZstdCompressor()
    chunk = bytes(2**20)
    frame = b"".join(compressor.compress(chunk) for _ in range(size // len(chunk))) + compressor.flush()
    return frame + pack_record(Span(0, len(frame), 0, 100, 1, 0, xxhash.xxh64_intdigest(b"")))


async def test_an_archive_that_expands_beyond_its_claimed_size_takes_little_memory(damaged_dir: Path) -> None:
    write_log(damaged_dir)
    (damaged_dir / "archive.jsonl.zst").write_bytes(_bomb(2**30))

    tracemalloc.start()
    with pytest.raises(CorruptLogError):
        await numbers(EventReader(damaged_dir))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 32 * 2**20
    assert sys.platform == "darwin" or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 * 2**20


def _raw_block(size: int) -> bytes:
    return struct.pack("<I", size << 3)[:3]


async def test_many_bytes_that_look_like_frames_are_rejected_quickly(damaged_dir: Path) -> None:
    """After an incomplete frame, complete ones are searched for, but not at every candidate."""
    write_log(damaged_dir)
    header = b"\x28\xb5\x2f\xfd\x00\x58"
    # Raw blocks, each of which contains the header of another frame that extends over all later blocks.
    chain = header + (_raw_block(9) + header + _raw_block(0)) * 30_000
    (damaged_dir / "archive.jsonl.zst").write_bytes(chain)
    expanded = 0
    original = frames.decompressed

    def counted(*arguments: int) -> Iterator[tuple[bytes, int]]:
        nonlocal expanded
        for piece, after in original(*arguments):
            expanded += len(piece)
            assert expanded < 2**30, "it looks at every candidate to its end"
            yield piece, after

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "decompressed", counted)
        with pytest.raises(CorruptLogError):
            await numbers(EventReader(damaged_dir))

    assert expanded > 0
