"""Finds the engine of a log from the first argument of `EventLog.open` and `EventReader`.

Promise: an address for which there is no engine is an error; it is never taken for the name of a directory.
"""

from __future__ import annotations

import os
import re
from importlib import import_module
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

from ._engine import Engine
from ._errors import EventfoldError
from ._files.engine import Files

# A directory, an address, or an engine.
Address: TypeAlias = str | os.PathLike[str] | Engine

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_WITHOUT_SLASHES = re.compile(r"(file|postgresql|postgres|nats|tls):", re.IGNORECASE)
# The module, the class in the module, and the extra that installs its dependencies.
_POSTGRES = ("eventfold.postgres", "Postgres", "postgres")
_JETSTREAM = ("eventfold.jetstream", "JetStream", "nats")
_ENGINES = {"postgresql": _POSTGRES, "postgres": _POSTGRES, "nats": _JETSTREAM, "tls": _JETSTREAM}


def engine_of(where: Address) -> Engine:
    """The engine for the path of a directory or for an address such as `postgresql://host/db`; an engine as it is.

    Raises `ValueError` if no engine has such addresses, and `EventfoldError` if the engine's packages are missing.
    """
    if isinstance(where, str):
        if scheme := _SCHEME.match(where):
            return _engine_at(where, scheme[1].lower())
        if known := _WITHOUT_SLASHES.match(where):
            raise ValueError(
                f"an address begins with {known[0]}//, not with {known[0]} alone; for a directory, write ./{known[0]}"
            )
        return Files(where)
    if isinstance(where, os.PathLike):
        return Files(where)
    if isinstance(where, Engine):
        return where
    raise ValueError(f"a log is a directory, an address or an engine, not {where!r}")


def _engine_at(address: str, scheme: str) -> Engine:
    # An address may contain a password, so messages contain only its scheme.
    if scheme == "file":
        parts = urlsplit(address)
        if parts.netloc not in ("", "localhost") or not parts.path or parts.query or parts.fragment:
            raise ValueError(f"a file:// address must be file:///PATH, not {address!r}")
        return Files(unquote(parts.path))
    if scheme not in _ENGINES:
        known = ", ".join(f"{name}://" for name in ("file", *_ENGINES))
        raise ValueError(f"no engine has addresses with {scheme}://: use {known} or the path of a directory")
    module, name, extra = _ENGINES[scheme]
    try:
        engine: Any = getattr(import_module(module), name)
    except ImportError as error:
        raise EventfoldError(
            f"a log at {scheme}:// needs packages that are not installed: pip install 'eventfold[{extra}]' ({error})"
        ) from error
    result: Engine = engine.from_address(address)
    return result
