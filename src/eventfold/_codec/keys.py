"""What finds an event without decoding the rest of its line: its type, its tags and its id."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

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
    found: list[tuple[int, Keys]] = []
    position = 0
    for text, keys in zip(texts, _decode(lines.data, texts), strict=True):
        found.append((lines.offset_at(position), keys))
        position += len(text) + 1
    return found


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
