"""The snapshots of views that are not registered with a log that is rotated."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from .._logging import WARNING, log_event
from .._reader import EventReader
from .._threads import in_thread
from .._view_snapshot import crate_offset
from ..snapshot import BEYOND_ANY_FILE, BadSnapshotError, encode, parse


class UnregisteredSnapshots:
    """The snapshots of unregistered views, which are rewritten together with those of the registered ones.

    After a rotation their `offset` would mislead the Rust crate: they get one beyond any file, and the crate rebuilds.
    """

    name = "snapshots of unregistered views"
    offset = 0

    def __init__(self, registered: Collection[str]) -> None:
        self._registered = registered

    async def refresh(self, reader: EventReader) -> None:
        """Nothing is to be folded."""

    async def rebuild(self, reader: EventReader) -> None:
        """Nothing is to be folded."""

    async def save(self, reader: EventReader) -> None:
        """Rewrites those whose offset would mislead the crate; a failure is logged."""
        try:
            for name in await reader.documents.names("view"):
                if name not in self._registered:
                    await self._correct(name, reader)
        except Exception as error:
            log_event(
                WARNING,
                "snapshot.correction_failed",
                "the snapshots of views that are not registered could not be corrected: %(error)s",
                error=error,
            )

    async def _correct(self, name: str, reader: EventReader) -> None:
        data = await reader.documents.load("view", name)
        if data is not None and (moved := await in_thread(_moved, data, await reader.base())) is not None:
            await reader.documents.store("view", name, moved)


def _moved(data: bytes, base: int) -> bytes | None:
    """The snapshot with an offset that makes the Rust crate rebuild, if its offset is wrong now; otherwise None."""
    try:
        found = parse(data)
    except BadSnapshotError:
        return None  # the crate does not use it either, and the view's own program warns about it
    if found.position is None or found.offset in (BEYOND_ANY_FILE, crate_offset(found.position, base)):
        return None
    return encode(msgspec.structs.replace(found, state=None, offset=BEYOND_ANY_FILE, hash=""), found.state)
