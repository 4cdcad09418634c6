"""Snapshots: the state of a view on disk, with the offset up to which it was folded.

A snapshot is a JSON object with the keys `state`, `offset`, `hash`, `position`, `position_hash`, `version`, `checksum`
and, for a view that does not fold every event, `query`. The first three have the same meaning as in the Rust crate:
`offset` is an offset in the active log, and `hash` is the hash of the line before it. `position` and `position_hash`
are the offset in the whole log, and the hash of the line before it. `checksum` is the xxh64 of the encoded state.
`query` says which events were folded: a list of alternatives, each an object such as
`{"types": ["added", "removed"], "tags": ["list:3"]}`. The Rust crate ignores the keys that it does not know.

Promises: a snapshot is replaced atomically; `load` returns the state that was saved, byte for byte.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any, is_typeddict

import msgspec
import xxhash

from ._chunks import Pause, decode_in_chunks, encode_in_chunks
from ._files import operations
from ._logging import WARNING, log_event
from ._threads import in_thread

__all__ = ["Snapshot", "delete", "load", "save"]

# An `offset` that makes the Rust crate rebuild its view, since no file is that large.
BEYOND_ANY_FILE = 2**63 - 1

# What precedes and what follows the state in a file that was written here.
_BEFORE_STATE, _AFTER_STATE = b'{"state":', b',"offset":'


class Snapshot(msgspec.Struct, frozen=True):
    """A view's state, and the offset up to which it was folded.

    Attributes:
        state: The state.
        offset: The offset in the active log, in bytes. The Rust crate uses it; this package does not.
        hash: The hash of the line before `offset`.
        position: The offset in the whole log, in bytes; None in a snapshot that the Rust crate wrote.
        position_hash: The hash of the line before `position`; None in a snapshot that the Rust crate wrote.
        version: The version of the view.
        query: Which events were folded; None for all.
    """

    state: Any
    offset: int
    hash: str
    position: int | None = None
    position_hash: str | None = None
    version: int | str = 0
    query: Any = None


class _Document(msgspec.Struct, omit_defaults=True):
    """The keys of a snapshot, in their order."""

    state: msgspec.Raw
    offset: int
    hash: str
    position: int | None = None
    position_hash: str | None = None
    version: int | str | None = None
    checksum: str | None = None
    query: Any = None


class BadSnapshotError(ValueError):
    """The snapshot can't be used; the message says why."""


def decode_state(data: bytes | memoryview, state_type: Any, pause: Callable[[], object] = lambda: None) -> Any:
    """Decodes a state. Raises `ValueError`, or what the constructor of the type raises.

    `pause` is called after each chunk of a large state.
    """
    if isinstance(state_type, type) and dict in state_type.__bases__ and not is_typeddict(state_type):
        # A Counter, for example: created as by `_decode_other`, but from a dict that was decoded in chunks.
        return _decode_other(state_type, decode_in_chunks(data, Any, _decode, pause))
    return decode_in_chunks(data, state_type, _decode, pause)


def encode_state(value: Any) -> bytes:
    """Encodes a state as JSON. Raises `TypeError` or `ValueError` if it can't be."""
    return msgspec.json.encode(value, enc_hook=_encode_other)


def _decode(data: bytes | memoryview, type_: Any) -> Any:
    return msgspec.json.decode(data, type=type_, dec_hook=_decode_other)


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


def encode(snapshot: Snapshot, state: bytes | memoryview) -> bytes:
    """Encodes a snapshot whose state is encoded already."""
    return _encode_document(snapshot, [state], lambda: None)[0]


def encode_whole(snapshot: Snapshot, state: Any, pause: Callable[[], object]) -> tuple[bytes, memoryview]:
    """Encodes a snapshot with this state, which must not change until this returns. Also returns the encoded state,
    which is a view of a part of the result.

    `pause` is called after each chunk of a large state.
    """
    return _encode_document(snapshot, encode_in_chunks(state, encode_state, pause), pause)


def _encode_document(
    snapshot: Snapshot, state: Iterable[bytes | memoryview], pause: Callable[[], object]
) -> tuple[bytes, memoryview]:
    # The buffer grows in place and is returned without a copy. Joining the chunks would hold the interpreter lock while
    # all of the memory is written.
    buffer, checksum = BytesIO(), xxhash.xxh64()
    buffer.write(_BEFORE_STATE)
    for chunk in state:
        checksum.update(chunk)
        buffer.write(chunk)
        pause()
    end = buffer.tell()
    document = _Document(
        msgspec.Raw(b"null"),
        snapshot.offset,
        snapshot.hash,
        snapshot.position,
        snapshot.position_hash,
        snapshot.version,
        checksum.hexdigest(),
        snapshot.query,
    )
    buffer.write(msgspec.json.encode(document).removeprefix(_BEFORE_STATE + b"null"))
    data = buffer.getvalue()
    return data, memoryview(data)[len(_BEFORE_STATE) : end]


def read(path: Path) -> Snapshot | None:
    """The snapshot in a file, its state still encoded (bytes, or a view of them); None if there is no file. Blocks.

    Raises `BadSnapshotError` for a damaged file, and `OSError`.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return parse(data)


def parse(data: bytes) -> Snapshot:
    """The snapshot in a document, its state still encoded. Raises `BadSnapshotError`."""
    split = _split(data)
    document, state = split or _decode_document(data)
    if split is None and document.position is not None and document.checksum != xxhash.xxh64_hexdigest(state):
        raise BadSnapshotError("it is damaged: its checksum does not match its state")
    return Snapshot(
        state,
        document.offset,
        document.hash,
        document.position,
        document.position_hash,
        document.version or 0,
        document.query,
    )


def _split(data: bytes) -> tuple[_Document, memoryview] | None:
    """The keys and the state of a document that has the form that `encode` gives it. The state is not decoded.

    None if the document may have a different form, or if its checksum is wrong.
    """
    end = data.rfind(_AFTER_STATE)  # the last occurrence: the state may contain these bytes too
    if end < 0 or not data.startswith(_BEFORE_STATE):
        return None
    try:
        document = msgspec.json.decode(_BEFORE_STATE + b"null" + data[end:], type=_Document)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    state = memoryview(data)[len(_BEFORE_STATE) : end]
    return (document, state) if document.checksum == xxhash.xxh64_hexdigest(state) else None


def _decode_document(data: bytes) -> tuple[_Document, memoryview]:
    try:
        document = msgspec.json.decode(data, type=_Document)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadSnapshotError(f"it is damaged: {error}") from error
    return document, memoryview(document.state)


async def save(path: str | os.PathLike[str], snapshot: Snapshot) -> None:
    """Writes a snapshot to a file, which is replaced atomically and durably.

    If cancelled, the snapshot may or may not be saved.

    Args:
        path: The file.
        snapshot: The snapshot, whose state must not change until this returns.

    Raises:
        TypeError: The state can't be encoded as JSON.
        ValueError: The state can't be encoded as JSON.
        OSError: The file could not be written.
    """
    await in_thread(_save, Path(path), snapshot)


async def load(path: str | os.PathLike[str], state_type: Any = Any) -> Snapshot | None:
    """Reads the snapshot in a file.

    If cancelled, reading may continue in a thread, without an effect.

    Args:
        path: The file.
        state_type: The type into which the state is decoded.

    Returns:
        The snapshot. None if there is no file, or if it can't be used; then a warning is logged.

    Raises:
        OSError: The file could not be read.
    """
    from aiofiles.os import wrap

    try:
        # A cancelled caller need not wait for the thread, since reading changes nothing.
        found: Snapshot | None = await wrap(_load)(Path(path), state_type)
        return found
    except (BadSnapshotError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        log_event(
            WARNING,
            "snapshot.unreadable",
            "snapshot %(path)s is ignored: %(error)s",
            path=os.fspath(path),
            error=error,
        )
        return None


def _save(path: Path, snapshot: Snapshot) -> None:
    operations.replace_file(path, encode_whole(snapshot, snapshot.state, Pause())[0])


def _load(path: Path, state_type: Any) -> Snapshot | None:
    found = read(path)
    if found is None:
        return None
    return msgspec.structs.replace(found, state=decode_state(found.state, state_type, Pause()))


async def delete(path: str | os.PathLike[str]) -> None:
    """Removes the file of a snapshot durably; does nothing if there is none.

    If cancelled, the file may or may not be removed.

    Args:
        path: The file.

    Raises:
        OSError: The file could not be removed.
    """
    await in_thread(_delete, Path(path))


def _delete(path: Path) -> None:
    try:
        operations.unlink(path)
    except FileNotFoundError:
        return
    operations.sync_dir(path.parent)
