"""Encodes and decodes large states in chunks, in a thread that lets the event loop run between two chunks.

msgspec holds the interpreter lock during a whole call, which takes tens of milliseconds for 10 MB. Python code in a
thread releases the lock only every 5 ms. So a large dict or list, at the top of a state or in a field of a struct or a
dataclass, is split into chunks, and the thread sleeps for a moment after each of them.

Promises: the bytes and the decoded state are the same as those of a single call; if a state can't be split, or if a
chunk can't be decoded, a single call is made.
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

# The size of a chunk in bytes: a few tenths of a millisecond of work.
CHUNK_SIZE = 64 * 1024
# A container with at most this number of elements is encoded whole.
MAX_WHOLE = 16
# How many possible ends of a chunk are tried, for each of these chunk sizes, which are multiples of `CHUNK_SIZE`.
_ATTEMPTS, _SIZE_FACTORS = 8, (1, 4)
# After how many seconds of work a thread sleeps, and for how many seconds.
_MAX_WORK, _SLEEP = 0.001, 0.00002

Encode: TypeAlias = Callable[[Any], bytes]
Decode: TypeAlias = Callable[[bytes | memoryview, Any], Any]

_key = re.compile(rb'"(?:[^"\\]|\\.)*":')


class Pause:
    """Called in a thread after each chunk: sleeps for a moment if the thread has worked for long enough."""

    def __init__(self) -> None:
        self._since = perf_counter()

    def __call__(self) -> None:
        if perf_counter() - self._since > _MAX_WORK:
            sleep(_SLEEP)
            self._since = perf_counter()


def encode_in_chunks(state: Any, encode: Encode, pause: Callable[[], object]) -> Iterator[bytes]:
    """Yields, in chunks, what `encode` returns for a state. The state must not change until the last chunk."""
    if _is_container(state):
        yield from _container_chunks(state, encode, pause)
        return
    large = {name: value for name in _fields(type(state)) if _is_container(value := getattr(state, name, None))}
    # The state is encoded with a token as the value of each large field. The chunks of the field replace the token.
    tokens = {name: b'"%s"' % os.urandom(16).hex().encode() for name in large}
    try:
        rest = _encoded_with(state, tokens, encode)
    except Exception:  # the state can't be copied, for example
        tokens = {}
        rest = encode(state)
    for name, token in tokens.items():
        before, _, rest = rest.partition(token)
        yield before
        yield from _container_chunks(large[name], encode, pause)
    yield rest


def _encoded_with(state: Any, tokens: dict[str, bytes], encode: Encode) -> bytes:
    """Encodes a state with tokens as the values of some fields. Raises any exception if that is not possible."""
    shallow = copy.copy(state) if tokens else state
    for name, token in tokens.items():
        _set(shallow, name, msgspec.Raw(token))
    encoded = encode(shallow)
    position = 0
    for token in tokens.values():  # each must be there, in the order of the fields
        position = encoded.index(token, position) + 1
    return encoded


def decode_in_chunks(data: bytes | memoryview, type_: Any, decode: Decode, pause: Callable[[], object]) -> Any:
    """Returns what `decode` returns for the bytes of a state. Raises what `decode` raises."""
    if len(data) > 2 * CHUNK_SIZE:
        # The data is never copied as a whole: getting new memory pages takes longer than decoding.
        view = memoryview(data)
        try:
            if _may_be_container(type_):
                return _decoded_container(view, type_, decode, pause)
            return _decoded_fields(view, type_, decode, pause)
        except Exception:  # noqa: S110
            pass  # the single call decides whether the data is invalid, or only can't be split
    return decode(data, type_)


def _is_container(value: Any) -> bool:
    return isinstance(value, dict | list) and len(value) > MAX_WHOLE


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


def _container_chunks(container: Any, encode: Encode, pause: Callable[[], object]) -> Iterator[bytes]:
    """Yields the bytes of a dict or a list."""
    is_dict = isinstance(container, dict)
    elements: Iterator[Any] = iter(container.items() if is_dict else container)
    count, separator = MAX_WHOLE, b"{" if is_dict else b"["
    while some := list(islice(elements, count)):
        chunk = encode(dict(some) if is_dict else some)[1:-1]
        yield separator
        yield chunk
        separator = b","
        # As many elements as probably make the next chunk of the right size.
        count = max(1, min(4 * count, count * CHUNK_SIZE // (len(chunk) + 1)))
        pause()
    yield b"}" if is_dict else b"]"


def _decoded_container(data: memoryview, type_: Any, decode: Decode, pause: Callable[[], object]) -> Any:
    """Decodes a dict or a list. Raises any exception if it can't be split.

    A chunk ends before a comma that probably separates two elements. If the chunk can be decoded, the comma does so:
    inside an element, a bracket or a string would still be open. Without an element, it would be valid JSON too, but
    the data would not be.
    """
    opening, closing = bytes(data[:1]), bytes(data[-1:])
    if opening not in (b"{", b"["):
        raise ValueError("it is not a dict or a list")
    result: dict[Any, Any] | list[Any] = {} if opening == b"{" else []
    extend: Callable[[Any], None] = result.update if isinstance(result, dict) else result.extend

    def add(chunk: Any) -> None:
        if not chunk:
            raise ValueError("an element is missing before or after a comma")
        extend(chunk)

    data = data[1:-1]
    separator = _separator(data, opening == b"{")
    while len(data) > 2 * CHUNK_SIZE:
        for end in _possible_ends(data, separator):
            try:
                chunk = decode(b"".join((opening, data[:end], closing)), type_)
            except Exception:
                pause()
                continue
            break
        else:
            raise ValueError("no end of an element was found")
        add(chunk)
        data = data[end + 1 :]
        pause()
    add(decode(b"".join((opening, data, closing)), type_))
    return result


def _separator(data: memoryview, is_dict: bool) -> bytes:
    """The bytes around the comma between two elements, as far as the first element lets them be guessed."""
    key = _key.match(data) if is_dict else None
    start = 0 if key is None else key.end()
    opening = bytes(data[start : start + 1])
    closing = {b"{": b"}", b"[": b"]", b'"': b'"'}.get(opening, b"")
    return closing + b"," + (b'"' if is_dict else opening if closing else b"")


def _possible_ends(data: memoryview, separator: bytes) -> Iterator[int]:
    """Yields the positions of commas at which the first chunk may end, the most likely one first."""
    for factor in _SIZE_FACTORS:
        some = bytes(data[: factor * CHUNK_SIZE])
        stop = len(some)
        for _ in range(_ATTEMPTS):
            found = some.rfind(separator, 0, stop)
            if found < 0:
                break
            yield found + separator.index(b",")
            stop = found + len(separator) - 1


def _decoded_fields(data: memoryview, type_: Any, decode: Decode, pause: Callable[[], object]) -> Any:
    """Decodes a struct or a dataclass. Raises any exception if it can't be split."""
    if hasattr(type_, "__post_init__") or not (fields := _fields(type_)):
        raise ValueError("it has no fields, or a __post_init__ that needs all of them at once")
    keys = dict(zip(fields, getattr(type_, "__struct_encode_fields__", fields), strict=True))
    hints = get_type_hints(type_, include_extras=True)
    large = _large_fields(data, keys, hints)
    if not large:
        raise ValueError("no field is large")
    # The positions were guessed. Check that they are those of the fields, and not of equal keys inside other values.
    tokens = [b'"%b"' % os.urandom(16).hex().encode() for _ in large]
    values = msgspec.json.decode(_replaced(data, large, tokens), type=dict[str, msgspec.Raw])
    if [bytes(values[keys[name]]) for name, _, _ in large] != tokens:
        raise ValueError("a field is not where it was guessed to be")
    empty = [bytes(data[start : start + 1]) + bytes(data[end - 1 : end]) for _, start, end in large]
    state = decode(_replaced(data, large, empty), type_)
    for name, start, end in large:
        _set(state, name, _decoded_container(data[start:end], hints[name], decode, pause))
    return state


def _large_fields(data: memoryview, keys: dict[str, str], hints: dict[str, Any]) -> list[tuple[str, int, int]]:
    """The name of each large field, with the positions at which its value probably begins and ends.

    `keys` are the keys of the fields in the data, and `hints` the types of the fields.
    """
    large: list[tuple[str, int, int]] = []
    searched = 0
    names = list(keys)
    for number, name in enumerate(names):
        key = b'"%b":' % keys[name].encode()
        start = searched + bytes(data[searched : searched + CHUNK_SIZE]).find(key) + len(key)
        if start >= searched + len(key) and _may_be_container(hints[name]):
            end = _field_end(data, start, [keys[later] for later in names[number + 1 :]])
            if end - start > CHUNK_SIZE:
                large.append((name, start, end))
                searched = end
    return large


def _field_end(data: memoryview, start: int, later: Iterable[str]) -> int:
    """Where the value at a position probably ends: before the next of the `later` keys, or at the end."""
    for key in later:
        # Searched backwards from the end, where small fields mostly are, in chunks that overlap by the length of a key.
        ending = b',"%b":' % key.encode()
        for stop in range(len(data), start, -CHUNK_SIZE):
            begin = max(start, stop - CHUNK_SIZE - len(ending))
            if (found := bytes(data[begin:stop]).rfind(ending)) >= 0:
                return begin + found
    return len(data) - 1


def _replaced(data: memoryview, large: list[tuple[str, int, int]], values: list[bytes]) -> bytes:
    """The data with other values in place of those of the large fields."""
    pieces: list[bytes | memoryview] = []
    position = 0
    for (_, start, end), value in zip(large, values, strict=True):
        pieces += [data[position:start], value]
        position = end
    pieces.append(data[position:])
    if sum(map(len, pieces)) > 4 * CHUNK_SIZE:
        raise ValueError("the remaining fields are large too")
    return b"".join(pieces)
