"""Queries: the rules by which an event matches, one by one."""

from __future__ import annotations

import copy
import pickle
from functools import reduce
from operator import or_
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.generated import examples

from eventfold import Event, Query
from eventfold._query import query_of, types_alone

TYPES, TAGS = ["a", "b", "c"], ["x", "y", "z"]
ITEMS = st.lists(st.tuples(st.sets(st.sampled_from(TYPES)), st.sets(st.sampled_from(TAGS))), min_size=1, max_size=4)
EVENTS = st.builds(
    lambda name, tags: Event(name, ts=1, tags=tuple(tags)),
    st.sampled_from([*TYPES, "d"]),
    st.lists(st.sampled_from([*TAGS, "w"]), unique=True),
)


def made(type: str, *tags: str) -> Event:
    return Event(type, ts=1, tags=tags)


def test_an_empty_query_matches_every_event() -> None:
    """An empty query has neither types nor tags."""
    assert Query().matches(made("a"))
    assert Query().matches(made("", "x"))
    assert Query()._matches_all


def test_an_event_must_have_one_of_the_types() -> None:
    """Any of the types is enough."""
    query = Query(types={"a", "b"})

    assert [query.matches(made(type)) for type in "abc"] == [True, True, False]


def test_an_event_must_have_all_of_the_tags() -> None:
    """The event may have more tags, and a part of a tag does not count."""
    query = Query(tags={"order:7", "customer:3"})

    assert query.matches(made("a", "customer:3", "order:7", "more"))
    assert not query.matches(made("a", "order:7"))
    assert not query.matches(made("a", "order:77", "customer:3"))
    assert not query.matches(made("a"))


def test_types_and_tags_must_both_fit() -> None:
    """The event needs one of the types and all of the tags."""
    query = Query(types={"a"}, tags={"x"})

    assert query.matches(made("a", "x"))
    assert not query.matches(made("a", "y"))
    assert not query.matches(made("b", "x"))


def test_an_event_must_match_one_of_two_queries() -> None:
    """The types of one query don't combine with the tags of the other."""
    query = Query({"a"}, {"x"}) | Query({"b"}, {"y"})

    assert query.matches(made("a", "x"))
    assert query.matches(made("b", "y"))
    assert not query.matches(made("a", "y"))
    assert not query.matches(made("b", "x"))


@examples(100)
@given(ITEMS, EVENTS)
def test_a_query_matches_as_the_rules_say(items: list[tuple[set[str], set[str]]], event: Event) -> None:
    """Tested with any alternatives and events; an event whose type is not in `types` can't match."""
    query = reduce(or_, (Query(types, tags) for types, tags in items))
    expected = any((not types or event.type in types) and tags <= set(event.tags) for types, tags in items)

    assert query.matches(event) == expected
    assert not expected or query.types is None or event.type in query.types
    assert not query._matches_all or expected
    alone = types_alone(query)
    assert alone is None or (event.type in alone) == expected


def test_queries_are_equal_whatever_the_order() -> None:
    """The order of types, tags and alternatives doesn't matter, and duplicates don't count."""
    one = Query(["a", "b"], ["x", "y"]) | Query({"c"})
    other = Query({"c"}) | Query(("b", "a", "a"), ("y", "x")) | Query({"c"})

    assert one == other
    assert hash(one) == hash(other)
    assert one != Query({"c"})
    assert one != "a"


def test_a_query_cannot_be_changed() -> None:
    """Queries are used as keys in caches."""
    query = Query({"a"})
    with pytest.raises(AttributeError):
        query.items = ()
    with pytest.raises(AttributeError):
        del query.items


def test_a_query_can_be_copied_and_pickled() -> None:
    """Tested also for queries with alternatives."""
    query = Query({"a"}, {"x"}) | Query(tags={"y"})

    assert pickle.loads(pickle.dumps(query)) == copy.deepcopy(query) == query


def test_the_repr_of_a_query_is_its_source() -> None:
    """Error messages show queries this way."""
    query = Query({"b", "a"}, {"x"}) | Query(tags={"y"})

    assert repr(query) == "Query(tags={'y'}) | Query(types={'a', 'b'}, tags={'x'})"
    assert repr(Query()) == "Query()"


@pytest.mark.parametrize("wrong", [{"types": "abc"}, {"tags": "abc"}, {"types": {1}}, {"tags": [None]}])
def test_a_string_is_not_a_collection_of_strings(wrong: dict[str, Any]) -> None:
    """`Query(types="abc")` would mean three types of one letter each."""
    with pytest.raises(TypeError, match=next(iter(wrong))):
        Query(**wrong)


def test_an_empty_set_of_event_types_matches_no_event() -> None:
    """A query without types, in contrast, matches events of every type."""
    nothing = query_of(None, [])

    assert nothing is not None
    assert not nothing.matches(made("a"))
    assert not nothing._matches_all
    assert "no event" in repr(nothing)
    assert nothing | Query({"a"}) == Query({"a"})
    assert query_of(None, None) is None
