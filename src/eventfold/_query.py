"""Queries select events by type and by tags.

The rules are those of the specification at https://dcb.events/specification/. A query consists of items, and matches an
event if at least one item does. An item matches an event whose type is one of the item's types and which has all of the
item's tags.

Promise: a query is immutable, and equal to any other query with the same items.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from ._event import Event

_NO_STRINGS: frozenset[str] = frozenset()


class QueryItem(NamedTuple):
    """One alternative of a query. Without types, it matches events of any type; without tags, it ignores tags."""

    types: frozenset[str]
    tags: frozenset[str]


class Query:
    """Selects events by type and by tags.

    `Query(types={"order_placed"}, tags={"customer:3"})` matches an event that has one of the types and all of the tags.
    `Query()` matches every event. `a | b` matches an event that `a` or `b` matches.

    Args:
        types: The event's type must be one of these; empty for any type.
        tags: The event must have all of these.

    Raises:
        TypeError: A string was given instead of a collection of strings, or the collection contains something else.
    """

    __slots__ = ("items",)

    items: tuple[QueryItem, ...]
    """The alternatives, sorted and without duplicates."""

    def __init__(self, types: Collection[str] = (), tags: Collection[str] = ()) -> None:
        object.__setattr__(self, "items", (QueryItem(_strings("types", types), _strings("tags", tags)),))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Query can't be changed: {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Query can't be changed: {name}")

    def __reduce__(self) -> tuple[object, ...]:
        return _of, (self.items,)

    def __or__(self, other: Query) -> Query:
        if not isinstance(other, Query):
            return NotImplemented
        return _of({*self.items, *other.items})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Query):
            return NotImplemented
        return self.items == other.items

    def __hash__(self) -> int:
        return hash(self.items)

    def __repr__(self) -> str:
        return " | ".join(map(_repr, self.items)) or "<Query that matches no event>"

    @property
    def _matches_all(self) -> bool:
        """Whether it matches every event."""
        return any(not item.types and not item.tags for item in self.items)

    @property
    def _has_tags(self) -> bool:
        """Whether every alternative has a tag, so that an index can find all matching events."""
        return all([item.tags for item in self.items])  # noqa: C419 (a generator takes twice as long)

    @property
    def types(self) -> frozenset[str] | None:
        """The types of which an event must have one; None if any type may match."""
        if any(not item.types for item in self.items):
            return None
        return frozenset().union(*(item.types for item in self.items))

    def matches(self, event: Event) -> bool:
        """Whether the query matches an event."""
        return self._matches_type_and_tags(event.type, event.tags)

    def _matches_type_and_tags(self, type: str, tags: Collection[str]) -> bool:
        """Whether the query matches an event with this type and these tags."""
        return any((not types or type in types) and wanted.issubset(tags) for types, wanted in self.items)


def query_of(query: Query | None, types: Collection[str] | None) -> Query | None:
    """The query that `query` or its short form `types` describes; None if both are None.

    Empty `types` match no event. Raises `ValueError` if both are given, and `TypeError` if one has the wrong type.
    """
    if query is not None and not isinstance(query, Query):
        raise TypeError(f"query must be a Query, such as Query(types={{'order_placed'}}), not {query!r}")
    if types is None:
        return query
    if query is not None:
        raise ValueError("types and query were both given; put the types into the query")
    types = _strings("types", types)
    return Query(types) if types else _of(())


def types_alone(query: Query) -> frozenset[str] | None:
    """The types that a query selects, if it selects by type alone; None if it has tags, or if any type may match."""
    return None if any(item.tags for item in query.items) else query.types


def _of(items: Collection[QueryItem]) -> Query:
    query = Query()
    object.__setattr__(
        query, "items", tuple(sorted(set(items), key=lambda item: (sorted(item.types), sorted(item.tags))))
    )
    return query


def _strings(name: str, values: Collection[str]) -> frozenset[str]:
    if values == ():
        return _NO_STRINGS
    if isinstance(values, str):
        raise TypeError(f"{name} must be a collection of strings, not the string {values!r}: write {{{values!r}}}")
    strings = frozenset(values)
    for value in strings:
        if not isinstance(value, str):
            raise TypeError(f"{name} must be strings, not {value!r}")
    return strings


def _repr(item: QueryItem) -> str:
    named = (("types", item.types), ("tags", item.tags))
    parts = [f"{name}={{{', '.join(map(repr, sorted(values)))}}}" for name, values in named if values]
    return f"Query({', '.join(parts)})"
