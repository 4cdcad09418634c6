"""The documentation: every block of Python runs, and every command prints what the page shows.

A block of Python with a title is a file; it is written to where the commands after it find it. Any other block runs as
it would in `python -m asyncio`. In a console block, a line that begins with `$ ` is a command, followed by its output,
in which `...` stands for any text.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import eventfold

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r'^```(python|console)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
REFERENCE = sorted((ROOT / "docs" / "reference").glob("*.md"))
LINK = re.compile(r"\]\(([^)#:]+)\)")
SECONDS = 60


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in the block if it runs for longer."""

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
    """Runs the blocks of a page in order, all Python in one namespace and one event loop; returns their number."""
    text = page.read_text()
    namespace: dict[str, Any] = {"__name__": "page"}
    blocks = list(BLOCK.finditer(text))
    with asyncio.Runner() as runner:
        for block in blocks:
            language, title, body = block.groups()
            if language == "console":
                check_commands(body)
            elif title is not None:
                Path(title).write_text(body)
            else:
                # Add blank lines before it, so that tracebacks show the line numbers of the page.
                source = "\n" * text.count("\n", 0, block.start(3)) + body
                code = compile(source, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
                result = eval(code, namespace)
                if inspect.iscoroutine(result):
                    runner.run(result)
    return len(blocks)


def check_commands(console: str) -> None:
    """Runs the commands of a console block; each must succeed and print the output that follows it."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "80"}
    for command in re.split(r"^\$ ", console, flags=re.MULTILINE)[1:]:
        line, _, expected = command.partition("\n")
        ran = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True, timeout=SECONDS)
        assert ran.returncode == 0, f"$ {line}\n{ran.stdout}{ran.stderr}"
        if expected.strip():
            pattern = ".*".join(re.escape(part.strip()) for part in expected.strip().split("..."))
            assert re.fullmatch(pattern, ran.stdout.strip(), re.DOTALL), f"$ {line}\n{ran.stdout}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks run in the order of the page, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    with time_limit(SECONDS):
        count = run(page)

    assert count == len(re.findall(r"^```(?:python|console)", page.read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]

    assert missing == []


def test_every_public_name_is_in_the_reference() -> None:
    documented = re.findall(r"^::: eventfold\.(\w+)$", "\n".join(page.read_text() for page in REFERENCE), re.MULTILINE)

    assert sorted(documented) == sorted(eventfold.__all__)


def test_every_module_is_on_the_map_of_the_architecture() -> None:
    """The map also names no module that doesn't exist."""
    source = ROOT / "src" / "eventfold"
    modules = {path.stem if path.is_file() else f"{path.name}/" for path in source.iterdir() if path.suffix != ".typed"}
    map_of_modules = (ROOT / "docs" / "architecture.md").read_text().partition("| --- |")[2].partition("\n\n")[0]
    named = {name for line in map_of_modules.splitlines() for name in re.findall(r"`([\w/]+)`", line.split(" | ")[0])}

    assert named == modules - {"__init__", "__pycache__/"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_whose_code_awaits_outside_of_a_function_says_how_it_runs(page: Path) -> None:
    text = page.read_text()
    blocks = [body for language, title, body in BLOCK.findall(text) if language == "python" and not title]

    if any(awaits_at_top_level(body) for body in blocks):
        assert "`python -m asyncio`" in text.replace("\n", " ")


def awaits_at_top_level(source: str) -> bool:
    try:
        compile(source, "block", "exec", dont_inherit=True)
    except SyntaxError:
        return True
    return False
