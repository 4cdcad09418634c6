"""A to-do list that keeps its state: run it several times, each time with something else to do.

python docs/examples/todo.py "buy milk"
python docs/examples/todo.py --done 1
python docs/examples/todo.py
"""

import argparse
import asyncio
from dataclasses import dataclass, field

from eventfold import Event, EventLog, View


@dataclass
class Todo:
    text: str
    done: bool = False


@dataclass
class Todos:
    items: list[Todo] = field(default_factory=list)


def reduce_todos(state: Todos, event: Event) -> Todos:
    match event.type:
        case "todo_added":
            state.items.append(Todo(event.data["text"]))
        case "todo_done":
            state.items[event.data["number"] - 1].done = True
    return state


async def main(args: argparse.Namespace) -> None:
    todos = View("todos", reduce_todos, Todos)
    async with EventLog.open(args.dir, views=[todos]) as log:
        print(f"{len(todos.state.items)} to-dos from before")
        for text in args.text:
            await log.append(Event("todo_added", {"text": text}))
        if args.done is not None:
            if not 1 <= args.done <= len(todos.state.items):
                raise SystemExit(f"there is no to-do number {args.done}")
            await log.append(Event("todo_done", {"number": args.done}))
        await log.refresh_all()
        for number, item in enumerate(todos.state.items, 1):
            print(f"{number}. [{'x' if item.done else ' '}] {item.text}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A to-do list that keeps its state.")
    parser.add_argument("text", nargs="*", help="something to do")
    parser.add_argument("--done", type=int, metavar="NUMBER", help="the to-do that is done")
    parser.add_argument("--dir", default="todo-data", help="where the log is (default: %(default)s)")
    asyncio.run(main(parser.parse_args()))
