"""Draws the pictures in docs/console.md: ``python -m tests.e2e.pictures``, which takes about a minute."""

import asyncio
import re
import tempfile
from pathlib import Path

from playwright.async_api import Browser, expect

from scheduler import service
from scheduler.config import BrokerConfig, Config, EngineConfig, MetricsConfig, TenantConfig
from tests.e2e.browser import chromium
from tests.e2e.load import busy

DOCS = Path(__file__).parents[2] / "docs"
PROMPT = "Why is the sky blue? Answer in one sentence."
#: Until the charts have something to show.
_WARM_UP_S = 25.0


async def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        config = Config(
            # So few blocks that there are preemptions to be seen.
            engine=EngineConfig(max_running=16, max_batch_tokens=64, num_blocks=64),
            broker=BrokerConfig(data_dir=scratch),
            metrics=MetricsConfig(port=0),
            tenants={"bob": TenantConfig(weight=2.0)},
        )
        async with (
            service.running(config) as running,
            chromium() as browser,
            busy(running.broker_url, "alice", "bob", "carol", requests=5, max_tokens=48),
        ):
            url = running.console_url
            assert url is not None
            await asyncio.gather(
                picture(browser, url, "console-light.png", scheme="light", width=1440, height=1000),
                picture(browser, url, "console-dark.png", scheme="dark", width=1440, height=1000),
                picture(browser, url, "console-narrow.png", scheme="light", width=390, height=1400),
            )


async def picture(browser: Browser, url: str, name: str, *, scheme: str, width: int, height: int) -> None:
    viewport = {"width": width, "height": height}
    async with await browser.new_context(color_scheme=scheme, viewport=viewport) as context:
        page = await context.new_page()
        await page.goto(url)
        await asyncio.sleep(_WARM_UP_S)
        await page.get_by_label("Prompt").fill(PROMPT)
        await page.get_by_label("Tokens at most").fill("48")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator("#answer-note")).to_contain_text("generated", timeout=300_000)
        await expect(page.locator("#own-requests .standing")).to_have_text(re.compile("stop|length"))
        await page.evaluate("scrollTo(0, 0)")
        await page.screenshot(path=DOCS / name)


if __name__ == "__main__":
    asyncio.run(main())
