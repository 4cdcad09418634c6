"""The documentation: every block of Python in it runs."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)\)")
SECONDS = 20


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in whatever runs for longer."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(page: Path) -> int:
    """Runs a page's blocks one after the other in one namespace and one event loop; their number."""
    text = page.read_text()
    namespace: dict[str, Any] = {"__name__": "page"}
    blocks = list(BLOCK.finditer(text))
    with asyncio.Runner() as runner:
        for block in blocks:
            # Blank lines before it, so that a traceback names the page's own line.
            source = "\n" * text.count("\n", 0, block.start(1)) + block[1]
            code = compile(source, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
            result = eval(code, namespace)
            if inspect.iscoroutine(result):
                runner.run(result)
    return len(blocks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    with time_limit(SECONDS):
        count = run(page)

    assert count == page.read_text().count("```python")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    """What a page points to in this repository is there."""
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]

    assert missing == []
