"""Corrects the snapshots of unregistered views after a rotation."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from .._logging import WARNING, log_event
from .._reader import EventReader
from .._threads import in_thread
from .._view_snapshot import crate_offset
from ..snapshot import BEYOND_ANY_FILE, BadSnapshotError, encode, parse


class UnregisteredSnapshots:
    """The snapshots of unregistered views, in the form of a view that `rotate` saves together with the registered ones.

    After a rotation, the `offset` in these snapshots would mislead the Rust crate. They get an offset beyond any file,
    so that the crate rebuilds its views.
    """

    name = "snapshots of unregistered views"
    offset = 0

    def __init__(self, registered: Collection[str]) -> None:
        self._registered = registered

    async def refresh(self, reader: EventReader) -> None:
        """Does nothing, since there is no state."""

    async def rebuild(self, reader: EventReader) -> None:
        """Does nothing, since there is no state."""

    async def save(self, reader: EventReader) -> None:
        """Rewrites the snapshots whose offset would mislead the crate. A failure is logged."""
        try:
            for name in await reader._documents.names("view"):
                if name not in self._registered:
                    await self._correct(name, reader)
        except Exception as error:
            log_event(
                WARNING,
                "snapshot.correction_failed",
                "the snapshots of unregistered views could not be corrected: %(error)s",
                error=error,
            )

    async def _correct(self, name: str, reader: EventReader) -> None:
        data = await reader._documents.load("view", name)
        if data is not None and (corrected := await in_thread(_corrected, data, await reader._base())) is not None:
            await reader._documents.store("view", name, corrected)


def _corrected(data: bytes, base: int) -> bytes | None:
    """The snapshot with an offset that makes the Rust crate rebuild its view; None if the offset is still right."""
    try:
        found = parse(data)
    except BadSnapshotError:
        return None  # the crate will not use it either, and the program with this view will log a warning
    if found.position is None or found.offset in (BEYOND_ANY_FILE, crate_offset(found.position, base)):
        return None
    return encode(msgspec.structs.replace(found, state=None, offset=BEYOND_ANY_FILE, hash=""), found.state)
