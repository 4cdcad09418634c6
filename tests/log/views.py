"""Views for the tests of logs."""

from __future__ import annotations

from typing import Any

from eventfold import (
    Event,
    View,
)


def count(state: int, event: Event) -> int:
    return state + 1


def collect(state: list[int], event: Event) -> list[int]:
    return [*state, event.data["n"]]


def views() -> list[View[Any]]:
    return [View("count", count, 0), View("numbers", collect, list)]
