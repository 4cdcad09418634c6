"""The offset of an event in a stream: `(sequence - 1) << 24 | position in the message`, where the position is in bytes.

A message is one group commit: one or more whole lines. The end of a message is the start of the next one, so the offset
after the last line of message `n` is `n << 24`. A message is smaller than 16 MiB, so the position always fits.
"""

from __future__ import annotations

from collections.abc import Sequence

from .._codec.lines import Lines

POSITION_BITS = 24
MAX_MESSAGE_SIZE = (1 << POSITION_BITS) - 1


def start_of(sequence: int) -> int:
    """The offset at which a message begins."""
    return (sequence - 1) << POSITION_BITS


def end_of(sequence: int) -> int:
    """The offset at which a message ends, and the next one begins."""
    return sequence << POSITION_BITS


def sequence_at(offset: int) -> int:
    """The sequence of the message that begins at an offset, or in which the offset is."""
    return (offset >> POSITION_BITS) + 1


def position_at(offset: int) -> int:
    """The position of an offset in its message, in bytes."""
    return offset & MAX_MESSAGE_SIZE


def join_messages(location: str, first: int, messages: Sequence[bytes], skip: int = 0) -> Lines:
    """The lines of consecutive messages, without the first `skip` bytes."""
    start = start_of(first) + skip
    data = b"".join(messages)[skip:]
    marks, position = [(0, start)], -skip
    for sequence, message in enumerate(messages, first):
        position += len(message)
        marks.append((position, end_of(sequence)))
    return Lines(location, start, data, tuple(marks))
