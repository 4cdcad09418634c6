"""Documents in a key-value bucket beside the stream, replaced atomically.

A value in the bucket can't be larger than a message, so a large document is stored in parts, each under its own key.
The parts are written first. Then the document's key gets a manifest that names them, which replaces the document by a
single write. A manifest is written on condition that the previous one still has the revision that was read, so if two
processes replace a document at once, one of them is refused and tries again.

The manifest of a consumer's document also names the process that reads under the consumer's name; see `_locks`.

`nats kv` can read the bucket. This module reads it from its leader, since a replica may return an old value.
"""

from __future__ import annotations

import asyncio
import errno
import uuid
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from .._documents import DocumentKind, DocumentLock, NoLock, check_name
from .._errors import CorruptLogError, EventfoldError
from .._logging import INFO, WARNING, log_event
from ._api import Message, get_message, stream_info
from ._codes import NO_SPACE, WRONG_LAST_SEQUENCE, error_code
from ._configuration import bucket_configuration, bucket_stream, check_bucket
from ._connection import Connection
from ._locks import HolderLiveness, Lock, Responder

_PART_SIZE = 512 * 1024
_ATTEMPTS = 20
_RETRY_DELAY = 0.02  # seconds
_RELEASE_TIMEOUT = 1.0  # seconds for which closing waits until locks are released


class _Manifest(msgspec.Struct, omit_defaults=True):
    """The value of a document's key: its content if that is small, otherwise the names of its parts.

    `holder` is the identity of the document's lock; "" if it is not locked. `exists` is false if there is a lock but no
    document yet.
    """

    parts: int
    prefix: str = ""
    content: bytes = b""
    holder: str = ""
    exists: bool = True


class KeyValueDocuments:
    """`Documents` in the bucket `eventfold-<stream>`, which is created or checked when it is first needed."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._bucket = f"eventfold-{connection.settings.stream}"
        self._opened = False
        self._locks: weakref.WeakValueDictionary[str, Lock] = weakref.WeakValueDictionary()
        self._liveness = HolderLiveness(connection)
        self._releasing: dict[str, asyncio.Task[None]] = {}  # by the identity of a lock

    def location(self, kind: DocumentKind, name: str) -> str:
        return f"{self._connection.location}/{kind}s/{check_name(kind, name)}"

    async def open(self) -> None:
        """Creates or checks the bucket. Raises `OSError`, and `EventfoldError` if the bucket may lose documents."""
        if self._opened:
            return
        settings, location = self._connection.settings, self._connection.location
        wanted = bucket_configuration(self._bucket, settings.replicas)
        info = await stream_info(self._connection.request, settings, wanted, create=settings.create)
        if "error" in info:
            raise EventfoldError(f"{location}: the stream {wanted['name']}: {info['error']['description']}")
        check_bucket(location, self._bucket, info["config"])
        self._opened = True

    async def load(self, kind: DocumentKind, name: str) -> bytes | None:
        key = _key(kind, name)
        for _ in range(_ATTEMPTS):
            manifest, _ = await self._manifest(key)
            if manifest is None or not manifest.exists:
                return None
            if not manifest.parts:
                return manifest.content
            parts = [await self._get(_part(manifest, index)) for index in range(manifest.parts)]
            if None not in parts:
                return b"".join([part.data for part in parts if part is not None])
            # A part is missing, since the document has just been replaced.
            await asyncio.sleep(_RETRY_DELAY)
        raise OSError(errno.EAGAIN, "the document is replaced too often, or is damaged", self.location(kind, name))

    async def store(self, kind: DocumentKind, name: str, data: bytes) -> None:
        await self.open()
        key, manifest = _key(kind, name), _Manifest(0, content=data)
        size = min(_PART_SIZE, self._connection.max_data)
        if len(data) > size:
            chunks = [data[start : start + size] for start in range(0, len(data), size)]
            manifest = _Manifest(len(chunks), f"{key}.{uuid.uuid4().hex}")
            for index, chunk in enumerate(chunks):
                await self._put(_part(manifest, index), chunk)
        await self._replace(kind, name, manifest)

    async def delete(self, kind: DocumentKind, name: str) -> None:
        await self.open()
        await self._replace(kind, name, _Manifest(0, exists=False))

    async def _replace(self, kind: DocumentKind, name: str, manifest: _Manifest) -> None:
        """Replaces a manifest, but not its holder, and removes the parts of the previous document.

        Raises `EventfoldError` if this process has lost the document's lock to another one.
        """
        key = _key(kind, name)
        for _ in range(_ATTEMPTS):
            previous, revision = await self._manifest(key)
            manifest.holder = "" if previous is None else previous.holder
            lock = self._locks.get(key)
            if lock is not None and lock.is_held and lock.identity != manifest.holder:
                lock.lost = True
                raise EventfoldError(
                    f"{self.location(kind, name)} belongs to another process now, which took over the {kind} while "
                    "this process could not be reached"
                )
            if previous is None and not manifest.exists:
                return
            if await self._put_manifest(key, manifest, revision):
                if previous is not None and previous.parts:
                    await self._purge(f"{previous.prefix}.*")
                return
            await asyncio.sleep(_RETRY_DELAY)
        raise OSError(errno.EAGAIN, "other processes replace the document too often", self.location(kind, name))

    async def _put_manifest(self, key: str, manifest: _Manifest, revision: int) -> bool:
        """Writes a manifest, or deletes the key if there is neither document nor lock; false if `revision` is old."""
        headers, value = {"Nats-Expected-Last-Subject-Sequence": str(revision)}, b""
        if manifest.exists or manifest.holder:
            value = msgspec.msgpack.encode(manifest)
        elif not revision:
            return True
        else:
            headers["KV-Operation"] = "DEL"
        return await self._put(key, value, headers)

    async def lock(self, kind: DocumentKind, name: str) -> DocumentLock | None:
        """Locks a consumer's document; returns None, after half a second, if another process has the lock.

        Raises `OSError` if the servers don't answer, and `EventfoldError`.
        """
        if kind == "view":
            return NoLock()
        await self.open()
        key = _key(kind, name)
        if self._releasing:  # one of them may be this lock
            await asyncio.wait(list(self._releasing.values()))
        manifest, revision = await self._manifest(key)
        manifest = manifest or _Manifest(0, exists=False)
        former_holder = manifest.holder
        if former_holder and not await self._liveness.is_dead(former_holder):
            return None
        lock = Lock(self._connection, self._release_callback(key))
        await lock.open()
        manifest.holder = lock.identity
        if not await self._put_manifest(key, manifest, revision):
            lock.release()
            return None
        self._locks[key] = lock
        if former_holder:
            log_event(
                INFO,
                "jetstream.taken_over",
                "%(location)s was taken over from a process that no longer answers",
                location=self.location(kind, name),
            )
        return lock

    def _release_callback(self, key: str) -> Callable[[str, Responder], None]:
        def release(identity: str, responder: Responder) -> None:
            task = asyncio.get_running_loop().create_task(self._release(key, identity, responder))
            self._releasing[identity] = task
            task.add_done_callback(lambda _: self._releasing.pop(identity, None))

        return release

    async def _release(self, key: str, identity: str, responder: Responder) -> None:
        """Removes a lock from the manifest. If that fails, other processes notice that its holder does not answer."""
        try:
            for _ in range(_ATTEMPTS):
                manifest, revision = await self._manifest(key)
                if manifest is None or manifest.holder != identity:
                    return
                manifest.holder = ""
                if await self._put_manifest(key, manifest, revision):
                    return
        except (EventfoldError, OSError):
            pass
        finally:
            await responder.stop()

    async def check_locks(self) -> None:
        """Marks those of this process's locks as lost that other processes have. Raises `EventfoldError`, `OSError`."""
        for key, lock in list(self._locks.items()):
            if not lock.is_held:
                continue
            await lock.open()
            manifest, _ = await self._manifest(key)
            if lock.is_held and (manifest is None or manifest.holder != lock.identity):
                lock.lost = True
                log_event(
                    WARNING,
                    "jetstream.lock_lost",
                    "%(location)s: another process has taken over %(key)s while this one could not be reached",
                    location=self._connection.location,
                    key=key,
                )

    async def aclose(self) -> None:
        """Waits, for at most one second, until all locks are released."""
        if self._releasing:
            _, unfinished = await asyncio.wait(list(self._releasing.values()), timeout=_RELEASE_TIMEOUT)
            for task in unfinished:
                task.cancel()
            if unfinished:
                await asyncio.wait(unfinished)

    async def names(self, kind: DocumentKind) -> list[str]:
        await self.open()
        answer = await self._connection.request(
            f"$JS.API.STREAM.INFO.{bucket_stream(self._bucket)}", {"subjects_filter": self._subject(f"{kind}.*")}
        )
        self._raise_error(answer)
        keys = [subject.removeprefix(self._subject("")) for subject in answer["state"].get("subjects") or ()]
        found = []
        for key in keys:
            manifest, _ = await self._manifest(key)
            if manifest is not None and manifest.exists:
                found.append(key.partition(".")[2].replace("=", "."))
        return sorted(found)

    async def _manifest(self, key: str) -> tuple[_Manifest | None, int]:
        """The manifest of a key, and the revision on which the next write depends; 0 for a new key."""
        message = await self._get(key)
        if message is None:
            return None, 0
        if message.headers.get("KV-Operation"):
            return None, message.sequence  # it was deleted
        try:
            return msgspec.msgpack.decode(message.data, type=_Manifest), message.sequence
        except msgspec.DecodeError as error:
            raise CorruptLogError(
                f"{self._connection.location}/{key}", 0, f"this is not a document of eventfold: {error}"
            ) from error

    def _subject(self, key: str) -> str:
        return f"$KV.{self._bucket}.{key}"

    async def _get(self, key: str) -> Message | None:
        await self.open()
        connection, which = self._connection, {"last_by_subj": self._subject(key)}
        return await get_message(connection.request, connection.location, bucket_stream(self._bucket), which)

    async def _put(self, key: str, value: bytes, headers: Mapping[str, str] | None = None) -> bool:
        """Writes a value. Returns false if the headers expect an older revision than the current one."""
        identity = uuid.uuid4().hex  # the request may be sent more than once
        answer = await self._connection.request(self._subject(key), value, {"Nats-Msg-Id": identity, **(headers or {})})
        if error_code(answer) in WRONG_LAST_SEQUENCE:
            message = await self._get(key)
            return message is not None and message.headers.get("Nats-Msg-Id") == identity
        self._raise_error(answer)
        return True

    async def _purge(self, keys: str) -> None:
        """Removes keys with their history. Ignores `OSError`."""
        try:
            await self._connection.request(
                f"$JS.API.STREAM.PURGE.{bucket_stream(self._bucket)}", {"filter": self._subject(keys)}
            )
        except OSError:
            pass  # the keys only take up space

    def _raise_error(self, answer: Mapping[str, Any]) -> None:
        error = answer.get("error")
        if error and error_code(answer) in NO_SPACE:
            raise OSError(errno.ENOSPC, error["description"], self._connection.location)
        if error:
            raise EventfoldError(f"{self._connection.location}: the bucket {self._bucket}: {error['description']}")


def _key(kind: DocumentKind, name: str) -> str:
    return f"{kind}.{check_name(kind, name).replace('.', '=')}"


def _part(manifest: _Manifest, index: int) -> str:
    return f"{manifest.prefix}.{index}"
