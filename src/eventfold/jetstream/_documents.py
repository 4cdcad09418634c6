"""Documents in a key-value bucket beside the stream, replaced atomically.

A value of the bucket is smaller than a message, so a document is stored in parts under keys of their own, which are
written first. The document's key then gets a manifest that names them: that one write makes the document the new one.
The manifest is written with the revision that was read, so that of two that replace a document at once one is told and
tries again.
"""

from __future__ import annotations

import asyncio
import errno
import uuid
from typing import Any

import msgspec
from nats.errors import Error as NatsError
from nats.js.errors import (
    APIError,
    KeyNotFoundError,
    KeyWrongLastSequenceError,
    NoKeysError,
    NotFoundError,
)
from nats.js.kv import KeyValue

from .._engine import DocumentKind, check_name
from ._connection import Connection

_PART_SIZE = 512 * 1024
_ATTEMPTS = 20


class _Manifest(msgspec.Struct):
    """What stands under a document's key: its content where that is small, otherwise the name of its parts."""

    parts: int
    prefix: str = ""
    content: bytes = b""


class KeyValueDocuments:
    """`Documents` in the bucket `eventfold-<stream>`, which is made when it is first needed."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._bucket: KeyValue | None = None

    def location(self, kind: DocumentKind, name: str) -> str:
        return f"{self._connection.location}/{kind}s/{check_name(kind, name)}"

    async def load(self, kind: DocumentKind, name: str) -> bytes | None:
        key = _key(kind, name)
        for _ in range(_ATTEMPTS):
            manifest, _ = await self._manifest(key)
            if manifest is None:
                return None
            if not manifest.parts:
                return manifest.content
            bucket = await self._open()
            try:
                parts = [await bucket.get(_part(manifest, index)) for index in range(manifest.parts)]
            except KeyNotFoundError:
                continue  # it was replaced meanwhile
            return b"".join(part.value or b"" for part in parts)
        raise OSError(errno.EAGAIN, "the document is being replaced all the time", self.location(kind, name))

    async def store(self, kind: DocumentKind, name: str, data: bytes) -> None:
        key, bucket = _key(kind, name), await self._open()
        manifest = _Manifest(0, content=data)
        if len(data) > _PART_SIZE:
            chunks = [data[start : start + _PART_SIZE] for start in range(0, len(data), _PART_SIZE)]
            manifest = _Manifest(len(chunks), f"{key}.{uuid.uuid4().hex}")
            for index, chunk in enumerate(chunks):
                await self._retried(bucket.put, _part(manifest, index), chunk)
        encoded = msgspec.msgpack.encode(manifest)
        for _ in range(_ATTEMPTS):
            before, revision = await self._manifest(key)
            try:
                await bucket.update(key, encoded, last=revision)
            except KeyWrongLastSequenceError:
                continue
            except (NatsError, TimeoutError):
                await asyncio.sleep(0.1)
                if (await self._manifest(key))[0] != manifest:
                    continue
            if before is not None:
                await self._delete_parts(before)
            return
        raise OSError(errno.EAGAIN, "the document could not be replaced", self.location(kind, name))

    async def delete(self, kind: DocumentKind, name: str) -> None:
        key, bucket = _key(kind, name), await self._open()
        before, _ = await self._manifest(key)
        if before is not None:
            await self._retried(bucket.delete, key)
            await self._delete_parts(before)

    async def names(self, kind: DocumentKind) -> list[str]:
        try:
            keys = await (await self._open()).keys()
        except NoKeysError:
            return []
        return sorted(
            parts[1].replace("=", ".")
            for parts in (key.split(".") for key in keys)
            if len(parts) == 2 and parts[0] == kind
        )

    async def _manifest(self, key: str) -> tuple[_Manifest | None, int]:
        """The manifest under a key, and the revision that the next write must name; 0 for a new key."""
        bucket = await self._open()
        try:
            entry = await self._retried(bucket.get, key)
        except KeyNotFoundError as error:
            # A key that was deleted still has the revision of its deletion.
            return None, 0 if error.entry is None else error.entry.revision
        return msgspec.msgpack.decode(entry.value, type=_Manifest), entry.revision

    async def _delete_parts(self, manifest: _Manifest) -> None:
        bucket = await self._open()
        for index in range(manifest.parts):
            try:
                await bucket.purge(_part(manifest, index))
            except (NatsError, TimeoutError):
                pass  # it takes up room, and nothing else

    async def _open(self) -> KeyValue:
        if self._bucket is None:
            client = await self._connection.client()
            settings = self._connection.settings
            stream = client.jetstream(timeout=settings.attempt_timeout)
            name = f"eventfold-{settings.stream}"
            try:
                self._bucket = await self._retried(stream.key_value, name)
            except NotFoundError:
                self._bucket = await self._retried(
                    lambda: stream.create_key_value(bucket=name, history=1, replicas=settings.replicas)
                )
        return self._bucket

    async def _retried(self, call: Any, *arguments: Any) -> Any:
        """Calls it until it is answered; `OSError` (ETIMEDOUT) where that takes too long."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._connection.settings.timeout
        while True:
            try:
                return await call(*arguments)
            except (KeyNotFoundError, NotFoundError, KeyWrongLastSequenceError):
                raise
            except (NatsError, APIError, TimeoutError) as error:
                if loop.time() >= until:
                    raise OSError(errno.ETIMEDOUT, f"no answer: {error!r}", self._connection.location) from error
                await asyncio.sleep(0.1)


def _key(kind: DocumentKind, name: str) -> str:
    return f"{kind}.{check_name(kind, name).replace('.', '=')}"


def _part(manifest: _Manifest, index: int) -> str:
    return f"{manifest.prefix}.{index}"
