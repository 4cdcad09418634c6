"""The pages of the examples in a real browser, with the real servers behind them."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import httpx
import pytest
from tests.examples.browser import Page, browser, find_browser
from tests.examples.programs import free_port, served

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")
TODOS = "[...document.querySelectorAll('#todos li')].map(item => item.textContent)"
MESSAGES = "[...document.querySelectorAll('#messages p')].map(line => line.textContent)"


async def submit(page: Page, text: str) -> None:
    """Types a text and sends the form."""
    await page.run(f"find('text').value = {text!r}; find('form').requestSubmit()")


async def test_pages_show_what_another_window_and_another_program_write(tmp_path: Path) -> None:
    """At once, as text and never as HTML, and again after the server was killed and is back, nothing lost or twice."""
    port = free_port()
    async with browser(BROWSER) as open_page:
        with served("fastapi_page", cwd=tmp_path, port=port) as server:
            one, other = await open_page(server.url), await open_page(server.url)
            await submit(one, "buy milk")
            for page in (one, other):
                await page.becomes(TODOS, ["buy milk"])
            async with httpx.AsyncClient(verify=False) as client:
                await client.post(f"{server.url}/todos", json={"text": "<b>drink</b> it"})
            for page in (one, other):
                await page.becomes(TODOS, ["buy milk", "<b>drink</b> it"])
            await asyncio.to_thread(server.stop, signal.SIGKILL)
            await one.becomes("find('problem').textContent !== ''", True)
            await submit(one, "wait for the server")
        with served("fastapi_page", cwd=tmp_path, port=port):
            for page in (one, other):
                await page.becomes(TODOS, ["buy milk", "<b>drink</b> it", "wait for the server"])
                await page.becomes("find('problem').textContent", "")
            assert one.errors == other.errors == []


async def test_a_conversation_between_two_windows_survives_its_server(tmp_path: Path) -> None:
    """What is said while the server is away is said once it is back."""
    pytest.importorskip("websockets", reason="uvicorn needs websockets for the chat: pip install websockets")
    port = free_port()
    async with browser(BROWSER) as open_page:
        with served("chat", cwd=tmp_path, port=port) as server:
            ann = await open_page(f"{server.url}/?name=ann")
            await submit(ann, "hello")
            await ann.becomes(MESSAGES, ["ann: hello"])
            await asyncio.to_thread(server.stop, signal.SIGKILL)
            await submit(ann, "are you there?")
        with served("chat", cwd=tmp_path, port=port) as server:
            bob = await open_page(f"{server.url}/?name=bob")
            for page in (ann, bob):
                await page.becomes(MESSAGES, ["ann: hello", "ann: are you there?"])
            assert ann.errors == bob.errors == []
