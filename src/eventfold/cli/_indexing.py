"""The commands `index build` and `index drop`."""

from __future__ import annotations

from .._address import without_password
from .._build_index import build_index, drop_index
from .._errors import EventfoldError
from ._output import print_json
from ._run import progress, reading


async def build(address: str) -> None:
    """Builds or updates the index."""
    async with reading(address):
        with progress("index") as report_progress:
            head = await build_index(address, progress=report_progress)
    print_json({"offset": head.offset, "line_hash": head.line_hash})


async def drop(address: str) -> None:
    """Removes the index."""
    async with reading(address):
        if not await drop_index(address):
            raise EventfoldError(f"there is no index in {without_password(address)}")
