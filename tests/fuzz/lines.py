"""`python -m tests.fuzz.lines`: damaged lines, and arbitrary bytes, are read as the reference reads them."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["eventfold"]):
    from tests.fuzz.damage import edited
    from tests.fuzz.guided import edits, fuzz, lines
    from tests.fuzz.targets import check_lines


def prepare(runner: asyncio.Runner) -> Callable[[atheris.FuzzedDataProvider], Coroutine[Any, Any, Any]]:
    place = Path(tempfile.mkdtemp(prefix="fuzz-"))

    def target(provider: atheris.FuzzedDataProvider) -> Coroutine[Any, Any, Any]:
        if provider.ConsumeBool():
            return check_lines(place, edited(lines(provider), edits(provider)))
        return check_lines(place, provider.ConsumeBytes(provider.remaining_bytes()) + b"\n")

    return target


if __name__ == "__main__":
    fuzz(prepare)
