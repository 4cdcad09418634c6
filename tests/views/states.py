"""States of each kind for the tests of views."""

from __future__ import annotations

import dataclasses
from typing import Any

from eventfold import (
    Event,
)


@dataclasses.dataclass
class Item:
    n: int
    tags: set[str] = dataclasses.field(default_factory=set)


def changed(state: Any, change: Any) -> Any:
    change(state)
    return state


def key(event: Event) -> str:
    return str(event.data["n"] % 3)


def fails_at(n: int) -> Any:
    def reduce(state: list[int], event: Event) -> list[int]:
        if event.data["n"] == n:
            raise KeyError("no such thing")
        return [*state, event.data["n"]]

    return reduce
