"""A proxy in front of a server; a test can cut its connections at any moment."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_CHUNK = 1 << 18


class Cut(enum.Enum):
    """When to cut the connection that carries the marked message."""

    BEFORE = "the server never gets the statement"
    AFTER = "the server has answered, and the answer is lost"
    LATE = "the server gets the statement when `deliver` is called"


class Proxy:
    """Forwards connections on `port`, and counts those that it has cut. Use `proxy_of` to create it."""

    def __init__(self, target: int) -> None:
        self.port = 0
        self.cuts = 0
        self.refuses = False
        self._target = target
        self._clients: set[asyncio.StreamWriter] = set()
        self._marks: list[tuple[bytes, Cut, bool]] = []
        self._delivered = asyncio.Event()

    def cut_all(self) -> None:
        """Cuts every connection, whatever is under way."""
        for client in self._clients:
            client.transport.abort()
        self.cuts += len(self._clients)

    def cut_at(self, mark: bytes, when: Cut, *, then_refuse: bool = False) -> None:
        """Cuts the connection by which a client sends this, once; with `then_refuse`, nobody can connect after that."""
        self._marks.append((mark, when, then_refuse))

    def deliver(self) -> None:
        """Sends to the server what was cut off as `Cut.LATE`."""
        self._delivered.set()

    def _found(self, data: bytes) -> Cut | None:
        for one in self._marks:
            mark, when, refuse = one
            if mark in data:
                self._marks.remove(one)
                self.refuses = refuse
                self.cuts += 1
                return when
        return None

    async def forward(self, from_client: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        """Serves one client until either side ends."""
        losing = False

        async def up() -> None:
            nonlocal losing
            while data := await from_client.read(_CHUNK):
                found = self._found(data)
                if found is Cut.BEFORE:
                    return
                losing = losing or found in (Cut.AFTER, Cut.LATE)
                if found is Cut.LATE:
                    client.transport.abort()
                    await self._delivered.wait()
                server.write(data)
                await server.drain()

        async def down() -> None:
            while (data := await from_server.read(_CHUNK)) and not losing:
                client.write(data)
                await client.drain()

        try:
            if self.refuses:
                return
            from_server, server = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            return
        else:
            self._clients.add(client)
            ways = [asyncio.ensure_future(up()), asyncio.ensure_future(down())]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
                server.transport.abort()
        finally:
            self._clients.discard(client)
            client.transport.abort()


@asynccontextmanager
async def proxy_of(port: int) -> AsyncIterator[Proxy]:
    """Runs a proxy on the loopback address in front of the server on this port."""
    proxy = Proxy(port)
    listening = await asyncio.start_server(proxy.forward, "127.0.0.1", 0)
    proxy.port = listening.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        listening.close()
        proxy.cut_all()
        await asyncio.sleep(0)
