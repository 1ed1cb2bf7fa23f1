"""The system's Chromium, without a window, and pages that complain are told of."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from playwright.async_api import Browser, Page, async_playwright

#: Debian's name and others'.
_NAMES = ("chromium", "chromium-browser", "google-chrome")


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.fail("Chromium wasn't found; deploy/packages.sh installs it")
    async with async_playwright() as playwright:
        # Its sandbox doesn't run as root, and our own pages need none.
        browser = await playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        async with browser:
            yield browser


def complaints(page: Page) -> list[str]:
    """Errors and warnings of the page from now on, refused loads and violated policies among them."""
    heard: list[str] = []
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("console", lambda told: heard.append(told.text) if told.type in {"error", "warning"} else None)
    return heard
