"""The commands that repair a log: `repair`, which shows what it would do and asks first, and `restore`."""

from __future__ import annotations

import os
import sys
from typing import Any

from .._repair import CutEnd, Repair, RepairPlan, plan_repairs
from .._repair import repair as repair_log
from .._restore import restore as restore_log
from .._threads import Thread
from .._view import View
from ._output import print_json
from ._run import FAILED, printable, progress, reading, say


async def repair(where: str, yes: bool, lose_events_from: int | None, views: list[View[Any]]) -> int:
    """Shows each repair, asks, and does it; the exit status says whether a problem is left."""
    asked: list[Repair] = []
    async with reading(where):
        plan = await _plan(where, views)
        # After a cut there may be more to do: snapshots and consumers may depend on what was cut.
        while new := [one for one in plan.repairs if one not in asked]:
            asked += new
            confirmed = [one for one in new if await _confirmed(one, yes, lose_events_from)]
            if not confirmed:
                break
            await repair_log(where, confirmed, lose_events_from=lose_events_from)
            plan = await _plan(where, views)
    for problem in plan.problems:
        say(f"restore a backup, since this can't be repaired: {problem}")
    if plan.problems or plan.repairs:
        return FAILED
    print("no problem is left")
    return 0


async def _plan(where: str, views: list[View[Any]]) -> RepairPlan:
    with progress("verify") as report_progress:
        return await plan_repairs(where, views=views, progress=report_progress)


async def _confirmed(one: Repair, yes: bool, lose_events_from: int | None) -> bool:
    print(printable(str(one)))
    if isinstance(one, CutEnd) and one.events and lose_events_from != one.offset:
        say(f"to lose these events, add --lose-events-from {one.offset}; a backup may have them")
        return False
    if yes:
        return True
    if not sys.stdin.isatty():
        say("nothing was changed: add --yes, or answer on a terminal")
        return False
    print("Do this? [y/N] ", end="", flush=True)
    # In a thread that is never joined: Ctrl-C must end the command while it waits for an answer.
    thread = Thread("eventfold answer")
    answer: bytes = await thread.call(os.read, sys.stdin.fileno(), 1000).interruptible()
    thread.end()
    return answer.strip().lower() in (b"y", b"yes")


async def restore(backup: str, target: str) -> None:
    """Restores a backup."""
    async with reading(backup):
        with progress("restore") as report_progress:
            head = await restore_log(backup, target, progress=report_progress)
    print_json({"directory": target, "offset": head.offset, "line_hash": head.line_hash})
