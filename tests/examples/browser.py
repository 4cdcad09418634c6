"""A headless Chromium, controlled by its own protocol over a WebSocket: it can open a page and run JavaScript in it."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import aiohttp
from tests.examples.programs import WITHIN

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")


def find_browser() -> str | None:
    """Returns the path of the browser, or None if this system has none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """An open page, and the errors of its scripts."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.errors: list[str] = []

    async def command(self, method: str, **parameters: Any) -> Any:
        """Sends a command to the browser; returns its answer."""
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
        """Returns the value of a JavaScript expression in the page; waits for promises."""
        answer = await self.command("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def submit(self, text: str) -> None:
        """Types a text into the page's form and submits it."""
        script = f"document.querySelector('form input').value = {json.dumps(text)}"
        await self.run(f"{script}; document.querySelector('form').requestSubmit()")

    async def becomes(self, script: str, expected: Any) -> None:
        """Waits until an expression has a value."""
        found = None
        try:
            async with asyncio.timeout(WITHIN):
                while (found := await self.run(script)) != expected:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"{script} is still {found!r}, not {expected!r}") from None


class Browser:
    """A running browser, which listens on a port."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/json/new?about:blank"

    @asynccontextmanager
    async def page(self, url: str) -> AsyncIterator[Page]:
        """Opens a window with a page in it."""
        async with aiohttp.ClientSession() as session:
            async with session.put(self._url) as answer:
                target = json.loads(await answer.text())
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                await page.command("Runtime.enable")
                await page.command("Page.navigate", url=url)
                await page.becomes("document.readyState", "complete")
                yield page
                await page.command("Page.close")


@contextmanager
def running_browser(path: str) -> Iterator[Browser]:
    """Starts a browser with its own profile, and kills it at the end."""
    with tempfile.TemporaryDirectory(prefix="eventfold-browser-", ignore_cleanup_errors=True) as profile:
        # A proxy from the environment must not be used for servers on this machine.
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server"]
        process = subprocess.Popen(
            [path, *options, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield Browser(_port(process, Path(profile, "DevToolsActivePort")))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _port(process: subprocess.Popen[bytes], written: Path) -> int:
    """Returns the port on which the browser listens, as soon as it does."""
    until = monotonic() + WITHIN
    while not written.exists() or "\n" not in written.read_text():
        assert process.poll() is None, "the browser has ended"
        assert monotonic() < until, "the browser does not listen"
        sleep(0.02)
    return int(written.read_text().splitlines()[0])
