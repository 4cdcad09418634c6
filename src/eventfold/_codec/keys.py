"""How events are found without decoding their data: by type, by tags and by id.

An index stores a tag or an id as a key, which is a signed 64-bit number: the xxh64 with seed 0 of a tag, with seed 1 of
an id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import msgspec
import xxhash

from .lines import Lines


class Header(msgspec.Struct, gc=False):
    """The fields of an event that queries and unique ids need."""

    type: str
    tags: tuple[str, ...] = ()
    id: str | None = None


_decoder = msgspec.json.Decoder(Header)
_EMPTY = Header("")


def headers_of(lines: Lines) -> list[tuple[int, Header]]:
    """The offset and the header of each line. The header of a line that is not an event is empty: no error is raised,
    since reading that line will raise one.
    """
    texts = lines.data.split(b"\n")
    texts.pop()  # the empty string after the last newline
    headers = _decode(lines.data, texts)
    starts: Iterable[int] = accumulate(
        [len(text) + 1 for text in texts[:-1]], initial=0 if lines.offset_map else lines.start_offset
    )
    if lines.offset_map:
        starts = map(lines.offset_at, starts)
    return list(zip(starts, headers, strict=False))


def pairs_of(lines: Lines) -> list[tuple[int, int]]:
    """The key of each tag and each id in the lines, with the offset of its event."""
    pairs = []
    for offset, header in headers_of(lines):
        pairs += [(key_of_tag(tag), offset) for tag in header.tags]
        if header.id is not None:
            pairs.append((key_of_id(header.id), offset))
    return pairs


def key_of_tag(tag: str) -> int:
    """The key of a tag in an index."""
    key = xxhash.xxh64_intdigest(tag.encode("utf-8", "surrogatepass"), 0)
    return key if key < 2**63 else key - 2**64


def key_of_id(id: str) -> int:
    """The key of an event's id in an index."""
    key = xxhash.xxh64_intdigest(id.encode("utf-8", "surrogatepass"), 1)
    return key if key < 2**63 else key - 2**64


def _decode(data: bytes, texts: Sequence[bytes]) -> list[Header]:
    try:
        headers = _decoder.decode_lines(data)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        headers = []
    # If the numbers differ, a line is blank or not an event.
    return headers if len(headers) == len(texts) else [_decode_one(text) for text in texts]


def _decode_one(text: bytes) -> Header:
    try:
        return _decoder.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return _EMPTY
