"""Encodes and decodes large states in parts, in a thread that lets the event loop run between two parts.

msgspec holds the interpreter lock for a whole call, which takes tens of milliseconds for 10 MB, and a thread that
computes releases the lock only every 5 ms. So a large dict or list, at the top of a state or in a field of a struct or
a dataclass, is split into parts, and the thread sleeps for a moment between two of them.

Promises: the bytes, and the decoded state, are the same as those of a single call; if a state can't be split, or a part
can't be decoded, a single call is made.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from time import perf_counter, sleep
from typing import Any, TypeAlias, get_origin, get_type_hints

import msgspec

# The size of a part in bytes: a few tenths of a millisecond of work.
PART = 64 * 1024
# A container with no more elements than this is encoded whole.
FEW = 16
# How many possible ends of a part are tried, and how many times larger the part may become if none of them is right.
_TRIES, _LARGER = 8, (1, 4)
# After how long a thread lets others run, and for how long it sleeps, in seconds.
_HOLD, _REST = 0.001, 0.00002

Encode: TypeAlias = Callable[[Any], bytes]
Decode: TypeAlias = Callable[[bytes | memoryview, Any], Any]

_key = re.compile(rb'"(?:[^"\\]|\\.)*":')


class Pause:
    """Called in a thread between two parts: sleeps for a moment if the last sleep was long enough ago."""

    def __init__(self) -> None:
        self._since = perf_counter()

    def __call__(self) -> None:
        if perf_counter() - self._since > _HOLD:
            sleep(_REST)
            self._since = perf_counter()


def encode_in_parts(state: Any, encode: Encode, pause: Callable[[], object]) -> Iterator[bytes]:
    """Yields what `encode` returns for a state, which must not change meanwhile."""
    if _is_container(state):
        yield from _container_parts(state, encode, pause)
        return
    large = {name: value for name in _fields(type(state)) if _is_container(value := getattr(state, name, None))}
    # The state is encoded with a token in place of each large field, which is replaced by that field's parts.
    tokens = {name: b'"%s"' % os.urandom(16).hex().encode() for name in large}
    try:
        rest = _encoded_with(state, tokens, encode)
    except Exception:  # it can't be copied, say
        tokens = {}
        rest = encode(state)
    for name, token in tokens.items():
        before, _, rest = rest.partition(token)
        yield before
        yield from _container_parts(large[name], encode, pause)
    yield rest


def _encoded_with(state: Any, tokens: dict[str, bytes], encode: Encode) -> bytes:
    """A state with tokens instead of the values of some fields. Raises any error where that can't be done."""
    shallow = copy.copy(state) if tokens else state
    for name, token in tokens.items():
        _set(shallow, name, msgspec.Raw(token))
    encoded = encode(shallow)
    at = 0
    for token in tokens.values():
        at = encoded.index(token, at) + 1
    return encoded


def decode_in_parts(data: bytes | memoryview, type_: Any, decode: Decode, pause: Callable[[], object]) -> Any:
    """Returns what `decode` returns for the bytes of a state. Raises what it raises."""
    if len(data) > 2 * PART:
        # Nothing here copies all of it: new memory pages take longer than decoding does.
        view = memoryview(data)
        try:
            if _may_be_container(type_):
                return _decoded_container(view, type_, decode, pause)
            return _decoded_fields(view, type_, decode, pause)
        except Exception:  # noqa: S110
            pass  # it is another kind of state, or an invalid one: the single call below decides
    return decode(data, type_)


def _is_container(value: Any) -> bool:
    return isinstance(value, dict | list) and len(value) > FEW


def _may_be_container(type_: Any) -> bool:
    return type_ is Any or (get_origin(type_) or type_) in (dict, list)


def _fields(type_: Any) -> tuple[str, ...]:
    """The fields of a struct or a dataclass, which are the keys of its JSON object; nothing for other types."""
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        return () if type_.__struct_config__.array_like else type_.__struct_fields__
    if dataclasses.is_dataclass(type_) and not hasattr(type_, "__pydantic_validator__"):
        return tuple(field.name for field in dataclasses.fields(type_))
    return ()


def _set(state: Any, name: str, value: Any) -> None:
    if isinstance(state, msgspec.Struct):
        msgspec.structs.force_setattr(state, name, value)
    else:
        object.__setattr__(state, name, value)


def _container_parts(container: Any, encode: Encode, pause: Callable[[], object]) -> Iterator[bytes]:
    """Yields the bytes of a dict or a list."""
    is_dict = isinstance(container, dict)
    rest: Iterator[Any] = iter(container.items() if is_dict else container)
    count, separator = FEW, b"{" if is_dict else b"["
    while some := list(islice(rest, count)):
        part = encode(dict(some) if is_dict else some)[1:-1]
        yield separator
        yield part
        separator = b","
        count = max(1, min(4 * count, count * PART // (len(part) + 1)))
        pause()
    yield b"}" if is_dict else b"]"


def _decoded_container(data: memoryview, type_: Any, decode: Decode, pause: Callable[[], object]) -> Any:
    """Decodes a dict or a list. Raises any error if it can't be split.

    If a part that ends before a comma can be decoded, the comma stands between two elements: inside an element, the cut
    would have left a bracket or a string open.
    """
    opening, closing = bytes(data[:1]), bytes(data[-1:])
    result: dict[Any, Any] | list[Any] = {} if opening == b"{" else []
    add: Callable[[Any], None] = result.update if isinstance(result, dict) else result.extend
    data = data[1:-1]
    separator = _separator(data, opening == b"{")
    while len(data) > 2 * PART:
        for cut in _cuts(data, separator):
            try:
                part = decode(b"".join((opening, data[:cut], closing)), type_)
            except Exception:
                pause()
                continue
            break
        else:
            raise ValueError("no end of an element was found")
        add(part)
        data = data[cut + 1 :]
        pause()
    add(decode(b"".join((opening, data, closing)), type_))
    return result


def _separator(data: memoryview, is_dict: bool) -> bytes:
    """What probably stands between two elements, judging by how the first one begins."""
    key = _key.match(data) if is_dict else None
    begin = 0 if key is None else key.end()
    value = bytes(data[begin : begin + 1])
    last = {b"{": b"}", b"[": b"]", b'"': b'"'}.get(value, b"")
    return last + b"," + (b'"' if is_dict else value if last else b"")


def _cuts(data: memoryview, separator: bytes) -> Iterator[int]:
    """Yields positions of commas at which the first part may end, the most likely one first."""
    for factor in _LARGER:
        some = bytes(data[: factor * PART])
        stop = len(some)
        for _ in range(_TRIES):
            found = some.rfind(separator, 0, stop)
            if found < 0:
                break
            yield found + separator.index(b",")
            stop = found + len(separator) - 1


def _decoded_fields(data: memoryview, type_: Any, decode: Decode, pause: Callable[[], object]) -> Any:
    """Decodes a struct or a dataclass. Raises any error if it can't be split."""
    if hasattr(type_, "__post_init__") or not (fields := _fields(type_)):
        raise ValueError("it has no fields, or wants to see all of them at once")
    keys = dict(zip(fields, getattr(type_, "__struct_encode_fields__", fields), strict=True))
    hints = get_type_hints(type_, include_extras=True)
    large: list[tuple[str, int, int]] = []
    at = 0
    for number, name in enumerate(fields):
        key = b'"%b":' % keys[name].encode()
        start = at + bytes(data[at : at + PART]).find(key) + len(key)
        if start >= at + len(key) and _may_be_container(hints[name]):
            end = _field_end(data, start, [keys[later] for later in fields[number + 1 :]])
            if end - start > PART:
                large.append((name, start, end))
                at = end
    if not large:
        raise ValueError("no field is large")
    # Check that these are the values of these keys, and not of equal keys inside other values.
    tokens = [b'"%b"' % os.urandom(16).hex().encode() for _ in large]
    found = msgspec.json.decode(_replaced(data, large, tokens), type=dict[str, msgspec.Raw])
    if [bytes(found[keys[name]]) for name, _, _ in large] != tokens:
        raise ValueError("they are not where they were looked for")
    empty = [bytes(data[start : start + 1]) + bytes(data[end - 1 : end]) for _, start, end in large]
    state = decode(_replaced(data, large, empty), type_)
    for name, start, end in large:
        _set(state, name, _decoded_container(data[start:end], hints[name], decode, pause))
    return state


def _field_end(data: memoryview, start: int, later: Iterable[str]) -> int:
    """Where the value at a position probably ends: before the next field, or at the end."""
    for key in later:
        # In overlapping chunks, backwards from the end, where small fields mostly are.
        ending = b',"%b":' % key.encode()
        for stop in range(len(data), start, -PART):
            begin = max(start, stop - PART - len(ending))
            if (found := bytes(data[begin:stop]).rfind(ending)) >= 0:
                return begin + found
    return len(data) - 1


def _replaced(data: memoryview, large: list[tuple[str, int, int]], values: list[bytes]) -> bytes:
    """The bytes with other values in place of the large ones."""
    parts: list[bytes | memoryview] = []
    at = 0
    for (_, start, end), value in zip(large, values, strict=True):
        parts += [data[at:start], value]
        at = end
    parts.append(data[at:])
    if sum(map(len, parts)) > 4 * PART:
        raise ValueError("what is left is large too")
    return b"".join(parts)
