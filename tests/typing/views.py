"""What the types promise: mypy and pyright check this module, and nothing runs it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, assert_type

from eventfold import Event, EventLog, View


def count(state: int, event: Event) -> int:
    return state + 1


def name(state: list[str], event: Event) -> list[str]:
    return [*state, event.type]


COUNT = View("count", count, 0)
NAMES = View("names", name, [])


async def a_view_object_gives_its_state_type(log: EventLog) -> None:
    assert_type(COUNT, View[int])
    assert_type(COUNT.state, int)
    assert_type(log.view(COUNT), int)
    assert_type(log.view(NAMES), list[str])
    assert_type(await log.wait_until(COUNT), int)
    assert_type(await log.wait_until(COUNT, 12), int)
    print(await log.wait_until(COUNT), log.view(NAMES))  # a `View[int]` is also accepted as a `View[object]`
    assert_type(await log.rebuild(NAMES), list[str])
    assert_type(log.watch(COUNT), AsyncGenerator[int, None])
    assert_type(log.views[COUNT], View[int])
    async for state in log.watch(COUNT):
        assert_type(state, int)


async def a_name_gives_any(log: EventLog) -> None:
    assert_type(log.view("count"), Any)
    assert_type(await log.wait_until("count"), Any)
    assert_type(log.views["count"], View[Any])


async def both_ways_of_opening_give_a_log() -> None:
    assert_type(await EventLog.open("data"), EventLog)
    async with EventLog.open("data") as log:
        assert_type(log, EventLog)
    async with await EventLog.open("data") as log:
        assert_type(log, EventLog)
