"""The names of the files in a data directory.

Promise: no name that a user gives leads out of its directory.
"""

from __future__ import annotations

import os
import re
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from .._documents import check_name
from .._errors import CorruptLogError

_NEXT = re.compile(r"app\.jsonl\.next\.(\d{1,19})\.(\d{1,19})\.(\d{1,19})", re.ASCII)


class NextFile(NamedTuple):
    """The file that a rotation creates. Its name describes the log at that moment (an offset, and sizes in bytes)."""

    path: Path
    base: int
    size: int
    archive_size: int


class Layout:
    """The paths in a data directory. Only `next_file` accesses the file system."""

    # The paths are created on demand, since most layouts are asked for few of them.

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        path = directory if isinstance(directory, Path) else Path(directory)
        # Made absolute once, so that a later `os.chdir` has no effect.
        self.dir = path if path.is_absolute() else Path(os.getcwd(), path)

    @cached_property
    def log_path(self) -> Path:
        return self.dir / "app.jsonl"

    @cached_property
    def base_path(self) -> Path:
        return self.dir / "app.jsonl.base"

    @cached_property
    def lock_path(self) -> Path:
        return self.dir / "app.jsonl.lock"

    @cached_property
    def archive_path(self) -> Path:
        return self.dir / "archive.jsonl.zst"

    @cached_property
    def views_dir(self) -> Path:
        return self.dir / "views"

    @cached_property
    def consumers_dir(self) -> Path:
        return self.dir / "consumers"

    def __repr__(self) -> str:
        return f"Layout({str(self.dir)!r})"

    def next_path(self, base: int, size: int, archive_size: int) -> Path:
        return self.dir / f"app.jsonl.next.{base}.{size}.{archive_size}"

    def next_file(self) -> NextFile | None:
        """The file of a rotation under way, if there is one. Raises `CorruptLogError` if there are several."""
        try:
            names = os.listdir(self.dir)
        except FileNotFoundError:
            return None
        found = [match for name in names if (match := _NEXT.fullmatch(name))]
        if not found:
            return None
        if len(found) > 1:
            listed = " and ".join(sorted(match[0] for match in found))
            raise CorruptLogError(self.log_path, 0, f"{listed} exist: the files were copied at different moments")
        base, size, archive_size = map(int, found[0].groups())
        return NextFile(self.dir / found[0][0], base, size, archive_size)

    def torn_path(self, offset: int) -> Path:
        return self.dir / f"app.jsonl.torn.{offset}"

    def snapshot_path(self, view: str) -> Path:
        return self.views_dir / f"{check_name('view', view)}.snapshot.json"

    def document_lock_path(self, document: Path) -> Path:
        """The file whose lock a process holds while it reads under a consumer's name."""
        return document.with_name(f".{document.name}.lock")

    def consumer_path(self, consumer: str) -> Path:
        return self.consumers_dir / f"{check_name('consumer', consumer)}.json"
