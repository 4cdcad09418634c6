"""The commands `index build` and `index drop`."""

from __future__ import annotations

from .._address import without_password
from .._build_index import build_index, drop_index
from .._errors import EventfoldError
from ._output import print_json
from ._run import progress, reading


async def build(where: str) -> None:
    """Builds the index, or brings it up to date."""
    async with reading(where):
        with progress("index") as report_progress:
            place = await build_index(where, progress=report_progress)
    print_json({"offset": place.offset, "line_hash": place.line_hash})


async def drop(where: str) -> None:
    """Removes the index."""
    async with reading(where):
        if not await drop_index(where):
            raise EventfoldError(f"there is no index in {without_password(where)}")
