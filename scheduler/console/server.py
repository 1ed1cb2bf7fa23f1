"""The console over HTTP: a page for anyone, numbers and the embedded broker for the operator.

The operator is whoever logged in; without a password, whoever is on this machine, and then the console is there on loopback
only. Tenants see of themselves what the broker lets them read, and nothing here tells them of others.
"""

import asyncio
import contextlib
import ipaddress
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from protocol.transport import BrokerAddress
from scheduler.config import Config, read_password
from scheduler.console import snapshot
from scheduler.console.activity import Activity
from scheduler.console.relay import relay
from scheduler.console.sessions import LIFETIME_S, Sessions, TooManyAttempts, WrongPassword

PREFIX = "/console"
COOKIE = "tokenbus_console"
_STATIC = Path(__file__).with_name("static")
#: Named conditions and whether each holds just now.
Checks = Callable[[], dict[str, bool]]
#: Between two snapshots on a stream.
_TICK_S = 0.5
#: Streams and broker connections that are open at once.
_MOST_OPEN = 64
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Settings(msgspec.Struct, frozen=True):
    """What the page is told first. ``broker``: where, from its own address, it finds MQTT over WebSockets; None: nowhere,
    for who asks.

    ``operator``: whether the numbers are for who asks; ``login``: whether there is a password to become that.
    """

    model: str
    broker: str | None
    operator: bool
    login: bool


class Login(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    password: str


class Console:
    """``application`` is what HttpServer serves under PREFIX. Until it is opened there are no numbers. Raises ConfigError for
    a password file that can't be used.
    """

    def __init__(self, config: Config, ready: Checks) -> None:
        file = config.console.password_file
        self._ready = ready
        self._model = config.model.alias
        self._broker_url = config.console.broker_websocket_url
        self._sessions = None if file is None else Sessions(read_password(Path(file)), time.monotonic)
        self._secure = config.metrics.cert_file is not None
        self._open: set[asyncio.Task[None]] = set()
        self._activity: Activity | None = None
        self._embedded: BrokerAddress | None = None
        self.application = web.Application(middlewares=[self._check_sender])
        self.application.on_response_prepare.append(self._add_headers)
        self.application.on_shutdown.append(self._end_streams)
        self.application.add_routes(
            [
                web.get("/", _page),
                web.static("/static", _STATIC),
                web.get("/settings", self._settings),
                web.get("/snapshot", self._snapshot),
                web.get("/events", self._events, allow_head=False),
                web.get("/mqtt", self._mqtt, allow_head=False),
                web.post("/login", self._log_in),
                web.post("/logout", self._log_out),
            ]
        )

    def open(self, activity: Activity, embedded: BrokerAddress | None) -> None:
        """The service is there: what it does, and its own broker if it runs one."""
        self._activity = activity
        self._embedded = embedded

    @web.middleware
    async def _check_sender(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """That the request is from a page of ours, or from no page at all.

        Without a password the Host is all that tells our page from one of a domain that was pointed at loopback (DNS rebinding).
        """
        if self._sessions is None and not _is_loopback(request.url.host or ""):
            raise web.HTTPForbidden(text="without console.password_file the console is for loopback addresses only")
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and origin.partition("://")[2] != request.host:
            raise web.HTTPForbidden(text="pages from elsewhere may not use the console")
        return await handler(request)

    async def _add_headers(self, _request: web.Request, response: web.StreamResponse) -> None:
        connect = f"'self' {self._broker_url or ''}".strip()
        response.headers.update(_HEADERS)
        response.headers.setdefault(hdrs.CACHE_CONTROL, "no-cache")
        response.headers["Content-Security-Policy"] = (
            f"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src {connect}; "
            "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
        )

    async def _settings(self, request: web.Request) -> web.Response:
        operator = self._is_operator(request)
        broker = self._broker_url
        if broker is None and operator and self._embedded is not None:
            broker = "mqtt"
        return _json(Settings(self._model, broker, operator, self._sessions is not None))

    async def _snapshot(self, request: web.Request) -> web.Response:
        self._require_operator(request)
        return _json(self._take())

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events (HTML Living Standard, 9.2), one snapshot each, until the session ends."""
        self._require_operator(request)
        self._take()
        response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: "text/event-stream", hdrs.CACHE_CONTROL: "no-store"})
        with self._place(), contextlib.suppress(ConnectionResetError):
            await response.prepare(request)
            while self._is_operator(request):
                await response.write(b"data: %b\n\n" % snapshot.encode(self._take()))
                await asyncio.sleep(_TICK_S)
        return response

    async def _mqtt(self, request: web.Request) -> web.StreamResponse:
        """The embedded broker, which asks for no password, so that this must."""
        self._require_operator(request)
        if self._embedded is None:
            raise web.HTTPNotFound(
                text="there is no embedded broker; the page connects to console.broker_websocket_url"
            )
        with self._place():
            return await relay(request, self._embedded, lambda: self._is_operator(request))

    async def _log_in(self, request: web.Request) -> web.Response:
        if self._sessions is None:
            raise web.HTTPNotFound(text="there is no password")
        try:
            login = msgspec.json.decode(await request.read(), type=Login)
            token = self._sessions.log_in(login.password)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise web.HTTPBadRequest(text=f"the body must be JSON: {error}") from None
        except WrongPassword as error:
            raise web.HTTPUnauthorized(text=str(error)) from None
        except TooManyAttempts as error:
            wait = {hdrs.RETRY_AFTER: str(round(error.retry_after_s) + 1)}
            raise web.HTTPTooManyRequests(text=str(error), headers=wait) from None
        response = web.Response(status=204)
        response.set_cookie(
            COOKIE, token, max_age=int(LIFETIME_S), path=PREFIX, httponly=True, samesite="Strict", secure=self._secure
        )
        return response

    async def _log_out(self, request: web.Request) -> web.Response:
        if self._sessions is not None:
            self._sessions.log_out(request.cookies.get(COOKIE, ""))
        response = web.Response(status=204)
        response.del_cookie(COOKIE, path=PREFIX, httponly=True, samesite="Strict", secure=self._secure)
        return response

    async def _end_streams(self, _application: web.Application) -> None:
        """They would go on for ever."""
        for task in self._open:
            task.cancel()

    def _is_operator(self, request: web.Request) -> bool:
        return self._sessions is None or request.cookies.get(COOKIE, "") in self._sessions

    def _require_operator(self, request: web.Request) -> None:
        if not self._is_operator(request):
            raise web.HTTPUnauthorized(text="log in first")

    def _take(self) -> snapshot.Snapshot:
        if self._activity is None:
            raise web.HTTPServiceUnavailable(text="the service is starting")
        return self._activity.snapshot(self._ready())

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        if len(self._open) >= _MOST_OPEN:
            raise web.HTTPServiceUnavailable(text="too many pages look at the console")
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            yield
        finally:
            self._open.discard(task)


def console_for(config: Config, ready: Checks) -> Console | None:
    """None where nobody could log in and others than this machine could ask. Raises ConfigError."""
    if config.console.password_file is None and not _is_loopback(config.metrics.host):
        return None
    return Console(config, ready)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _page(_request: web.Request) -> web.FileResponse:
    return web.FileResponse(_STATIC / "index.html")


def _json(body: msgspec.Struct) -> web.Response:
    headers = {hdrs.CACHE_CONTROL: "no-store"}
    return web.Response(body=msgspec.json.encode(body), content_type="application/json", headers=headers)
