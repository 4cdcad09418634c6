"""Documents in a key-value bucket beside the stream, replaced atomically.

A value of the bucket is smaller than a message, so a large document is stored in parts under keys of their own, which
are written first. The document's key then gets a manifest that names them: that one write makes the document the new
one. The manifest is written with the revision that was read, so that of two that replace a document at once one is told
and tries again.

The bucket is one that `nats kv` can read. It is read from its leader, since a replica may give an old value.
"""

from __future__ import annotations

import asyncio
import errno
import uuid
from collections.abc import Mapping
from typing import Any

import msgspec

from .._engine import DocumentKind, check_name
from .._errors import CorruptLogError, EventfoldError
from ._codes import NO_ROOM, WRONG_LAST_SEQUENCE, error_code
from ._configuration import bucket_configuration, bucket_stream, check_bucket
from ._connection import Connection, Message

_PART_SIZE = 512 * 1024
_ATTEMPTS = 20
_RETRY_DELAY = 0.02  # seconds


class _Manifest(msgspec.Struct):
    """What stands under a document's key: its content where that is small, otherwise the name of its parts."""

    parts: int
    prefix: str = ""
    content: bytes = b""


class KeyValueDocuments:
    """`Documents` in the bucket `eventfold-<stream>`, which is made or checked when it is first needed."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._bucket = f"eventfold-{connection.settings.stream}"
        self._opened = False

    def location(self, kind: DocumentKind, name: str) -> str:
        return f"{self._connection.location}/{kind}s/{check_name(kind, name)}"

    async def open(self) -> None:
        """Makes the bucket, or checks it. Raises `EventfoldError` for one that may lose documents, and `OSError`."""
        if not self._opened:
            wanted = bucket_configuration(self._bucket, self._connection.settings.replicas)
            check_bucket(self._connection.location, self._bucket, await self._connection.other_stream(wanted))
            self._opened = True

    async def load(self, kind: DocumentKind, name: str) -> bytes | None:
        key = _key(kind, name)
        for _ in range(_ATTEMPTS):
            manifest, _ = await self._manifest(key)
            if manifest is None:
                return None
            if not manifest.parts:
                return manifest.content
            parts = [await self._get(_part(manifest, index)) for index in range(manifest.parts)]
            if None not in parts:
                return b"".join([part.data for part in parts if part is not None])
            # It was replaced meanwhile.
            await asyncio.sleep(_RETRY_DELAY)
        raise OSError(errno.EAGAIN, "the document is replaced all the time, or was damaged", self.location(kind, name))

    async def store(self, kind: DocumentKind, name: str, data: bytes) -> None:
        await self.open()
        key, manifest = _key(kind, name), _Manifest(0, content=data)
        size = min(_PART_SIZE, self._connection.max_data)
        if len(data) > size:
            chunks = [data[start : start + size] for start in range(0, len(data), size)]
            manifest = _Manifest(len(chunks), f"{key}.{uuid.uuid4().hex}")
            for index, chunk in enumerate(chunks):
                await self._put(_part(manifest, index), chunk)
        await self._replace(kind, name, msgspec.msgpack.encode(manifest))

    async def delete(self, kind: DocumentKind, name: str) -> None:
        await self.open()
        await self._replace(kind, name, None)

    async def _replace(self, kind: DocumentKind, name: str, value: bytes | None) -> None:
        """Puts a value in the place of the manifest, or removes it, and then the parts of the one before."""
        key = _key(kind, name)
        for _ in range(_ATTEMPTS):
            before, revision = await self._manifest(key)
            if before is None and value is None:
                return
            headers = {"Nats-Expected-Last-Subject-Sequence": str(revision)}
            if value is None:
                headers["KV-Operation"] = "DEL"
            if await self._put(key, value or b"", headers):
                if before is not None and before.parts:
                    await self._purge(f"{before.prefix}.*")
                return
            await asyncio.sleep(_RETRY_DELAY)
        raise OSError(errno.EAGAIN, "the document is replaced all the time by others", self.location(kind, name))

    async def names(self, kind: DocumentKind) -> list[str]:
        await self.open()
        answer = await self._connection.request(
            f"$JS.API.STREAM.INFO.{bucket_stream(self._bucket)}", {"subjects_filter": self._subject(f"{kind}.*")}
        )
        self._raise_error(answer)
        keys = [subject.removeprefix(self._subject("")) for subject in answer["state"].get("subjects") or ()]
        return sorted(
            [key.partition(".")[2].replace("=", ".") for key in keys if (await self._manifest(key))[0] is not None]
        )

    async def _manifest(self, key: str) -> tuple[_Manifest | None, int]:
        """The manifest under a key, and the revision that the next write must name; 0 for a new key."""
        message = await self._get(key)
        if message is None:
            return None, 0
        if message.headers.get("KV-Operation"):
            return None, message.sequence  # it was deleted
        try:
            return msgspec.msgpack.decode(message.data, type=_Manifest), message.sequence
        except msgspec.DecodeError as error:
            raise CorruptLogError(
                f"{self._connection.location}/{key}", 0, f"no document of eventfold: {error}"
            ) from error

    def _subject(self, key: str) -> str:
        return f"$KV.{self._bucket}.{key}"

    async def _get(self, key: str) -> Message | None:
        await self.open()
        return await self._connection.get(bucket_stream(self._bucket), {"last_by_subj": self._subject(key)})

    async def _put(self, key: str, value: bytes, headers: Mapping[str, str] | None = None) -> bool:
        """Writes a value; false where the expected revision is not the last one."""
        identity = uuid.uuid4().hex  # it may be sent more than once
        answer = await self._connection.request(self._subject(key), value, {"Nats-Msg-Id": identity, **(headers or {})})
        if error_code(answer) in WRONG_LAST_SEQUENCE:
            message = await self._get(key)
            return message is not None and message.headers.get("Nats-Msg-Id") == identity
        self._raise_error(answer)
        return True

    async def _purge(self, keys: str) -> None:
        """Removes keys, and all that is known of them."""
        try:
            await self._connection.request(
                f"$JS.API.STREAM.PURGE.{bucket_stream(self._bucket)}", {"filter": self._subject(keys)}
            )
        except OSError:
            pass  # they take up room, and nothing else

    def _raise_error(self, answer: Mapping[str, Any]) -> None:
        error = answer.get("error")
        if error and error_code(answer) in NO_ROOM:
            raise OSError(errno.ENOSPC, error["description"], self._connection.location)
        if error:
            raise EventfoldError(f"{self._connection.location}: the bucket {self._bucket}: {error['description']}")


def _key(kind: DocumentKind, name: str) -> str:
    return f"{kind}.{check_name(kind, name).replace('.', '=')}"


def _part(manifest: _Manifest, index: int) -> str:
    return f"{manifest.prefix}.{index}"
