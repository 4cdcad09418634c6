"""A model of the protocol of shared writers, and a search through everything that can happen in it.

The search covers every interleaving of a few writers, with every kill and, in every state, every power cut. In the
model, a line of the log is a small number and an offset counts lines, so that a log is a tuple. Writers append, and
rotate ("R").

`explore` returns what it has visited; it raises `Violation` with the steps that led to a bad state. A mutation leaves
one step of the protocol out; then the search must find a bad state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

MUTATIONS = (
    "append without the turn",
    "do not follow another's rotation",
    "follow without a sync of the directory",
    "believe the mark, not the file",
    "do not cut a torn tail",
    "answer without a sync",
    "tell a peer's end as durable",
    "begin a rotation without a sync",
    "rotate without the claim",
    "switch without a sync",
    "switch without a sync of the directory",
)

Lines = tuple[int, ...]
Next = tuple[int, int, int]  # base, size, and the file that becomes the active log


class File(NamedTuple):
    """One file that is or was the active log: its content, how much of that is on disk, and whether its end is torn."""

    lines: Lines = ()
    synced: int = 0
    torn: bool = False


class Writer(NamedTuple):
    step: str
    file: int
    base: int
    head: int
    own: tuple[int, int] | None  # the line that it appends, and that line's offset
    todo: tuple[int | str, ...]
    rotation: Next | None
    alive: bool = True


class State(NamedTuple):
    files: tuple[File, ...]
    active: int
    next: Next | None
    names: tuple[tuple[int, Next | None], ...]  # names that the directory may have after a power cut
    archive: Lines
    archive_synced: int
    turn: int | None
    claim: int | None
    written: int
    durable: int
    writers: tuple[Writer, ...]
    acknowledged: frozenset[tuple[int, int]]
    kills: int


class Violation(Exception):  # noqa: N818
    """A bad state, with the steps that led to it."""


class Explored(NamedTuple):
    states: int
    ends: int


def explore(plans: Iterable[tuple[int | str, ...]], kills: int, mutation: str = "") -> Explored:
    """Visits every state that writers with these plans can reach, with up to that many kills."""
    writers = tuple(Writer("idle", 0, 0, 0, None, plan, None) for plan in plans)
    start = State((File(),), 0, None, ((0, None),), (), 0, None, None, 0, 0, writers, frozenset(), kills)
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    queue = deque([start])
    ends = 0
    while queue:
        state = queue.popleft()
        before = _read(state)
        successors = list(_successors(state, mutation))
        for name, after, bad in successors:
            if after in came_from:
                continue
            bad = bad or _fault(after)
            now = _read(after)
            if not bad and (now is None or now[: len(before or ())] != before):
                bad = "a line that was there has gone or moved"
            if bad:
                raise Violation(f"{bad}: {' > '.join([*_path(came_from, state), name])}")
            came_from[after] = state, name
            queue.append(after)
        if not successors:
            ends += 1
            if state.turn is not None or any(writer.alive and writer.todo for writer in state.writers):
                raise Violation(f"nobody can go on: {' > '.join(_path(came_from, state))}")
    return Explored(len(came_from), ends)


def _path(came_from: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    steps = []
    while (step := came_from[state]) is not None:
        state, name = step
        steps.append(name)
    return steps[::-1]


# What a state means


def _log(archive: Lines, active: Lines, next: Next | None) -> Lines | None:
    """Returns what a reader finds; None if the files contradict each other."""
    if next is None:
        return archive + active
    base, size, _ = next
    if len(active) < size or (len(archive) > base and archive[base:] != active[: len(archive) - base]):
        return None
    return archive[:base] + active


def _read(state: State) -> Lines | None:
    return _log(state.archive, state.files[state.active].lines, state.next)


def _after_power_cuts(state: State) -> Iterator[Lines | None]:
    """Yields every log that a power cut may leave: synced lines are there, and the rest partly or not at all."""
    for active, next in state.names:
        for archive in {state.archive, state.archive[: state.archive_synced]}:
            file = state.files[active]
            for count in range(file.synced, len(file.lines) + 1):
                yield _log(archive, file.lines[:count], next)


def _fault(state: State) -> str:
    now = _read(state)
    if now is None:
        return "readers find a contradiction"
    if len(set(now)) != len(now):
        return "a line is there twice"
    if any(now[offset : offset + 1] != (line,) for line, offset in state.acknowledged):
        return "an acknowledged line is not where it was said to be"
    for log in _after_power_cuts(state):
        if log is None:
            return "power cut: the files contradict each other"
        if len(set(log)) != len(log):
            return "power cut: a line is there twice"
        if log[: state.durable] != now[: state.durable]:
            return "power cut: what was called durable was not"
        if any(log[offset : offset + 1] != (line,) for line, offset in state.acknowledged):
            return "power cut: an acknowledged line is lost"
    return ""


# The protocol


def _successors(state: State, mutation: str) -> Iterator[tuple[str, State, str]]:
    """Yields each possible next step: its name, the state after it, and what is wrong with that state, if anything."""
    for number, writer in enumerate(state.writers):
        if not writer.alive:
            if writer.todo and state.turn is None:
                yield f"{number} opens", _opened(state, number, mutation), ""
            continue
        yield from _kills(state, number)
        yield from _Steps(state, number, mutation).next()


def _kills(state: State, number: int) -> Iterator[tuple[str, State, str]]:
    writer = state.writers[number]
    if not state.kills or not (writer.step != "idle" or writer.todo):
        return
    todo = writer.todo if writer.step == "idle" else writer.todo[1:]
    dead = _with_writer(state, number, Writer("dead", 0, 0, 0, None, todo, None, alive=False))._replace(
        turn=None if state.turn == number else state.turn,
        claim=None if state.claim == number else state.claim,
        kills=state.kills - 1,
    )
    yield f"{number} is killed before '{writer.step}'", dead, ""
    if writer.step == "write":
        torn = state.files[writer.file]._replace(torn=True)
        yield f"{number} is killed while it writes", _with_file(dead, writer.file, torn), ""


def _opened(state: State, number: int, mutation: str) -> State:
    writer = Writer("idle", state.active, _base(state), 0, None, state.writers[number].todo, None)
    opened = _with_writer(_directory_synced(state), number, writer)
    return _looked(opened._replace(written=-1), number, mutation)


def _base(state: State) -> int:
    return state.next[0] if state.next else len(state.archive)


def _with_file(state: State, number: int, file: File) -> State:
    return state._replace(files=(*state.files[:number], file, *state.files[number + 1 :]))


def _with_writer(state: State, number: int, writer: Writer) -> State:
    return state._replace(writers=(*state.writers[:number], writer, *state.writers[number + 1 :]))


def _directory_synced(state: State) -> State:
    return state._replace(names=((state.active, state.next),))


def _synced(state: State, file: int) -> State:
    return _with_file(state, file, state.files[file]._replace(synced=len(state.files[file].lines)))


def _named(state: State, next: Next | None, active: int) -> State:
    """Changes the directory's names; until the directory is synced, a power cut may leave the old or the new ones."""
    names = tuple(dict.fromkeys((*state.names, (active, next))))
    return state._replace(active=active, next=next, names=names)


def _looked(state: State, number: int, mutation: str) -> State:
    """What a writer does first in its turn: it follows a rotation, and learns where the log ends."""
    writer = state.writers[number]
    if writer.file != state.active and mutation != "do not follow another's rotation":
        if mutation != "follow without a sync of the directory":
            state = _directory_synced(state)
        writer = writer._replace(file=state.active, base=_base(state))
    file = state.files[writer.file]
    head = writer.base + len(file.lines)
    if mutation == "believe the mark, not the file":
        head = state.written
    elif state.written != head or file.torn:
        if mutation != "do not cut a torn tail":
            state = _with_file(state, writer.file, file._replace(torn=False))
        state = _synced(state, writer.file)._replace(written=head, durable=max(state.durable, head))
    return _with_writer(state, number, writer._replace(head=head))


class _Steps:
    """The steps that one writer can take in one state: an append, or a rotation."""

    def __init__(self, state: State, number: int, mutation: str) -> None:
        self.state, self.number, self.mutation = state, number, mutation
        self.writer = state.writers[number]

    def next(self) -> Iterator[tuple[str, State, str]]:
        step = self.writer.step
        if step == "idle":
            if self.writer.todo:
                first = "take the turn" if isinstance(self.writer.todo[0], int) else "take the turn to rotate"
                yield self._to(self.state, first)
        elif step.startswith("take the turn"):
            if self.state.turn is None or self.mutation == "append without the turn":
                following = {
                    "take the turn": "look",
                    "take the turn to rotate": "begin",
                    "take the turn to tell": "tell",
                    "take the turn to switch": "copy the rest",
                }
                yield self._to(self.state._replace(turn=self.number), following[step])
        else:
            yield getattr(self, f"_{step.replace(' ', '_')}")()

    def _to(self, state: State, step: str, bad: str = "", **changes: object) -> tuple[str, State, str]:
        writer = state.writers[self.number]._replace(step=step, **changes)
        return f"{self.number}: {self.writer.step}", _with_writer(state, self.number, writer), bad

    def _given_back(self, state: State) -> State:
        return state._replace(turn=None) if state.turn == self.number else state

    # An append

    def _look(self) -> tuple[str, State, str]:
        return self._to(_looked(self.state, self.number, self.mutation), "write")

    def _write(self) -> tuple[str, State, str]:
        writer, file = self.writer, self.state.files[self.writer.file]
        line = writer.todo[0]
        assert isinstance(line, int)
        bad = "it writes behind torn bytes" if file.torn else ""
        if writer.head - writer.base != len(file.lines):
            bad = "it does not write at the end"
        state = _with_file(self.state, writer.file, file._replace(lines=(*file.lines, line)))
        return self._to(state, "mark what is written", bad, own=(line, writer.head), head=writer.head + 1)

    def _mark_what_is_written(self) -> tuple[str, State, str]:
        return self._to(self.state._replace(written=self.writer.head), "give the turn back")

    def _give_the_turn_back(self) -> tuple[str, State, str]:
        return self._to(self._given_back(self.state), "sync")

    def _sync(self) -> tuple[str, State, str]:
        synced = self.state if self.mutation == "answer without a sync" else _synced(self.state, self.writer.file)
        return self._to(synced, "take the turn to tell")

    def _tell(self) -> tuple[str, State, str]:
        assert self.writer.own is not None
        end = self.writer.own[1] + 1
        durable = self.state.written if self.mutation == "tell a peer's end as durable" else end
        return self._to(self.state._replace(durable=max(self.state.durable, durable)), "acknowledge")

    def _acknowledge(self) -> tuple[str, State, str]:
        assert self.writer.own is not None
        state = self._given_back(self.state)
        state = state._replace(acknowledged=state.acknowledged | {self.writer.own})
        return self._to(state, "idle", todo=self.writer.todo[1:], own=None)

    # A rotation

    def _begin(self) -> tuple[str, State, str]:
        state = _looked(self.state, self.number, self.mutation)
        writer, rest = state.writers[self.number], self.writer.todo[1:]
        if state.next is not None:
            if state.claim is not None and self.mutation != "rotate without the claim":
                return self._to(self._given_back(state), "idle", todo=rest)  # Another writer is rotating.
            return self._to(self._given_back(state)._replace(claim=self.number), "recover", rotation=state.next)
        if writer.head == writer.base:
            return self._to(self._given_back(state), "idle", todo=rest)
        if self.mutation != "begin a rotation without a sync":
            state = _synced(state, writer.file)
        next = writer.base, writer.head - writer.base, len(state.files)
        state = _named(state._replace(files=(*state.files, File()), claim=self.number), next, state.active)
        return self._to(state, "sync the new name", rotation=next)

    def _sync_the_new_name(self) -> tuple[str, State, str]:
        return self._to(self._given_back(_directory_synced(self.state)), "archive")

    def _recover(self) -> tuple[str, State, str]:
        assert self.writer.rotation is not None
        base, _, file = self.writer.rotation
        state = _directory_synced(self.state)
        if len(state.archive) > base:
            state = _with_file(state, file, File())._replace(archive_synced=len(state.archive))
            return self._to(state, "archive")
        return self._to(_named(state, None, state.active), "sync that it is undone")

    def _sync_that_it_is_undone(self) -> tuple[str, State, str]:
        state = _directory_synced(self.state)._replace(claim=None)
        return self._to(state, "take the turn to rotate", rotation=None)

    def _archive(self) -> tuple[str, State, str]:
        """Archives one frame, which has one line, with its record."""
        assert self.writer.rotation is not None
        base, size, _ = self.writer.rotation
        done = len(self.state.archive) - base
        if done >= size:
            return self._to(self.state, "take the turn to switch")
        frame = self.state.files[self.writer.file].lines[done : done + 1]
        return self._to(self.state._replace(archive=self.state.archive + frame), "sync the archive")

    def _sync_the_archive(self) -> tuple[str, State, str]:
        return self._to(self.state._replace(archive_synced=len(self.state.archive)), "archive")

    def _copy_the_rest(self) -> tuple[str, State, str]:
        assert self.writer.rotation is not None
        _, size, file = self.writer.rotation
        state = _looked(self.state, self.number, self.mutation)
        rest = state.files[state.writers[self.number].file].lines[size:]
        return self._to(_with_file(state, file, File(rest)), "sync the new file")

    def _sync_the_new_file(self) -> tuple[str, State, str]:
        assert self.writer.rotation is not None
        leave_out = self.mutation == "switch without a sync"
        return self._to(self.state if leave_out else _synced(self.state, self.writer.rotation[2]), "rename")

    def _rename(self) -> tuple[str, State, str]:
        assert self.writer.rotation is not None
        base, size, file = self.writer.rotation
        return self._to(_named(self.state, None, file), "sync the name", file=file, base=base + size)

    def _sync_the_name(self) -> tuple[str, State, str]:
        leave_out = self.mutation == "switch without a sync of the directory"
        return self._to(self.state if leave_out else _directory_synced(self.state), "end the rotation")

    def _end_the_rotation(self) -> tuple[str, State, str]:
        head = self.writer.head
        state = self._given_back(self.state)._replace(written=head, durable=max(self.state.durable, head), claim=None)
        return self._to(state, "idle", todo=self.writer.todo[1:], rotation=None)
