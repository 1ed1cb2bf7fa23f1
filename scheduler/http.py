"""What is served over HTTP, apart from all requests: the metrics and the health of this process, and the console."""

import ssl
from pathlib import Path
from typing import Self

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from scheduler.config import ConfigError, MetricsConfig
from scheduler.console.server import PREFIX, Checks, Console

#: What may still be answered when the server stops; idle connections are closed at once.
_STOP_S = 1.0
#: The biggest body that anything here takes: a login.
_MOST_BODY_BYTES = 4096


class HttpServer:
    """Serves ``/metrics``, ``/healthz`` and ``/readyz``; use as ``async with HttpServer(...) as server``.

    ``live`` says whether this process should be left alone, ``ready`` whether it should get work: not until that is set.
    ``console`` is served too, if there is one.
    ``port`` 0 takes a free one; ``url`` tells which, once entered. Entering raises OSError when the address can't be had.
    """

    url: str

    def __init__(
        self,
        host: str,
        port: int,
        *,
        registry: CollectorRegistry,
        live: Checks,
        ready: Checks,
        tls: ssl.SSLContext | None = None,
        console: Console | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._registry = registry
        self._live = live
        self._ready = ready
        self._tls = tls
        self._console = console

    async def __aenter__(self) -> Self:
        application = web.Application(client_max_size=_MOST_BODY_BYTES)
        application.add_routes(
            [
                web.get("/metrics", self._metrics),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
            ]
        )
        if self._console is not None:
            application.add_routes([web.get(path, _to_console) for path in ("/", PREFIX)])
            application.add_subapp(PREFIX, self._console.application)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=_STOP_S)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port, ssl_context=self._tls).start()
        except OSError:
            await self._runner.cleanup()
            raise
        scheme = "http" if self._tls is None else "https"
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"{scheme}://{host}:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _metrics(self, request: web.Request) -> web.Response:
        try:
            encode, content_type = choose_encoder(",".join(request.headers.getall("Accept", [])))
        except TypeError:  # it compares versions as numbers, and the client's isn't one
            encode, content_type = choose_encoder("")
        return web.Response(body=encode(self._registry), headers={"Content-Type": content_type})

    async def _healthz(self, _request: web.Request) -> web.Response:
        return _health(self._live())

    async def _readyz(self, _request: web.Request) -> web.Response:
        return _health(self._ready())


async def _to_console(_request: web.Request) -> web.Response:
    raise web.HTTPFound(f"{PREFIX}/")


def _health(checks: dict[str, bool]) -> web.Response:
    ok = all(checks.values())
    return web.json_response({"ok": ok, "checks": checks}, status=200 if ok else 503)


def tls_context(config: MetricsConfig) -> ssl.SSLContext | None:
    """What the configured certificate and key make, None without them. Raises ConfigError when they can't be used."""
    if config.cert_file is None or config.key_file is None:
        return None
    for name, file in (("cert_file", config.cert_file), ("key_file", config.key_file)):
        try:
            Path(file).read_bytes()  # only to name the file: ssl doesn't
        except OSError as error:
            raise ConfigError(f"metrics.{name}: {error}") from None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.cert_file, config.key_file, password="")  # never ask on the terminal for one
    except ssl.SSLError as error:
        raise ConfigError(f"metrics.cert_file, metrics.key_file: not a certificate and its key: {error}") from None
    return context
