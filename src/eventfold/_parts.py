"""Large states, encoded and decoded in parts, so that whoever does it in a thread lets the event loop run in between.

msgspec holds the interpreter's lock from the beginning of a call to its end, 10 MB take it tens of milliseconds, and a
thread that computes gives the lock away only every 5 ms. So a state is taken apart where it is large, mostly in a dict
or a list, at its top or in a field of a struct or a dataclass; and between two parts the thread sleeps for a moment.

Promises: the bytes are those that one call gives, and so is what is decoded; where a state can't be taken apart, or a
part is no good, that one call is made.
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

# Bytes of a part: some tenths of a millisecond.
PART = 64 * 1024
# Elements of a container below which it is not looked into when it is encoded.
FEW = 16
# Places where a part may end that are tried, and how many times larger the part may become if none of them is right.
_TRIES, _LARGER = 8, (1, 4)
# Seconds after which a thread lets the others run, and for how long: it takes some time to sleep at all.
_HOLD, _REST = 0.001, 0.00002

Encode: TypeAlias = Callable[[Any], bytes]
Decode: TypeAlias = Callable[[bytes | memoryview, Any], Any]

_key = re.compile(rb'"(?:[^"\\]|\\.)*":')


class Pause:
    """Called between two parts in a thread: sleeps for a moment if it is time to."""

    def __init__(self) -> None:
        self._since = perf_counter()

    def __call__(self) -> None:
        if perf_counter() - self._since > _HOLD:
            sleep(_REST)
            self._since = perf_counter()


def encode_in_parts(state: Any, encode: Encode, pause: Callable[[], object]) -> Iterator[bytes]:
    """What `encode` makes of a state, which must not change meanwhile."""
    if _is_container(state):
        yield from _container_parts(state, encode, pause)
        return
    large = {name: value for name in _fields(type(state)) if _is_container(value := getattr(state, name, None))}
    # The state with something else in place of what is large, which is then put there.
    tokens = {name: b'"%s"' % os.urandom(16).hex().encode() for name in large}
    shallow = copy.copy(state) if large else state
    for name, token in tokens.items():
        _set(shallow, name, msgspec.Raw(token))
    rest = encode(shallow)
    if any(rest.count(token) != 1 for token in tokens.values()):
        yield encode(state)
        return
    for name, token in tokens.items():
        before, _, rest = rest.partition(token)
        yield before
        yield from _container_parts(large[name], encode, pause)
    yield rest


def decode_in_parts(data: bytes | memoryview, type_: Any, decode: Decode, pause: Callable[[], object]) -> Any:
    """What `decode` makes of the bytes of a state. Raises what it raises."""
    if len(data) > 2 * PART:
        # Nothing here copies all of it: the pages of new memory take longer than decoding does.
        view = memoryview(data)
        try:
            if _may_be_container(type_):
                return _decoded_container(view, type_, decode, pause)
            return _decoded_fields(view, type_, decode, pause)
        except Exception:  # noqa: S110
            pass  # so it is another kind of state, or a bad one: one call tells
    return decode(data, type_)


def _is_container(value: Any) -> bool:
    return isinstance(value, dict | list) and len(value) > FEW


def _may_be_container(type_: Any) -> bool:
    return type_ is Any or (get_origin(type_) or type_) in (dict, list)


def _fields(type_: Any) -> tuple[str, ...]:
    """The fields of a struct or a dataclass that are the keys of its object; none of anything else."""
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
    """The bytes of a dict or a list."""
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
    """The dict or the list that the bytes hold. Raises any error where it can't be taken apart.

    That a part which was cut out at a comma can be decoded proves that the comma is one between two elements: within
    one, a bracket or a string would have been cut in two.
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
    """What is likely to stand between two elements, by how the first one begins."""
    key = _key.match(data) if is_dict else None
    begin = 0 if key is None else key.end()
    value = bytes(data[begin : begin + 1])
    last = {b"{": b"}", b"[": b"]", b'"': b'"'}.get(value, b"")
    return last + b"," + (b'"' if is_dict else value if last else b"")


def _cuts(data: memoryview, separator: bytes) -> Iterator[int]:
    """Positions of commas at which the first part may end, the likeliest first."""
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
    """The struct or dataclass that the bytes hold. Raises any error where it can't be taken apart."""
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
    # Whether these are the values of these keys, and not of the same keys somewhere within other values.
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
    """Where the value that begins at a position is likely to end: before the next field, or at the end."""
    for key in later:
        # In pieces that overlap, from the end on, where the fields mostly are that are not large.
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
