"""The network between the servers of a cluster; a test can cut off one of them."""

from __future__ import annotations

import asyncio
import contextlib
import threading


class Network:
    """A proxy for each direction between two servers. What is sent while it is cut arrives once it is mended."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network")
        self._ways: dict[tuple[int, int], asyncio.Event] = {}
        self._servers: list[asyncio.Server] = []
        self._thread.start()

    def routes(self, start: int, ports: list[int]) -> list[int]:
        """Returns the ports at which one server reaches the others."""
        ends = [end for end in range(len(ports)) if end != start]
        return [
            asyncio.run_coroutine_threadsafe(self._listen(start, end, ports[end]), self._loop).result() for end in ends
        ]

    async def _listen(self, start: int, end: int, port: int) -> int:
        way = self._ways[start, end] = asyncio.Event()
        way.set()

        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while data := await reader.read(65536):
                    await way.wait()
                    writer.write(data)
                    await writer.drain()
            except ConnectionError:
                pass
            finally:
                writer.close()

        async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await way.wait()
            with contextlib.suppress(OSError):
                other_reader, other_writer = await asyncio.open_connection("127.0.0.1", port)
                await asyncio.gather(pump(reader, other_writer), pump(other_reader, writer))
            writer.close()

        server = await asyncio.start_server(connect, "127.0.0.1", 0)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    def cut_off(self, index: int) -> None:
        """Stops everything between this server and the others."""
        for way, event in self._ways.items():
            if index in way:
                self._loop.call_soon_threadsafe(event.clear)

    def mend(self) -> None:
        """Lets everything arrive again, including what was held up."""
        for event in self._ways.values():
            self._loop.call_soon_threadsafe(event.set)

    def stop(self) -> None:
        """Stops the proxies; the servers must have ended."""
        self.mend()

        async def ended() -> None:
            for server in self._servers:
                server.close()
            while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(tasks)

        asyncio.run_coroutine_threadsafe(ended(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
