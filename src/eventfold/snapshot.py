"""A view's state on disk, with the place in the log that it stands for.

A snapshot is a JSON object with the keys `state`, `offset`, `hash`, `position`, `position_hash`, `version`, `checksum`
and, for a view that does not fold every event, `query`. The first three are the Rust crate's and mean what they mean to
it: `offset` and `hash` are the place in the active log, and the hash of the line before it. `position` and
`position_hash` are the same in the whole log; `checksum` is the xxh64 of the encoded state. `query` says which events
were folded: a list of alternatives, each an object such as `{"types": ["added", "removed"], "tags": ["list:3"]}`. The
Rust crate passes over what it does not know.

Promises: a snapshot is replaced atomically; what `load` gives has the state that was saved, byte for byte.
"""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import Any

import msgspec

from ._aio import in_thread
from ._event import line_hash
from ._files import operations
from ._logging import WARNING, log_event

__all__ = ["Snapshot", "delete", "load", "save"]

# An `offset` beyond any file: the Rust crate then rebuilds its view.
NOWHERE = 2**63 - 1


class Snapshot(msgspec.Struct, frozen=True):
    """A state, and where in the log it stands.

    `offset` (bytes in the active log) and `hash` are what the Rust crate goes by; `position` (bytes in the whole log)
    and `position_hash` what we do, None in a snapshot that the crate wrote. `version` is the view's; `query` says which
    events were folded, None for all.
    """

    state: Any
    offset: int
    hash: str
    position: int | None = None
    position_hash: str | None = None
    version: int | str = 0
    query: Any = None


class _File(msgspec.Struct, omit_defaults=True):
    """The file's keys, in its order."""

    state: msgspec.Raw
    offset: int
    hash: str
    position: int | None = None
    position_hash: str | None = None
    version: int | str | None = None
    checksum: str | None = None
    query: Any = None


class BadSnapshotError(ValueError):
    """The file holds no snapshot that can be believed; the text says why."""


def encode_state(state: Any) -> bytes:
    """A state as JSON: whatever msgspec encodes, and pydantic models."""
    return msgspec.json.encode(state, enc_hook=_encode_other)


def decode_state(data: bytes, state_type: Any) -> Any:
    """The state that `encode_state` encoded. Raises `ValueError`, or what the type's own constructor raises."""
    return msgspec.json.decode(data, type=state_type, dec_hook=_decode_other)


def _encode_other(value: Any) -> Any:
    if hasattr(value, "__pydantic_validator__"):
        return msgspec.Raw(value.model_dump_json().encode())
    if isinstance(value, deque):
        return list(value)
    raise TypeError(f"a state of type {type(value).__name__} can't be encoded as JSON")


def _decode_other(type_: type[Any], value: Any) -> Any:
    if hasattr(type_, "__pydantic_validator__"):
        return type_.model_validate_json(msgspec.json.encode(value))
    # Subclasses of the plain containers, such as Counter and deque.
    return type_(value)


def encode(snapshot: Snapshot, state: bytes) -> bytes:
    """The file's content for a snapshot whose state is encoded already."""
    return msgspec.json.encode(
        _File(
            msgspec.Raw(state),
            snapshot.offset,
            snapshot.hash,
            snapshot.position,
            snapshot.position_hash,
            snapshot.version,
            line_hash(state),
            snapshot.query,
        )
    )


def read(path: Path) -> Snapshot | None:
    """The snapshot with its state still encoded (a `bytes`); None if there is no file. Blocks.

    Raises `BadSnapshotError` for a file that is damaged.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return parse(data)


def parse(data: bytes) -> Snapshot:
    """The snapshot in a document, with its state still encoded. Raises `BadSnapshotError`."""
    try:
        file = msgspec.json.decode(data, type=_File)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadSnapshotError(f"it is damaged: {error}") from error
    state = bytes(file.state)
    if file.position is not None and (file.checksum is None or file.checksum != line_hash(state)):
        raise BadSnapshotError("it is damaged: its checksum does not fit its state")
    return Snapshot(state, file.offset, file.hash, file.position, file.position_hash, file.version or 0, file.query)


async def save(path: str | os.PathLike[str], snapshot: Snapshot) -> None:
    """Replaces the file, atomically and for good.

    Raises `OSError`, and `TypeError` or `ValueError` for a state that is no JSON. Cancelled, it is saved or not.
    """
    data = encode(snapshot, encode_state(snapshot.state))
    await in_thread(operations.replace_file, Path(path), data)


async def load(path: str | os.PathLike[str], state_type: Any = Any) -> Snapshot | None:
    """The snapshot, its state decoded into `state_type`; None if there is none, or, with a warning, if it is damaged.

    Raises `OSError`.
    """
    from aiofiles.os import wrap

    try:
        # When cancelled, it leaves the thread to end on its own, since reading changes nothing.
        found: Snapshot | None = await wrap(read)(Path(path))
        if found is None:
            return None
        return msgspec.structs.replace(found, state=decode_state(found.state, state_type))
    except (BadSnapshotError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        log_event(
            WARNING,
            "snapshot.unreadable",
            "snapshot %(path)s is passed over: %(error)s",
            path=os.fspath(path),
            error=error,
        )
        return None


async def delete(path: str | os.PathLike[str]) -> None:
    """Removes the file, for good; nothing if there is none. Raises `OSError`."""
    await in_thread(_delete, Path(path))


def _delete(path: Path) -> None:
    try:
        operations.unlink(path)
    except FileNotFoundError:
        return
    operations.sync_dir(path.parent)
