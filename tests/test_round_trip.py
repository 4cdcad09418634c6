"""A state that is saved is the same when it is loaded: no value in it has become an equal one of another type."""

from __future__ import annotations

import enum
from collections import Counter, deque
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.generated import JSON, TEXT, examples

from eventfold import _chunks, snapshot
from eventfold._round_trip import difference


class Status(enum.StrEnum):
    OPEN = "open"
    ODD = '","'


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Name(str):
    pass


# A type, and the values that a field of this type may have.
Typed = tuple[Any, st.SearchStrategy[Any]]

SCALARS: list[Typed] = [
    (str, TEXT),
    (int, st.integers(-(2**63), 2**64 - 1)),
    (Status, st.sampled_from(Status)),
    (Level, st.sampled_from(Level)),
    (UUID, st.uuids()),
    (date, st.dates()),
    (datetime, st.datetimes(timezones=st.none() | st.just(UTC))),
    (Decimal, st.sampled_from([Decimal("1"), Decimal("1.00"), Decimal("1E+5")])),
]
# Without a type, these values, or some of them, become plain ones.
UNTYPED: list[Typed] = [
    (dict, st.dictionaries(TEXT | st.sampled_from(Status) | TEXT.map(Name), JSON)),
    (set, st.sets(TEXT | st.sampled_from(Status) | st.sampled_from(Level) | st.integers(0, 9))),
    (Counter, st.lists(TEXT | st.sampled_from(Status)).map(Counter)),
    (deque, st.lists(JSON, max_size=5).map(deque)),
    (Any, JSON | st.sampled_from(Status) | st.tuples(JSON)),
]


def containers(inner: st.SearchStrategy[Typed]) -> st.SearchStrategy[Typed]:
    keys = st.sampled_from(SCALARS)
    return (
        inner.map(lambda typed: (list[typed[0]], st.lists(typed[1], max_size=30)))
        | st.builds(lambda key, typed: (dict[key[0], typed[0]], st.dictionaries(key[1], typed[1])), keys, inner)
        | keys.map(lambda typed: (set[typed[0]], st.sets(typed[1])))
        | st.builds(lambda a, b: (tuple[a[0], b[0]], st.tuples(a[1], b[1])), inner, inner)
    )


TYPES = st.recursive(st.sampled_from(SCALARS + UNTYPED), containers, max_leaves=4)


def exactly(value: Any) -> str:
    """Returns a value in a form in which equal values of different types differ."""
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    if isinstance(value, dict):
        parts = [f"{exactly(key)}: {exactly(part)}" for key, part in value.items()]
    elif isinstance(value, list | tuple | deque):
        parts = list(map(exactly, value))
    elif isinstance(value, set):
        parts = sorted(map(exactly, value))
    else:
        parts = [repr(value)]
    return f"{type(value).__name__}({', '.join(parts)})"


@examples(150)
@given(st.lists(TYPES, min_size=1, max_size=4), st.sampled_from([8, 64, 512]), st.data())
def test_a_state_of_any_type_is_loaded_as_it_was_or_is_not_saved(types: list[Typed], size: int, data: Any) -> None:
    """The chunks are so small that most states have several."""
    fields = [(f"field_{number}", type) for number, (type, _) in enumerate(types)]
    state_type = msgspec.defstruct("State", fields, rename="camel")
    state = state_type(*[data.draw(values) for _, values in types])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_chunks, "CHUNK_SIZE", size)
        patch.setattr(_chunks, "MAX_WHOLE", 1)
        _, encoded = snapshot.encode_whole(snapshot.Snapshot(None, 0, ""), state, int)
        try:
            loaded = snapshot.decode_state(encoded, state_type)
        except ValueError:
            return  # refused

    assert bytes(encoded) == snapshot.encode_state(state)
    assert exactly(loaded) == exactly(snapshot._decode(encoded, state_type))
    assert (difference(state, loaded) is None) == (exactly(loaded) == exactly(state))
