"""Decoding lines into events: complete batches, wherever the blocks of lines end, and only the selected events."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.generated import EVENTS, exactly, examples

from eventfold import CorruptLogError, Event, Record
from eventfold._codec import selection
from eventfold._codec.backwards import BackwardsDecoder
from eventfold._codec.decode import Decoder, Lines, Slice
from eventfold._codec.encode import encode_line
from eventfold._query import Query, query_of

PATH = Path("app.jsonl")


def decoded(
    data: bytes, types: Iterable[str] | None = None, exact_offsets: bool = True, query: Query | None = None
) -> list[Slice]:
    decoder = Decoder(query_of(query, None if types is None else frozenset(types)), exact_offsets=exact_offsets)
    return [slice_ for lines in Lines(PATH, 0, data).chunks() for slice_ in decoder.feed(lines)]


def records(slices: Iterable[Slice]) -> list[Record]:
    return [record for slice_ in slices for record in slice_.records()]


@given(st.lists(st.tuples(EVENTS, st.integers(1, 3)), max_size=8), st.integers(1, 400))
@examples(100)
def test_the_result_does_not_depend_on_the_size_of_blocks(groups: list[tuple[Event, int]], size: int) -> None:
    """For any size of block, batches and single lines come out complete and in order."""
    lines = [
        encode_line(each, 2**24, None if count == 1 else (i, count))
        for each, count in groups
        for i in range(1, count + 1)
    ]
    data = b"".join(lines)
    decoder = Decoder()
    slices = [slice_ for block in Lines(PATH, 7, data).chunks(size) for slice_ in decoder.feed(block)]
    places = [(record.start_offset, record.end_offset) for slice_ in slices for record in slice_.records()]
    ends = [7 + sum(map(len, lines[: i + 1])) for i in range(len(lines))]

    assert [exactly(e) for slice_ in slices for e in slice_.events] == [
        exactly(each) for each, count in groups for _ in range(count)
    ]
    assert places == list(zip([7, *ends], ends, strict=False))
    assert all(slice_.end_offset in ends for slice_ in slices)


def test_a_batch_longer_than_many_slices_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was decoded is kept until the batch ends, instead of being decoded again."""
    count = 5000
    data = b"".join(encode_line(Event("counted", {"n": n}, ts=1), 2**24, (n + 1, count)) for n in range(count))
    decode, decoded_bytes = Decoder._decode_at_once, []

    def counted(decoder: Decoder, part: bytes, texts: Any, batches: bool) -> Any:
        if batches:
            decoded_bytes.append(len(part))
        return decode(decoder, part, texts, batches)

    monkeypatch.setattr(Decoder, "_decode_at_once", counted)
    slices = decoded(data)

    assert [e.data["n"] for slice_ in slices for e in slice_.events] == list(range(count))
    assert len(decoded_bytes) > 1
    assert sum(decoded_bytes) == len(data)


@pytest.mark.parametrize("places", [[(1, 2), (1, 2)], [(2, 2)], [(1, 2), (3, 2)], [(1, 2), (1, 0)], [(1, 3), (2, 4)]])
def test_an_incomplete_batch_longer_than_a_slice_is_reported_at_its_start(places: list[tuple[int, int]]) -> None:
    """The lines before it may have been fed separately; the events before it are returned."""
    first = encode_line(Event("counted", {}, ts=1), 2**24)
    lines = [encode_line(Event("counted", {}, ts=1), 2**24, place) for place in places]
    decoder, given, offset = Decoder(), [], 0
    with pytest.raises(CorruptLogError) as raised:
        for each in [first, *lines, first]:
            given += decoder.feed(Lines(PATH, offset, each))
            offset += len(each)

    assert sum(len(slice_.events) for slice_ in given) == 1
    assert raised.value.offset == len(first)


@given(st.lists(st.tuples(EVENTS, st.integers(1, 3)), max_size=8), st.data())
@examples(100)
def test_a_selection_of_types_yields_a_subset_of_all_events(
    groups: list[tuple[Event, int]], data: st.DataObject
) -> None:
    """The events and their offsets are the same, in batches too, and there are no others."""
    lines = b"".join(
        encode_line(each, 2**24, None if count == 1 else (i, count))
        for each, count in groups
        for i in range(1, count + 1)
    )
    there = [each.type for each, _ in groups]
    types = data.draw(st.sets(st.sampled_from([*there, "not there"])))
    everything, selected = records(decoded(lines)), decoded(lines, types)
    expected = [(exactly(r.event), r.start_offset, r.end_offset) for r in everything if r.event.type in types]

    assert [(exactly(r.event), r.start_offset, r.end_offset) for r in records(selected)] == expected
    assert [exactly(e) for slice_ in selected for e in slice_.events] == [each for each, _, _ in expected]


@pytest.mark.parametrize("most", [3, 1000])
def test_a_selection_finds_its_events_among_any_number_of_types(most: int) -> None:
    """There may be more types than the decoder distinguishes, and new ones may appear on the way."""
    lines = [encode_line(Event(f"type {i % 10}", i, ts=1), 2**24) for i in range(200)]
    with mock.patch.object(selection, "_MOST_TYPES", most):
        decoder = Decoder(Query({f"type {most % 7}", "never"}), exact_offsets=False)
        found = [
            e.data
            for i in range(0, 200, 7)
            for slice_ in decoder.feed(Lines(PATH, 0, b"".join(lines[i : i + 7])))
            for e in slice_.events
        ]

    assert found == list(range(most % 7, 200, 10))


TAGS = st.sampled_from(["order:7", "order:77", "ä", 'say "hi"', "back\\slash", "tab\t"])
QUERIES = st.lists(
    st.builds(Query, st.sets(st.sampled_from(["a", "b", ""])), st.sets(TAGS, max_size=2)), min_size=1, max_size=3
).map(lambda queries: reduce(or_, queries))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c"]), st.lists(TAGS, unique=True, max_size=3), st.integers(1, 3), st.booleans()
        ),
        max_size=12,
    ),
    QUERIES,
    st.integers(1, 400),
    st.booleans(),
)
@examples(300)
def test_a_query_yields_a_subset_of_all_events(
    groups: list[tuple[str, list[str], int, bool]], query: Query, size: int, exact_offsets: bool
) -> None:
    """The events and offsets are the same, however the tags are written, in batches too, and there are no others."""
    lines = []
    for type, tags, count, escaped in groups:
        for i in range(1, count + 1):
            each = encode_line(Event(type, i, ts=1, tags=tuple(tags)), 2**24, None if count == 1 else (i, count))
            lines.append(each.replace(b"order", b"\\u006frder") if escaped else each)
    everything = records(decoded(b"".join(lines)))
    decoder = Decoder(query, exact_offsets=exact_offsets)
    selected = [slice_ for part in Lines(PATH, 0, b"".join(lines)).chunks(size) for slice_ in decoder.feed(part)]
    expected = [r for r in everything if query.matches(r.event)]

    assert [e for slice_ in selected for e in slice_.events] == [r.event for r in expected]
    assert not exact_offsets or records(selected) == expected
    assert sum(slice_.end_offset - slice_.start_offset for slice_ in selected) == sum(map(len, lines))


def test_a_line_without_a_selected_tag_is_not_decoded() -> None:
    """Since it is not decoded, its text need not be valid UTF-8."""
    line = b'{"type":"a","data":"\xff","ts":1,"tags":["order:77"]}\n'

    assert [slice_.events for slice_ in decoded(line, query=Query(tags={"order:7"}))] == [[]]
    with pytest.raises(CorruptLogError):
        decoded(line, query=Query(tags={"order:77"}))


@pytest.mark.parametrize(
    "batch",
    ["0", "1.5", '"1,2"', "{}", "[]", "[0,5]", "[3,2]", "[-1,2]", "[1,2,3]", '["a","b"]', "[1.5,2]", "true", "null"],
)
@pytest.mark.parametrize(
    "query", [None, Query({"a"}), Query({"b"}), Query(tags={"t"}), Query({"b"}) | Query(tags={"t"})]
)
@pytest.mark.parametrize("exact_offsets", [True, False])
def test_a_batch_value_that_is_not_a_position_is_ignored(batch: str, query: Query | None, exact_offsets: bool) -> None:
    """Another program may use that key for its own purposes, so the event stands alone."""
    data = f'{{"type":"a","data":1,"ts":1,"tags":["t"],"batch":{batch}}}\n'.encode() * 2
    around = encode_line(Event("b", 2, ts=1), 2**24)
    found = [
        e.data
        for slice_ in decoded(around + data + around, query=query, exact_offsets=exact_offsets)
        for e in slice_.events
    ]
    wanted = {1} if query is None or query.matches(Event("a", tags=("t",))) else set()
    wanted |= {2} if query is None or query.matches(Event("b")) else set()

    assert found == [n for n in (2, 1, 1, 2) if n in wanted]


@pytest.mark.parametrize("batch", ["0", "[0,5]"])
def test_a_batch_is_broken_by_an_event_whose_batch_is_not_a_position(batch: str) -> None:
    """The event stands alone, so it is not part of the open batch."""
    data = (
        b'{"type":"a","data":1,"ts":1,"batch":[1,2]}\n' + f'{{"type":"a","data":1,"ts":1,"batch":{batch}}}\n'.encode()
    )

    with pytest.raises(CorruptLogError, match="this batch is incomplete"):
        decoded(data)


@pytest.mark.parametrize("exact_offsets", [True, False])
@pytest.mark.parametrize("query", [None, Query({"a"}), Query({"b"}), Query(tags={"t"})])
def test_the_last_of_several_keys_named_batch_counts(query: Query | None, exact_offsets: bool) -> None:
    """As for every key. The first one is not a position, and another one is."""
    lines = b"".join(b'{"type":"a","data":%d,"ts":1,"batch":"x","batch":[%d,2]}\n' % (i, i) for i in (1, 2))

    slices = decoded(lines, query=query, exact_offsets=exact_offsets)

    assert [slice_.end_offset for slice_ in slices] == [len(lines)]
    with pytest.raises(CorruptLogError, match="this batch is incomplete"):
        decoded(lines[: len(lines) // 2] * 2, query=query, exact_offsets=exact_offsets)


@pytest.mark.parametrize("types", [None, [""], ["a"]])
def test_an_event_may_have_an_empty_type(types: list[str] | None) -> None:
    """The Rust crate writes such events."""
    line = b'{"type":"","data":{},"ts":1}\n'

    assert [e.type for slice_ in decoded(line, types) for e in slice_.events] == ([] if types == ["a"] else [""])


def test_an_empty_selection_yields_nothing_but_still_checks_the_lines() -> None:
    """A line that is not JSON is still an error."""
    line = encode_line(Event("a", ts=1), 2**24)

    assert [slice_.events for slice_ in decoded(line, [])] == [[]]
    with pytest.raises(CorruptLogError, match="offset"):
        decoded(line + b"}" + line, [])


@pytest.mark.parametrize("wanted", [["a"], ["b"]])
@pytest.mark.parametrize(
    "line",
    [
        b"no event\n",
        b'{"type":"a","data":{"x":1},"ts":1\n',
        b'{"type":"a","data":{"x":1},"ts":1}{"type":"a","data":{},"ts":1}\n',
        b'{"data":{},"ts":1}\n',
        b'{"type":7,"data":{},"ts":1}\n',
        b'["a"]\n',
        b"null\n",
        b'{"type":"a","data":{},"ts":1,"batch":[2,3]}\n',
        b'{"type":"a","data":{},"ts":1,"batch":[1,3]}\n',
    ],
)
@pytest.mark.parametrize("exact_offsets", [True, False])
def test_a_bad_line_is_found_whatever_is_selected(line: bytes, wanted: list[str], exact_offsets: bool) -> None:
    """Lines of other types are skipped, but not lines without a type; all events before the bad line are returned."""
    good = encode_line(Event("a", ts=1), 2**24) + encode_line(Event("b", ts=1), 2**24)
    decoder = Decoder(query_of(None, wanted), exact_offsets=exact_offsets)
    given = []
    with pytest.raises(CorruptLogError) as caught:
        for slice_ in decoder.feed(Lines(PATH, 0, good + line + good)):
            given += slice_.events

    assert caught.value.offset == len(good)
    assert [e.type for e in given] == wanted


def test_text_that_is_not_utf_8_is_found_in_selected_events() -> None:
    """The text of skipped events is not checked."""
    line = b'{"type":"a","data":"\xff","ts":1}\n'

    assert [slice_.events for slice_ in decoded(line, ["b"])] == [[]]
    for types in (["a"], None):
        with pytest.raises(CorruptLogError):
            decoded(line, types)


def test_a_selected_event_is_like_any_other() -> None:
    """The event equals the one that was written, has the same repr and encoding, and can be copied and pickled."""
    original = Event("a", {"b": [1]}, ts=1, id="i", meta=2)
    line = encode_line(original, 2**24)
    for types in (None, ["a"]):
        [slice_] = decoded(line, types)
        [found] = slice_.events

        assert found == original
        assert repr(found) == repr(original)
        assert msgspec.json.encode(found) + b"\n" == line
        assert pickle.loads(pickle.dumps(found)) == original
        assert copy.deepcopy(found) == original


def test_an_unknown_key_similar_to_ours_changes_no_type() -> None:
    """Unknown keys are skipped, whatever their names."""
    line = b'{"type":"a","eventfold type":"b","data":{},"ts":1}\n'

    assert [e.type for slice_ in decoded(line, ["a"]) for e in slice_.events] == ["a"]
    assert [e.type for slice_ in decoded(line, ["b"]) for e in slice_.events] == []


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b"]), st.lists(TAGS, unique=True, max_size=2), st.integers(1, 4))),
    st.none() | QUERIES,
    st.integers(1, 300),
)
@examples(150)
def test_lines_decoded_backwards_are_the_same_in_reverse(
    groups: list[tuple[str, list[str], int]], query: Query | None, size: int
) -> None:
    """Tested with any size of block, with batches, and with any query."""
    lines = [
        encode_line(Event(type, i, ts=1, tags=tuple(tags)), 2**24, None if count == 1 else (i, count))
        for type, tags, count in groups
        for i in range(1, count + 1)
    ]
    block = Lines(PATH, 0, b"".join(lines))
    forwards = [r for r in records(decoded(block.data)) if query is None or query.matches(r.event)]
    decoder = BackwardsDecoder(query)
    blocks = list(block.chunks_backwards(size))

    assert [record for chunk in blocks for record in decoder.feed(chunk)] == forwards[::-1]
    assert b"".join(chunk.data for chunk in reversed(blocks)) == block.data
    assert all(len(chunk.data) <= size or chunk.data.count(b"\n") == 1 for chunk in blocks)


@pytest.mark.parametrize("exact_offsets", [True, False])
@pytest.mark.parametrize("query", [None, Query({"counted"}), Query(tags={"odd"})])
def test_blocks_with_and_without_batches_can_alternate(query: Query | None, exact_offsets: bool) -> None:
    """Stretches of blocks with and without batches give the same events as all lines at once."""
    lines = []
    for size in [1] * 300 + [3] * 40 + [1] * 300 + [200] + [2] * 5 + [1] * 30:
        for i in range(1, size + 1):
            number = len(lines)
            each = Event("counted", {"n": number}, ts=1, tags=("odd",) if number % 2 else ())
            lines.append(encode_line(each, 2**24, None if size == 1 else (i, size)))
    decoder = Decoder(query, exact_offsets=exact_offsets)
    slices = [slice_ for block in Lines(PATH, 0, b"".join(lines)).chunks(900) for slice_ in decoder.feed(block)]

    wanted = [n for n in range(len(lines)) if query is None or not query.items[0].tags or n % 2]
    assert [e.data["n"] for slice_ in slices for e in slice_.events] == wanted
    assert [(r.event.data["n"], r.end_offset - r.start_offset) for r in records(slices)] == [
        (n, len(lines[n])) for n in wanted
    ]


def test_blocks_are_decoded_once_whether_or_not_they_have_batches() -> None:
    """Only the first block after a change is decoded again."""
    single = [encode_line(Event("counted", {"n": n}, ts=1), 2**24) for n in range(400)]
    batches = [encode_line(Event("counted", {"n": n}, ts=1), 2**24, (n % 4 + 1, 4)) for n in range(400)]
    data = b"".join([*single, *batches, *single, *batches])
    decoder = Decoder()
    with mock.patch.object(decoder, "_decode", wraps=decoder._decode) as decode:
        blocks = list(Lines(PATH, 0, data).chunks(2000))
        events = [each for block in blocks for slice_ in decoder.feed(block) for each in slice_.events]

    assert len(events) == 1600
    assert sum(len(call.args[0]) for call in decode.mock_calls) < len(data) + 5 * 2000


def test_lines_of_two_damages_that_cancel_out_are_found_where_offsets_count() -> None:
    """The lines are a blank one, and one with two events, before a batch that continues in the next block."""
    one, two, three = (encode_line(Event("counted", {"n": n}, ts=1), 2**24) for n in range(3))
    begun = encode_line(Event("counted", {"n": 3}, ts=1), 2**24, (1, 2))
    decoder = Decoder()
    found = []
    with pytest.raises(CorruptLogError) as caught:
        for slice_ in decoder.feed(Lines(PATH, 0, one + b"\n" + two[:-1] + three + begun)):
            found += [e.data["n"] for e in slice_.events]

    assert caught.value.offset == len(one) + 1
    assert found == [0]


@pytest.mark.parametrize("exact_offsets", [True, False])
@pytest.mark.parametrize("types", [None, [], ["a"]])
def test_blank_lines_alone_are_passed_over(types: list[str] | None, exact_offsets: bool) -> None:
    """Without a slice that ends after them, a view that folds no type of event would never get beyond them."""
    selection.selection.cache_clear()
    selection._by_type.cache_clear()
    slices = decoded(b"\n \n", types, exact_offsets)

    assert [slice_.events for slice_ in slices] == [[], []]
    assert slices[-1].end_offset == 3


@pytest.mark.parametrize("query", [None, Query({"counted"}), Query({"other"}), Query(tags={"t"}), Query(tags={"u"})])
@pytest.mark.parametrize(("between", "blank"), [(b"", b"\n"), (b" ", b" \t\n"), (b"\r", b"\r\n")])
@pytest.mark.parametrize("blank_first", [True, False])
def test_a_lost_newline_is_found_although_a_blank_line_makes_up_for_it(
    query: Query | None, between: bytes, blank: bytes, blank_first: bool
) -> None:
    """Even without exact offsets: a slice can still return its records, which would be at wrong offsets."""
    one, two, three = (encode_line(Event("counted", {"n": n}, ts=1, tags=("t",)), 2**24) for n in range(3))
    joined = two[:-1] + between + three
    before = one + blank if blank_first else one
    with pytest.raises(CorruptLogError) as caught:
        decoded(before + joined + (b"" if blank_first else blank) + one, query=query, exact_offsets=False)

    assert caught.value.offset == len(before)


def test_an_event_over_two_lines_is_found_although_a_lost_newline_makes_up_for_it() -> None:
    """There are as many newlines as events."""
    one, two, three = (encode_line(Event("counted", {"n": n}, ts=1), 2**24) for n in range(3))
    with pytest.raises(CorruptLogError) as caught:
        decoded(one + two.replace(b'"data":', b'"data":\n') + three[:-1] + one, exact_offsets=False)

    assert caught.value.offset == len(one)


def test_the_events_of_a_batch_are_on_lines_of_their_own_even_without_exact_offsets() -> None:
    """A newline is missing inside a batch, and a blank line makes up for it: a slice would give wrong offsets."""
    first, second = (encode_line(Event("counted", {"n": n}, ts=1), 2**24, (n, 2)) for n in (1, 2))
    one = encode_line(Event("counted", {"n": 3}, ts=1), 2**24)
    with pytest.raises(CorruptLogError) as caught:
        decoded(one + first[:-1] + second + b"\n" + one, exact_offsets=False)

    assert caught.value.offset == len(one)
