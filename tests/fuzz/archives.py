"""`python -m tests.fuzz.archives`: a damaged archive gives its events, or is refused."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["eventfold"]):
    from tests.fuzz.damage import archived, edited
    from tests.fuzz.guided import edits, fuzz
    from tests.fuzz.targets import check_archive


def prepare(runner: asyncio.Runner) -> Callable[[atheris.FuzzedDataProvider], Coroutine[Any, Any, Any]]:
    whole = runner.run(archived(Path(tempfile.mkdtemp(prefix="fuzz-")) / "data"))

    def target(provider: atheris.FuzzedDataProvider) -> Coroutine[Any, Any, Any]:
        data = whole.data
        if provider.ConsumeBool():
            data = whole.spliced(list(provider.ConsumeBytes(provider.ConsumeIntInRange(0, 6))))
        data = edited(data, edits(provider))
        at = provider.ConsumeIntInRange(0, len(data))
        return check_archive(whole, data[:at] + provider.ConsumeBytes(provider.remaining_bytes()) + data[at:])

    return target


if __name__ == "__main__":
    fuzz(prepare)
