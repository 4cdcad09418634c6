"""Events that hypothesis generates, whatever JSON can express, and how many of them a test tries."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
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


def examples(count: int) -> settings:
    """A test tries this number of examples, which are the same in each run, so that a change alone can make it fail.

    With `EVENTFOLD_EXAMPLES=N`, it tries N times as many random ones.
    """
    factor = os.environ.get("EVENTFOLD_EXAMPLES")
    return settings(
        max_examples=count * int(factor or 1),
        derandomize=factor is None,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def exactly(value: Event) -> str:
    """Returns an event in a form in which 1, 1.0 and True differ, 0.0 and -0.0 differ, and the order of keys counts."""
    return repr((value.type, value.data, value.ts, value.id, value.actor, value.meta, value.tags))
