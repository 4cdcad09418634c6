"""What a stream must be configured like, so that eventfold can keep its promises on it.

A stream may lose messages by design: through limits, ages, purges, or a retention other than by limits. Such a stream
is refused, and the error says what to change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._errors import CorruptLogError, EventfoldError

OLDEST_SERVER = (2, 11)  # earlier ones can't sync a message before they acknowledge it
DUPLICATE_WINDOW = 120 * 10**9  # nanoseconds; how long a commit may be sent again


def stream_configuration(stream: str, subject: str, replicas: int, compression: str) -> dict[str, Any]:
    """The configuration of a new stream, as the server's API takes it."""
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


# The settings on which a promise rests, and what each must be.
_REQUIRED: dict[str, Any] = {
    "retention": "limits",
    "storage": "file",
    "max_msgs": -1,
    "max_bytes": -1,
    "max_age": 0,
    "max_msgs_per_subject": -1,
    "deny_delete": True,
    "deny_purge": True,
    "allow_direct": True,
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
_DEFAULTS: dict[str, Any] = {"max_age": 0, "deny_delete": False, "deny_purge": False, "allow_direct": False}


def check_server(location: str, version: tuple[int, int], text: str) -> None:
    """Raises `EventfoldError` for a server that can't keep the promises."""
    if version < OLDEST_SERVER:
        raise EventfoldError(
            f"{location}: nats-server {text} is too old: it can't sync before it acknowledges; use 2.11 or later"
        )


def check_stream(location: str, subject: str, found: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raises `EventfoldError` for a stream that could lose events, and `CorruptLogError` for one that has lost some."""
    if found.get("subjects") != [subject]:
        raise EventfoldError(
            f"{location}: the stream's subjects are {found.get('subjects')!r}; they must be {[subject]!r}"
        )
    for name, required in _REQUIRED.items():
        value = found.get(name, _DEFAULTS.get(name))
        if value != required:
            raise EventfoldError(
                f"{location}: the stream's {name} is {value!r}, so that it may lose events; set it to {required!r}"
            )
    for name in _ABSENT:
        if found.get(name):
            raise EventfoldError(f"{location}: the stream has {name} set, so that it may lose events; remove that")
    if found.get("duplicate_window", 0) < DUPLICATE_WINDOW:
        raise EventfoldError(
            f"{location}: the stream's duplicate_window is {found.get('duplicate_window', 0)} ns, so that a commit "
            f"that is sent again may be doubled; set it to at least {DUPLICATE_WINDOW} ns"
        )
    first = state.get("first_seq", 0)
    if state.get("messages") and (first != 1 or state.get("num_deleted")):
        raise CorruptLogError(location, 0, f"messages are gone: the stream begins at sequence {first}")
    if not state.get("messages") and state.get("last_seq"):
        raise CorruptLogError(location, 0, f"all {state['last_seq']} messages are gone: the stream was purged")
