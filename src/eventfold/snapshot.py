"""A view's state on disk, with its place in the log.

A snapshot is a JSON object with the keys `state`, `offset`, `hash`, `position`, `position_hash`, `version`, `checksum`
and, for a view that does not fold every event, `query`. The first three have the Rust crate's meaning: `offset` and
`hash` are the place in the active log, and the hash of the line before it. `position` and `position_hash` are the same
in the whole log; `checksum` is the xxh64 of the encoded state. `query` says which events were folded: a list of
alternatives, each an object such as `{"types": ["added", "removed"], "tags": ["list:3"]}`. The Rust crate ignores what
it does not know.

Promises: a snapshot is replaced atomically; what `load` returns has the state that was saved, byte for byte.
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

from ._files import operations
from ._logging import WARNING, log_event
from ._parts import Pause, decode_in_parts, encode_in_parts
from ._threads import in_thread

__all__ = ["Snapshot", "delete", "load", "save"]

# An `offset` beyond any file: the Rust crate then rebuilds its view.
NOWHERE = 2**63 - 1

# How a file written here begins, and what follows the state.
_BEFORE_STATE, _AFTER_STATE = b'{"state":', b',"offset":'


class Snapshot(msgspec.Struct, frozen=True):
    """A state, and its place in the log.

    `offset` (bytes in the active log) and `hash` are for the Rust crate; `position` (bytes in the whole log) and
    `position_hash` are for eventfold, and None in a snapshot that the crate wrote. `version` is the view's; `query`
    says which events were folded, None for all.
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
    """The file has no snapshot that can be used; the text says why."""


def decode_state(data: bytes | memoryview, state_type: Any, pause: Callable[[], object] = lambda: None) -> Any:
    """The state that was encoded. Raises `ValueError`, or what the type's own constructor raises.

    `pause` is called between the parts of a large one.
    """
    if isinstance(state_type, type) and dict in state_type.__bases__ and not is_typeddict(state_type):
        # A Counter, say: as `_decode_other` makes it, but of a dict that was decoded in parts.
        return _decode_other(state_type, decode_in_parts(data, Any, _decode, pause))
    return decode_in_parts(data, state_type, _decode, pause)


def _encode(value: Any) -> bytes:
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
    """The file's content for a snapshot whose state is encoded already."""
    return _file(snapshot, [state], lambda: None)[0]


def encode_whole(snapshot: Snapshot, state: Any, pause: Callable[[], object]) -> tuple[bytes, memoryview]:
    """The file's content for a snapshot with this state, which must not change meanwhile, and what of it is the state.

    `pause` is called between the parts of a large one.
    """
    return _file(snapshot, encode_in_parts(state, _encode, pause), pause)


def _file(
    snapshot: Snapshot, state: Iterable[bytes | memoryview], pause: Callable[[], object]
) -> tuple[bytes, memoryview]:
    # It grows in place, and is returned without being copied: joining the parts would touch all its pages at once.
    buffer, checksum = BytesIO(), xxhash.xxh64()
    buffer.write(_BEFORE_STATE)
    for part in state:
        checksum.update(part)
        buffer.write(part)
        pause()
    end = buffer.tell()
    file = _File(
        msgspec.Raw(b"null"),
        snapshot.offset,
        snapshot.hash,
        snapshot.position,
        snapshot.position_hash,
        snapshot.version,
        checksum.hexdigest(),
        snapshot.query,
    )
    buffer.write(msgspec.json.encode(file).removeprefix(_BEFORE_STATE + b"null"))
    data = buffer.getvalue()
    return data, memoryview(data)[len(_BEFORE_STATE) : end]


def read(path: Path) -> Snapshot | None:
    """The snapshot with its state still encoded (bytes, or a view of them); None if there is no file. Blocks.

    Raises `BadSnapshotError` for a file that is damaged.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return parse(data)


def parse(data: bytes) -> Snapshot:
    """The snapshot in a document, with its state still encoded. Raises `BadSnapshotError`."""
    split = _split(data)
    file, state = split or _read_through(data)
    if split is None and file.position is not None and file.checksum != xxhash.xxh64_hexdigest(state):
        raise BadSnapshotError("it is damaged: its checksum does not match its state")
    return Snapshot(state, file.offset, file.hash, file.position, file.position_hash, file.version or 0, file.query)


def _split(data: bytes) -> tuple[_File, memoryview] | None:
    """The keys and the state of a file that is written as `encode` does; msgspec need not look at what is in the state.

    None where it may be written otherwise, or its checksum is wrong. Behind the state, nothing has an `offset` in it.
    """
    end = data.rfind(_AFTER_STATE)
    if end < 0 or not data.startswith(_BEFORE_STATE):
        return None
    try:
        file = msgspec.json.decode(_BEFORE_STATE + b"null" + data[end:], type=_File)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    state = memoryview(data)[len(_BEFORE_STATE) : end]
    return (file, state) if file.checksum == xxhash.xxh64_hexdigest(state) else None


def _read_through(data: bytes) -> tuple[_File, memoryview]:
    try:
        file = msgspec.json.decode(data, type=_File)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadSnapshotError(f"it is damaged: {error}") from error
    return file, memoryview(file.state)


async def save(path: str | os.PathLike[str], snapshot: Snapshot) -> None:
    """Replaces the file, atomically and durably.

    The state must not change meanwhile. Raises `OSError`, and `TypeError` or `ValueError` for a state that is not JSON.
    If cancelled, it may or may not be saved.
    """
    await in_thread(_save, Path(path), snapshot)


async def load(path: str | os.PathLike[str], state_type: Any = Any) -> Snapshot | None:
    """The snapshot, its state decoded into `state_type`; None if there is none, or, with a warning, if it is damaged.

    Raises `OSError`.
    """
    from aiofiles.os import wrap

    try:
        # If cancelled, it leaves the thread to finish on its own, since reading changes nothing.
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
    """Removes the file durably; does nothing if there is none. Raises `OSError`."""
    await in_thread(_delete, Path(path))


def _delete(path: Path) -> None:
    try:
        operations.unlink(path)
    except FileNotFoundError:
        return
    operations.sync_dir(path.parent)
