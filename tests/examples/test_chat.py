"""The chat as a real server with several clients that lose their connections."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.examples.browser import Browser
from tests.examples.programs import WITHIN, Server, served

pytest.importorskip("websockets", reason="uvicorn needs websockets for the chat: pip install websockets")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests, each of which uses its own room."""
    with served("chat", cwd=tmp_path_factory.mktemp("chat")) as found:
        yield found


class Client:
    """A person in a room."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket

    async def say(self, id: str, text: str) -> None:
        await self.socket.send_json({"id": id, "text": text})

    async def hear(self) -> Any:
        """Returns the next message; None at the end of the connection."""
        message = await self.socket.receive(WITHIN)
        return message.json() if message.type is aiohttp.WSMsgType.TEXT else None

    async def texts(self, count: int) -> list[str]:
        return [(await self.hear())["text"] for _ in range(count)]


@asynccontextmanager
async def joined(server: Server, room: str, name: str = "ann", **parameters: int) -> AsyncIterator[Client]:
    url = f"{server.url}/rooms/{room}"
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(url, params={"name": name, **parameters}) as socket,
    ):
        yield Client(socket)


async def test_everybody_in_a_room_gets_its_messages_and_no_others(server: Server) -> None:
    """The sender gets its own message as well, and the other room gets none."""
    async with joined(server, "a") as ann, joined(server, "a", "bob") as bob, joined(server, "b") as other:
        await bob.say("1", "hello")
        heard = [await ann.hear(), await bob.hear()]
        await other.say("2", "is anybody here?")

        assert [(message["name"], message["text"]) for message in heard] == [("bob", "hello")] * 2
        assert await other.texts(1) == ["is anybody here?"]


async def test_a_client_that_reconnects_gets_exactly_the_messages_that_it_missed(server: Server) -> None:
    """The client resumes from the offset of the last message that it received."""
    async with joined(server, "back", "bob") as bob:
        async with joined(server, "back") as ann:
            await bob.say("back 1", "one")
            last = await ann.hear()
        for text in ("two", "three"):
            await bob.say(f"back {text}", text)
        await bob.texts(3)
        async with joined(server, "back", after=last["offset"]) as ann:
            assert await ann.texts(2) == ["two", "three"]
            await bob.say("back 4", "four")
            assert await ann.texts(1) == ["four"]


async def test_a_message_that_is_sent_again_is_in_the_room_once(server: Server) -> None:
    """The client could not know whether it had arrived."""
    async with joined(server, "again") as ann:
        for _ in range(2):
            await ann.say("again 1", "only once")
        await ann.say("again 2", "next")

        assert await ann.texts(2) == ["only once", "next"]


async def test_a_new_client_gets_the_last_fifty_messages(server: Server) -> None:
    """After them, it gets new messages."""
    async with joined(server, "old") as ann:
        for number in range(60):
            await ann.say(f"old {number}", str(number))
        await ann.texts(60)
    async with joined(server, "old", "bob") as bob:
        assert await bob.texts(50) == [str(number) for number in range(10, 60)]


@pytest.mark.parametrize(
    "sent",
    [
        "",
        "not JSON",
        b"\xff",
        '{"id": "bad 1"}',
        '{"id": "bad 2", "text": ""}',
        '{"id": "bad 3", "text": "%s"}' % ("x" * 2001),
    ],
    ids=["nothing", "not JSON", "not UTF-8", "no text", "empty", "too long"],
)
async def test_a_bad_message_is_refused_with_a_reason_and_the_connection_continues(
    server: Server, sent: str | bytes
) -> None:
    """The next message is accepted."""
    async with joined(server, f"bad{len(sent)}") as ann:
        await (ann.socket.send_str(sent) if isinstance(sent, str) else ann.socket.send_bytes(sent))

        assert (await ann.hear())["error"]
        await ann.say(f"good {len(sent)}", "better")
        assert await ann.texts(1) == ["better"]


async def test_an_offset_where_no_event_ends_is_refused_with_a_reason(server: Server) -> None:
    """The offset may belong to another log, and starting anywhere else would be wrong."""
    async with joined(server, "none", after=10**9) as ann:
        assert await ann.hear() is None
        assert ann.socket.close_code == 1008


async def test_a_conversation_continues_when_a_killed_server_is_back(tmp_path: Path) -> None:
    """No message is repeated or lost, and Ctrl-C ends a server with open rooms."""
    with served("chat", cwd=tmp_path) as first:
        async with joined(first, "lobby") as ann:
            await ann.say("1", "before")
            heard = await ann.hear()
            await ann.say("2", "did you get this?")
            await ann.hear()
            first.stop(signal.SIGKILL)
            assert await ann.hear() is None
    with served("chat", cwd=tmp_path) as second:
        async with joined(second, "lobby", after=heard["offset"]) as ann:
            await ann.say("2", "did you get this?")
            await ann.say("3", "after")

            assert await ann.texts(2) == ["did you get this?", "after"]
            await asyncio.to_thread(second.stop)
            assert await ann.hear() is None


async def test_two_windows_of_the_page_exchange_messages_and_reconnect(server: Server, browser: Browser) -> None:
    """A message that was written while the connection was lost is sent afterwards, and no message is shown twice."""
    shown = "[...document.querySelectorAll('#messages p')].map(line => line.textContent)"
    async with (
        browser.page(f"{server.url}/?room=page&name=ann") as ann,
        browser.page(f"{server.url}/?room=page&name=bob") as bob,
    ):
        await ann.submit("<i>hello</i>")
        await bob.becomes(shown, ["ann: <i>hello</i>"])
        await ann.run("socket.close()")
        await bob.submit("are you there?")
        await ann.submit("here I am")
        for page in (ann, bob):
            await page.becomes(shown, ["ann: <i>hello</i>", "bob: are you there?", "ann: here I am"])
        assert ann.errors == bob.errors == []
