"""A headless Chromium, driven by its own protocol over a WebSocket: enough to open a page and run JavaScript in it."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
WITHIN = 20  # seconds in which a page must become what it is to be


def find_browser() -> str | None:
    """The path of the browser, if there is one on this system."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """An open page, and what its scripts complained about."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.errors: list[str] = []

    async def command(self, method: str, **parameters: Any) -> Any:
        """Has the browser do something; what it answers."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=WITHIN)
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(message["params"]["exceptionDetails"]))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    async def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page; promises are waited for."""
        answer = await self.command("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def becomes(self, script: str, expected: Any) -> None:
        """Waits until an expression has a value."""
        found = None
        try:
            async with asyncio.timeout(WITHIN):
                while (found := await self.run(script)) != expected:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"{script} is still {found!r}, not {expected!r}") from None


@asynccontextmanager
async def browser(path: str) -> AsyncIterator[Any]:
    """A running browser: call it with an address to open a page there."""
    with tempfile.TemporaryDirectory(prefix="eventfold-browser-", ignore_cleanup_errors=True) as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command = [path, *options, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
        # The proxy of the environment is not for this machine.
        process = subprocess.Popen(
            [*command, "--no-proxy-server"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            port = await _port(process, Path(profile, "DevToolsActivePort"))
            async with aiohttp.ClientSession() as session:

                async def open_page(url: str) -> Page:
                    async with session.put(f"http://127.0.0.1:{port}/json/new?about:blank") as answer:
                        target = json.loads(await answer.text())
                    page = Page(await session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0))
                    await page.command("Runtime.enable")
                    await page.command("Page.navigate", url=url)
                    await page.becomes("document.readyState", "complete")
                    return page

                yield open_page
        finally:
            os.killpg(process.pid, 9)
            process.wait()


async def _port(process: subprocess.Popen[bytes], written: Path) -> int:
    """Where the browser listens, as soon as it does."""
    async with asyncio.timeout(WITHIN):
        while not written.exists() or "\n" not in written.read_text():
            assert process.poll() is None, "the browser has ended"
            await asyncio.sleep(0.02)
    return int(written.read_text().splitlines()[0])
