"""The commands that repair a log: `repair`, which asks before it changes anything, and `restore`."""

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
from ._run import FAILED, print_error, printable, progress, reading


async def repair(address: str, yes: bool, lose_events_from: int | None, views: list[View[Any]]) -> int:
    """Shows each repair and does it after confirmation; returns the exit status."""
    shown: list[Repair] = []
    async with reading(address):
        plan = await _plan(address, views)
        # A cut may make further repairs necessary, of snapshots and consumers that depend on what was cut off.
        while new := [repair for repair in plan.repairs if repair not in shown]:
            shown += new
            confirmed = [repair for repair in new if await _confirmed(repair, yes, lose_events_from)]
            if not confirmed:
                break
            await repair_log(address, confirmed, lose_events_from=lose_events_from)
            plan = await _plan(address, views)
    for problem in plan.problems:
        print_error(f"this can't be repaired, so restore a backup: {problem}")
    if plan.problems or plan.repairs:
        return FAILED
    print("no problem is left")
    return 0


async def _plan(address: str, views: list[View[Any]]) -> RepairPlan:
    with progress("verify") as report_progress:
        return await plan_repairs(address, views=views, progress=report_progress)


async def _confirmed(repair: Repair, yes: bool, lose_events_from: int | None) -> bool:
    print(printable(str(repair)))
    if isinstance(repair, CutEnd) and repair.events and lose_events_from != repair.offset:
        print_error(f"to lose these events, add --lose-events-from {repair.offset}; a backup may have them")
        return False
    if yes:
        return True
    if not sys.stdin.isatty():
        print_error("nothing was changed: add --yes, or run the command on a terminal to confirm")
        return False
    print("Do this? [y/N] ", end="", flush=True)
    # In a thread that is never joined, so that Ctrl-C ends the command while it waits for an answer.
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
