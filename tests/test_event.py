"""Events and their lines: whatever JSON can express comes back unchanged, and everything else is refused."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from tests.generated import EVENTS, exactly, examples
from tests.support import event, numbers, records

from eventfold import Event, EventReader, EventWriter, InvalidEventError, SyncMode, line_hash
from eventfold._codec.decode import Decoder, Lines
from eventfold._codec.encode import encode_line


def read_back(line: bytes) -> Event:
    [piece] = Decoder().feed(Lines(Path("app.jsonl"), 0, line))
    [found] = piece.events
    return found


def nested(levels: int) -> Any:
    value: Any = []
    for level in range(levels - 1):
        value = {"deeper": value} if level % 2 else [value]
    return value


def cycle() -> dict[str, Any]:
    value: dict[str, Any] = {"a": 1}
    value["self"] = value
    return value


REFUSED: dict[str, tuple[Any, str]] = {
    "empty type": (Event("", ts=1), "type"),
    "type no string": (Event(5, ts=1), "type"),  # type: ignore[arg-type]
    "negative ts": (Event("a", ts=-1), "ts"),
    "fractional ts": (Event("a", ts=1.5), "ts"),  # type: ignore[arg-type]
    "whole float ts": (Event("a", ts=1.0), "ts"),  # type: ignore[arg-type]
    "bool ts": (Event("a", ts=True), "ts"),
    "large ts": (Event("a", ts=2**64), "ts"),
    "ts None": (Event("a", ts=None), "ts"),  # type: ignore[arg-type]
    "id no string": (Event("a", ts=1, id=5), "id"),  # type: ignore[arg-type]
    "actor no string": (Event("a", ts=1, actor=b"me"), "actor"),  # type: ignore[arg-type]
    "NaN": (Event("a", math.nan, ts=1), "data: nan"),
    "NaN inside": (Event("a", {"list": [1, {"x": math.nan}]}, ts=1), r"data\.list\[1\]\.x: nan"),
    "infinity": (Event("a", {"x": math.inf}, ts=1), r"data\.x: inf"),
    "infinity in meta": (Event("a", ts=1, meta={"y": [-math.inf]}), r"meta\.y\[0\]: -inf"),
    "NaN in a tuple": (Event("a", ts=1, meta=(0, math.nan)), r"meta\[1\]: nan"),
    "large integer": (Event("a", {"n": 2**64}, ts=1), rf"data\.n: {2**64}"),
    "small integer": (Event("a", [-(2**63) - 1], ts=1), r"data\[0\]"),
    "huge integer": (Event("a", {"n": 10**30}, ts=1), r"data\.n"),
    "bytes": (Event("a", {"b": b"x"}, ts=1), r"data\.b: bytes"),
    "set": (Event("a", {"s": {1}}, ts=1), r"data\.s: set"),
    "object": (Event("a", {"o": object()}, ts=1), r"data\.o: object"),
    "class": (Event("a", ts=1, meta={"c": int}), r"meta\.c: type"),
    "complex": (Event("a", [1j], ts=1), r"data\[0\]: complex"),
    "integer key": (Event("a", {"k": {1: 2}}, ts=1), r"data\.k: the key 1"),
    "None key": (Event("a", {None: 2}, ts=1), "data: the key None"),
    "surrogate in data": (Event("a", {"x": ["ok", "\ud800"]}, ts=1), r"data\.x\[1\]: a lone surrogate"),
    "surrogate in a key": (Event("a", {"x": {"\udfff": 1}}, ts=1), r"data\.x: a lone surrogate in the key"),
    "surrogate in meta": (Event("a", ts=1, meta="\udc00"), "meta: a lone surrogate"),
    "surrogate in type": (Event("a\ud800", ts=1), "type: a lone surrogate"),
    "surrogate in id": (Event("a", ts=1, id="\ud83d"), "id: a lone surrogate"),
    "surrogate in actor": (Event("a", ts=1, actor="\ude00"), "actor: a lone surrogate"),
    "too deep": (Event("a", nested(127), ts=1), "data.*127 levels"),
    "much too deep": (Event("a", nested(5000), ts=1), "data.*127 levels"),
    "too deep in meta": (Event("a", ts=1, meta=nested(127)), "meta.*127 levels"),
    "cycle": (Event("a", cycle(), ts=1), r"data\.self.*cycle"),
    "no event": ({"type": "a"}, "dict is not an Event"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_event_that_cannot_be_encoded_is_refused_with_the_place(case: str) -> None:
    """The message says what is wrong, and where in the event."""
    bad, place = REFUSED[case]

    with pytest.raises(InvalidEventError, match=place):
        encode_line(bad, 2**24)


@pytest.mark.parametrize("case", REFUSED)
async def test_a_refused_event_affects_no_other_append_of_its_batch(data_dir: Path, case: str) -> None:
    """Only its own call raises; the events that others append at the same moment are in the log."""
    bad, place = REFUSED[case]
    async with EventWriter.open(data_dir, sync=SyncMode.OS) as writer:
        results = await asyncio.gather(
            writer.append(event(1)), writer.append(bad), writer.append(event(2)), return_exceptions=True
        )
        found = await numbers(writer.reader())

    with pytest.raises(InvalidEventError, match=place):
        raise results[1]  # type: ignore[misc]
    assert found == [1, 2]


async def test_a_batch_with_a_refused_event_is_refused_whole(data_dir: Path) -> None:
    """If one event of an `append_many` can't be written, none is."""
    async with EventWriter.open(data_dir) as writer:
        with pytest.raises(InvalidEventError, match=r"data\.x"):
            await writer.append_many([event(1), Event("a", {"x": math.nan}), event(2)])
        head = writer.head

    assert head == (0, "")


async def test_a_conditional_append_of_a_refused_event_writes_nothing(data_dir: Path) -> None:
    """`append_if` checks the event as `append` does."""
    async with EventWriter.open(data_dir) as writer:
        with pytest.raises(InvalidEventError, match=r"data\.x"):
            await writer.append_if(Event("a", {"x": math.inf}), *writer.head)
        head = writer.head

    assert head == (0, "")


def test_the_refusal_is_a_value_error_too() -> None:
    """Code that validates input doesn't need to know eventfold's exceptions."""
    with pytest.raises(ValueError, match="type"):
        encode_line(Event(""), 2**24)


@given(EVENTS)
@examples(300)
def test_every_event_is_read_back_unchanged(original: Event) -> None:
    """Nested data, control characters, all of Unicode, integers and floats keep their values, types and order."""
    line = encode_line(original, 2**24)

    assert exactly(read_back(line)) == exactly(original)
    assert json.loads(line)["data"] == original.data
    assert line.count(b"\n") == 1


@given(st.lists(EVENTS, max_size=12), st.lists(EVENTS, max_size=5))
@examples(25)
async def test_every_event_survives_the_log(one_by_one: list[Event], together: list[Event]) -> None:
    """A reader returns every event, appended alone or in a batch, with hashes and offsets that match the file."""
    with TemporaryDirectory() as directory:
        async with EventWriter.open(directory, sync=SyncMode.OS) as writer:
            results = [await writer.append(each) for each in one_by_one]
            results += await writer.append_many(together)
        found = await records(EventReader(directory))
        data = (Path(directory) / "app.jsonl").read_bytes()

    assert [exactly(record.event) for record in found] == [exactly(each) for each in one_by_one + together]
    assert [(r.start_offset, r.end_offset, r.line_hash) for r in found] == [
        (r.start_offset, r.end_offset, r.line_hash) for r in results
    ]
    assert [data[r.start_offset : r.end_offset] for r in found] == data.splitlines(keepends=True)


def test_all_of_unicode_is_read_back_unchanged() -> None:
    """Every code point except surrogates is tested, in one string and as a key."""
    text = "".join(chr(point) for point in range(sys.maxunicode + 1) if not 0xD800 <= point <= 0xDFFF)
    original = Event("a", {text: text}, ts=1)

    assert read_back(encode_line(original, 2**26)) == original


@pytest.mark.parametrize(
    "number",
    [
        *(0, -1, 2**53 + 1, -(2**53) - 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)),
        *(5e-324, -5e-324, sys.float_info.max, sys.float_info.min, 0.1, 1e22, 1e23, -0.0, 1.0, 123456789.123456789),
        *(2.2250738585072011e-308, 9007199254740993.0, 1e308, 4.35, 1 / 3),
    ],
)
def test_the_largest_and_smallest_numbers_are_read_back_unchanged(number: float) -> None:
    """Numbers keep every bit and stay integers or floats."""
    found = read_back(encode_line(Event("a", number, ts=1), 2**24)).data

    assert repr(found) == repr(number)


def test_nesting_as_deep_as_the_crate_can_read_is_accepted() -> None:
    """The limit is 127 levels, of which the event itself is one; such an event can be written and read."""
    original = Event("a", nested(126), ts=1, meta=nested(126))

    assert read_back(encode_line(original, 2**24)) == original


def test_a_line_has_its_keys_in_the_order_of_the_format() -> None:
    """The order is `type`, `data`, `ts`, `id`, `actor`, `meta`, without spaces."""
    full = encode_line(Event("a", {"b": 1}, ts=2, id="i", actor="me", meta=[None]), 2**24)
    bare = encode_line(Event("a", ts=2), 2**24)
    batched = encode_line(Event("a", ts=2, id="i"), 2**24, (1, 3))

    assert full == b'{"type":"a","data":{"b":1},"ts":2,"id":"i","actor":"me","meta":[null]}\n'
    assert bare == b'{"type":"a","data":{},"ts":2}\n'
    assert batched == b'{"type":"a","data":{},"ts":2,"id":"i","batch":[1,3]}\n'


@pytest.mark.parametrize("excess", [0, 1])
def test_a_line_may_be_as_long_as_max_event_size_and_no_longer(excess: int) -> None:
    """The limit is the number of bytes of the line with its newline; the message contains both sizes."""
    original = Event("a", {"text": "ä" * 100}, ts=1)
    size = len(encode_line(original, 2**24))
    attempt: Callable[[], bytes] = lambda: encode_line(original, size - excess)  # noqa: E731

    if excess:
        with pytest.raises(InvalidEventError, match=rf"{size} bytes.*max_event_size is {size - 1}"):
            attempt()
    else:
        assert len(attempt()) == size


async def test_the_writer_refuses_a_line_above_its_max_event_size(data_dir: Path) -> None:
    """The limit that is given to `open` applies."""
    async with EventWriter.open(data_dir, max_event_size=100) as writer:
        await writer.append(Event("a", "x" * 50, ts=1))
        with pytest.raises(InvalidEventError, match="max_event_size is 100"):
            await writer.append(Event("a", "x" * 100, ts=1))
        found = [record.event.data async for record in writer.reader().read_full()]

    assert found == ["x" * 50]


def test_events_are_equal_by_value() -> None:
    """Two events with the same fields are equal, and each field counts."""
    first = Event("a", {"b": [1]}, ts=1, id="i", actor="me", meta=2)
    same = Event("a", {"b": [1]}, ts=1, id="i", actor="me", meta=2)
    others = [
        Event("z", {"b": [1]}, ts=1, id="i", actor="me", meta=2),
        Event("a", {"b": [2]}, ts=1, id="i", actor="me", meta=2),
        Event("a", {"b": [1]}, ts=2, id="i", actor="me", meta=2),
        Event("a", {"b": [1]}, ts=1, id="j", actor="me", meta=2),
        Event("a", {"b": [1]}, ts=1, id="i", actor="you", meta=2),
        Event("a", {"b": [1]}, ts=1, id="i", actor="me", meta=3),
    ]

    assert first == same
    assert all(first != other for other in others)
    assert first != "a"


def test_an_event_read_from_a_log_equals_the_one_that_was_written() -> None:
    """The operands may come in either order."""
    original = Event("a", {"b": 1}, ts=5, id="x")
    found = read_back(encode_line(original, 2**24))

    assert found == original
    assert original == found
    assert isinstance(found, Event)
    assert repr(found) == repr(original)


def test_an_event_cannot_be_changed() -> None:
    for target in (Event("a", ts=1), read_back(encode_line(Event("a", ts=1), 2**24))):
        with pytest.raises(AttributeError):
            target.type = "b"  # type: ignore[misc]


def test_an_event_without_a_time_gets_the_current_one_in_whole_seconds() -> None:
    """`ts` is optional."""
    before = int(time.time())
    made = Event("a")
    after = int(time.time())

    assert isinstance(made.ts, int)
    assert before <= made.ts <= after


def test_events_do_not_share_their_empty_data() -> None:
    """Each event gets a new dict."""
    first, second = Event("a"), Event("a")
    first.data["x"] = 1

    assert second.data == {}


def test_the_other_fields_are_given_by_name() -> None:
    """Only `type` and `data` may be positional."""
    with pytest.raises(TypeError):
        Event("a", {}, 1)  # type: ignore[misc]


@examples(100)
@given(st.binary().filter(lambda data: b"\n" not in data))
def test_the_line_hash_is_that_of_the_line_without_its_newline(data: bytes) -> None:
    """The hash is xxh64 with seed 0, as 16 hex digits."""
    assert line_hash(data) == xxhash.xxh64(data, seed=0).hexdigest()
    assert line_hash(data + b"\n") == line_hash(data)
    assert len(line_hash(data)) == 16
