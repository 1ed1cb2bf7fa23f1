"""The HTTP server, asked over real connections."""

import asyncio
import http.client
import json
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from scheduler.config import ConfigError, MetricsConfig
from scheduler.http import Checks, HttpServer, tls_context
from scheduler.sources import load


class Answer:
    def __init__(self, status: int, headers: http.client.HTTPMessage, body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body


async def ask(url: str, method: str = "GET", accept: str | None = None, tls: ssl.SSLContext | None = None) -> Answer:
    def send() -> Answer:
        request = urllib.request.Request(url, method=method, headers={} if accept is None else {"Accept": accept})
        try:
            with urllib.request.urlopen(request, timeout=10, context=tls) as answer:
                return Answer(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.headers, error.read())

    return await asyncio.to_thread(send)


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("tokenbus_things", "Things", ["kind"], registry=registry).labels("blue").inc(3)
    return registry


def http_server(
    registry: CollectorRegistry,
    *,
    live: Checks = lambda: {"loop": True},
    ready: Checks = lambda: {"worker": True, "broker": True},
    tls: ssl.SSLContext | None = None,
) -> HttpServer:
    return HttpServer("127.0.0.1", 0, registry=registry, live=live, ready=ready, tls=tls)


@pytest.fixture
async def server(registry: CollectorRegistry) -> AsyncIterator[HttpServer]:
    async with http_server(registry) as running:
        yield running


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> MetricsConfig:
    folder = tmp_path_factory.mktemp("certificate")
    config = MetricsConfig(cert_file=str(folder / "cert.pem"), key_file=str(folder / "key.pem"))
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", config.key_file, "-out", config.cert_file]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *files]
    subprocess.run(command, check=True, capture_output=True)
    return config


@pytest.mark.parametrize(
    "accept", [None, "*/*", "text/plain;version=0.0.4", "nonsense", "text/plain;version=x", ";;,="]
)
async def test_metrics_are_text_for_anyone(server: HttpServer, accept: str | None) -> None:
    answer = await ask(f"{server.url}/metrics", accept=accept)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = [sample for family in parse_text(answer.body.decode()) for sample in family.samples]
    assert ("tokenbus_things_total", {"kind": "blue"}, 3.0) in [sample[:3] for sample in samples]


async def test_metrics_are_openmetrics_for_those_who_ask(server: HttpServer) -> None:
    asked = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    answer = await ask(f"{server.url}/metrics", accept=asked)
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    (family,) = parse_openmetrics(answer.body.decode())
    assert (family.name, family.samples[0].value) == ("tokenbus_things", 3.0)


async def test_health_names_every_check_as_it_is_now(registry: CollectorRegistry) -> None:
    live, ready = {"loop": True}, {"worker": True, "broker": False}
    async with http_server(registry, live=lambda: live, ready=lambda: ready) as server:
        healthz, readyz = await ask(f"{server.url}/healthz"), await ask(f"{server.url}/readyz")
        assert (healthz.status, json.loads(healthz.body)) == (200, {"ok": True, "checks": {"loop": True}})
        assert readyz.status == 503
        assert json.loads(readyz.body) == {"ok": False, "checks": {"worker": True, "broker": False}}
        live["loop"], ready["broker"] = False, True
        assert (await ask(f"{server.url}/healthz")).status == 503
        assert (await ask(f"{server.url}/readyz")).status == 200


async def test_only_get_and_head_of_known_paths(server: HttpServer) -> None:
    head = await ask(f"{server.url}/metrics", "HEAD")
    assert (head.status, head.body) == (200, b"")
    assert int(head.headers["Content-Length"]) == len((await ask(f"{server.url}/metrics")).body)
    assert (await ask(f"{server.url}/readyz", "HEAD")).status == 200
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        refused = await ask(f"{server.url}/metrics", method)
        assert (refused.status, refused.headers["Allow"]) == (405, "GET,HEAD")
    for path in ("/", "/metrics/", "/nothing", "/../etc/passwd"):
        assert (await ask(server.url + path)).status == 404


async def test_open_connections_do_not_hold_up_the_end(registry: CollectorRegistry) -> None:
    """One kept alive, one that never asked, one in the middle of asking."""
    async with asyncio.timeout(5):
        async with http_server(registry) as server:
            port = int(server.url.rpartition(":")[2])
            connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            reader, writer = connections[0]
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            connections[2][1].write(b"GET /healthz HTTP/1.1\r\n")
        for reader, writer in connections:
            await reader.read()
            writer.close()
            await writer.wait_closed()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


async def test_taken_address_is_told(server: HttpServer, registry: CollectorRegistry) -> None:
    port = int(server.url.rpartition(":")[2])
    other = HttpServer("127.0.0.1", port, registry=registry, live=dict, ready=dict)
    with pytest.raises(OSError, match=f"{port}.*address already in use"):
        await other.__aenter__()


async def test_tls(registry: CollectorRegistry, certificate: MetricsConfig) -> None:
    trusting = ssl.create_default_context(cafile=certificate.cert_file)
    async with http_server(registry, tls=tls_context(certificate)) as server:
        assert server.url.startswith("https://127.0.0.1:")
        answer = await ask(f"{server.url}/metrics", tls=trusting)
        assert answer.status == 200
        assert b"tokenbus_things_total" in answer.body
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            await ask(f"{server.url}/metrics")


def test_no_certificate_no_tls() -> None:
    assert tls_context(MetricsConfig()) is None


@pytest.mark.parametrize("setting", ["metrics.cert_file", "metrics.key_file"])
def test_certificate_without_key_is_a_config_error(setting: str) -> None:
    with pytest.raises(ConfigError, match="must be given together"):
        load(flags={setting: "file.pem"})


def test_certificate_that_cannot_be_used_is_told(certificate: MetricsConfig, tmp_path: Path) -> None:
    cert, key = certificate.cert_file, certificate.key_file
    with pytest.raises(ConfigError, match=r"metrics\.cert_file: .*No such file.*none\.pem"):
        tls_context(MetricsConfig(cert_file=str(tmp_path / "none.pem"), key_file=key))
    with pytest.raises(ConfigError, match=r"metrics\.key_file: .*Is a directory"):
        tls_context(MetricsConfig(cert_file=cert, key_file=str(tmp_path)))
    with pytest.raises(ConfigError, match="not a certificate and its key"):
        tls_context(MetricsConfig(cert_file=cert, key_file=cert))


def test_key_under_a_password_is_refused_without_asking(certificate: MetricsConfig, tmp_path: Path) -> None:
    locked = tmp_path / "locked.pem"
    command = ["openssl", "rsa", "-aes256", "-passout", "pass:secret", "-in", certificate.key_file, "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(ConfigError, match="not a certificate and its key"):
        tls_context(MetricsConfig(cert_file=certificate.cert_file, key_file=str(locked)))
