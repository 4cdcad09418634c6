"""Personal data in a log that is never rewritten: fields are encrypted with a key per person, kept outside the log.

Deleting the key of a person makes the person's data unreadable in the log, in its archive and in every backup. Needs
the extra `crypto`.

Promises: a value that was changed or moved to a different field or person, or for which there is a wrong key, raises an
error and is never revealed; a value whose key was deleted becomes a `Forgotten`; when `forget` has returned, the key is
no longer in the store, even after a power failure.
"""

from __future__ import annotations

import asyncio
import base64
import fcntl
import hashlib
import os
import secrets
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

import msgspec

from ._errors import EventfoldError

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
except ImportError as _error:
    raise ImportError("eventfold.privacy needs the package cryptography: pip install 'eventfold[crypto]'") from _error

__all__ = ["DirectoryKeys", "Forgotten", "Key", "KeyEntry", "KeyStore", "Privacy", "ProtectedDataError"]

MARK = "$protected"
KEY_SIZE = 32  # bytes: AES-256
NONCE_SIZE = 12  # bytes, as usual for GCM


class ProtectedDataError(EventfoldError):
    """A protected value can't be decrypted, although its key was not deleted, or a key can't be read.

    The value was changed or moved, the store has a different key, or the file of the key is damaged.
    """


@dataclass(frozen=True)
class Forgotten:
    """A placeholder for a value whose key was deleted. Its truth value is false, and it prints as `[forgotten]`.

    Attributes:
        subject: Whose data the value was.
    """

    subject: str

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return "[forgotten]"


@dataclass(frozen=True)
class Key:
    """The key of a subject.

    Attributes:
        id: A random id, which is stored in each value that is encrypted with the key.
        secret: The key itself: 32 bytes.
    """

    id: str
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class KeyEntry:
    """What a store has about a subject.

    Attributes:
        key: The key; None if there is none.
        forgotten: The ids of the keys that were deleted.
    """

    key: Key | None = None
    forgotten: tuple[str, ...] = ()


class KeyStore(Protocol):
    """The protocol of a store of keys: `DirectoryKeys`, or your own adapter for a key management service."""

    async def load(self, subject: str) -> KeyEntry:
        """Returns the entry of a subject; an empty entry if the subject is unknown."""

    async def create(self, subject: str) -> Key:
        """Returns the key of a subject. If there is none, creates a key, which is durable before this returns."""

    async def delete(self, subject: str) -> None:
        """Deletes the key of a subject durably, and keeps the key's id in `forgotten`. Does nothing without a key."""


class Privacy:
    """Encrypts and decrypts fields of events.

    Args:
        keys: The store of the keys, which must be neither in the log's directory nor in its backups.
    """

    def __init__(self, keys: KeyStore) -> None:
        self._keys = keys

    async def protect(self, data: Mapping[str, Any], subject: str, fields: Collection[str]) -> dict[str, Any]:
        """Returns the data of an event with some fields encrypted.

        If cancelled, the subject's key may have been created.

        Args:
            data: The event's data, which is not changed.
            subject: Whose data it is. It is stored in plain text: use an id that reveals nothing.
            fields: The names of the fields to encrypt, each with any JSON value.

        Returns:
            New data for the event.

        Raises:
            ValueError: A field does not exist (a misspelt name would leave the value readable), the data contains a
                protected value already, or the subject is empty.
            TypeError: A value is not JSON, such as NaN or a date, or `fields` is a string.
            ProtectedDataError: The stored key can't be read.
            OSError: The key could not be read or stored.
        """
        if isinstance(fields, str):
            raise TypeError(f"fields must be a collection of names, not the string {fields!r}")
        if not isinstance(subject, str) or not subject:
            raise ValueError(f"the subject must be a non-empty string, not {subject!r}")
        missing = sorted(set(fields) - set(data))
        if missing:
            raise ValueError(f"the data has no field {missing[0]!r} to protect; it has: {', '.join(map(str, data))}")
        if any(_marked(data, "")):
            raise ValueError(f"the data already contains a protected value (an object with the key {MARK!r})")
        plain = {name: _encode(name, data[name]) for name in fields}
        key = await self._keys.create(subject)
        result = dict(data)
        for name, value in plain.items():
            nonce = secrets.token_bytes(NONCE_SIZE)
            encrypted = nonce + AESGCM(key.secret).encrypt(nonce, value, _associated(subject, name))
            result[name] = {MARK: base64.b64encode(encrypted).decode(), "subject": subject, "key": key.id}
        return result

    async def reveal(self, data: Any, field: str = "") -> Any:
        """Returns data with all protected values decrypted.

        It accepts the data of an event, and any dicts and lists, such as the state of a view, in which each protected
        value, or the list that contains it, still has the name of its original field. A cancelled call leaves nothing
        behind.

        Args:
            data: The data, which is not changed.
            field: The name of the field, if `data` is the value of a field.

        Returns:
            New data, with a `Forgotten` for each value whose key was deleted.

        Raises:
            ProtectedDataError: A value was changed, it is in a different field than the one in which it was protected,
                the store has a different key for its subject, or a key can't be read.
            OSError: A key could not be read.
        """
        subjects = sorted({_subject(name, value) for name, value in _marked(data, field)})
        entries = {subject: await self._keys.load(subject) for subject in subjects}
        return _reveal(data, field, entries)

    async def forget(self, subject: str) -> None:
        """Deletes the key of a subject, so that no value that was protected with it can ever be revealed again.

        This includes all copies of the values. When this returns, the key is deleted permanently. If cancelled, the key
        may or may not be deleted: call it again. If data of the same subject is protected later, a new key is created.

        Args:
            subject: Whose data is forgotten.

        Raises:
            OSError: The key could not be deleted.
        """
        await self._keys.delete(subject)


class DirectoryKeys:
    """A store of keys in a directory, with a file for each subject that only the owner of the file can read.

    Several processes may use it at the same time. The directory is created if necessary. The name of a file is the
    SHA-256 of its subject, and its content is JSON. When the subject is forgotten, the file remains, without the key.

    Args:
        dir: The directory, which must be neither the log's directory nor part of its backups.
    """

    def __init__(self, dir: str | os.PathLike[str]) -> None:
        self._dir = Path(dir)
        self._durable: set[str] = set()  # ids of keys that are known to be on disk

    def __repr__(self) -> str:
        return f"<DirectoryKeys in {str(self._dir)!r}>"

    async def load(self, subject: str) -> KeyEntry:
        """Returns the entry of a subject; an empty entry if the subject is unknown.

        Raises:
            ProtectedDataError: The subject's file is damaged.
            OSError: The file could not be read.
        """
        return await asyncio.to_thread(self._load, subject)

    async def create(self, subject: str) -> Key:
        """Returns the key of a subject. If there is none, creates a key, which is durable before this returns.

        If cancelled, the key may have been created.

        Raises:
            ProtectedDataError: The subject's file is damaged.
            OSError: The file could not be read or written.
        """
        return await asyncio.to_thread(self._create, subject)

    async def delete(self, subject: str) -> None:
        """Deletes the key of a subject durably; does nothing without a key.

        If cancelled, the key may or may not be deleted.

        Raises:
            ProtectedDataError: The subject's file is damaged.
            OSError: The file could not be read or written.
        """
        await asyncio.to_thread(self._delete, subject)

    def _path(self, subject: str) -> Path:
        return self._dir / f"{hashlib.sha256(subject.encode()).hexdigest()}.json"

    def _load(self, subject: str) -> KeyEntry:
        path = self._path(subject)
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return KeyEntry()
        try:
            entry = msgspec.json.decode(text, type=KeyEntry)
            if entry.key is not None and len(entry.key.secret) != KEY_SIZE:
                raise ValueError(f"a key of {len(entry.key.secret)} bytes")
        except ValueError as error:
            raise ProtectedDataError(f"{path}: no key can be read ({error}): restore the file") from error
        return entry

    def _create(self, subject: str) -> Key:
        with self._locked():
            entry = self._load(subject)
            key = entry.key
            if key is None:
                key = Key(secrets.token_hex(8), secrets.token_bytes(KEY_SIZE))
                self._store(subject, KeyEntry(key, entry.forgotten))
            elif key.id not in self._durable:
                _sync_dir(self._dir)  # the process that stored the key may have died before it synced the directory
            self._durable.add(key.id)
            return key

    def _delete(self, subject: str) -> None:
        with self._locked():
            entry = self._load(subject)
            if entry.key is not None:
                self._store(subject, KeyEntry(None, (*entry.forgotten, entry.key.id)))
            else:
                _sync_dir(self._dir)  # the process that deleted the key may have died before it synced the directory

    def _store(self, subject: str, entry: KeyEntry) -> None:
        """Replaces the subject's file, atomically and durably."""
        path = self._path(subject)
        # The name is fixed, so that a file that a killed process left, which may contain a key, is removed here.
        temporary = path.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(msgspec.json.encode(entry))
                file.flush()
                _sync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_dir(self._dir)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds a lock against all other threads and processes, which is released when the process ends."""
        if not self._dir.is_dir():
            self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            _sync_dir(self._dir.parent)
        fd = os.open(self._dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _sync(fd: int) -> None:
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS, where fsync leaves data in the drive's cache
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def _sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _encode(field: str, value: Any) -> bytes:
    """The value of a field as JSON. Raises `TypeError` if it would be revealed as another value."""
    if not _is_json(value):  # the message must not contain it
        raise TypeError(
            f"the value of the field {field!r} is not JSON: it contains NaN, a date or a key that is not a string"
        )
    return msgspec.json.encode(value)


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return isfinite(value) if isinstance(value, float) else isinstance(value, str | int | None)


def _associated(subject: str, field: str) -> bytes:
    """The data that is authenticated with a value, so that the value can't be moved to another field or subject.

    It is JSON, so that it is different for any two pairs of a subject and a field.
    """
    return msgspec.json.encode(["eventfold", 1, subject, field])


def _marked(data: Any, field: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields all objects that look like protected values, each with the name of its field."""
    if isinstance(data, Mapping):
        if MARK in data:
            yield field, data
        else:
            for name, value in data.items():
                yield from _marked(value, name)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from _marked(value, field)


def _subject(field: str, value: Mapping[str, Any]) -> str:
    """The subject of a value. Raises `ProtectedDataError` for a value that `protect` can't have created."""
    if {name: type(part) for name, part in value.items()} != {MARK: str, "subject": str, "key": str}:
        raise ProtectedDataError(f"the protected value in the field {field!r} was changed: {dict(value)!r}")
    subject: str = value["subject"]
    return subject


def _reveal(data: Any, field: str, entries: Mapping[str, KeyEntry]) -> Any:
    if isinstance(data, Mapping):
        if MARK in data:
            return _decrypt(data[MARK], data["subject"], data["key"], field, entries[data["subject"]])
        return {name: _reveal(value, name, entries) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_reveal(value, field, entries) for value in data]
    return data


def _decrypt(text: str, subject: str, key_id: str, field: str, entry: KeyEntry) -> Any:
    if key_id in entry.forgotten or entry.key is None:
        return Forgotten(subject)
    where = f"the value of {subject!r} in the field {field!r} can't be decrypted"
    if key_id != entry.key.id:
        raise ProtectedDataError(
            f"{where}: it needs the key {key_id}, but the store has the key {entry.key.id}; is it the wrong store?"
        )
    try:
        encrypted = base64.b64decode(text, validate=True)
        nonce, value = encrypted[:NONCE_SIZE], encrypted[NONCE_SIZE:]
        return msgspec.json.decode(AESGCM(entry.key.secret).decrypt(nonce, value, _associated(subject, field)))
    except (InvalidTag, ValueError) as error:
        raise ProtectedDataError(
            f"{where}: it was changed, it was protected as another field, or the key is wrong"
        ) from error
