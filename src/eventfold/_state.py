"""What may become of a state on disk: whether it reads back as it was, and if not, where it differs.

Promise: two states without a difference are equal and of the same types all through, so that folding on from either
gives the same. A Counter equals a dict, and acts otherwise; that is a difference.
"""

from __future__ import annotations

import reprlib
from collections import deque
from collections.abc import Callable, Iterable, Sized
from itertools import repeat
from typing import Any

from .snapshot import decode_state

# Elements of a container that are compared between two pauses.
_SOME = 256
# What has nothing in it.
_PLAIN = frozenset({str, int, float, bool, bytes, type(None)})
_missing = object()


def difference(state: Any, read: Any, pause: Callable[[], object] = lambda: None) -> str | None:
    """Where and how a state differs from what it reads back as, such as `jobs['x'].due: 1 became '1'`.

    An `int` that reads back as the equal `float` is no difference: it stands in a field that is declared `float`.
    `pause` is called now and then.
    """
    if _same(state, read, pause):
        return None
    found = _difference(state, read, "")
    if found is None:
        return None
    where, before, after = found
    if type(before) is not type(after) and reprlib.repr(before) == reprlib.repr(after):
        before, after = f"a {type(before).__name__}", f"a {type(after).__name__}"
    else:
        before, after = reprlib.repr(before), reprlib.repr(after)
    return f"{where.removeprefix('.') or 'the state'}: {before} became {after}"


def takes_none(state_type: Any) -> bool:
    """Whether None is a state of this type."""
    try:
        return decode_state(b"null", state_type) is None
    except Exception:
        return False


def _same(one: Any, other: Any, pause: Callable[[], object]) -> bool:
    """Whether there is no difference: several times as fast as finding out where one is."""
    kind: Any = type(one)
    if kind is not type(other) or kind in _PLAIN:
        return _difference(one, other, "") is None
    pairs: Iterable[tuple[Any, Any]]
    if isinstance(one, dict):
        pairs = zip(one.values(), map(other.get, one, repeat(_missing)), strict=True)
    elif isinstance(one, list | tuple | deque):
        pairs = zip(one, other, strict=False)
    elif (names := _fields(kind)) is not None:
        pairs = zip(map(getattr, repeat(one), names), map(getattr, repeat(other), names), strict=True)
    else:
        return bool(one == other)
    if isinstance(one, Sized) and len(one) != len(other):
        return False
    if isinstance(one, deque) and one.maxlen != other.maxlen:
        return False
    for number, (value, read) in enumerate(pairs, 1):
        if not number % _SOME:
            pause()
        # Asked here too, since a call for each number and text would take most of the time.
        plain = type(value) is type(read) and type(value) in _PLAIN
        if value is not read and not (value == read if plain else _same(value, read, pause)):
            return False
    return True


def _difference(one: Any, other: Any, where: str) -> tuple[str, Any, Any] | None:
    kind: Any = type(one)
    if kind is not type(other):
        return None if kind is int and type(other) is float and one == other else (where, one, other)
    children: Iterable[tuple[str, Any, Any]]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return where, one, other
        children = ((f"{where}[{key!r}]", value, other[key]) for key, value in one.items())
    elif isinstance(one, list | tuple | deque):
        if len(one) != len(other) or (isinstance(one, deque) and one.maxlen != other.maxlen):
            return where, one, other
        children = (
            (f"{where}[{index}]", value, read) for index, (value, read) in enumerate(zip(one, other, strict=True))
        )
    elif (names := _fields(kind)) is not None:
        children = ((f"{where}.{name}", getattr(one, name), getattr(other, name)) for name in names)
    else:
        return None if one == other else (where, one, other)
    for place, value, read in children:
        if value is not read and (found := _difference(value, read, place)) is not None:
            return found
    return None


def _fields(kind: Any) -> Iterable[str] | None:
    """The names of the fields of a struct, a dataclass, an attrs class or a pydantic model."""
    if (names := getattr(kind, "__struct_fields__", None)) is not None:
        return tuple(names)
    for fields in ("__dataclass_fields__", "__pydantic_fields__"):
        if (found := getattr(kind, fields, None)) is not None:
            return tuple(found)
    attributes = getattr(kind, "__attrs_attrs__", None)
    return None if attributes is None else [attribute.name for attribute in attributes]
