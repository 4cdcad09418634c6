"""How servers, the stream and the bucket must be configured so that no event is lost.

A stream may be configured to lose messages: by limits of size or age, by purges, or by another retention policy. Such a
stream is refused, and the error says what to change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._errors import CorruptLogError, EventfoldError

MIN_SERVER_VERSION = (2, 11)  # earlier versions can't sync a message before they acknowledge it
MIN_PAYLOAD = 64 * 1024  # bytes
DUPLICATE_WINDOW = 120 * 10**9  # nanoseconds for which the servers recognise a commit that is sent again
MAX_TIMEOUT = 100.0  # seconds for which a commit may be sent again: less than the duplicate window


def stream_configuration(stream: str, subject: str, replicas: int, compression: str) -> dict[str, Any]:
    """The configuration of a new stream, for the server's API."""
    return {
        "name": stream,
        "subjects": [subject],
        "retention": "limits",
        "storage": "file",
        "max_msgs": -1,
        "max_bytes": -1,
        "max_age": 0,
        "max_msgs_per_subject": -1,
        "discard": "new",
        "deny_delete": True,
        "deny_purge": True,
        "allow_direct": True,
        "num_replicas": replicas,
        "duplicate_window": DUPLICATE_WINDOW,
        "compression": compression,
    }


def bucket_configuration(bucket: str, replicas: int) -> dict[str, Any]:
    """The configuration of a new key-value bucket, which is a stream."""
    return {
        "name": bucket_stream(bucket),
        "subjects": [f"$KV.{bucket}.>"],
        "retention": "limits",
        "storage": "file",
        "max_msgs": -1,
        "max_bytes": -1,
        "max_age": 0,
        "max_msgs_per_subject": 1,
        "discard": "new",
        "deny_delete": True,
        "allow_rollup_hdrs": True,
        "allow_direct": True,
        "num_replicas": replicas,
        "duplicate_window": DUPLICATE_WINDOW,
    }


def bucket_stream(bucket: str) -> str:
    """The name of the stream that is a key-value bucket."""
    return f"KV_{bucket}"


# The settings on which the safety of events depends, and the value that each must have.
_REQUIRED: dict[str, Any] = {
    "retention": "limits",
    "storage": "file",
    "max_msgs": -1,
    "max_bytes": -1,
    "max_age": 0,
    "max_msgs_per_subject": -1,
    "max_msg_size": -1,
    "persist_mode": "default",  # otherwise a server acknowledges messages that it has not written yet
    "deny_delete": True,
    "deny_purge": True,
    "allow_direct": True,
}
_REQUIRED_OF_BUCKET: dict[str, Any] = {
    "retention": "limits",
    "storage": "file",
    "max_msgs": -1,
    "max_bytes": -1,
    "max_age": 0,
    "max_msg_size": -1,
    "persist_mode": "default",
}
_ABSENT = (
    "mirror",
    "sources",
    "subject_transform",
    "allow_rollup_hdrs",
    "sealed",
    "allow_msg_ttl",
    "allow_msg_counter",
    "no_ack",
)
_DEFAULTS: dict[str, Any] = {
    "max_age": 0,
    "max_msg_size": -1,
    "persist_mode": "default",
    "deny_delete": False,
    "deny_purge": False,
    "allow_direct": False,
}


def check_server(location: str, version: tuple[int, int], text: str, max_payload: int) -> None:
    """Raises `EventfoldError` if the server is too old, or accepts only small messages."""
    if version < MIN_SERVER_VERSION:
        raise EventfoldError(
            f"{location}: nats-server {text} is too old: it can't sync before it acknowledges; use 2.11 or later"
        )
    if max_payload < MIN_PAYLOAD:
        raise EventfoldError(
            f"{location}: the servers' max_payload is {max_payload} bytes; set it to at least {MIN_PAYLOAD}"
        )


def check_stream(location: str, subject: str, found: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raises `EventfoldError` if the stream could lose events, and `CorruptLogError` if it has lost some."""
    if found.get("subjects") != [subject]:
        raise EventfoldError(
            f"{location}: the stream's subjects are {found.get('subjects')!r}; they must be {[subject]!r}"
        )
    for name, required in _REQUIRED.items():
        value = found.get(name, _DEFAULTS.get(name))
        if value != required:
            raise EventfoldError(
                f"{location}: the stream's {name} is {value!r}, so it may lose events; set it to {required!r}"
            )
    for name in _ABSENT:
        if found.get(name):
            raise EventfoldError(f"{location}: the stream has {name} set, so it may lose events; remove that setting")
    if found.get("duplicate_window", 0) < DUPLICATE_WINDOW:
        raise EventfoldError(
            f"{location}: the stream's duplicate_window is {found.get('duplicate_window', 0)} ns, so a commit that "
            f"is sent again may be duplicated; set it to at least {DUPLICATE_WINDOW} ns"
        )
    first = state.get("first_seq", 0)
    if state.get("messages") and (first != 1 or state.get("num_deleted")):
        raise CorruptLogError(location, 0, f"messages were deleted: the stream begins at sequence {first}")
    if lost := state.get("lost"):
        raise CorruptLogError(location, 0, f"the server has lost messages: {lost}")
    if not state.get("messages") and state.get("last_seq"):
        raise CorruptLogError(location, 0, f"all {state['last_seq']} messages were deleted: the stream was purged")


def check_bucket(location: str, bucket: str, found: Mapping[str, Any]) -> None:
    """Raises `EventfoldError` if the bucket's configuration could make it lose documents."""
    for name, required in _REQUIRED_OF_BUCKET.items():
        value = found.get(name, _DEFAULTS.get(name))
        if value != required:
            raise EventfoldError(
                f"{location}: the stream {bucket_stream(bucket)} of the key-value bucket {bucket!r} has {name} "
                f"{value!r}, so it may lose snapshots and committed offsets of consumers; set it to {required!r}"
            )
