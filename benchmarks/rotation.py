"""Rotating a log of 64 MB: the rate of the rotation, and the latency of appends during it.

The reference compresses the same file in the same chunks at the same level, writes it and syncs it once. eventfold also
checks and counts the lines, and syncs each chunk, so that a power cut damages only the last one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ._bench import Bench, events_in
from ._child import Answer, Contender
from ._harness import Case, Figures, Table

TASKS = 100
SIZE, QUICK_SIZE = 64_000_000, 4_000_000
WAIT = {"p50": "ms", "p99": "ms", "max": "ms"}


def tables(bench: Bench) -> Iterator[Table]:
    """Every round rotates a copy of the same log."""
    size = bench.options.size(SIZE, QUICK_SIZE)
    templates: dict[str, Path | None] = {}
    waits: dict[str, Answer] = {}

    @contextmanager
    def written() -> Iterator[None]:
        with bench.new_dir() as parent:
            for contender in bench.contenders("raw", "eventfold"):
                templates[contender.name] = bench.write(contender, parent, events_in(size))
            yield

    def rotate(contender: Contender, tasks: int) -> Answer | None:
        template = templates[contender.name]
        if template is None:
            return None
        with bench.new_dir() as parent:
            shutil.copytree(template, parent / "copy")
            return contender.ask("rotate", dir=str(parent / "copy"), tasks=tasks)

    def throughput(work: str, contender: Contender, tasks: int) -> Case:
        def once() -> Figures | None:
            answer = rotate(contender, tasks)
            return None if answer is None else {"rate": answer["bytes"] / answer["seconds"] / 1e6}

        return Case(work, contender.name, once)

    def usual(contender: Contender) -> Case:
        def once() -> Figures | None:
            answer = rotate(contender, TASKS)
            if answer is None:
                return None
            waits[contender.name] = answer
            return {name: answer["usual"][name] * 1e3 for name in WAIT}

        return Case("an append before the rotation", contender.name, once)

    def during(contender: Contender) -> Case:
        def once() -> Figures | None:
            if contender.name not in waits:
                return None
            return {name: waits[contender.name]["during"][name] * 1e3 for name in WAIT}

        return Case("an append during the rotation", contender.name, once)

    alone = [throughput("no appends", c, 0) for c in bench.contenders("raw", "eventfold")]
    busy = [throughput(f"{TASKS} tasks append", c, TASKS) for c in bench.contenders("eventfold")]
    yield Table(
        "rotate",
        f"rotating {size // 1_000_000} MB",
        {"rate": "MB/s"},
        alone + busy,
        more_is_better=True,
        setting=written,
    )
    yield Table(
        "rotate-waits",
        f"the latency of appends from {TASKS} tasks, before and during a rotation of {size // 1_000_000} MB",
        WAIT,
        [case(contender) for case in (usual, during) for contender in bench.contenders("eventfold")],
        setting=written,
    )
