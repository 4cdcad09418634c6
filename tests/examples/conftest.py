"""A browser for the pages of the examples."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.examples.browser import Browser, find_browser, running_browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One browser for all tests, each of which opens its own windows; skips where there is none."""
    path = find_browser()
    if path is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with running_browser(path) as found:
        yield found
