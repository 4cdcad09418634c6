"""Keeps the snapshots of a read-only log's views in a separate directory.

Promise: nothing is written beside the log except the committed offsets of consumers.
"""

from __future__ import annotations

import os
from pathlib import Path

from .._address import Address
from .._documents import DocumentKind, DocumentLock, Documents, LockingDocuments, NoLock
from .._engine import Paths
from .._files import operations
from .._files.paths import Layout
from .._files.source import FileDocuments
from .._reader import EventReader


class OwnSnapshotsReader(EventReader):
    """A reader of a log whose snapshots are in `directory`, not beside the log."""

    def __init__(self, dir: Address, directory: str | os.PathLike[str]) -> None:
        super().__init__(dir)
        self._snapshots = Layout(directory)
        self._snapshots.views_dir = self._snapshots.dir
        self._both_documents = _Documents(super()._documents, FileDocuments(self._snapshots))

    @property
    def directory(self) -> Path:
        """The directory of the snapshots."""
        return self._snapshots.dir

    @property
    def _documents(self) -> Documents:
        """The consumers' documents beside the log, and the snapshots in the directory."""
        return self._both_documents

    def prepare(self) -> None:
        """Removes temporary files that a killed process left in the directory. Blocks.

        Raises `ValueError` for a directory inside that of the log, where the writer keeps its snapshots.
        """
        paths = getattr(self._source, "layout", None)
        if isinstance(paths, Paths):
            log, own = Path(os.path.realpath(paths.dir)), Path(os.path.realpath(self._snapshots.dir))
            if log == own or log in own.parents:
                raise ValueError(f"snapshots={str(own)!r} is inside the log's directory: choose a separate directory")
        operations.discard_leftovers(self._snapshots.dir)


class _Documents:
    """The documents beside the log, with the snapshots from a separate directory."""

    def __init__(self, beside_log: Documents, snapshots: FileDocuments) -> None:
        self._beside_log = beside_log
        self._snapshots = snapshots

    def _of(self, kind: DocumentKind) -> Documents:
        return self._snapshots if kind == "view" else self._beside_log

    def location(self, kind: DocumentKind, name: str) -> str | Path:
        return self._of(kind).location(kind, name)

    async def load(self, kind: DocumentKind, name: str) -> bytes | None:
        return await self._of(kind).load(kind, name)

    async def store(self, kind: DocumentKind, name: str, data: bytes) -> None:
        await self._of(kind).store(kind, name, data)

    async def delete(self, kind: DocumentKind, name: str) -> None:
        await self._of(kind).delete(kind, name)

    async def names(self, kind: DocumentKind) -> list[str]:
        return await self._of(kind).names(kind)

    async def lock(self, kind: DocumentKind, name: str) -> DocumentLock | None:
        documents = self._of(kind)
        return await documents.lock(kind, name) if isinstance(documents, LockingDocuments) else NoLock()
