"""Who gets what from the console, asked over real connections; behind the relay is a real Mosquitto."""

import asyncio
import re
from hashlib import sha256
from pathlib import Path

import pytest
from aiohttp import ClientSession, WSMsgType, WSServerHandshakeError
from prometheus_client import CollectorRegistry

import scheduler.console
from protocol.transport import BrokerAddress
from scheduler.config import Config, ConfigError, ConsoleConfig, MetricsConfig
from scheduler.console.server import COOKIE, Console, console_for
from scheduler.console.snapshot import decode
from scheduler.http import HttpServer
from scheduler.sources import load
from tests.scheduler.console.serving import PASSWORD, serving

STATIC = Path(scheduler.console.__file__).with_name("static")
#: An MQTT 5 CONNECT of the client "page", and the CONNACK that accepts it (3.1 and 3.2 there).
CONNECT = bytes([0x10, 17, 0, 4]) + b"MQTT" + bytes([5, 2, 0, 60, 0, 0, 4]) + b"page"
CONNACK, ACCEPTED = 0x20, 0


async def log_in(client: ClientSession, password: str = PASSWORD) -> int:
    async with client.post("/console/login", json={"password": password}) as answer:
        return answer.status


async def status(client: ClientSession, path: str, **headers: str) -> int:
    async with client.get(path, headers=headers) as answer:
        return answer.status


async def test_on_loopback_the_numbers_are_there_for_the_asking(bench):
    async with serving(Config(), bench) as client:
        async with client.get("/console/snapshot") as answer:
            assert decode(await answer.read()) == bench.activity.snapshot({"worker": True})
            assert answer.headers["Cache-Control"] == "no-store"
        async with client.get("/console/settings") as answer:
            assert await answer.json() == {"model": "smollm2", "broker": None, "operator": True, "login": False}
        assert await log_in(client) == 404


async def test_with_a_password_nothing_is_told_before_the_login(protected, bench):
    async with serving(protected, bench) as client:
        for path in ("snapshot", "events", "mqtt"):
            assert await status(client, f"/console/{path}") == 401
        assert await status(client, "/console/snapshot", Cookie=f"{COOKIE}=guess") == 401
        async with client.get("/console/settings") as answer:
            assert await answer.json() == {"model": "smollm2", "broker": None, "operator": False, "login": True}
        assert await log_in(client, "wrong") == 401
        assert await status(client, "/console/snapshot") == 401
        assert await log_in(client) == 204
        assert await status(client, "/console/snapshot") == 200
        async with client.post("/console/logout") as answer:
            assert answer.status == 204
        assert await status(client, "/console/snapshot") == 401


async def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(protected, bench):
    async with serving(protected, bench) as client:
        async with client.post("/console/login", json={"password": PASSWORD}) as answer:
            cookie = answer.cookies[COOKIE]
        assert (cookie["httponly"], cookie["samesite"], cookie["path"]) == (True, "Strict", "/console")
        assert len(cookie.value) >= 40
        async with client.post("/console/logout"):
            pass
        assert await status(client, "/console/snapshot", Cookie=f"{COOKIE}={cookie.value}") == 401


async def test_over_tls_the_cookie_never_goes_in_the_clear(protected, bench):
    config = Config(console=protected.console, metrics=MetricsConfig(cert_file="cert.pem", key_file="key.pem"))
    async with serving(config, bench) as client, client.post("/console/login", json={"password": PASSWORD}) as answer:
        assert answer.cookies[COOKIE]["secure"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[]", b'{"password": 1}', b'{"password": "x", "more": 1}', b'{"password": "\\ud800"}', b"\xff"],
)
async def test_a_login_that_is_none_is_told_so(protected, bench, body):
    async with serving(protected, bench) as client, client.post("/console/login", data=body) as answer:
        assert answer.status == 400
        assert "the body must be JSON" in await answer.text()


async def test_a_huge_login_is_refused(protected, bench):
    async with serving(protected, bench) as client, client.post("/console/login", data=b" " * 10_000) as answer:
        assert answer.status == 413


async def test_guessing_is_slowed_down(protected, bench):
    async with serving(protected, bench) as client:
        for _ in range(5):
            assert await log_in(client, "guess") == 401
        async with client.post("/console/login", json={"password": PASSWORD}) as answer:
            assert answer.status == 429
            assert 1 <= int(answer.headers["Retry-After"]) <= 6


async def test_other_sites_get_nothing(protected, bench):
    async with serving(Config(), bench) as client:
        for host in ("evil.example", "evil.example:9464", "127.0.0.1.evil.example", "[::2]", "a b"):
            assert await status(client, "/console/snapshot", Host=host) in {400, 403}
        for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
            assert await status(client, "/console/snapshot", Origin=origin) == 403
        own = f"http://{client._base_url.authority}"
        assert await status(client, "/console/snapshot", Origin=own) == 200
    async with serving(protected, bench) as client:
        async with client.post("/console/login", json={"password": PASSWORD}, headers={"Origin": "http://e.vil"}) as no:
            assert no.status == 403
        assert await status(client, "/console/settings", Host="console.example") == 200


@pytest.mark.parametrize("path", ["", "static/console.js", "settings", "snapshot", "nothing", "static/../server.py"])
async def test_every_answer_forbids_what_the_page_does_not_need(bench, path):
    config = Config(console=ConsoleConfig(broker_websocket_url="wss://broker.example:8084/mqtt"))
    async with serving(config, bench) as client, client.get(f"/console/{path}") as answer:
        policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == "'self'"
        assert policy["connect-src"] == "'self' wss://broker.example:8084/mqtt"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.status == (404 if path in {"nothing", "static/../server.py"} else 200)


async def test_addresses_without_the_slash_lead_to_the_page(bench):
    async with serving(Config(), bench) as client:
        for path in ("/", "/console"):
            async with client.get(path) as answer:
                assert (answer.status, answer.url.path, answer.content_type) == (200, "/console/", "text/html")


async def test_before_the_service_is_there_it_says_so():
    async with serving(Config(), None) as client:
        assert await status(client, "/console/snapshot") == 503
        assert await status(client, "/console/events") == 503
        assert await status(client, "/console/") == 200


async def test_events_follow_the_service_until_the_session_ends(protected, bench):
    async with serving(protected, bench) as client, asyncio.timeout(20):
        await log_in(client)
        async with client.get("/console/events") as stream:
            assert stream.content_type == "text/event-stream"
            first = decode((await stream.content.readuntil(b"\n\n")).removeprefix(b"data: "))
            assert (first.running, first.waiting) == (0, 1)
            bench.step()
            while first.running != 1:
                first = decode((await stream.content.readuntil(b"\n\n")).removeprefix(b"data: "))
            async with client.post("/console/logout"):
                pass
            await stream.content.read()  # ends only because the server ends it


async def test_streams_are_bounded_and_places_come_back(bench, monkeypatch):
    monkeypatch.setattr("scheduler.console.server._MOST_OPEN", 1)
    monkeypatch.setattr("scheduler.console.server._TICK_S", 0.01)
    async with serving(Config(), bench) as client, asyncio.timeout(20):
        async with client.get("/console/events") as stream:
            await stream.content.readuntil(b"\n\n")
            assert await status(client, "/console/events") == 503
        while await first_line(client) != b"data":
            await asyncio.sleep(0.01)


async def test_watchers_do_not_hold_up_the_end(bench, address):
    console = Console(Config(), dict)
    console.open(bench.activity, address)
    http = HttpServer("127.0.0.1", 0, registry=CollectorRegistry(), live=dict, ready=dict, console=console)
    async with asyncio.timeout(10), ClientSession() as client:
        async with http as server:
            stream = await client.get(f"{server.url}/console/events")
            page = await client.ws_connect(f"{server.url}/console/mqtt", protocols=["mqtt"])
            await stream.content.readuntil(b"\n\n")
        stream.close()
        await page.close()


async def first_line(client: ClientSession) -> bytes:
    """The first four bytes of a stream, or of the refusal."""
    async with client.get("/console/events") as stream:
        return await stream.content.readexactly(4)


async def test_the_embedded_broker_answers_through_the_console(bench, address):
    async with (
        asyncio.timeout(20),
        serving(Config(), bench, address) as client,
        client.ws_connect("/console/mqtt", protocols=["mqtt"]) as socket,
    ):
        assert socket.protocol == "mqtt"
        async with client.get("/console/settings") as answer:
            assert (await answer.json())["broker"] == "mqtt"
        await socket.send_bytes(CONNECT[:5])  # packets needn't keep to messages
        await socket.send_bytes(CONNECT[5:])
        connack = await socket.receive_bytes()
        assert (connack[0], connack[3]) == (CONNACK, ACCEPTED)
        await socket.send_str("text isn't MQTT")
        assert (await socket.receive()).type in {WSMsgType.CLOSE, WSMsgType.CLOSED}


async def test_the_relay_closes_with_the_broker(bench, address):
    async with (
        asyncio.timeout(20),
        serving(Config(), bench, address) as client,
        client.ws_connect("/console/mqtt", protocols=["mqtt"]) as socket,
    ):
        await socket.send_bytes(b"\x00\x00this is no MQTT")
        while (message := await socket.receive()).type is WSMsgType.BINARY:
            pass
        assert message.type in {WSMsgType.CLOSE, WSMsgType.CLOSED}


async def test_the_broker_is_for_the_operator_and_for_the_page_only(protected, bench, address):
    async with serving(protected, bench, address) as client:
        for attempt in ({}, {"origin": "http://evil.example"}):
            with pytest.raises(WSServerHandshakeError) as refused:
                await client.ws_connect("/console/mqtt", protocols=["mqtt"], **attempt)
            assert refused.value.status == (403 if attempt else 401)
        await log_in(client)
        with pytest.raises(WSServerHandshakeError) as refused:
            await client.ws_connect("/console/mqtt", protocols=["other"])
        assert refused.value.status == 400
        assert await status(client, "/console/mqtt") == 400
        async with client.ws_connect("/console/mqtt", protocols=["mqtt"]) as socket:
            assert socket.protocol == "mqtt"


async def test_who_logs_out_is_off_the_broker_too(protected, bench, address):
    async with asyncio.timeout(20), serving(protected, bench, address) as client:
        await log_in(client)
        async with client.ws_connect("/console/mqtt", protocols=["mqtt"]) as socket:
            await socket.send_bytes(CONNECT)
            assert (await socket.receive_bytes())[0] == CONNACK
            async with client.post("/console/logout"):
                pass
            assert (await socket.receive()).type in {WSMsgType.CLOSE, WSMsgType.CLOSED}


async def test_a_broker_that_is_away_is_told(bench):
    async with serving(Config(), bench, BrokerAddress("127.0.0.1", 1)) as client:
        with pytest.raises(WSServerHandshakeError) as refused:
            await client.ws_connect("/console/mqtt", protocols=["mqtt"])
        assert refused.value.status == 502


async def test_without_an_embedded_broker_there_is_no_relay(bench):
    async with serving(Config(), bench) as client:
        assert await status(client, "/console/mqtt") == 404


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "console.example", ""])
def test_away_from_loopback_there_is_no_console_without_a_password(host, protected):
    metrics = MetricsConfig(host=host)
    assert console_for(Config(metrics=metrics), dict) is None
    assert console_for(Config(metrics=metrics, console=protected.console), dict) is not None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_on_loopback_there_is_one(host):
    assert console_for(Config(metrics=MetricsConfig(host=host)), dict) is not None


def test_a_password_file_that_is_not_there_is_a_config_error(tmp_path):
    config = Config(console=ConsoleConfig(password_file=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match=r"password file .*none"):
        console_for(config, dict)


@pytest.mark.parametrize(
    "url",
    ["http://host", "wss://user:hunter2@host", "wss://host/; script-src *", "wss://", "wss://host/a b", "wss://h'"],
)
def test_an_address_for_browsers_that_is_none_is_a_config_error(url):
    with pytest.raises(ConfigError, match=r"console\.broker_websocket_url") as refused:
        load(flags={"console.broker_websocket_url": url})
    assert "hunter2" not in str(refused.value)


def test_the_vendored_client_is_the_one_that_was_looked_at():
    sums = re.findall(r"^(\w{64})  (\S+)$", (STATIC / "vendor" / "SHA256SUMS").read_text(), flags=re.MULTILINE)
    files = {path.name for path in (STATIC / "vendor").iterdir()} - {"SHA256SUMS"}
    assert {name for _, name in sums} == files
    for digest, name in sums:
        assert sha256((STATIC / "vendor" / name).read_bytes()).hexdigest() == digest


def test_the_page_needs_no_other_host_and_no_inline_script():
    page = (STATIC / "index.html").read_text()
    assert re.findall(r"<script[^>]*>", page) == ['<script type="module" src="static/console.js">']
    assert not re.search(r"\son\w+=|style=|https?://", page)
    for file in STATIC.glob("*.js"):
        assert "innerHTML" not in file.read_text(), file
