"""Every sync in the package is needed: without it, the recorder finds a loss.

The syncs are found in the source, so that none can be forgotten. Each is left out in turn, by replacing the code of its
function, and the scenarios are run, crashed and recovered until something is lost. With `EVENTFOLD_SYNCS=all`, this
includes the syncs whose loss takes minutes to find.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import os
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.crash.recorder import Recorded, State, States, kills
from tests.crash.scenarios import (
    SCENARIOS,
    Play,
    check_state,
    cuts_in_a_row,
    list_in_order,
    recovery,
)
from tests.crash.shared_scenarios import SHARED_SCENARIOS

import eventfold
from eventfold import LockMode

pytestmark = pytest.mark.usefixtures("fast_disk")

PACKAGE = Path(eventfold.__file__).parent
NAMES = ("sync", "sync_dir")
# A backup writes to its own directory, and `tests/test_backup.py` interrupts it; likewise `tests/test_repair.py` and
# `tests/test_restore.py`.
ELSEWHERE = {"_backup", "_files.damaged_end", "_restore"}
# Without these, something is lost only if there are several writers.
SHARED = {"_files.shared_log", "_files.shared_rotation"}
# The loss of these shows only in a crash of one of the last recoveries.
SLOW = {"_files.recovery.recover_archive: operations.sync", "_files.recovery.open_log: operations.sync_dir"}
# Syncs that can be left out without a loss, and why they are there anyway.
NOT_NEEDED: dict[str, str] = {}


class Site(NamedTuple):
    """A place in the source that syncs: the module, the function's name in it, and which one of its syncs it is."""

    module: str
    function: str
    number: int
    text: str

    def __str__(self) -> str:
        return f"{self.module}.{self.function}: {self.text}" + (f" ({self.number + 1})" if self.number else "")


def _is_sync(node: ast.AST, module: str) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr in NAMES and isinstance(node.ctx, ast.Load)
    return (
        module == "_files.operations"
        and isinstance(node, ast.Name)
        and node.id in NAMES
        and isinstance(node.ctx, ast.Load)
    )


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yields the functions and methods of a module, without those inside them."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node


def sites() -> list[Site]:
    """Returns every place in the package that calls a sync, or passes one on to be called."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if module in ELSEWHERE:
            continue
        for function, tree in _functions(ast.parse(path.read_text())):
            here = [node for node in ast.walk(tree) if _is_sync(node, module)]
            found += [Site(module, function, number, ast.unparse(node)) for number, node in enumerate(here)]
    return found


class _LeftOut(ast.NodeTransformer):
    def __init__(self, node: ast.AST) -> None:
        self._node = node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if node is self._node:
            return ast.copy_location(ast.Name("_left_out", ast.Load()), node)
        return super().generic_visit(node)


def _code(code: types.CodeType, name: str) -> types.CodeType:
    """Returns the code of the function with this name within a module's code."""
    for part in name.split("."):
        code = next(inner for inner in code.co_consts if isinstance(inner, types.CodeType) and inner.co_name == part)
    return code


class Mutation:
    """The package without one of its syncs; `met` counts how often that would have been called."""

    def __init__(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        self.met = 0
        module = importlib.import_module(f"eventfold.{site.module}")
        path = PACKAGE / f"{site.module.replace('.', '/')}.py"
        tree = ast.parse(path.read_text())
        function = dict(_functions(tree))[site.function]
        node = [node for node in ast.walk(function) if _is_sync(node, site.module)][site.number]
        without = ast.fix_missing_locations(_LeftOut(node).visit(tree))
        real: Any = module
        for part in site.function.split("."):
            real = getattr(real, part)
        monkeypatch.setattr(module, "_left_out", self._left_out, raising=False)
        monkeypatch.setattr(real, "__code__", _code(compile(without, path, "exec"), site.function))

    def _left_out(self, *_: Any) -> None:
        self.met += 1


class Search:
    """Looks for a loss without the sync."""

    def __init__(self, mutation: Mutation, root: Path, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
        self._mutation = mutation
        self._lock = LockMode.SHARED if shared else LockMode.FLOCK
        self._scenarios = SHARED_SCENARIOS if shared else SCENARIOS
        self._root = root
        self._monkeypatch = monkeypatch
        self._numbers = itertools.count()

    def _new(self) -> Path:
        return self._root / f"{next(self._numbers)}"

    def losses(self) -> Iterator[str]:
        """Yields every loss: the scenario, where it was crashed, and what was wrong. Fast searches come first."""
        recordings = {}
        for name, scenario in self._scenarios.items():
            met = self._mutation.met
            recordings[name] = scenario(Play(self._new(), self._lock), self._monkeypatch)
            if self._mutation.met > met:
                yield from self._lost(States().after(recordings[name]), name)
        for reverse in (False, True):
            with self._monkeypatch.context() as patch:
                list_in_order(patch, reverse)
                yield from self._lost(cuts_in_a_row(self._new(), patch), "cuts in a row")
        for name, recorded in recordings.items():
            states = States()
            for first, ops in kills(recorded):
                yield from self._recovery(first, states, Recorded(recorded.files, ops, recorded.expected), name)
        for name, recorded in recordings.items():
            states = States()
            for first in list(states.after(recorded)):
                yield from self._recovery(first, states, Recorded(first.files, [], first.expected), name)

    def _lost(self, states: Iterable[State], *before: str) -> Iterator[str]:
        for state in states:
            try:
                state.check_kept()
                check_state(state, self._new(), self._lock)
            except Exception as error:
                yield "; ".join((*before, state.after, f"{error!r:.300}"))

    def _recovery(self, first: State, states: States, before: Recorded, name: str) -> Iterator[str]:
        met = self._mutation.met
        try:
            more = recovery(first, self._new(), self._monkeypatch, rotating=True, lock=self._lock)
        except Exception as error:
            yield f"{name}; {first.after}; {error!r:.300}"
            return
        if self._mutation.met > met:
            both = before._replace(ops=before.ops + more)
            yield from self._lost(states.after(both, since=len(before.ops)), name, first.after)


@pytest.mark.parametrize("site", sites(), ids=str)
def test_without_any_one_sync_something_is_lost(site: Site, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash leaves a log, or a file beside it, that breaks a promise, unless the list says why the sync is there."""
    if str(site) in SLOW and os.environ.get("EVENTFOLD_SYNCS") != "all":
        pytest.skip("its loss takes minutes to find: set EVENTFOLD_SYNCS=all")
    mutation = Mutation(site, monkeypatch)
    lost = next(Search(mutation, scratch, monkeypatch, site.module in SHARED).losses(), None)
    print(f"{site}: {lost}")

    assert mutation.met
    assert (lost is None) == (str(site) in NOT_NEEDED)


def test_each_exception_names_an_existing_sync() -> None:
    """The list of exceptions has no sync that was removed."""
    assert set(NOT_NEEDED) | SLOW <= set(map(str, sites()))
