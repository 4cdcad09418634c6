"""Personal data in a log that is never rewritten: fields encrypted with a key for each person, kept outside the log.

Deleting a key erases the person from the log, its archive and every backup of them at once. Needs the extra `crypto`.

Promises: a value that was changed, was moved to another field or person, or meets the wrong key is an error and never
revealed; a value whose key is gone becomes a `Forgotten`; once `forget` returns, the key is no longer in the store,
even after a power failure.
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
    """A protected value can't be decrypted although there is a key: it was changed or moved, or the key is wrong."""


@dataclass(frozen=True)
class Forgotten:
    """A placeholder for a value whose key is gone. It is false, and prints as `[forgotten]`."""

    subject: str

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return "[forgotten]"


@dataclass(frozen=True)
class Key:
    """A subject's key; its random `id` is stored with everything that was encrypted with it."""

    id: str
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class KeyEntry:
    """What a store knows about a subject: its key, if it has one, and the ids of deleted keys."""

    key: Key | None = None
    forgotten: tuple[str, ...] = ()


class KeyStore(Protocol):
    """Where keys are kept: a directory (`DirectoryKeys`), or your own adapter to a key management service."""

    async def load(self, subject: str) -> KeyEntry:
        """Returns the subject's entry; an empty one if the subject is unknown."""

    async def create(self, subject: str) -> Key:
        """Returns the subject's key; if there is none, a new one, which is durable before this returns."""

    async def delete(self, subject: str) -> None:
        """Deletes the subject's key durably and keeps its id as forgotten; does nothing if there is no key."""


class Privacy:
    """Protects fields of events and reveals them.

    Args:
        keys: The store of the keys, which must not be in the log's directory or its backups.
    """

    def __init__(self, keys: KeyStore) -> None:
        self._keys = keys

    async def protect(self, data: Mapping[str, Any], subject: str, fields: Collection[str]) -> dict[str, Any]:
        """Returns an event's data with some of its fields encrypted.

        If cancelled, it may have created the subject's key.

        Args:
            data: The event's data, which is not changed.
            subject: Whose data it is. It is stored in plain text: use an id that reveals nothing.
            fields: The names of the fields to encrypt, each with any JSON value.

        Returns:
            New data for the event.

        Raises:
            ValueError: A field is missing (a misspelt one would leave the value readable), the data contains protected
                values already, or the subject is empty.
            TypeError: A value is not JSON, or `fields` is a string.
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
            raise ValueError(f"the data contains a protected value (an object with the key {MARK!r}) already")
        plain = {name: msgspec.json.encode(data[name]) for name in fields}
        key = await self._keys.create(subject)
        result = dict(data)
        for name, value in plain.items():
            nonce = secrets.token_bytes(NONCE_SIZE)
            encrypted = nonce + AESGCM(key.secret).encrypt(nonce, value, _associated(subject, name))
            result[name] = {MARK: base64.b64encode(encrypted).decode(), "subject": subject, "key": key.id}
        return result

    async def reveal(self, data: Any, field: str = "") -> Any:
        """Returns the same data with all protected values decrypted.

        Works on an event's data and on any dicts and lists, such as a view's state, as long as each value is under the
        name of its original field, in a list or not.

        Args:
            data: The data, which is not changed.
            field: The name of the field, where `data` is the value of one.

        Returns:
            New data, with a `Forgotten` for each value whose key is gone.

        Raises:
            ProtectedDataError: A value was changed, is in a field other than the one in which it was protected, or the
                store has a different key for that subject.
            OSError: A key could not be read.
        """
        subjects = sorted({_subject(name, value) for name, value in _marked(data, field)})
        entries = {subject: await self._keys.load(subject) for subject in subjects}
        return _reveal(data, field, entries)

    async def forget(self, subject: str) -> None:
        """Deletes a subject's key: what was protected with it can't be revealed again, wherever it was copied to.

        Once it returns, the key is gone for good. If cancelled, the key may or may not be gone: call it again. If the
        subject returns, it gets a new key.

        Args:
            subject: Whose data is to be forgotten.

        Raises:
            OSError: The key could not be deleted.
        """
        await self._keys.delete(subject)


class DirectoryKeys:
    """A directory with one file for each subject, which only its owner can read; safe to share between processes.

    The directory is created if necessary. A file is named after the SHA-256 of its subject and contains JSON; it stays,
    without the key, when the subject is forgotten.

    Args:
        dir: The directory: not the log's, and not part of the log's backups.
    """

    def __init__(self, dir: str | os.PathLike[str]) -> None:
        self._dir = Path(dir)
        self._durable: set[str] = set()  # ids of keys that are known to be on disk

    def __repr__(self) -> str:
        return f"<DirectoryKeys in {str(self._dir)!r}>"

    async def load(self, subject: str) -> KeyEntry:
        """Returns the subject's entry. Raises `ProtectedDataError` if its file is damaged."""
        return await asyncio.to_thread(self._load, subject)

    async def create(self, subject: str) -> Key:
        """Returns the subject's key, a new one if there is none. If cancelled, the key may have been created."""
        return await asyncio.to_thread(self._create, subject)

    async def delete(self, subject: str) -> None:
        """Deletes the subject's key durably. If cancelled, the key may or may not be gone."""
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
                _sync_dir(self._dir)  # the process that stored it may have died before
            self._durable.add(key.id)
            return key

    def _delete(self, subject: str) -> None:
        with self._locked():
            entry = self._load(subject)
            if entry.key is not None:
                self._store(subject, KeyEntry(None, (*entry.forgotten, entry.key.id)))
            else:
                _sync_dir(self._dir)  # the process that deleted it may have died before

    def _store(self, subject: str, entry: KeyEntry) -> None:
        """Replaces the subject's file, atomically and durably."""
        path = self._path(subject)
        # A fixed name: what a killed process left there, perhaps a key, is overwritten or removed by the next one.
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
        """Holds a lock against all threads and processes; it ends with the process."""
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


def _associated(subject: str, field: str) -> bytes:
    """Returns what is authenticated with a value, so that it can't be moved; JSON, so that no two are the same."""
    return msgspec.json.encode(["eventfold", 1, subject, field])


def _marked(data: Any, field: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields everything that looks like a protected value, each with the name of its field."""
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
    """Returns the subject of a value. Raises `ProtectedDataError` for a value that `protect` can't have created."""
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
            f"{where}: it needs the key {key_id}, and the store has {entry.key.id}; is it the wrong store?"
        )
    try:
        encrypted = base64.b64decode(text, validate=True)
        nonce, value = encrypted[:NONCE_SIZE], encrypted[NONCE_SIZE:]
        return msgspec.json.decode(AESGCM(entry.key.secret).decrypt(nonce, value, _associated(subject, field)))
    except (InvalidTag, ValueError) as error:
        raise ProtectedDataError(
            f"{where}: it was changed, it was protected as another field, or the key is wrong"
        ) from error
