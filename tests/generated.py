"""Events that hypothesis generates: whatever JSON can express."""

from __future__ import annotations

from hypothesis import strategies as st

from eventfold import Event

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=20,
)
EVENTS = st.builds(
    Event,
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    JSON,
    ts=st.integers(0, 2**64 - 1),
    id=st.none() | TEXT,
    actor=st.none() | TEXT,
    meta=JSON,
    tags=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=3, unique=True).map(tuple),
)


def exactly(value: Event) -> str:
    """Returns an event in a form in which 1, 1.0 and True differ, 0.0 and -0.0 differ, and the order of keys counts."""
    return repr((value.type, value.data, value.ts, value.id, value.actor, value.meta, value.tags))
