"""The page of the FastAPI example in a real browser, with a real server."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import httpx
from tests.examples.browser import Browser
from tests.examples.programs import WITHIN, served
from tests.support import free_port

# The texts, with a mark before those that are done.
TODOS = """[...document.querySelectorAll("#todos li")].map(
  item => (item.querySelector("input").checked ? "x " : "") + item.textContent)"""


async def test_a_page_shows_changes_of_others_and_continues_after_its_server_was_killed(
    browser: Browser, tmp_path: Path
) -> None:
    """Both windows show the texts as text, never as HTML; no text is missing or shown twice."""
    port = free_port()
    async with browser.page("about:blank") as other:
        with served("fastapi_page", cwd=tmp_path, port=port) as server:
            await other.command("Page.navigate", url=server.url)
            async with browser.page(server.url) as one:
                await one.submit("buy milk")
                for page in (one, other):
                    await page.becomes(TODOS, ["buy milk"])
                async with httpx.AsyncClient(verify=False) as client:
                    await client.post(f"{server.url}/todos", json={"text": "<b>drink</b> it"})
                await other.becomes(TODOS, ["buy milk", "<b>drink</b> it"])
                await other.run("document.querySelector('#todos input').click()")
                for page in (one, other):
                    await page.becomes(TODOS, ["x buy milk", "<b>drink</b> it"])
            await asyncio.to_thread(server.stop, signal.SIGKILL)
            await other.becomes("find('problem').textContent !== ''", True)
            await other.submit("wait for the server")
        with served("fastapi_page", cwd=tmp_path, port=port):
            await other.becomes(TODOS, ["x buy milk", "<b>drink</b> it", "wait for the server"])
            await other.becomes("find('problem').textContent", "")
        assert other.errors == []


async def test_a_page_that_is_opened_during_writes_misses_nothing(browser: Browser, tmp_path: Path) -> None:
    """No event is lost between the list and the stream that follows it, and none is shown twice."""
    texts = [str(number) for number in range(200)]
    with served("fastapi_page", cwd=tmp_path) as server:

        async def write() -> None:
            async with httpx.AsyncClient(verify=False, timeout=WITHIN) as client:
                for text in texts:
                    (await client.post(f"{server.url}/todos", json={"text": text})).raise_for_status()

        writing = asyncio.create_task(write())
        async with browser.page(server.url) as page:
            await writing
            await page.becomes(TODOS, texts)
