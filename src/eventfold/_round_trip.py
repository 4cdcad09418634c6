"""Checks whether a state is the same after it has been saved and loaded, and if not, where it differs.

Promise: two states without a difference are equal, and all values in them have the same types, so that a reducer
continues in the same way from both. A `Counter` that became an equal `dict` is a difference, since a reducer may rely
on its methods.
"""

from __future__ import annotations

import reprlib
from collections import deque
from collections.abc import Callable, Iterable, Sized
from datetime import datetime, time, timedelta
from itertools import chain, islice, repeat
from typing import Any

from .snapshot import decode_state

# How many elements of a container are compared between two calls of `pause`.
_ELEMENTS_PER_PAUSE = 256
# Types without elements.
_PLAIN = frozenset({str, int, float, bool, bytes, type(None)})
_missing = object()


def difference(state: Any, read: Any, pause: Callable[[], object] = lambda: None) -> str | None:
    """Where and how a state differs from the one read back, such as `jobs['x'].due: 1 became '1'`.

    An `int` that reads back as the equal `float` is not a difference, since its field is declared as `float`. `pause`
    is called repeatedly during the comparison.
    """
    if _same(state, read, pause):
        return None
    found = _difference(state, read, "")
    if found is None:
        return None
    path, before, after = found
    if type(before) is not type(after) and reprlib.repr(before) == reprlib.repr(after):
        before, after = f"a {type(before).__name__}", f"a {type(after).__name__}"
    else:
        before, after = reprlib.repr(before), reprlib.repr(after)
    return f"{path.removeprefix('.') or 'the state'}: {before} became {after}"


def accepts_none(state_type: Any) -> bool:
    """Whether None is a state of this type."""
    try:
        return decode_state(b"null", state_type) is None
    except Exception:
        return False


def _same(one: Any, other: Any, pause: Callable[[], object]) -> bool:
    """Whether there is no difference. Several times as fast as `_difference`, which also finds the path."""
    kind: Any = type(one)
    if kind is not type(other) or kind in _PLAIN:
        return _difference(one, other, "") is None
    pairs: Iterable[tuple[Any, Any]]
    if isinstance(one, dict):
        if not _same_keys(one, other, pause):
            return False
        pairs = zip(one.values(), map(other.get, one, repeat(_missing)), strict=True)
    elif isinstance(one, set | frozenset):
        pairs = zip(one, map(_by_value(other).get, one, repeat(_missing)), strict=True)
    elif isinstance(one, list | tuple | deque):
        pairs = zip(one, other, strict=False)
    elif (names := _fields(kind)) is not None:
        pairs = zip(map(getattr, repeat(one), names), map(getattr, repeat(other), names), strict=True)
    else:
        return _equal(one, other)
    if isinstance(one, Sized) and len(one) != len(other):
        return False
    if isinstance(one, deque) and one.maxlen != other.maxlen:
        return False
    for number, (value, read) in enumerate(pairs, 1):
        if not number % _ELEMENTS_PER_PAUSE:
            pause()
        # Plain values are compared here, since a call for each number and string would take most of the time.
        plain = type(value) is type(read) and type(value) in _PLAIN
        if value is not read and not (value == read if plain else _same(value, read, pause)):
            return False
    return True


def _same_keys(keys: Iterable[Any], others: Iterable[Any], pause: Callable[[], object]) -> bool:
    """Whether equal keys of two dicts are the same. If their order differs, which loading does not change, false."""
    keys, others = iter(keys), iter(others)
    while some := list(islice(keys, _ELEMENTS_PER_PAUSE)):
        read = list(islice(others, _ELEMENTS_PER_PAUSE))
        types = list(map(type, some))
        if types != list(map(type, read)) or (not _PLAIN.issuperset(types) and not all(map(_equal, some, read))):
            return False
        pause()
    return True


def _by_value(elements: Iterable[Any]) -> dict[Any, Any]:
    """Maps each element to itself, to find the one that equals a given value but may have a different type."""
    return {element: element for element in elements}


def _difference(one: Any, other: Any, path: str) -> tuple[str, Any, Any] | None:
    """The path of the first difference, such as `.jobs['x'].due`, and the two values there."""
    kind: Any = type(one)
    if kind is not type(other):
        return None if kind is int and type(other) is float and one == other else (path, one, other)
    children: Iterable[tuple[str, Any, Any]]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return path, one, other
        keys = _by_value(other)
        children = chain(
            ((f"{path}.keys()", key, keys[key]) for key in one),
            ((f"{path}[{key!r}]", value, other[key]) for key, value in one.items()),
        )
    elif isinstance(one, set | frozenset):
        if one != other:
            return path, one, other
        elements = _by_value(other)
        children = ((path, element, elements[element]) for element in one)
    elif isinstance(one, list | tuple | deque):
        if len(one) != len(other) or (isinstance(one, deque) and one.maxlen != other.maxlen):
            return path, one, other
        children = (
            (f"{path}[{index}]", value, read) for index, (value, read) in enumerate(zip(one, other, strict=True))
        )
    elif (names := _fields(kind)) is not None:
        children = ((f"{path}.{name}", getattr(one, name), getattr(other, name)) for name in names)
    else:
        return None if _equal(one, other) else (path, one, other)
    for child_path, value, read in children:
        if value is not read and (found := _difference(value, read, child_path)) is not None:
            return found
    return None


def _equal(one: Any, other: Any) -> bool:
    """Whether two values of one type without elements are the same."""
    if isinstance(one, datetime | time):
        # Equal ones may behave differently: a time in a zone with daylight saving time is read back with a fixed
        # offset, and `fold` is not stored.
        return one == other and one.fold == other.fold and _fixed_offset(one) == _fixed_offset(other)
    return bool(one == other)


def _fixed_offset(value: datetime | time) -> timedelta | None:
    """The UTC offset of a time, if that is the same for every date in its time zone."""
    return None if value.tzinfo is None else value.tzinfo.utcoffset(None)


def _fields(kind: Any) -> Iterable[str] | None:
    """The names of the fields of a struct, a dataclass, an attrs class or a pydantic model."""
    if (names := getattr(kind, "__struct_fields__", None)) is not None:
        return tuple(names)
    if (found := getattr(kind, "__dataclass_fields__", None)) is not None:
        return tuple(found)
    if (found := getattr(kind, "__pydantic_fields__", None)) is not None:
        return *found, "__pydantic_extra__", "__pydantic_private__"
    attributes = getattr(kind, "__attrs_attrs__", None)
    return None if attributes is None else [attribute.name for attribute in attributes]
