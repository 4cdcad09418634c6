"""The error codes of JetStream's API on which the engine's behaviour depends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NO_MESSAGE = 10037
NO_STREAM = 10059
NO_PEERS = 10005  # too few servers for so many replicas
STREAM_EXISTS = 10058
STREAM_OFFLINE = 10118
WRONG_LAST_SEQUENCE = {10071, 10164}
ATTEMPT_UNDER_WAY = 10158  # an earlier message with the same id is not decided yet
# Storage, resources, limits of the stream or the account: the message is refused before anything is written.
NO_SPACE = {10047, 10023, 10122}


def error_code(answer: Mapping[str, Any]) -> int:
    """The code of the error in an answer; 0 if there is none."""
    code: int = (answer.get("error") or {}).get("err_code", 0)
    return code


def is_unavailable(answer: Mapping[str, Any]) -> bool:
    """Whether the request should be repeated, because there is no leader, or no JetStream, at the moment."""
    return (answer.get("error") or {}).get("code") == 503 or error_code(answer) == STREAM_OFFLINE
