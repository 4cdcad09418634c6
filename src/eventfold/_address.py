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
_SHOWN_OPTIONS = ("log", "schema", "replicas")
_ENGINES = {"postgresql": _POSTGRES, "postgres": _POSTGRES, "nats": _JETSTREAM, "tls": _JETSTREAM}


def engine_of(where: Address) -> Engine:
    """The engine for the path of a directory or for an address such as `postgresql://host/db`; an engine as it is.

    Raises `ValueError` if no engine has such addresses, and `EventfoldError` if the engine's packages are missing.
    """
    if isinstance(where, str):
        if not where:  # usually a variable that is not set
            raise ValueError("the name of the log is empty: for the current directory, write `.`")
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


def directory_of(where: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The directory of a path or of a `file://` address. Raises `ValueError` for any other address."""
    if not isinstance(where, str):
        return where
    scheme = _SCHEME.match(where) or _WITHOUT_SLASHES.match(where)
    if scheme is not None and scheme[1].lower() != "file":
        raise ValueError(f"this must be a directory, not an address that begins with {scheme[0]}")
    engine = engine_of(where)
    assert isinstance(engine, Files)
    return engine.source().layout.dir


def without_password(where: str) -> str:
    """An address without its password and without options that may contain one; a path is returned unchanged."""
    scheme = _SCHEME.match(where)
    if scheme is None:
        return where
    # A password may contain any character that was not encoded. On NATS, a user without a password may be a token.
    userinfo, _, rest = where[scheme.end() :].rpartition("@")
    user, colon, _ = userinfo.partition(":")
    location, _, query = rest.partition("?")
    options = "&".join(option for option in query.split("&") if option.partition("=")[0] in _SHOWN_OPTIONS)
    shown_user = f"{user}@" if userinfo and (colon or scheme[1].lower() in ("postgresql", "postgres")) else ""
    return scheme[0] + shown_user + location + (f"?{options}" if options else "")


def _engine_at(address: str, scheme: str) -> Engine:
    # An address may contain a password, so messages contain only its scheme.
    if scheme == "file":
        parts = urlsplit(address)
        if parts.netloc not in ("", "localhost") or not parts.path or parts.query or parts.fragment:
            raise ValueError("a file:// address must be file:///PATH, without a host, a query or a fragment")
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
