"""Coverage-guided fuzzing: passes what atheris generates to a target.

The tests don't depend on atheris: install it to run `python -m tests.fuzz.lines` or `python -m tests.fuzz.archives`
from a clone. libFuzzer's options may follow, such as `-max_total_time=60`. A finding ends the run with a traceback and
leaves its input in a file `crash-…`; pass that file as an argument to repeat the finding.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from tests.fuzz.damage import KINDS, LINES, PIECES, Edit

try:
    import atheris
except ImportError:
    sys.exit("this needs atheris: pip install atheris")


def edits(provider: atheris.FuzzedDataProvider) -> list[Edit]:
    """Returns some changes."""
    return [
        Edit(
            provider.PickValueInList(KINDS),
            provider.ConsumeIntInRange(0, 2**12),
            provider.ConsumeIntInRange(1, 200),
            provider.PickValueInList(PIECES),
        )
        for _ in range(provider.ConsumeIntInRange(0, 4))
    ]


def lines(provider: atheris.FuzzedDataProvider) -> bytes:
    """Returns some lines."""
    return b"".join(provider.PickValueInList(LINES) for _ in range(provider.ConsumeIntInRange(1, 7)))


def fuzz(prepare: Callable[[asyncio.Runner], Callable[[atheris.FuzzedDataProvider], Coroutine[Any, Any, Any]]]) -> None:
    """Runs a target, which `prepare` returns, for as long as the options say."""
    with asyncio.Runner() as runner:
        target = prepare(runner)

        def one_input(data: bytes) -> None:
            runner.run(target(atheris.FuzzedDataProvider(data)))

        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()
