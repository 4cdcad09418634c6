"""Finds lines in an open file of lines: the first one, and those at the end.

All positions are in bytes of the file.
"""

from __future__ import annotations

import os

from .._codec.decode import batch_position
from .._event import line_hash

_FIRST_READ_SIZE = 4096
_STEP_BACK = 4096


def first_line(fd: int) -> bytes | None:
    """The first line, without its newline; None if there is no whole line."""
    size = _FIRST_READ_SIZE
    while True:
        data = os.pread(fd, size, 0)
        newline = data.find(b"\n")
        if newline >= 0:
            return data[:newline]
        if len(data) < size:
            return None
        size *= 4


def first_line_hash(fd: int) -> str | None:
    """The hash of the first line; "" if there is no whole line, None if a power cut has left a hole there."""
    line = first_line(fd)
    if line is None:
        return ""
    return None if line.startswith(b"\0") else line_hash(line)


def line_before(fd: int, end: int) -> tuple[int, bytes]:
    """The line that ends at position `end`: the position where it begins, and its bytes without the newline."""
    step = _STEP_BACK
    while True:
        start = max(0, end - step)
        data = os.pread(fd, end - start, start)
        begin = data.rfind(b"\n", 0, len(data) - 1) + 1
        if begin or not start:
            return start + begin, data[begin:-1]
        step *= 4


def last_line_end(fd: int, start: int, end: int) -> int:
    """The position after the last newline between two positions; `start` if there is none."""
    step = _STEP_BACK
    while True:
        begin = max(start, end - step)
        newline = os.pread(fd, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        if begin == start:
            return start
        step *= 4


def complete_size(fd: int, size: int) -> int:
    """How many of the first `size` bytes are whole lines, without incomplete batches at the end."""
    end = last_line_end(fd, 0, size)
    # A crash leaves at most one. If there are more, an append after the first one would make it permanent damage.
    while end and (start := _start_of_incomplete_batch(fd, end)) is not None:
        end = start
    return end


def _start_of_incomplete_batch(fd: int, end: int) -> int | None:
    """Where the batch begins whose last lines are missing at position `end`; None if there is no such batch."""
    start, line = line_before(fd, end)
    batch = batch_position(line)
    if batch is None or not 1 <= batch[0] < batch[1]:
        return None
    index, count = batch
    while index > 1:
        if not start:
            return None
        start, line = line_before(fd, start)
        index -= 1
        if batch_position(line) != (index, count):
            return None  # lines in the wrong order are not an incomplete batch, and readers report them
    return start
