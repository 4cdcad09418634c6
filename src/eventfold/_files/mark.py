"""The mark in `app.jsonl.lock`: where the log of shared writers ends, and how far it is on disk.

The file begins with two versions of the mark, each with a sequence number and a checksum. Writing a mark replaces the
older one, so a process that is killed while it writes leaves the newer one intact.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import xxhash

from .._event import Head

_MAGIC = b"EVTMARK\1"
_BODY = struct.Struct("<8sQQQQQBB6x")  # magic, sequence, written and durable (offset, hash), failed, sync mode
_CHECKSUM = struct.Struct("<Q")
VERSION_SIZE = _BODY.size + _CHECKSUM.size
_VERSION_POSITIONS = (0, 128)
MARK_SIZE = _VERSION_POSITIONS[1] + VERSION_SIZE
"""The size in bytes of the part of the file that contains both versions."""


class Mark(NamedTuple):
    """Where the log ends, how far it is on disk, and whether a sync has failed since the log was last opened.

    `sync_mode` is a number for the `SyncMode` that all writers use.
    """

    written: Head
    durable: Head
    failed: bool = False
    sync_mode: int = 0


def encode_mark(sequence: int, mark: Mark) -> tuple[int, bytes]:
    """Where in the file to write a mark with this sequence number, and what to write."""
    (written, written_hash), (durable, durable_hash), failed, sync_mode = mark
    hashes = int(written_hash or "0", 16), int(durable_hash or "0", 16)
    body = _BODY.pack(_MAGIC, sequence, written, hashes[0], durable, hashes[1], failed, sync_mode)
    return _VERSION_POSITIONS[sequence % 2], body + _CHECKSUM.pack(xxhash.xxh64_intdigest(body))


def decode_mark(data: bytes) -> tuple[int, Mark] | None:
    """The sequence number and the mark of the newest intact version; None if no version is intact."""
    newest: tuple[Any, ...] | None = None
    for position in _VERSION_POSITIONS:
        fields = _BODY.unpack_from(data, position)
        if fields[0] == _MAGIC and (newest is None or fields[1] > newest[1]):
            body = data[position : position + _BODY.size]
            if _CHECKSUM.unpack_from(data, position + _BODY.size)[0] == xxhash.xxh64_intdigest(body):
                newest = fields
    if newest is None:
        return None
    _, sequence, written, written_hash, durable, durable_hash, failed, sync_mode = newest
    return sequence, Mark(_head(written, written_hash), _head(durable, durable_hash), bool(failed), sync_mode)


def _head(offset: int, hash: int) -> Head:
    return Head(offset, f"{hash:016x}" if offset else "")
