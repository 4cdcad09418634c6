"""What finds an event without decoding the rest of its line: its type, its tags and its id.

In an index, a tag or an id is a signed number of 64 bits: its xxh64, with seed 0 for tags and seed 1 for ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import msgspec
import xxhash

from .lines import Lines


class Keys(msgspec.Struct, gc=False):
    """What queries and unique ids look at in a line."""

    type: str
    tags: tuple[str, ...] = ()
    id: str | None = None


_decoder = msgspec.json.Decoder(Keys)
_NO_EVENT = Keys("")


def keys_of(lines: Lines) -> list[tuple[int, Keys]]:
    """The offset and the keys of each line. A line that is not an event has none: whoever reads it reports that."""
    texts = lines.data.split(b"\n")
    texts.pop()  # what follows the last newline: nothing
    keys = _decode(lines.data, texts)
    starts: Iterable[int] = accumulate(
        [len(text) + 1 for text in texts[:-1]], initial=0 if lines.marks else lines.start_offset
    )
    if lines.marks:
        starts = map(lines.offset_at, starts)
    return list(zip(starts, keys, strict=False))


def pairs_of(lines: Lines) -> list[tuple[int, int]]:
    """The number of each tag and each id in the lines, with the offset of its event."""
    pairs = []
    for offset, keys in keys_of(lines):
        pairs += [(key_of_tag(tag), offset) for tag in keys.tags]
        if keys.id is not None:
            pairs.append((key_of_id(keys.id), offset))
    return pairs


def key_of_tag(tag: str) -> int:
    """The key under which events with a tag are found."""
    key = xxhash.xxh64_intdigest(tag.encode("utf-8", "surrogatepass"), 0)
    return key if key < 2**63 else key - 2**64


def key_of_id(id: str) -> int:
    """The key under which events with an id are found."""
    key = xxhash.xxh64_intdigest(id.encode("utf-8", "surrogatepass"), 1)
    return key if key < 2**63 else key - 2**64


def _decode(data: bytes, texts: Sequence[bytes]) -> list[Keys]:
    try:
        found = _decoder.decode_lines(data)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        found = []
    # Otherwise there is a blank line, or one that is not an event.
    return found if len(found) == len(texts) else [_decode_one(text) for text in texts]


def _decode_one(text: bytes) -> Keys:
    try:
        return _decoder.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return _NO_EVENT
