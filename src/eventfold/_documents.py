"""The documents beside a log: the snapshots of views and the committed offsets of consumers, and locks on them.

The protocols that an engine implements, and what all engines have in common: the names that documents may have.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

from ._aio import uninterrupted
from ._threads import ThreadCall

DocumentKind: TypeAlias = Literal["view", "consumer"]
L = TypeVar("L", bound="DocumentLock")

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


def is_name(name: object) -> bool:
    """Whether a view or a consumer may have this name, which becomes part of a file name."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def check_name(kind: str, name: str) -> str:
    """Returns a name that a view or a consumer may have; raises `ValueError` for any other."""
    if not is_name(name):
        raise ValueError(
            f"{kind} name {name!r}: it must be 1 to 128 characters of A-Z a-z 0-9 . _ -, not starting with a dot"
        )
    return name


class Documents(Protocol):
    """The documents beside a log: the snapshots of views, and the committed offsets of consumers."""

    def location(self, kind: DocumentKind, name: str) -> str | Path:
        """The location of a document, for messages."""

    async def load(self, kind: DocumentKind, name: str) -> bytes | None:
        """The content of a document; None if the document does not exist."""

    async def store(self, kind: DocumentKind, name: str, data: bytes) -> None:
        """Replaces a document atomically; its content is durable when this returns."""

    async def delete(self, kind: DocumentKind, name: str) -> None:
        """Removes a document; does nothing if it does not exist."""

    async def names(self, kind: DocumentKind) -> list[str]:
        """The names of all documents of a kind, sorted."""


class DocumentLock(Protocol):
    """A lock that this process holds. It is also released when the process ends."""

    async def was_lost(self) -> bool:
        """Whether another process may hold the lock now, because the connection to the server was lost."""

    def release(self) -> None:
        """Releases the lock. Idempotent and never blocks; any thread may call it."""


class NoLock:
    """A placeholder where nothing can be locked."""

    async def was_lost(self) -> bool:
        return False

    def release(self) -> None:
        """Does nothing."""


async def acquired(acquiring: asyncio.Future[L | None] | ThreadCall[L | None]) -> L | None:
    """Waits for a lock that is being acquired; None if another process holds it.

    If cancelled, it still waits for the lock, and releases it.
    """
    try:
        return await (uninterrupted(acquiring) if isinstance(acquiring, asyncio.Future) else acquiring)
    except asyncio.CancelledError:
        with suppress(Exception):  # the cancellation is raised, whether or not the lock could be acquired
            if (lock := acquiring.result()) is not None:
                lock.release()
        raise
    finally:
        del acquiring  # as in `uninterrupted`


@runtime_checkable
class LockingDocuments(Protocol):
    """Documents that can be locked. The locks apply to all processes that use the log."""

    async def lock(self, kind: DocumentKind, name: str) -> DocumentLock | None:
        """Locks a document, which need not exist; None if another process holds the lock. Raises `OSError`."""
