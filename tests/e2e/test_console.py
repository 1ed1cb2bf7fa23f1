"""The console as people use it: in a real browser and in a terminal, with a real model and real brokers behind it."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from protocol.client import Client
from protocol.request import Message, Request
from scheduler import service
from scheduler.config import BrokerConfig, Config, ConsoleConfig, EngineConfig, MetricsConfig
from scheduler.console.snapshot import Snapshot
from scheduler.mqtt.broker import EmbeddedBroker
from scheduler.service import Service
from tests.e2e.browser import chromium, complaints
from tests.e2e.load import busy
from tests.e2e.test_cli import TOKENBUS, run

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

ACL = Path(__file__).parents[2] / "deploy/mosquitto/acl"
PASSWORD = "operator's password"
QUESTION = "What is the capital of France?"
PATIENCE_MS = 60_000


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as running_browser:
        yield running_browser


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Browser) -> AsyncIterator[Page]:
    """A page of its own, which had nothing to complain of in the end."""
    async with await browser.new_context() as context:
        page = await context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        heard = complaints(page)
        yield page
        assert heard == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def web_broker(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[EmbeddedBroker, int]]:
    """A broker that knows its tenants, by the shipped ACL, and on what port it speaks WebSockets."""
    folder = tmp_path_factory.mktemp("broker")
    passwords = folder / "passwords"
    write_passwords(passwords, "_service", "alice", "bob")
    web_port = free_port()
    settings = ["allow_anonymous false", f"password_file {passwords}", f"acl_file {ACL}"]
    settings += [f"listener {web_port} 127.0.0.1", "protocol websockets"]
    async with EmbeddedBroker(data_dir=folder / "data", settings=settings) as broker:
        yield broker, web_port


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def protected(
    web_broker: tuple[EmbeddedBroker, int], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Service]:
    """A service behind a password, at that broker."""
    broker, web_port = web_broker
    folder = tmp_path_factory.mktemp("protected")
    (folder / "service").write_text("_service's")
    (folder / "operator").write_text(PASSWORD)
    config = Config(
        engine=EngineConfig(max_running=8, max_batch_tokens=64, kv_memory_mb=256),
        broker=BrokerConfig(
            url=broker.url,
            data_dir=str(folder / "data"),
            username="_service",
            password_file=str(folder / "service"),
        ),
        metrics=MetricsConfig(port=0),
        console=ConsoleConfig(
            password_file=str(folder / "operator"), broker_websocket_url=f"ws://127.0.0.1:{web_port}/"
        ),
    )
    async with service.running(config) as running:
        yield running


def write_passwords(file: Path, *users: str) -> None:
    """Everybody's password is their name and "'s"."""
    file.touch()
    for user in users:
        subprocess.run(["mosquitto_passwd", "-b", file, user, f"{user}'s"], check=True, capture_output=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def ask(page: Page, tenant: str, password: str, prompt: str, max_tokens: int = 16) -> None:
    await page.get_by_label("Tenant", exact=True).fill(tenant)
    await page.get_by_label("Broker password").fill(password)
    await page.get_by_label("Prompt").fill(prompt)
    await page.get_by_label("Tokens at most").fill(str(max_tokens))
    await page.get_by_role("button", name="Send").click()


async def test_charts_move_under_load(running: Service, page: Page):
    await page.goto(running.console_url)
    await expect(page.locator("#status")).to_have_text("ready")
    await expect(page.locator("[data-figure=running]")).to_contain_text("0 of 8")
    async with busy(running.broker_url, "carol", "dave", requests=5):
        await expect(page.locator("[data-figure=running]")).to_contain_text("8 of 8", timeout=PATIENCE_MS)
        await expect(page.locator("[data-figure=waiting]")).to_contain_text("2 requests", timeout=PATIENCE_MS)
        for chart in ("Batch", "Tokens/s", "KV cache"):
            line = page.get_by_role("img", name=f"{chart}: ").locator("path").first
            before = await line.get_attribute("d")
            await expect(line).not_to_have_attribute("d", before)
            heights = {place.split(",")[1] for place in (await line.get_attribute("d"))[1:].split("L")}
            assert len(heights) > 1, chart  # it went up, not only along
        for tenant in ("carol", "dave"):
            await expect(page.locator("#tenants").get_by_role("cell", name=tenant, exact=True)).to_be_visible()
        for stage in ("waiting", "prefill", "decode"):
            await expect(page.locator(f"#requests .track .{stage}").first).to_be_attached(timeout=PATIENCE_MS)
    await expect(page.locator("[data-figure=running]")).to_contain_text("0 of 8", timeout=PATIENCE_MS)
    await expect(page.locator("#requests").get_by_role("cell", name="cancelled").first).to_be_visible()


async def test_a_prompt_streams_its_answer(running: Service, page: Page):
    await page.goto(running.console_url)
    await page.evaluate(
        """() => {
            const answer = document.getElementById("answer");
            window.lengths = new Set();
            new MutationObserver(() => window.lengths.add(answer.textContent.length))
                .observe(answer, { childList: true, characterData: true, subtree: true });
        }"""
    )
    await page.get_by_label("Temperature").fill("0")
    await ask(page, "erin", "", QUESTION)
    await expect(page.locator("#answer-note")).to_contain_text("generated;", timeout=PATIENCE_MS)
    request = Request(messages=[Message("user", QUESTION)], max_tokens=16, temperature=0.0)
    async with Client(running.broker_url, tenant="erin") as client:
        result = await client.complete(request, model="smollm2")
    assert await page.locator("#answer").text_content() == result.text
    lengths = sorted(await page.evaluate("[...window.lengths]"))
    assert len([length for length in lengths if 0 < length < len(result.text)]) >= 1, lengths
    await expect(page.locator("#own-requests").get_by_role("cell", name="stop")).to_be_visible()


async def test_a_request_can_be_cancelled_and_errors_are_told(running: Service, page: Page):
    await page.goto(running.console_url)
    await ask(page, "erin", "", QUESTION)
    await expect(page.locator("#answer-note")).to_contain_text("generated;", timeout=PATIENCE_MS)
    await page.get_by_label("Tokens at most").fill("100000")
    await page.get_by_role("button", name="Send").click()
    await expect(page.locator("#ask-form .error")).to_contain_text("100000", timeout=PATIENCE_MS)
    await page.get_by_label("Tokens at most").fill("2000")
    await page.get_by_role("button", name="Send").click()
    await expect(page.locator("#answer")).not_to_be_empty(timeout=PATIENCE_MS)
    await page.get_by_role("button", name="Cancel").click()
    await expect(page.locator("#answer-note")).to_have_text("cancelled", timeout=PATIENCE_MS)


async def test_a_tenant_sees_nothing_of_another(protected: Service, browser: Browser, page: Page):
    """Neither on the page nor in anything that reached the browser, though its page was asked to listen to everything."""
    frames: list[bytes] = []
    page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: frames.append(as_bytes(frame))))
    await page.goto(protected.console_url)
    await expect(page.locator("#status")).to_have_text("tenant view")
    assert not await page.locator("#operator").is_visible()
    await ask(page, "alice", "alice's", "Say the word marzipan.")
    await expect(page.locator("#answer-note")).to_contain_text("generated", timeout=PATIENCE_MS)
    await page.evaluate(
        """async () => {
            const { default: mqtt } = await import("/console/static/vendor/mqtt-5.16.0.js");
            const { broker } = await (await fetch("settings")).json();
            const client = await mqtt.connectAsync(
                broker, { protocolVersion: 5, username: "alice", password: "alice's", timerVariant: "native" });
            const topics = ["#", "tokenbus/v1/+/out/#", "tokenbus/v1/bob/#", "$share/x/tokenbus/v1/bob/out/#"];
            await client.subscribeAsync(topics, { qos: 1 });
            window.spy = client;
        }"""
    )
    async with await browser.new_context() as other_context:
        other = await other_context.new_page()
        other_heard = complaints(other)
        other_frames: list[bytes] = []
        other.on("websocket", lambda ws: ws.on("framereceived", lambda frame: other_frames.append(as_bytes(frame))))
        await other.goto(protected.console_url)
        await ask(other, "bob", "bob's", "Say the word saxophone.")
        await expect(other.locator("#answer-note")).to_contain_text("generated", timeout=PATIENCE_MS)
        assert b"tokenbus/v1/bob/out/" in b"".join(other_frames)
        assert other_heard == []
    # What comes of hers after his is the proof that his would have come by now.
    await page.get_by_role("button", name="Send").click()
    await expect(page.locator("#own-requests tbody tr")).to_have_count(2)
    await expect(page.locator("#answer-note")).to_contain_text("generated", timeout=PATIENCE_MS)
    received = b"".join(frames)
    assert b"tokenbus/v1/alice/out/" in received
    assert b"bob" not in received
    assert "bob" not in await page.locator("body").inner_text()


def as_bytes(frame: str | bytes) -> bytes:
    return frame.encode() if isinstance(frame, str) else frame


async def test_the_broker_decides_who_is_a_tenant(protected: Service, page: Page):
    await page.goto(protected.console_url)
    await ask(page, "bob", "alice's", QUESTION)
    await expect(page.locator("#ask-form .error")).to_contain_text("Not authorized", timeout=PATIENCE_MS)


async def test_an_answer_goes_on_after_the_broker_was_away(
    protected: Service, web_broker: tuple[EmbeddedBroker, int], browser: Browser
):
    async with await browser.new_context() as context:
        page = await context.new_page()
        await page.goto(protected.console_url)
        await page.get_by_label("Temperature").fill("0")
        await ask(page, "alice", "alice's", "Count to a hundred in words.", max_tokens=128)
        await expect(page.locator("#answer")).not_to_be_empty(timeout=PATIENCE_MS)
        await web_broker[0].restart()
        before = await page.locator("#answer").text_content()
        await expect(page.locator("#answer-note")).to_be_empty()
        await expect(page.locator("#answer-note")).to_contain_text("generated;", timeout=PATIENCE_MS)
        after = await page.locator("#answer").text_content()
        assert len(before) < len(after)
        assert after.startswith(before)


async def test_the_operator_sees_all_tenants_and_no_texts(protected: Service, browser: Browser):
    async with await browser.new_context() as context:
        page = await context.new_page()
        heard = complaints(page)
        bodies: list[str] = []
        await page.goto(protected.console_url)
        await ask(page, "alice", "alice's", "Say the word marzipan.")
        await expect(page.locator("#answer-note")).to_contain_text("generated", timeout=PATIENCE_MS)
        await page.get_by_label("Password", exact=True).fill("guess")
        await page.get_by_role("button", name="Log in").click()
        await expect(page.locator("#login-form .error")).to_have_text("that isn't the password")
        assert len(heard) == 1, heard  # the browser's own line about the 401
        await page.get_by_label("Password", exact=True).fill(PASSWORD)
        await page.get_by_role("button", name="Log in").click()
        await expect(page.locator("#status")).to_have_text("ready")
        await expect(page.locator("#tenants").get_by_role("cell", name="alice", exact=True)).to_be_visible()
        bodies.append(await page.evaluate("async () => await (await fetch('snapshot')).text()"))
        assert "alice" in bodies[0]
        assert "marzipan" not in bodies[0]
        assert PASSWORD not in page.url
        assert await page.evaluate("document.cookie") == ""
        await page.get_by_role("button", name="Log out").click()
        await expect(page.locator("#status")).to_have_text("tenant view")
        assert not await page.locator("#operator").is_visible()
        assert await page.evaluate("async () => (await fetch('snapshot')).status") == 401


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
async def test_the_page_is_readable(running: Service, browser: Browser, scheme: str, width: int):
    """Everything that can be typed into has a name, nothing sticks out, and text stands out from its ground (WCAG 2.2, 1.4.3)."""
    async with await browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800}) as context:
        page = await context.new_page()
        await page.goto(running.console_url)
        await expect(page.locator("#status")).to_have_text("ready")
        unnamed = await page.eval_on_selector_all(
            "input, textarea, button, svg", "all => all.filter(e => !e.labels?.length && !e.ariaLabel && !e.innerText)"
        )
        assert unnamed == []
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        weak = await page.evaluate((Path(__file__).parent / "contrast.js").read_text())
        assert weak == []


async def test_top_shows_the_same_in_a_terminal(running: Service):
    url = running.console_url.removesuffix("/console/")
    async with busy(running.broker_url, "carol", requests=2):
        while not running.engine.batcher.running:
            await asyncio.sleep(0.05)
        code, out, err = await run("top", "--url", url, "--json")
        assert (code, err) == (0, "")
        snapshot = json.loads(out)
        assert set(snapshot) == set(Snapshot.__struct_fields__)
        assert next(row for row in snapshot["tenants"] if row["tenant"] == "carol")["running"] >= 1
        code, out, err = await run("top", "--url", f"{url}/", "--once", COLUMNS="120")
        assert (code, err) == (0, "")
        assert "carol" in out
        assert "of 8 running" in out


async def test_top_goes_on_until_it_is_interrupted(running: Service):
    url = running.console_url.removesuffix("/console/")
    ours, its = os.openpty()
    top = await asyncio.create_subprocess_exec(
        *(*TOKENBUS, "top", "--url", url, "--interval", "0.1"),
        stdin=its,
        stdout=its,
        stderr=its,
        # It is ignored in what a shell without job control has in its background, as these tests may be.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(its)
    shown, interrupted = b"", False
    # What it writes must be read until its end, when nobody has the other side open.
    with contextlib.suppress(OSError):
        while True:
            shown += await asyncio.to_thread(os.read, ours, 65536)
            if not interrupted and shown.count(b"of 8 running") >= 3:
                top.send_signal(signal.SIGINT)
                interrupted = True
    assert await top.wait() == 0
    assert interrupted
    os.close(ours)
