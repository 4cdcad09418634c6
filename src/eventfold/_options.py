"""Checks the options and the addresses of engines."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

# The hosts of an address and their ports.
_HOSTS = re.compile(r"((\[[^\]]*\]|[^:,\[\]]*)(:\d*)?(,|$))*")


def refuse_options(options: Mapping[str, Any], engine: str) -> None:
    """For an engine without options for `open_committer`: raises `ValueError` if any are given."""
    if options:
        raise ValueError(f"{', '.join(sorted(options))}: only a log in files has this option, not a log in {engine}")


def check_seconds(name: str, value: object, *, check_range: bool = True) -> None:
    """Raises `ValueError` unless the value of an option is a number of seconds, and with `check_range` more than 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or (check_range and not value > 0):
        raise ValueError(f"{name} must be a number of seconds, more than 0, not {value!r}")


def address_parts(address: str) -> SplitResult:
    """The parts of an address.

    Raises a `ValueError` without any part of the address if a password in it is not percent-encoded. A part of such a
    password would be taken for a port or a name, and messages would show it.
    """
    try:
        parts = urlsplit(address)
        clear = "@" not in parts.path + parts.fragment
    except ValueError:
        clear = False
    if not clear or ("@" not in parts.netloc and not _HOSTS.fullmatch(parts.netloc)):
        raise ValueError(
            "the address can't be read: in a user or a password, the characters / ? # [ ] @ : % must be written as "
            "%2F %3F %23 %5B %5D %40 %3A %25; a port must be a number"
        )
    return parts


def check_flag(name: str, value: object) -> None:
    """Raises `ValueError` unless the value of an option is a boolean."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {value!r}")
