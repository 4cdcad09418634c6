"""The error codes of JetStream's API that mean more than “it failed”."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NO_MESSAGE = 10037
NO_STREAM = 10059
NO_PEERS = 10005  # too few servers for so many replicas
STREAM_EXISTS = 10058
STREAM_OFFLINE = 10118
WRONG_LAST_SEQUENCE = {10071, 10164}
ATTEMPT_UNDER_WAY = 10158  # the first attempt of what is sent again has not been decided yet
NO_ROOM = {10047, 10023, 10077, 10122}  # storage, resources, limits of the stream or the account


def error_code(answer: Mapping[str, Any]) -> int:
    """The code of the error that an answer holds, or 0."""
    code: int = (answer.get("error") or {}).get("err_code", 0)
    return code


def is_unavailable(answer: Mapping[str, Any]) -> bool:
    """Whether to try again: there is no leader at the moment, or no JetStream."""
    return (answer.get("error") or {}).get("code") == 503 or error_code(answer) == STREAM_OFFLINE
