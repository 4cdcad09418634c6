"""What benchmarks work with: the options, the contenders, and new directories."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._child import BUILT_IN, Answer, Contender
from ._events import LINE_SIZE
from ._harness import Figures, Table

# The packages that a contender's module needs besides eventfold's own dependencies.
NEEDS = {
    "sqlite": "aiosqlite",
    "sqlite_shared": "aiosqlite",
    "eventsourcing": "eventsourcing",
    "jsonl": "aiofiles",
    "umadb": "umadb",
}


@dataclass(frozen=True)
class Options:
    """The command line's options: where temporary files go, how much is measured, and with which contenders."""

    dir: str
    events: int = 1_000_000
    rounds: int = 5
    quick: bool = False
    loop: str = "asyncio"
    others: tuple[str, ...] = ()

    def size(self, full: int, quick: int) -> int:
        """The size to use in this run."""
        return quick if self.quick else full


@dataclass
class Bench:
    """The contenders of one run, each with its process."""

    options: Options
    _stack: ExitStack = field(default_factory=ExitStack)
    _contenders: dict[str, Contender] = field(default_factory=dict)

    def __enter__(self) -> Bench:
        for name in BUILT_IN:
            self._contenders[name] = self._stack.enter_context(Contender.built_in(name, self.options.loop))
        for option in self.options.others:
            contender = self._stack.enter_context(Contender.from_option(option))
            self._contenders[contender.name] = contender
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def contenders(self, *names: str) -> list[Contender]:
        """The built-in contenders with these names, and all that were added with `--contender`."""
        return [c for name, c in self._contenders.items() if name in names or name not in BUILT_IN]

    def contender(self, name: str) -> Contender:
        return self._contenders[name]

    def on_uvloop(self, name: str) -> Contender:
        """A built-in contender in another process, which runs on uvloop."""
        return self._stack.enter_context(Contender.built_in(name, "uvloop"))

    @contextmanager
    def new_dir(self) -> Iterator[Path]:
        """A new directory, removed at the end."""
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=self.options.dir) as path:
            yield Path(path).resolve()

    def in_new_dir(self, contender: Contender, do: str, **fields: Any) -> Answer | None:
        """The contender's answer to a request for work in a new directory."""
        with self.new_dir() as dir:
            return contender.ask(do, dir=str(dir), **fields)

    def write(self, contender: Contender, parent: Path, events: int, distinct: int | None = None) -> Path | None:
        """A directory with the contender's log of sample events; None if it can't write one."""
        # raw and eventfold read the same file.
        dir = parent / f"{'lines' if contender.name in ('raw', 'eventfold') else contender.name}-{events}"
        if not dir.exists():
            dir.mkdir()
            if contender.ask("write", dir=str(dir), events=events, distinct=distinct) is None:
                return None
        return dir


Tables = Callable[[Bench], Iterator[Table]]


def missing_packages(*others: str) -> list[str]:
    """The packages that the contenders need, and others, that are not installed."""
    return sorted({package for package in [*NEEDS.values(), *others] if importlib.util.find_spec(package) is None})


def per_second(amount: float, column: str, answer: Answer | None) -> Figures | None:
    """The rate, calculated from an answer's seconds."""
    return None if answer is None else {column: amount / answer["seconds"]}


def events_in(size: int) -> int:
    """The approximate number of sample events in `size` bytes."""
    return size // LINE_SIZE
