"""A notebook on the command line in which every note keeps its history, even after it has been deleted.

    python docs/examples/notebook.py add "Call the plumber"
    python docs/examples/notebook.py edit 1 "Call the plumber before noon"
    python docs/examples/notebook.py list
    python docs/examples/notebook.py history 1

`watch` in a second terminal shows the notes, and shows them again whenever they change. `time_travel.py` shows the
notebook at any moment of its past.
"""

import argparse
import asyncio
import sys
from datetime import datetime

import msgspec

from eventfold import Catalog, Event, EventfoldError, EventLog, LockMode, Query, View

catalog = Catalog()


def note_tag(event) -> list[str]:
    return [f"note:{event.note}"]


@catalog.event("note_added", tags=note_tag)
class NoteAdded(msgspec.Struct, frozen=True):
    note: int
    text: str


@catalog.event("note_edited", tags=note_tag)
class NoteEdited(msgspec.Struct, frozen=True):
    note: int
    text: str


@catalog.event("note_deleted", tags=note_tag)
class NoteDeleted(msgspec.Struct, frozen=True):
    note: int


class Notebook(msgspec.Struct):
    notes: dict[int, str] = {}
    last: int = 0  # the number of the newest note; numbers of deleted notes are not reused


class RefusedError(Exception):
    """The user's request is not possible."""


def reduce_notebook(state: Notebook, event: Event) -> Notebook:
    match event.data:
        case NoteAdded(note, text):
            state.notes[note] = text
            state.last = note
        case NoteEdited(note, text):
            state.notes[note] = text
        case NoteDeleted(note):
            del state.notes[note]
    return state


def notebook_view() -> View[Notebook]:
    return View("notebook", reduce_notebook, Notebook)


def add(state: Notebook, text: str) -> NoteAdded:
    return NoteAdded(state.last + 1, checked(text))


def edit(state: Notebook, note: int, text: str) -> NoteEdited | None:
    existing(state, note)
    # A decision may also append nothing.
    return None if checked(text) == state.notes[note] else NoteEdited(note, text)


def delete(state: Notebook, note: int) -> NoteDeleted:
    existing(state, note)
    return NoteDeleted(note)


def checked(text: str) -> str:
    if not text.strip():
        raise RefusedError("a note needs a text")
    return text


def existing(state: Notebook, note: int) -> None:
    if note not in state.notes:
        raise RefusedError(f"there is no note {note}")


def lines(state: Notebook, word: str = "") -> list[str]:
    return [f"{note:>4}  {text}" for note, text in state.notes.items() if word.lower() in text.lower()]


async def run(args: argparse.Namespace) -> None:
    notebook = notebook_view()
    # SHARED, so that the notebook can be open in several terminals. Two notes that are added at the same moment can't
    # get the same number: `decide` appends only if nothing was appended in the meantime, and otherwise tries again.
    async with EventLog.open(args.dir, catalog=catalog, views=[notebook], lock=LockMode.SHARED) as log:
        match args.command:
            case "add":
                await log.decide(notebook, lambda state: add(state, args.text))
            case "edit":
                await log.decide(notebook, lambda state: edit(state, args.note, args.text))
            case "delete":
                await log.decide(notebook, lambda state: delete(state, args.note))
            case "list":
                print("\n".join(lines(notebook.state, args.word)) or "no notes")
            case "history":
                if not 1 <= args.note <= notebook.state.last:
                    raise RefusedError(f"there never was a note {args.note}")
                async for record in log.read_from(query=Query(tags=[f"note:{args.note}"])):
                    time = datetime.fromtimestamp(record.event.ts)
                    print(
                        f"{time:%Y-%m-%d %H:%M:%S}  {record.event.type:<12}  {getattr(record.event.data, 'text', '')}"
                    )
            case "watch":
                async for state in log.watch(notebook):
                    print(*lines(state), "--", sep="\n", flush=True)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="A notebook that forgets nothing.")
    parser.add_argument("--dir", default="notebook-data", help="where the notebook is (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("add", help="write a note").add_argument("text")
    editing = commands.add_parser("edit", help="change a note")
    editing.add_argument("note", type=int)
    editing.add_argument("text")
    commands.add_parser("delete", help="delete a note").add_argument("note", type=int)
    commands.add_parser("list", help="show the notes").add_argument(
        "word", nargs="?", default="", help="only those that contain this"
    )
    commands.add_parser("history", help="show everything that happened to a note").add_argument("note", type=int)
    commands.add_parser("watch", help="show the notes, and again whenever they change")
    return parser


if __name__ == "__main__":
    try:
        asyncio.run(run(parser().parse_args()))
    except (RefusedError, EventfoldError, OSError) as error:
        sys.exit(f"notebook: {error}")
    except KeyboardInterrupt:  # ends `watch`
        sys.exit(130)
